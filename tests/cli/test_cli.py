# SPDX-License-Identifier: Apache-2.0
"""Test the command line as a process."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import aiohttp
import pytest
from livekit.plugins import openai
from support.fresh import COMMAND, Program, program
from support.fresh import SCRIPT as RUN_SCRIPT

from traced_retry import semconv
from traced_retry.simulator import PROVIDERS
from traced_retry.simulator.reach import WITH_TLS

AGENT = str(Path(__file__).parents[1] / "support" / "one_reply.py")
SCRIPT = str(Path(sys.executable).with_name("traced-retry"))


def environment(**environ):
    """Return the environment of the command."""
    return {**os.environ, "COLUMNS": "80", **environ}


def run(*arguments, **environ):
    """Run the command in a forked process."""
    return program(COMMAND, "traced-retry", *arguments, environ=environment(**environ), timeout=90)


def run_script(*arguments, **environ):
    """Run the command that pip installed."""
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=environment(**environ),
    )


def interrupted(replies):
    """Return the trace ids of the replies that the caller interrupted."""
    return {r["trace_id"] for r in replies if r["outcome"] == "interrupted"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the demo once as JSON, with a store under its own state directory."""
    state = tmp_path_factory.mktemp("state")
    done = run_script("demo", "--json", XDG_STATE_HOME=str(state))
    assert 0 == done.returncode, done.stderr
    return json.loads(done.stdout), done, state


class TestDemo:
    def test_every_reply_is_heard_once_or_known_as_failed(self, demo):
        """A reply is heard once if the script ends in ok. Otherwise it is not heard."""
        replies = demo[0]["replies"]

        assert {r["script"]: int(r["script"].endswith("ok")) for r in replies} == {
            r["script"]: r["replies_heard"] for r in replies
        }
        assert 10 <= len(replies)
        for reply in replies:
            well = reply["outcome"] in ("succeeded", "recovered")
            assert well == bool(reply["replies_heard"])
            assert well == (reply["stop_reason"] is None)

    def test_keys(self, demo):
        """The machine-readable form has fixed keys."""
        assert {"store", "seconds", "replies"} == set(demo[0])
        assert {
            "provider",
            "script",
            "outcome",
            "stop_reason",
            "attempts",
            "requests_sent",
            "replies_heard",
            "seconds",
            "trace_id",
        } == {key for reply in demo[0]["replies"] for key in reply}

    def test_takes_less_than_half_a_minute(self, demo):
        """The demo ends within half a minute."""
        assert demo[0]["seconds"] < 30

    def test_each_trace_is_in_the_store_and_fits_the_contract(self, demo):
        """The store has reply and attempts of each trace, with the attributes of the contract."""
        spans = {}
        for line in Path(demo[0]["store"]).read_text().splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    for span in scope["spans"]:
                        spans.setdefault(span["traceId"], []).append(span)
        assert len(demo[0]["replies"]) == len({r["trace_id"] for r in demo[0]["replies"]})
        for reply in demo[0]["replies"]:
            ours = spans[reply["trace_id"]]
            (parent,) = [s for s in ours if s["name"] == semconv.SPAN_REPLY]
            attempts = [s for s in ours if s["name"] == semconv.SPAN_ATTEMPT]
            has = {a["key"] for a in parent["attributes"]}

            assert reply["attempts"] == len(attempts)
            assert {parent["spanId"]} == {a["parentSpanId"] for a in attempts}
            assert {semconv.PROVIDER, semconv.MODEL, semconv.OUTCOME, semconv.ATTEMPTS} <= has
            assert (reply["stop_reason"] is not None) == (semconv.STOP_REASON in has)
            for attempt in attempts:
                names = {a["key"] for a in attempt["attributes"]}
                assert {semconv.ATTEMPT, semconv.ACTION, semconv.DELAY, semconv.RESULT} <= names
                assert (semconv.ERROR_TYPE in names) == (semconv.RECOVERABLE in names)

    def test_no_content_in_the_store(self, demo):
        """The store has neither instructions nor words."""
        stored = Path(demo[0]["store"]).read_text()

        assert not [s for s in ("Say hello", "Be brief", "reply 1", "a-key") if s in stored]

    def test_says_where_the_spans_are(self, demo):
        """The output names the store, and ``report`` without a file reads it."""
        state = demo[2]
        assert Path(demo[0]["store"]).is_relative_to(state)

        done = run("report", "--json", XDG_STATE_HOME=str(state))
        assert [r["trace_id"] for r in demo[0]["replies"]] == [
            r["trace_id"] for r in json.loads(done.stdout)["replies"]
        ]

    def test_quiet(self, demo):
        """With --json the output is JSON only, without LiveKit's log."""
        assert "" == demo[1].stderr


