# SPDX-License-Identifier: Apache-2.0
"""Test ``traced-retry doctor`` as a process, with real servers."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from backends.servers import Jaeger, command, free_ports
from support.fresh import COMMAND, fresh, program
from support.receiver import receiver

from traced_retry import semconv, shipped_files
from traced_retry.doctor.plugins import session_names
from traced_retry.doctor.probe import jaeger_query_url
from traced_retry.livekit.registry import ADAPTERS

MARKER = "sk-hunter2-never-to-be-seen"
SETTINGS = ("OTEL_", "TRACED_RETRY_", "LIVEKIT_", "REQUESTS_CA_BUNDLE")


@dataclass
class Examined:
    """The result of one run of the doctor."""

    status: int
    printed: str

    @property
    def answer(self):
        """The printed JSON."""
        return json.loads(self.printed)

    def __getitem__(self, check):
        """Return the one check of that name."""
        (found,) = [c for c in self.answer["checks"] if c["check"] == check]
        return found

    @property
    def bad(self):
        """The status of each check that is not ok, by its name."""
        return {c["check"]: c["status"] for c in self.answer["checks"] if c["status"] != "ok"}


@pytest.fixture
def doctor(tmp_path):
    """Run it as JSON, or as text: ``doctor("--jaeger", url, text=True, VARIABLE=...)``.

    ``before`` is a command that starts it in an interpreter of its own. Without it, it is a fork.
    """

    def run(*arguments, text=False, before=None, **environ):
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(SETTINGS) and not name.upper().endswith("_PROXY")
        }
        environ = {**clean, "XDG_STATE_HOME": str(tmp_path / "state"), **environ}
        words = ["traced-retry", "doctor", *arguments, *([] if text else ["--json"])]
        if before is None:
            done = program(COMMAND, *words, environ=environ)
        else:
            words[0] = str(Path(sys.executable).with_name(words[0]))
            done = subprocess.run(
                [*before, *words],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env=environ,
            )
        assert "Traceback" not in done.stderr, done.stderr
        assert MARKER not in done.stdout + done.stderr
        return Examined(done.returncode, done.stdout)

    return run


@pytest.fixture
def examined(tmp_path):
    """Run the checks without the command line, in a process forked from a warm one."""

    def run(**environ):
        code = """
            import dataclasses, json
            from traced_retry.doctor import run_checks

            result = json.dumps({"checks": [dataclasses.asdict(check) for check in run_checks()]})
        """
        ended = fresh(code, **{"XDG_STATE_HOME": str(tmp_path / "state"), **environ})
        assert "" == ended.error
        return Examined(-1, ended.result)

    return run


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory):
    """Start a real Jaeger."""
    command("jaeger")
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as jaeger:
        yield jaeger


NAMED = "correct the value that the message names"


class TestWell:
    def test_local_store(self, doctor, tmp_path):
        """Without variables, the test span is read back, and the store's file is deleted."""
        done = doctor(before=[])

        assert (0, True, {}) == (done.status, done.answer["ok"], done.bad)
        assert done["export"]["message"].endswith("a test span was read back")
        assert str(tmp_path / "state/traced-retry/spans") in done["export"]["message"]
        assert [] == [p for p in (tmp_path / "state").rglob("*") if p.is_file()]

    def test_text(self, doctor):
        """Each check has one line, which starts with its status."""
        done = doctor(text=True)

        assert 0 == done.status
        assert {"ok"} == {line.split()[0] for line in done.printed.splitlines()}
        assert "ok    sampler: every reply is traced\n" in done.printed

    def test_jaeger_has_the_span(self, doctor, jaeger):
        """The doctor finds its test span in Jaeger."""
        done = doctor(
            "--jaeger",
            jaeger.url,
            OTEL_EXPORTER_OTLP_ENDPOINT=jaeger.endpoint,
            OTEL_METRICS_EXPORTER="none",
            OTEL_SERVICE_NAME="examined",
        )

        assert (0, {}) == (done.status, done.bad)
        assert f"and Jaeger at {jaeger.url} has it" in done["export"]["message"]
        (trace,) = jaeger.traces("examined").values()
        assert [semconv.SPAN_DOCTOR] == [span["name"] for span in trace]

    def test_output_of_the_page(self, doctor, jaeger):
        """The doctor prints each line of docs/doctor.md, with this Jaeger's ports."""
        page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
        (block,) = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        installed = importlib.metadata.version("livekit-agents")
        for shown, actual in (
            ("http://127.0.0.1:4318", jaeger.endpoint),
            ("127.0.0.1:4318", jaeger.endpoint.removeprefix("http://")),
            ("http://127.0.0.1:16686", jaeger.url),
            ("1.8.9", installed),
        ):
            block = block.replace(shown, actual)
        lines = block.splitlines()
        exports = [line for line in lines if line.startswith("$ export ")]
        variables = dict(
            word.split("=", 1)
            for line in exports
            for word in shlex.split(line.removeprefix("$ export "))
        )
        done = doctor("--jaeger", jaeger.url, text=True, **variables)

        assert 1 == done.status
        expected = [line for line in lines if not line.startswith("$ ")]
        assert 11 == len(expected)
        assert [] == [line for line in expected if line not in done.printed.splitlines()]

    def test_preset(self, doctor):
        """The spans go where the preset sends them."""
        done = doctor("--preset", "jaeger")

        assert done["provider"]["message"].endswith("spans go to preset jaeger")
        assert done["export"]["message"].startswith("otlp to http://127.0.0.1:4318: ")

    def test_configuration_file(self, doctor, jaeger, tmp_path):
        """The exporter of a configuration file is tested too."""
        text = shipped_files.presets()["jaeger"].read_text()
        file = tmp_path / "otel.yaml"
        shipped = "${OTEL_EXPORTER_OTLP_ENDPOINT:-http://127.0.0.1:4318}"
        assert shipped in text
        file.write_text(text.replace(shipped, jaeger.endpoint))
        done = doctor("--jaeger", jaeger.url, OTEL_CONFIG_FILE=str(file))

        assert (0, {}) == (done.status, done.bad)
        assert f"and Jaeger at {jaeger.url} has it" in done["export"]["message"]

    def test_another_endpoint(self, doctor):
        """A server that is not a Jaeger passes if it accepts spans and metrics."""
        with receiver() as server:
            done = doctor(OTEL_EXPORTER_OTLP_ENDPOINT=server.url)
            names = [span.name for _, span in server.spans]

        assert f"otlp to {server.url}: a test span was accepted" in (done["export"]["message"])
        assert "ok" == done["metrics"]["status"]
        assert [semconv.SPAN_DOCTOR] == names

    def test_a_sampler_does_not_hide_a_dead_endpoint(self, doctor):
        """The test span is exported although the sampler drops all spans."""
        with receiver() as server:
            doctor(OTEL_EXPORTER_OTLP_ENDPOINT=server.url, OTEL_TRACES_SAMPLER="always_off")
            assert 1 == len(server.spans)


