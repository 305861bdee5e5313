# SPDX-License-Identifier: Apache-2.0
"""The examples in LiveKit's own worker and job processes: no span is left behind at a job's end.

There is no room: livekit-server could not be built here. Everything else is the real thing: the
worker, its process pool, its job processes and threads, its shutdown, the plugin, the wire.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.fresh import SCRIPT, program

from traced_retry import semconv

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
INSTRUMENT = str(Path(sys.executable).with_name("opentelemetry-instrument"))


def run_agent(example, *arguments, state, under=(), **environ):
    """Run an example; return what the run printed, and the spans in the local stores.

    The worker is forked, unless it is started ``under`` another command.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OTEL_", "LIVEKIT_", "TRACED_RETRY_", "PROMETHEUS_"))
    }
    command = [str(TESTS / "support" / "run_agent.py"), str(example), *map(str, arguments)]
    kept = {**kept, "XDG_STATE_HOME": str(state), "PYTHONPATH": str(TESTS), **environ}
    if under:
        done = subprocess.run(
            [*under, sys.executable, *command],
            cwd=state,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            env=kept,
        )
    else:
        done = program(SCRIPT, *command, cwd=state, environ=kept, timeout=180)
    assert 0 == done.returncode, done.stderr
    spans = []
    for path in (state / "traced-retry" / "spans").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    spans += scope["spans"]
    return json.loads(done.stdout.splitlines()[-1]), spans, done.stderr


def orphans(spans):
    """The names of spans whose parent is not there."""
    ids = {span["spanId"] for span in spans}
    return [s["name"] for s in spans if s.get("parentSpanId") and s["parentSpanId"] not in ids]


def named(spans, name):
    """Those of that name."""
    return [span for span in spans if span["name"] == name]


@pytest.mark.parametrize(
    ("executor", "start", "jobs"),
    [("process", "forkserver", 2), ("process", "spawn", 1), ("thread", "spawn", 2)],
)
def test_the_example(executor, start, jobs, tmp_path):
    """Jobs with a retry each: every span that ended is stored, LiveKit's very last as well."""
    ran, spans, _ = run_agent(
        ROOT / "examples" / "agent.py",
        *("--jobs", jobs, "--script", "rate_limit:0.1,ok,rate_limit:0.1,ok"),
        *("--executor", executor, "--start", start),
        state=tmp_path,
    )

    assert (2 * jobs, jobs) == (ran["requests"], ran["completed"])
    assert jobs == len(named(spans, semconv.SPAN_REPLY))
    assert 2 * jobs == len(named(spans, semconv.SPAN_ATTEMPT))
    assert jobs == len(named(spans, "agent_session"))
    assert jobs == len(named(spans, "job_shutdown"))
    assert [] == orphans(spans)
    assert [(0, False)] * jobs == [(e["exitcode"], e["killed"]) for e in ran["ended"]]


def test_without_a_line_of_code(tmp_path):
    """Under opentelemetry-instrument the same is stored, in one trace from LiveKit's root on."""
    code = (ROOT / "examples" / "agent.py").read_text()
    plain = tmp_path / "plain_agent.py"
    plain.write_text(
        code.replace("    traced_retry.enable(ctx)\n", "").replace("import traced_retry\n", "")
    )
    assert "traced_retry" not in plain.read_text().split('"""', 2)[2]

    ran, spans, _ = run_agent(
        plain, "--script", "rate_limit:0.1,ok", state=tmp_path, under=[INSTRUMENT]
    )
    (root,) = [span for span in spans if not span.get("parentSpanId")]
    stores = list((tmp_path / "traced-retry" / "spans").glob("*.jsonl"))

    assert 1 == len(stores)  # the job's; the worker and the fork server have none
    assert (2, 1) == (ran["requests"], ran["completed"])
    assert "job_entrypoint" == root["name"]
    assert 2 == len(named(spans, semconv.SPAN_ATTEMPT))
    assert 1 == len(named(spans, "job_shutdown"))
    assert [] == orphans(spans)


def test_a_server_that_hangs(tmp_path):
    """The job's process ends in its own time; LiveKit need not kill it."""
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        endpoint = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        ran, _, log = run_agent(
            ROOT / "examples" / "agent.py",
            state=tmp_path,
            OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        )
    (ended,) = ran["ended"]

    assert 1 == ran["completed"]
    assert (0, False) == (ended["exitcode"], ended["killed"])
    assert ended["seconds"] < 8
    assert "was not delivered within 1.5 s" in log


class TestPrometheus:
    @staticmethod
    def run(tmp_path, *arguments):
        ran, _, _ = run_agent(ROOT / "examples" / "agent_prometheus.py", *arguments, state=tmp_path)
        return ran

    @staticmethod
    def series(scraped, name):
        """The values of a metric, by its labels as written."""
        lines = (line.rpartition(" ") for line in scraped.splitlines())
        return {
            of.removeprefix(name): float(value)
            for of, _, value in lines
            if of.startswith(f"{name}{{")
        }

    def test_scraped(self, tmp_path):
        """Counts of jobs that have ended are on LiveKit's /metrics, and add up."""
        ran = self.run(tmp_path, "--jobs", 2, "--script", "rate_limit:0.1,ok,ok")
        replies = self.series(ran["scraped"], "traced_retry_replies_total")
        attempts = self.series(ran["scraped"], "traced_retry_attempts_total")
        silence = self.series(ran["scraped"], "traced_retry_reply_duration_seconds_count")
        provider = 'gen_ai_provider_name="openai"'

        assert 1 == replies[f'{{{provider},traced_retry_outcome="recovered"}}']
        assert 1 == replies[f'{{{provider},traced_retry_outcome="succeeded"}}']
        assert 2 == sum(replies.values())
        assert 3 == sum(attempts.values())
        assert 2 == sum(silence.values())
        assert {0.0} == set(self.series(ran["scraped"], "traced_retry_in_flight").values())
        assert "room" not in ran["scraped"]

    def test_a_killed_process(self, tmp_path):
        """What a job counted before it was killed is not lost."""
        ran = self.run(tmp_path, "--kill")

        assert 1 == sum(self.series(ran["scraped"], "traced_retry_replies_total").values())


def test_what_differs_for_prometheus():
    """Of the code, one import and the server; the entrypoint is the same."""
    plain, scraped = (
        (ROOT / "examples" / name).read_text().split('"""', 2)[2]
        for name in ("agent.py", "agent_prometheus.py")
    )

    assert plain.replace("import traced_retry\n", "import traced_retry\nIMPORT\n").replace(
        "server = AgentServer()", "SERVER"
    ) == (
        scraped.replace("from traced_retry.export import prometheus\n", "IMPORT\n").replace(
            scraped[scraped.index("server = ") : scraped.index("\n)\n") + 2], "SERVER"
        )
    )