def test_demo_beside_a_dead_server(tmp_path):
    """The demo takes no longer than without a server, and prints neither its user nor its path."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        done = run(
            "demo",
            XDG_STATE_HOME=str(tmp_path),
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://user:k3y@{server}/k3y?token=k3y",
        )

    assert 0 == done.returncode, done.stderr
    assert time.monotonic() - started < 45  # It was 94 s when each scenario flushed to the server.
    assert f"The spans were also sent to http://{server}." in done.stdout
    assert "k3y" not in done.stdout + done.stderr


def test_interrupted_demo_prints_the_location_of_its_spans(tmp_path):
    """Ctrl-C after the first conversation leaves a store that can be read, and no traceback."""
    store = tmp_path / "spans.jsonl"
    with subprocess.Popen(
        [SCRIPT, "demo", "--store", str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        for line in process.stderr:
            if "heard once" in line:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)

    assert 130 == process.returncode
    assert "Traceback" not in rest
    assert f"Interrupted. The spans recorded so far are in\n  {store}" in rest
    assert "succeeded" in run("report", store).stdout


class TestReport:
    def test_text(self, demo):
        """The report names each outcome and fits a terminal."""
        done = run("report", demo[0]["store"])

        assert 0 == done.returncode
        assert max(len(line) for line in done.stdout.splitlines()) <= 80
        assert {"succeeded", "recovered", "exhausted", "interrupted"} <= set(done.stdout.split())

    def test_html(self, demo, tmp_path):
        """The command writes one page and prints its path."""
        done = run("report", demo[0]["store"], "--html", tmp_path / "page.html")

        assert str(tmp_path / "page.html") == done.stdout.strip()
        assert "<html" in (tmp_path / "page.html").read_text()

    def test_no_such_file(self, tmp_path):
        """One line names the file, and the status is 2."""
        done = run("report", tmp_path / "nothing.jsonl")

        assert 2 == done.returncode
        assert "nothing.jsonl" in done.stderr
        assert "Traceback" not in done.stderr

    def test_failed_replies_are_selected(self, demo):
        """--failed, --last and --provider select, and --limit shows fewer than are counted."""
        every = demo[0]["replies"]
        lost = [r["trace_id"] for r in every if r["stop_reason"] and not r["replies_heard"]]
        lost = [t for t in lost if t not in interrupted(every)]

        done = run("report", demo[0]["store"], "--failed", "--json")
        assert lost == [r["trace_id"] for r in json.loads(done.stdout)["replies"]]

        done = run("report", demo[0]["store"], "--failed", "--last", "1", "--jsonl")
        assert [lost[-1]] == [json.loads(line)["trace_id"] for line in done.stdout.splitlines()]

        done = run("report", demo[0]["store"], "--limit", "0")
        assert f"{len(every)} replies, " in done.stdout
        assert lost[0] not in done.stdout

        done = run("report", demo[0]["store"], "--provider", "aws")
        assert f"No reply matches --provider aws. {len(every)} were read.\n" == done.stdout

    def test_json_lines_from_standard_input(self, demo):
        """A store comes through a pipe, and each reply is one line."""
        done = subprocess.run(
            [SCRIPT, "report", "-", "--jsonl"],
            input=Path(demo[0]["store"]).read_bytes(),
            capture_output=True,
            timeout=90,
            check=True,
        )
        replies = [json.loads(line) for line in done.stdout.splitlines()]

        assert {r["trace_id"] for r in demo[0]["replies"]} == {r["trace_id"] for r in replies}
        assert {"traced-retry-demo"} == {r["service"] for r in replies}

    def test_progress_is_only_for_a_terminal(self, demo):
        """A pipe gets no progress."""
        assert "" == run("report", demo[0]["store"]).stderr

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("notes.txt", b"Call the provider.\n", "is a text file, not OTLP-JSON lines"),
            ("sound.wav", b"RIFF\x24\x00\x00\x00WAVE", "is a binary file, not OTLP-JSON lines"),
        ],
    )
    def test_other_files(self, name, content, problem, tmp_path):
        """One line names the file's kind and the expected kind."""
        (tmp_path / name).write_bytes(content)
        done = run("report", tmp_path / name)

        assert (2, 1) == (done.returncode, len(done.stderr.splitlines()))
        assert f"{name} {problem}. Give a file" in done.stderr

    def test_missing_folder_of_a_page(self, demo, tmp_path):
        """One line names the page."""
        done = run("report", demo[0]["store"], "--html", tmp_path / "gone" / "page.html")

        assert (2, 1) == (done.returncode, len(done.stderr.splitlines()))
        assert "page.html cannot be written" in done.stderr

    def test_options_that_do_not_fit(self, demo):
        """The message names the options, or the value and the expected values."""
        done = run("report", demo[0]["store"], "--json", "--jsonl")
        assert (2, True) == (done.returncode, "exclude each other" in done.stderr)

        done = run("report", demo[0]["store"], "--since", "yesterday")
        assert (2, True) == (done.returncode, "invalid time 'yesterday'" in done.stderr)

    def test_no_store_yet(self, tmp_path):
        """The message names the command that makes a store."""
        done = run("report", XDG_STATE_HOME=str(tmp_path))

        assert 2 == done.returncode
        assert "traced-retry demo" in done.stderr