class TestProvider:
    def test_given_to_livekit(self, tmp_path):
        """The doctor examines the provider that LiveKit's tracer uses, and not the global one."""
        code = f"""
            from livekit.agents import telemetry
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import SimpleSpanProcessor
            from traced_retry.doctor import run_checks
            from traced_retry.export.file_store import StoreExporter

            provider = TracerProvider()
            provider.add_span_processor(SimpleSpanProcessor(StoreExporter({str(tmp_path / "s")!r})))
            telemetry.set_tracer_provider(provider)
            result = {{c.check: (c.status, c.message) for c in run_checks()}}
        """
        ended = fresh(code)

        assert "" == ended.error
        assert ("ok", "the tracer provider given to LiveKit") == ended.result["provider"]
        assert "a test span was read back" in ended.result["export"][1]

    @pytest.mark.parametrize(
        ("environ", "check", "said", "fix"),
        [
            (
                {"OTEL_SDK_DISABLED": "true"},
                "provider",
                "nowhere",
                "unset OTEL_SDK_DISABLED",
            ),
            (
                {"OTEL_TRACES_EXPORTER": "none"},
                "export",
                "nowhere",
                "set OTEL_TRACES_EXPORTER to otlp, or unset it for the local store",
            ),
            ({"OTEL_TRACES_EXPORTER": "jeager"}, "provider", "'jeager'; installed", NAMED),
            (
                {"XDG_STATE_HOME": "/dev/null"},
                "provider",
                "cannot be written",
                "set XDG_STATE_HOME to a folder that can be written",
            ),
            ({"OTEL_CONFIG_FILE": "/not/there.yaml"}, "provider", "/not/there.yaml", NAMED),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:99999"}, "provider", "65535", NAMED),
        ],
    )
    def test_nowhere(self, examined, environ, check, said, fix):
        """The remedy fits the one problem that is reported."""
        done = examined(**environ)

        assert {check: "fail"} == done.bad
        assert said in done[check]["message"]
        assert fix == done[check]["fix"]

    def test_file_that_says_disabled(self, examined, tmp_path):
        """The fix is to change the file."""
        (tmp_path / "otel.yaml").write_text('file_format: "1.0"\ndisabled: true\n')
        done = examined(OTEL_CONFIG_FILE=str(tmp_path / "otel.yaml"))

        assert {"provider": "fail"} == done.bad
        assert "set disabled to false in the file" == done["provider"]["fix"]

    def test_disk_full(self, doctor):
        """A store that cannot be written fails although its file could be created."""
        done = doctor(before=["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"])

        assert (1, {"export": "fail"}) == (done.status, done.bad)
        assert done["export"]["message"].endswith("a test span was lost, the disk is full")

    def test_no_such_preset(self, doctor):
        """The message lists the presets that exist."""
        done = doctor("--preset", "jager")

        assert (1, {"provider": "fail"}) == (done.status, done.bad)
        assert "'jager'; it must be one of" in done["provider"]["message"]


