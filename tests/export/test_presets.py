# SPDX-License-Identifier: Apache-2.0
"""Test the presets under ``opentelemetry-instrument`` with ``OTEL_CONFIG_FILE``, and typos."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
import yaml
from support.fresh import INSTRUMENTED, fresh, program
from support.receiver import receiver
from support.run_conversation import SECRET

from traced_retry import semconv, shipped_files
from traced_retry.core.policy import ENV
from traced_retry.errors import ConfigurationFileError
from traced_retry.export.config_file import load
from traced_retry.livekit.instrumentor import RetryOptions

TESTS = Path(__file__).parents[1]
KEY = "sk-hunter2"
INSTRUMENT = str(Path(sys.executable).with_name("opentelemetry-instrument"))


def instrumented(file, script, *, fork=True, **environ):
    """Run a conversation, which does not mention traced-retry, under opentelemetry-instrument.

    Args:
        file: OTEL_CONFIG_FILE.
        script: of the simulator.
        fork: False for the real command and the real end of an interpreter.
        environ: variables.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        # requests lets the bundle variables win over OTEL_EXPORTER_OTLP_CERTIFICATE.
        if not name.startswith(("OTEL_", "LIVEKIT_", "TRACED_RETRY_", "REQUESTS_CA", "CURL_CA"))
    }
    command = [str(TESTS / "support" / "run_conversation.py"), script]
    kept = {**kept, "PYTHONPATH": str(TESTS), "OTEL_CONFIG_FILE": str(file), **environ}
    if fork:
        return program(INSTRUMENTED, *command, environ=kept, timeout=120)
    return subprocess.run(
        [INSTRUMENT, sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=kept,
    )


def unexpected(done):
    """Return the lines of stderr without our own records of a failed reply."""
    return [line for line in done.stderr.splitlines() if not line.startswith("openai reply failed")]


@pytest.fixture
def edited(tmp_path):
    """Return the path of an edited copy of a preset: ``edited("jaeger", "old", "new")``."""

    def edit(preset, *changes):
        text = shipped_files.presets()[preset].read_text()
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / f"{preset}.yaml"
        path.write_text(text)
        return path

    return edit


@pytest.fixture(scope="module")
def authority():
    """Return a certificate authority that no system trusts."""
    return trustme.CA()


RETRY_ONCE = (
    "${LIVEKIT_REALTIME_MAX_RETRIES:-3}",
    "1",
    "${LIVEKIT_REALTIME_RETRY_BASE_DELAY}",
    "0",
)


class TestUnderOpentelemetryInstrument:
    """Each preset delivers spans, and its one retry replaces the default of three."""

    @pytest.mark.parametrize("preset", ["jaeger", "collector"])
    def test_otlp(self, preset, edited):
        """Spans arrive by OTLP/HTTP with the resource. Metrics arrive too, except with Jaeger."""
        with receiver() as server:
            done = instrumented(
                edited(preset, *RETRY_ONCE),
                "rate_limit",
                OTEL_EXPORTER_OTLP_ENDPOINT=server.url,
                OTEL_SERVICE_NAME="support",
                OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
            )
            told = [told for told, span in server.spans if span.name == semconv.SPAN_REPLY]
            attempts = [s for _, s in server.spans if s.name == semconv.SPAN_ATTEMPT]
            measures = server.bodies("/v1/metrics")

        assert (0, {"requests": 2, "completed": 0}) == (done.returncode, json.loads(done.stdout))
        assert [] == unexpected(done)
        assert 2 == len(attempts)
        assert ["support"] == [resource["service.name"] for resource in told]
        assert ["test"] == [resource["deployment.environment.name"] for resource in told]
        assert (preset == "collector") == (semconv.METRIC_REPLIES.encode() in measures)

    def test_vendor(self, edited, authority, tmp_path):
        """Requests use TLS with the vendor's certificate, and carry the headers."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        with receiver(tls) as server:
            done = instrumented(
                edited("vendor", *RETRY_ONCE),
                "rate_limit",
                OTEL_EXPORTER_OTLP_ENDPOINT=server.url,
                OTEL_EXPORTER_OTLP_HEADERS="api-key=sk-vendor,x-team=voice",
                OTEL_EXPORTER_OTLP_CERTIFICATE=str(tmp_path / "ca.pem"),
            )
            headers = [(h["api-key"], h["x-team"]) for _, h, _ in server.posted]
            attempts = [s for _, s in server.spans if s.name == semconv.SPAN_ATTEMPT]
            measures = server.bodies("/v1/metrics")

        assert (0, []) == (done.returncode, unexpected(done))
        assert 2 == len(attempts)
        assert semconv.METRIC_REPLIES.encode() in measures
        assert {("sk-vendor", "voice")} == set(headers)

    def test_vendor_whose_certificate_is_not_trusted(self, edited, authority):
        """No span is sent, and the reply succeeds."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        with receiver(tls) as server:
            done = instrumented(
                edited("vendor"),
                "ok",
                OTEL_EXPORTER_OTLP_ENDPOINT=server.url,
                OTEL_EXPORTER_OTLP_HEADERS="api-key=sk-vendor",
            )

            assert [] == server.posted
        assert {"requests": 1, "completed": 1} == json.loads(done.stdout)
        assert "sk-vendor" not in done.stderr

    def test_console(self, edited):
        """Spans and metrics are printed on standard output."""
        done = instrumented(edited("console", *RETRY_ONCE), "rate_limit")

        assert (0, []) == (done.returncode, unexpected(done))
        assert 2 == done.stdout.count(f'"name": "{semconv.SPAN_ATTEMPT}"')
        assert f'"name": "{semconv.METRIC_REPLIES}"' in done.stdout
        assert SECRET not in done.stdout

    def test_local(self, edited, tmp_path):
        """The store can be read by ``traced-retry report``."""
        done = instrumented(
            edited("local", *RETRY_ONCE),
            "rate_limit",
            fork=False,
            XDG_STATE_HOME=str(tmp_path / "state"),
        )
        (store,) = (tmp_path / "state").rglob("*.jsonl")

        assert (0, {"requests": 2, "completed": 0}) == (done.returncode, json.loads(done.stdout))
        assert 2 == store.read_text().count(f'"name":"{semconv.SPAN_ATTEMPT}"')
        assert SECRET not in store.read_text()

    def test_each_preset_is_tested_here(self):
        """Each shipped preset has a test in this class."""
        assert ["collector", "console", "jaeger", "local", "vendor"] == sorted(
            shipped_files.presets()
        )

    def test_a_typo(self, edited):
        """One line names file, key and allowed values, and replies are retried."""
        file = edited("local", "max_retries", "max_retrys")
        done = instrumented(file, "rate_limit:0.01,ok", LIVEKIT_REALTIME_RETRY_BASE_DELAY="0")

        assert {"requests": 2, "completed": 1} == json.loads(done.stdout)
        (line,) = [line for line in done.stderr.splitlines() if "nowhere" in line]
        assert line.startswith(
            f"spans go nowhere: {file}: instrumentation/development.python.traced_retry: "
            "'max_retrys' is not known; allowed: max_retries, base_delay"
        )

    def test_disabled(self, edited, tmp_path):
        """OTEL_PYTHON_DISABLED_INSTRUMENTATIONS leaves LiveKit unchanged and sets no SDK up."""
        done = instrumented(
            edited("local"),
            "rate_limit",
            OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="requests, traced_retry",
            XDG_STATE_HOME=str(tmp_path / "state"),
        )

        assert {"requests": 1, "completed": 0} == json.loads(done.stdout)
        assert [] == list((tmp_path / "state").rglob("*.jsonl"))


def dropped(done):
    """Return the reasons and numbers of dropped spans in the last record."""
    assert "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if " span(s): " in line]
    count, why = re.fullmatch(r"exporter otlp_http dropped (\d+) span\(s\): (.*)", told).groups()
    assert int(count) == sum(int(number) for number in re.findall(r"\d+", why))
    return why


class TestABackendThatMisbehaves:
    """Our processor exports a file's batches: test_backends.py has each case."""

    @pytest.mark.parametrize("preset", ["jaeger", "collector"])
    def test_drops_are_counted(self, preset, edited):
        """Drops at a closed port are counted and logged once."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
            done = instrumented(
                edited(preset),
                "ok",
                fork=preset != "jaeger",
                OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
            )

        assert {"requests": 1, "completed": 1} == json.loads(done.stdout)
        assert re.fullmatch(r"(connection (\d+))?(, )?(shutdown \d+)?", dropped(done))

    @pytest.mark.parametrize("preset", ["jaeger", "collector"])
    def test_the_exit_is_bounded(self, preset, edited):
        """The exit is short, although the file allows ten minutes per export."""
        file = edited(preset)
        file.write_text(file.read_text().replace("timeout: 2000", "timeout: 600000"))
        with socket.create_server(("127.0.0.1", 0)) as mute:
            endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
            done = instrumented(
                file, "ok", fork=preset != "jaeger", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint
            )

        assert {"requests": 1, "completed": 1} == json.loads(done.stdout)
        assert re.fullmatch(r"shutdown \d+", dropped(done))

    def test_certificates_of_file_are_used(self, edited, authority, tmp_path):
        """The file's ``tls`` is used for spans. The SDK alone reads it from variables."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        file = edited("vendor", "${OTEL_EXPORTER_OTLP_CERTIFICATE}", str(tmp_path / "ca.pem"))
        with receiver(tls) as server:
            instrumented(
                file,
                "ok",
                OTEL_EXPORTER_OTLP_ENDPOINT=server.url,
                OTEL_EXPORTER_OTLP_HEADERS="api-key=sk-vendor",
            )
            told = [span.name for _, span in server.spans]

        assert semconv.SPAN_REPLY in told


TYPOS = {
    # what is changed in jaeger.yaml: what the error says beside the file
    ("service.name\n", "service.name\n      valeu: x\n"): "'valeu' at resource.attributes.0 is not "
    "known; allowed: name, type, value",
    ("tracer_provider:", "tracer_provder:"): "'tracer_provder' at the top level is not known; "
    "allowed: attribute_limits, disabled, distribution, file_format, instrumentation/development",
    ("otlp_http:", "otlp_htp:"): "'otlp_htp' at tracer_provider.processors.0.batch.exporter is not "
    "known; allowed: console, otlp_file/development, otlp_grpc, otlp_http",
    (
        "timeout:",
        "time_out:",
    ): "'time_out' at tracer_provider.processors.0.batch.exporter.otlp_http "
    "is not known; allowed: compression, encoding, endpoint, headers, headers_list, timeout, tls",
    ("always_on:", "allways_on:"): "'allways_on' at tracer_provider.sampler.parent_based.root is "
    "not known; allowed: always_off, always_on",
    ("schedule_delay: 5000", "schedule_delay: soon"): "tracer_provider.processors.0.batch."
    "schedule_delay must have type",
    ("file_format:", "file_frmat:"): "the top level lacks 'file_format'",
    ("traced_retry: #", "traced_rety: #"): "'traced_rety' at instrumentation/development.python is "
    "not known; did you mean 'traced_retry'?",
    ("max_retries:", "retries:"): "instrumentation/development.python.traced_retry: 'retries' is "
    "not known; allowed: max_retries, base_delay, max_delay, deadline",
    ("MAX_RETRIES:-3", "MAX_RETRIES:--1"): "instrumentation/development.python.traced_retry: "
    "max_retries is -1; it must be a whole number, 0 or more",
    ("ON_SILENCE}", "ON_SILENCE:-shout}"): "on_silence is 'shout'; it must be one of restart, "
    "listen, resend",
    (
        "BUDGET}",
        "BUDGET:-lots}",
    ): "budget is 'lots'; it must be how many retries at once, 1 or more",
    ("service.name\n", "service.name: [\n"): "line 14 is no YAML",
    ("timeout: 2000", "compression: zip"): "tracer_provider.processors.0.batch.exporter.otlp_http."
    "compression is invalid; it must be one of gzip, deflate, none",
    ("http://127", "htp://127"): "tracer_provider.processors.0.batch.exporter.otlp_http.endpoint "
    "is no http:// or https:// URL",
}


IN_EXPORTER = """
file_format: '1.0'
tracer_provider:
  processors:
    - batch:
        exporter:
          otlp_http:
            {}
"""


class TestTypos:
    @pytest.mark.parametrize("change", TYPOS, ids=lambda change: change[1].strip().split("\n")[-1])
    def test_the_error_names_file_key_and_what_is_allowed(self, change, edited):
        """The error is the same in each part of the file."""
        file = edited("jaeger", *change)

        with pytest.raises(ConfigurationFileError) as raised:
            load(file)
        assert str(raised.value).startswith(f"{file}: ")
        assert TYPOS[change] in str(raised.value)

    def test_what_the_file_holds_is_not_told(self, edited):
        """An error about a header does not quote it."""
        file = edited("vendor", "headers_list: ${OTEL_EXPORTER_OTLP_HEADERS}", "headers: sk-secret")

        with pytest.raises(ConfigurationFileError) as raised:
            load(file)
        assert "headers" in str(raised.value)
        assert "sk-secret" not in str(raised.value)

    @pytest.mark.parametrize(
        ("suffix", "text"),
        [
            # Errors whose text or traceback quotes the file
            (".yaml", f"headers: [api-key={KEY}\nx: y"),
            (".yaml", f"headers: *{KEY}"),
            (".yaml", f"headers: !{KEY} x"),
            (".yaml", f"headers: '{KEY}"),
            (".yaml", f'headers: "{KEY}\\q"'),
            (".yaml", f"a: &x [*x]\nfile_format: {KEY}"),
            (".yaml", f"file_format: {KEY}"),
            (".yaml", f"file_format: '1.0'\nlog_level: {KEY}"),
            (".yaml", f"file_format: '1.0'\nheaders: 2001-99-99 # {KEY}"),
            (".yaml", f"{KEY}: \udcff"),
            (".yaml", f"{KEY}: {'[' * 3000}"),
            (".json", f'{{"headers": "{KEY}" "x"}}'),
            (".json", f'{{"headers": "{KEY}\n"}}'),
            (".yaml", IN_EXPORTER.format(f"headers: [{{{KEY}: x}}]")),
            (".yaml", IN_EXPORTER.format(f"compression: {KEY}")),
        ],
    )
    @pytest.mark.parametrize("start", ["enable", "instrument"])
    def test_text_of_broken_file_is_not_printed(self, start, suffix, text, tmp_path):
        """Neither we nor the SDK's loader, which logs a traceback, quote the file."""
        file = tmp_path / f"otel{suffix}"
        file.write_bytes(text.encode(errors="surrogateescape"))
        if start == "enable":
            ended = fresh(
                "import logging, traced_retry\nlogging.basicConfig()\ntraced_retry.enable()",
                OTEL_CONFIG_FILE=file,
            )
            printed = "\n".join([ended.error, *ended.log])
            assert printed.startswith(f"ConfigurationFileError: {file}: ")
        else:
            printed = instrumented(file, "ok").stderr
            assert f"spans go nowhere: {file}: " in printed
        assert KEY not in printed
        assert "Traceback" not in printed


class TestContent:
    @pytest.mark.parametrize("preset", sorted(shipped_files.presets()))
    def test_each_carries(self, preset, monkeypatch):
        """Each preset has resource, limits, sampler and our options with their defaults."""
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://127.0.0.1:9")
        text = yaml.safe_load(shipped_files.presets()[preset].read_text())
        provider = text["tracer_provider"]
        options = text["instrumentation/development"]["python"]["traced_retry"]

        assert {"service.name"} == {a["name"] for a in text["resource"]["attributes"]}
        assert {"parent_based": {"root": {"always_on": None}}} == provider["sampler"]
        assert {"attribute_value_length_limit", "attribute_count_limit"} <= set(provider["limits"])
        assert set(ENV.values()) == set(options)
        assert RetryOptions().policy() == load(shipped_files.presets()[preset]).options.policy()

    @pytest.mark.parametrize(("text", "capacity"), [("off", None), ("25", 25), ("", 10)])
    def test_a_budget(self, text, capacity, monkeypatch):
        """The budget is a number or ``off``, which YAML reads as false."""
        monkeypatch.setenv("TRACED_RETRY_BUDGET", text)
        budget = load(shipped_files.presets()["jaeger"]).options.policy().budget

        assert capacity == (budget and budget.capacity)

    def test_options_are_those_of_the_environment(self):
        """A file has an option for each variable."""
        assert set(ENV.values()) == set(RetryOptions.__dataclass_fields__)