class TestScript:
    def test_newest_incident(self, demo):
        """The demo's last call is a failed response that was retried."""
        done = run("script", demo[0]["store"])

        assert "error:server_error,ok\n" == done.stdout
        assert "traced-retry simulate openai --script 'error:server_error,ok'" in done.stderr

    def test_trace(self, demo):
        """The trace id selects the call."""
        (reply,) = [r for r in demo[0]["replies"] if r["script"] == "rate_limit"]

        done = run("script", demo[0]["store"], "--trace", reply["trace_id"][:12])
        assert "rate_limit,rate_limit,rate_limit,rate_limit\n" == done.stdout

    def test_unknown_trace(self, demo):
        """One line names the trace."""
        done = run("script", demo[0]["store"], "--trace", "0" * 32)

        assert (2, True) == (done.returncode, "no trace 000" in done.stderr)


class TestSimulate:
    def test_serves_until_interrupted(self):
        """The command prints its address on 127.0.0.1, and a count at the end."""
        with subprocess.Popen(
            [SCRIPT, "simulate", "openai", "--script", "rate_limit,late:3,ok"],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=20)

        assert first.startswith("openai on http://127.0.0.1:")
        assert "script rate_limit,late:3,ok" in first
        assert "0 requests, 0 turns, 0 answered in full, 0 cancelled" in rest

    @pytest.mark.real_time
    async def test_caller_speaks_by_itself(self):
        """With an element for turns, the caller speaks, and the plugin gets the answers."""
        with Program(
            COMMAND,
            "traced-retry",
            *("simulate", "openai", "--script", "turn:ok,turn:failed", "--turn-every", "0.1"),
            environ=environment(),
        ) as process:
            url = process.stdout.readline().split()[2].rstrip(",")
            async with aiohttp.ClientSession() as http:
                model = openai.realtime.RealtimeModel(
                    api_key="none", base_url=url, http_session=http, modalities=["text"]
                )
                session = model.session()
                answered = asyncio.get_running_loop().create_future()
                session.once("generation_created", answered.set_result)
                generation = await asyncio.wait_for(answered, 20)
                lines = (line for line in process.stdout if "turn 1" in line)
                first = await asyncio.wait_for(asyncio.to_thread(next, lines), 20)
                await session.aclose()
            process.interrupt()
            done = process.communicate(timeout=20)

        assert not generation.user_initiated
        assert 0 == done.returncode, done.stderr
        assert "turn 1: ok" in first
        assert re.search(r"0 requests, [1-9]\d* turns, ", done.stdout)

    @pytest.mark.parametrize("provider", sorted(set(PROVIDERS) - {"openai"}))
    def test_each_provider(self, provider):
        """Each simulator listens on 127.0.0.1."""
        with Program(
            COMMAND, "traced-retry", "simulate", provider, environ=environment()
        ) as process:
            first = process.stdout.readline()
            process.interrupt()
            done = process.communicate(timeout=20)

        assert 0 == done.returncode, done.stderr
        assert first.startswith(f"{provider} on ")
        assert "://127.0.0.1:" in first

    @pytest.mark.parametrize("provider", sorted(PROVIDERS))
    def test_plugin_of_another_process_reaches_it(self, provider, tmp_path):
        """The printed lines make the real plugin connect, and the agent hears the reply.

        NVIDIA's plugin refuses to request a reply, so it only connects.
        """
        if provider == "aws" and sys.version_info < (3, 12):
            pytest.skip("livekit-plugins-aws[realtime] needs Python 3.12")
        with Program(
            COMMAND,
            "traced-retry",
            *("simulate", provider, "--script", "ok", "--ca", tmp_path / "ca.pem"),
            environ=environment(),
        ) as process:
            heard = converse(printed(process)[1])
            process.interrupt()
            rest = process.communicate(timeout=20).stdout

        assert (provider != "nvidia") == ("reply 1" in heard)
        assert (provider != "nvidia") == ("request 1: ok\n" in rest)
        assert "\n1 connections, " in f"\n{rest}"
        assert (provider in WITH_TLS) == (tmp_path / "ca.pem").exists()

    def test_lists_the_faults_of_a_protocol(self):
        """The list has only the faults that the protocol can have."""
        openai = run("simulate", "openai", "--faults").stdout
        assert "active[:SECONDS]" in openai
        assert "Put turn: in front of an element" in openai
        assert "turn:" not in run("simulate", "nvidia", "--faults").stdout
        google = run("simulate", "google", "--faults").stdout
        assert "error:CODE" in google
        assert "active" not in google

    def test_ca_that_cannot_be_written(self, tmp_path):
        """The message names the file and the option."""
        done = run("simulate", "google", "--ca", tmp_path / "gone" / "ca.pem")

        assert 2 == done.returncode
        assert "name another file with --ca" in done.stderr

    def test_unknown_fault(self):
        """The message lists the known faults."""
        done = run("simulate", "openai", "--script", "rate_limt")

        assert 2 == done.returncode
        lines = done.stderr.splitlines()
        assert "traced-retry: unknown fault 'rate_limt'" == lines[0]
        assert [] != [line for line in lines if line.startswith("  rate_limit[:SECONDS]  ")]
        assert "Traceback" not in done.stderr

    def test_unknown_provider(self):
        """The message lists the known providers."""
        done = run("simulate", "opnai")

        assert 2 == done.returncode
        assert "'opnai' is not simulated; known: openai, xai" in " ".join(done.stderr.split())