class TestEndpoint:
    def test_refused(self, doctor):
        """A refused connection is reported for spans and for metrics."""
        (port,) = free_ports(1)
        done = doctor(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}")

        assert (1, {"export": "fail", "metrics": "fail"}) == (done.status, done.bad)
        assert done["export"]["message"] == (
            f"otlp to http://127.0.0.1:{port}: nothing listens there"
        )

    def test_hanging(self, doctor):
        """A server that does not answer is reported within 10 s of the first connection."""
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
            server.settimeout(60)
            accepted = threads.submit(lambda: (server.accept()[0], time.monotonic()))
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            done = doctor(OTEL_EXPORTER_OTLP_ENDPOINT=url)
            ended = time.monotonic()
            connection, began = accepted.result()
            connection.close()

        assert {"export": "fail", "metrics": "fail"} == done.bad
        assert "does not answer as OTLP" in done["export"]["message"]
        assert ended - began < 10

    def test_grpc_port(self, doctor, jaeger):
        """The fix names the port of OTLP/HTTP if the endpoint speaks gRPC."""
        done = doctor(
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{jaeger.grpc}", OTEL_METRICS_EXPORTER="none"
        )

        assert {"export": "fail"} == done.bad
        assert "4318 is OTLP/HTTP's" in done["export"]["fix"]

    def test_wrong_path(self, doctor, jaeger):
        """The fix of a 404 names the path that is expected."""
        done = doctor(
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{jaeger.endpoint}/api/traces",
            OTEL_METRICS_EXPORTER="none",
        )

        assert {"export": "fail"} == done.bad
        assert f"otlp to {jaeger.endpoint}: it answers 404" == done["export"]["message"]
        assert "/v1/traces" in done["export"]["fix"]

    def test_metrics_to_jaeger(self, doctor, jaeger):
        """Metrics fail if one endpoint is set for all signals and is a Jaeger."""
        done = doctor("--jaeger", jaeger.url, OTEL_EXPORTER_OTLP_ENDPOINT=jaeger.endpoint)

        assert (1, {"metrics": "fail"}) == (done.status, done.bad)
        assert "it takes none (404)" in done["metrics"]["message"]
        assert "OTEL_METRICS_EXPORTER=none" in done["metrics"]["fix"]

    def test_another_jaeger(self, doctor, jaeger):
        """A span that another server accepted is missing in the Jaeger that the user named."""
        with receiver() as server:
            done = doctor("--jaeger", jaeger.url, OTEL_EXPORTER_OTLP_ENDPOINT=server.url)

        assert (1, {"export": "fail"}) == (done.status, done.bad)
        assert f"but Jaeger at {jaeger.url} does not have it" in done["export"]["message"]

    @pytest.mark.parametrize(
        ("endpoint", "query"),
        [
            ("http://traces.local:4318/v1/traces", "http://traces.local:16686"),
            ("https://[::1]:4318/v1/traces", "http://[::1]:16686"),
            ("traces.local:4317", "http://traces.local:16686"),
            (f"https://user:{MARKER}@traces.local/v1/traces", None),
            (f"https://traces.local/v1/traces?key={MARKER}", None),
            (None, None),
        ],
    )
    def test_where_a_jaeger_may_be(self, endpoint, query):
        """A Jaeger may be on the endpoint's host, unless the endpoint has a password."""
        assert query == jaeger_query_url(endpoint)

    def test_no_jaeger(self, doctor, jaeger):
        """A --jaeger with a port that refuses connections is a failed check."""
        done = doctor(
            "--jaeger",
            f"http://127.0.0.1:{free_ports(1)[0]}",
            OTEL_EXPORTER_OTLP_ENDPOINT=jaeger.endpoint,
            OTEL_METRICS_EXPORTER="none",
        )

        assert {"export": "fail"} == done.bad
        assert "does not answer as one" in done["export"]["message"]