def printed(process):
    """Return the first line of a server, and the lines of Python that reach it."""
    first = process.stdout.readline()
    return first, "".join(itertools.takewhile(str.strip, process.stdout))


def converse(lines):
    """Run an agent on the model that the lines create; return its output."""
    agent = program(RUN_SCRIPT, AGENT, lines, environ=environment(), timeout=120)
    assert 0 == agent.returncode, agent.stderr[-3000:]
    return agent.stdout


class Serving(subprocess.Popen):
    """The command that pip installed, as long as it serves."""

    def __init__(self, *arguments, cwd, **environ):
        super().__init__(
            [SCRIPT, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment(**environ),
        )

    def __exit__(self, *_):
        """End it also if the test has failed."""
        self.kill()
        super().__exit__(*_)

    def stop(self):
        """Send Ctrl-C and return the rest of the output."""
        self.send_signal(signal.SIGINT)
        rest, error = self.communicate(timeout=20)
        assert 0 == self.returncode, error
        return rest


class TestRecord:
    @pytest.mark.parametrize("provider", ["openai", "google", "aws"])
    def test_commands_of_the_page(self, provider, tmp_path):
        """The agent hears the simulator through the recorder, and the cassette without it."""
        if provider == "aws" and sys.version_info < (3, 12):
            pytest.skip("livekit-plugins-aws[realtime] needs Python 3.12")
        page = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
        commands = re.findall(r"^\$ .* openai .*call\.jsonl.*", page, re.MULTILINE)
        record, replay = (
            command.replace("openai ", f"{provider} ").split()[2:] for command in commands
        )
        ca = tmp_path / "upstream.pem"
        own = ("--ca", "own.pem")
        with Serving("simulate", provider, "--ca", str(ca), cwd=tmp_path) as upstream:
            url = printed(upstream)[0].split()[2].rstrip(",")
            trusted = {"SSL_CERT_FILE": str(ca)} if ca.exists() else {}
            keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
            with Serving(*record[:-1], url, *own, cwd=tmp_path, **trusted, **keys) as recorder:
                first, lines = printed(recorder)
                heard = converse(lines.replace("own.pem", str(tmp_path / "own.pem")))
                rest = recorder.stop()
            upstream.stop()

        assert "reply 1" in heard
        assert first.endswith(" to call.jsonl; Ctrl-C ends it\n")
        assert rest.startswith("1 connections, ")
        assert 0o600 == (tmp_path / "call.jsonl").stat().st_mode & 0o777
        assert "reply 1" not in (tmp_path / "call.jsonl").read_text()

        with Serving(*replay, *own, cwd=tmp_path) as player:
            heard = converse(printed(player)[1].replace("own.pem", str(tmp_path / "own.pem")))
            rest = player.stop()

        sent, total = re.match(r"(\d+) of (\d+) recorded events were sent", rest).groups()
        assert "AAAAAAA" in heard
        assert sent == total

    def test_cassette_that_exists_is_kept(self, tmp_path):
        """The message names the file."""
        (tmp_path / "call.jsonl").write_text("mine")
        done = run("record", "openai", tmp_path / "call.jsonl", "--to", "http://127.0.0.1:9/v1")

        assert 2 == done.returncode
        assert "call.jsonl cannot be written (File exists): name another file" in done.stderr
        assert "mine" == (tmp_path / "call.jsonl").read_text()

    def test_script_and_replay_exclude_each_other(self):
        """The message names both options."""
        done = run("simulate", "openai", "--script", "ok", "--replay", "call.jsonl")

        assert 2 == done.returncode
        assert "--script and --replay exclude each other" in done.stderr


class Receiver(http.server.BaseHTTPRequestHandler):
    """An OTLP/HTTP endpoint that keeps the paths and bodies of requests."""

    posted: ClassVar[list] = []

    def do_POST(self):
        self.posted.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class TestExport:
    def test_standard_variables_send_the_spans_there(self, tmp_path):
        """With an OTLP endpoint in the environment, spans and metrics also go to it."""
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            done = run(
                "demo", "--store", tmp_path / "x.jsonl", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint
            )
        finally:
            server.shutdown()
            server.server_close()
        posted = {
            path: b"".join(body for p, body in Receiver.posted if p == path)
            for path, _ in Receiver.posted
        }

        assert 0 == done.returncode, done.stderr
        assert f"The spans were also sent to {endpoint}." in done.stdout
        assert semconv.SPAN_ATTEMPT.encode() in posted["/v1/traces"]
        assert semconv.METRIC_REPLIES.encode() in posted["/v1/metrics"]

    def test_a_protocol_that_is_not_spoken(self, tmp_path):
        """The error names the variable, its value and the allowed values."""
        done = run(
            "demo",
            "--store",
            tmp_path / "x.jsonl",
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4317",
            OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        )

        assert 2 == done.returncode
        assert "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; it must be 'http/protobuf'" in done.stderr

    def test_a_store_that_cannot_be_written(self, tmp_path):
        """The error names the file and the remedy."""
        (tmp_path / "file").touch()
        done = run("demo", "--store", tmp_path / "file" / "x.jsonl")

        assert 2 == done.returncode
        assert "cannot be written" in done.stderr
        assert "--store" in done.stderr


def test_help_teaches():
    """Each command explains itself, and simulate lists the elements of a script."""
    assert "demo" in run("--help").stdout
    assert "late:SECONDS" in run("simulate", "--help").stdout


def test_version():
    """--version prints the package's version."""
    import traced_retry

    expected = f"traced-retry {traced_retry.__version__}"
    assert expected == run("--version").stdout.strip()
    assert expected == run_script("--version").stdout.strip()