class TestSettings:
    @pytest.mark.parametrize(
        ("sampler", "argument", "well"),
        [
            ("always_on", "", True),
            ("parentbased_traceidratio", "1.0", True),
            ("parentbased_traceidratio", "0.99", False),
            ("traceidratio", "0.01", False),
            ("always_off", "", False),
        ],
    )
    def test_sampler(self, examined, sampler, argument, well):
        """A sampler that may drop a reply fails."""
        done = examined(OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=argument)

        assert ({} if well else {"sampler": "fail"}) == done.bad

    @pytest.mark.parametrize(
        ("environ", "said"),
        [
            ({"LIVEKIT_REALTIME_MAX_RETRIES": "-1"}, ["LIVEKIT_REALTIME_MAX_RETRIES is '-1'"]),
            ({"LIVEKIT_REALTIME_RETRY_BASE_DELAY": "60"}, ["base_delay is 60.0, above max_delay"]),
            (
                {"TRACED_RETRY_DEADLINE": "0", "TRACED_RETRY_ON_SILENCE": "shout"},
                ["TRACED_RETRY_DEADLINE is '0'", "TRACED_RETRY_ON_SILENCE is 'shout'"],
            ),
        ],
    )
    def test_policy(self, examined, environ, said):
        """The message names each invalid value and the allowed values."""
        done = examined(**environ)
        found = [c["message"] for c in done.answer["checks"] if c["check"] == "policy"]

        assert {"policy": "fail"} == done.bad
        assert len(said) == len(found)
        assert all(what in message for what, message in zip(said, found, strict=True))

    @pytest.mark.parametrize(("file", "well"), [("breaker", True), ("missing/breaker", False)])
    def test_breaker(self, examined, tmp_path, file, well):
        """A file that cannot be used leaves replies without the breaker."""
        done = examined(TRACED_RETRY_BREAKER=tmp_path / file)

        assert ({} if well else {"breaker": "fail"}) == done.bad

    def test_text(self, doctor):
        """An invalid value has its fix in the next line, and the status is 1."""
        done = doctor(text=True, TRACED_RETRY_DEADLINE="soon")

        assert 1 == done.status
        assert "fail  policy: TRACED_RETRY_DEADLINE is 'soon'; it must be" in done.printed
        assert "\n      fix: correct the variable, or unset it\n" in done.printed

    def test_mistyped_variable(self, doctor):
        """A misspelt variable is reported with the right name."""
        done = doctor(TRACED_RETRY_BUDGTE="3")

        assert (1, {"TRACED_RETRY_BUDGTE": "warn"}) == (done.status, done.bad)
        assert "did you mean TRACED_RETRY_BUDGET?" == done["TRACED_RETRY_BUDGTE"]["fix"]

    def test_control_characters(self, doctor):
        """A variable cannot write to the terminal."""
        done = doctor(text=True, OTEL_SERVICE_NAME="a\x1b[2Jb\nok    c")

        assert "OTEL_SERVICE_NAME: a?[2Jb?ok    c\n" in done.printed

    def test_values(self, doctor):
        """Values of variables without secrets are shown as they are."""
        done = doctor(TRACED_RETRY_BUDGET="25", OTEL_SERVICE_NAME="support")

        assert ("25", "support") == (
            done["TRACED_RETRY_BUDGET"]["message"],
            done["OTEL_SERVICE_NAME"]["message"],
        )

    @pytest.mark.parametrize("text", [False, True])
    def test_secrets(self, doctor, text):
        """No secret of any variable is printed. The fixture ``doctor`` looks for it."""
        with receiver() as server:
            done = doctor(
                text=text,
                OTEL_EXPORTER_OTLP_ENDPOINT=server.url.replace("//", f"//user:{MARKER}@"),
                OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{server.url}/{MARKER}/v1/traces?key={MARKER}",
                OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=f"{server.url}/{MARKER}",
                OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer%20{MARKER},x-team=voice",
                OTEL_EXPORTER_OTLP_METRICS_HEADERS=MARKER,
                OTEL_EXPORTER_OTLP_LOGS_ENDPOINT=MARKER,
                OTEL_RESOURCE_ATTRIBUTES=f"team={MARKER}",
                OTEL_EXPORTER_OTLP_CLIENT_KEY=f"-----BEGIN KEY-----\n{MARKER * 99}",
                OTEL_MADE_UP=MARKER,
                LIVEKIT_API_SECRET=MARKER,
                HTTPS_PROXY=f"http://user:{MARKER}@127.0.0.1:9",
            )

        assert 1 == done.status
        assert "authorization=(hidden), x-team=(hidden)" in done.printed
        assert "https_proxy" not in done.printed
        assert "http://127.0.0.1:9" in done.printed
        assert "LIVEKIT_API_SECRET" not in done.printed

    @pytest.mark.parametrize("endpoint", [MARKER, f"http://{MARKER}@", f"{MARKER}:no-port"])
    def test_an_endpoint_that_is_a_key(self, doctor, endpoint):
        """A key in place of an endpoint is not printed as the name of a host."""
        assert 1 == doctor(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint).status

    def test_jaeger_is_no_url(self, doctor):
        """A --jaeger that is not a URL is a usage error with status 2."""
        assert 2 == doctor("--jaeger", MARKER).status


class TestPlugins:
    def test_each_is_active(self, doctor):
        """Each adapter is active with the installed versions."""
        done = doctor()
        found = {
            c["check"]: c["message"]
            for c in done.answer["checks"]
            if c["check"].startswith("plugin ")
        }

        names = ["aws", "azure", "google", "openai", "phonic", "ultravox", "xai"]
        installed = {
            name: importlib.metadata.version(f"livekit-plugins-{name}")
            for name in names
            if importlib.util.find_spec(f"livekit.plugins.{name}")
        }
        assert installed
        for name, version in installed.items():
            assert found[f"plugin {name}"].startswith(f"{version}: ")
            assert "Adapter is active" in found[f"plugin {name}"]

    @pytest.mark.parametrize("home", ADAPTERS)
    def test_what_is_read_of_the_source_is_so(self, home):
        """The names read from the source include every method of the imported class."""
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError as error:
            pytest.skip(f"no {error.name} here")
        session = getattr(module, "RealtimeSession", None)
        here = session is not None and session.__module__ == home
        methods = {n for n, v in vars(session).items() if callable(v)} if here else set()

        assert bool(methods) == bool(session_names(home))
        assert set() == {n for n in methods if not n.startswith("__")} - session_names(home)

    def test_observe_only(self, doctor, tmp_path):
        """A plugin without an attribute that its adapter needs is reported as observe-only."""
        spec = importlib.util.find_spec("livekit.plugins.phonic")
        copy = tmp_path / "livekit/plugins/phonic"
        shutil.copytree(spec.submodule_search_locations[0], copy)
        file = copy / "realtime/realtime_model.py"
        file.write_text(file.read_text().replace("_pending_user_text", "_text_that_waits"))
        done = doctor(before=[], PYTHONPATH=str(tmp_path))

        assert (1, {"plugin phonic": "warn"}) == (done.status, done.bad)
        assert "observe-only, for _pending_user_text is gone" in done["plugin phonic"]["message"]
        assert "1.7.0 to 1.8.9" in done["plugin phonic"]["fix"]


@pytest.mark.parametrize(
    ("value", "status", "message"),
    [
        ("true", "warn", "TRACED_RETRY_DISABLED is true: replies are neither retried nor traced"),
        ("1", "fail", "TRACED_RETRY_DISABLED is '1': expected true or false"),
    ],
)
def test_off_switch_is_shown(doctor, value, status, message):
    """An agent that is switched off retries no reply, whatever the other checks say."""
    found = doctor(TRACED_RETRY_DISABLED=value)["switch"]

    assert (status, message) == (found["status"], found["message"])
    assert found["fix"]
