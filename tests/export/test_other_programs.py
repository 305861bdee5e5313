# SPDX-License-Identifier: Apache-2.0
"""Programs under ``opentelemetry-instrument`` that are unrelated to realtime replies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTRUMENT = str(Path(sys.executable).with_name("opentelemetry-instrument"))

STATE = '''
import json, multiprocessing, os, sys

def state():
    """Return the facts that our package might have changed in this process."""
    from opentelemetry import metrics, trace

    with trace.get_tracer("program").start_as_current_span("secret") as span:
        recording = span.is_recording()
    providers = (trace.get_tracer_provider(), metrics.get_meter_provider())
    return {
        "finder": any("traced_retry" in type(f).__module__ for f in sys.meta_path),
        "livekit": sorted(m for m in sys.modules if m.split(".")[0] == "livekit"),
        "sdk": [type(p).__module__ for p in providers if "sdk" in type(p).__module__],
        "recording": recording,
    }

def send(connection):
    connection.send(state())
    connection.close()

def child(method):
    """Return the state of a child process."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(there,))
    process.start()
    found = here.recv()
    process.join()
    return found
'''


def run(code, tmp_path, **environ):
    """Run a program under opentelemetry-instrument, and return the JSON that it printed."""
    script = tmp_path / "program.py"
    script.write_text(STATE + code)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OTEL_", "LIVEKIT_", "TRACED_RETRY_", "PROMETHEUS_"))
    }
    done = subprocess.run(
        [INSTRUMENT, sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**kept, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"), **environ},
    )
    assert 0 == done.returncode, done.stderr
    assert "" == done.stderr
    return json.loads(done.stdout)


UNTOUCHED = {"finder": True, "livekit": [], "sdk": [], "recording": False}


def test_unrelated_program_and_its_children_are_not_changed(tmp_path):
    """The package imports no LiveKit, sets no provider and writes no file there."""
    found = run(
        """
if __name__ == "__main__":
    ways = ["fork", "forkserver", "spawn"]
    print(json.dumps([state(), *map(child, ways)]))
""",
        tmp_path,
    )

    assert [UNTOUCHED] * 4 == found
    assert ["program.py"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize(
    "environ",
    [
        {"TRACED_RETRY_DEADLINE": "never"},
        {"OTEL_CONFIG_FILE": "missing.yaml"},
        {"OTEL_TRACES_EXPORTER": "nobody"},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_invalid_setting_is_not_reported_to_an_unrelated_program(environ, tmp_path):
    """A setting of ours is read only if the process uses LiveKit."""
    found = run("\nprint(json.dumps(state()))\n", tmp_path, **environ)

    assert UNTOUCHED == found


def test_program_that_only_imports_livekit_gets_no_provider_and_no_file(tmp_path):
    """LiveKit's worker, its fork server and a token server are such programs."""
    found = run(
        """
import livekit.agents

print(json.dumps(state()))
""",
        tmp_path,
    )

    assert ([], False, False) == (found["sdk"], found["recording"], found["finder"])
    assert ["program.py"] == [path.name for path in tmp_path.iterdir()]


def test_first_realtime_session_is_retried_and_traced(tmp_path):
    """The set-up and the hook are in place before the session, and the policy is in force."""
    found = run(
        """
import asyncio, importlib.util

importlib.util.find_spec("livekit.agents")  # many programs look so for an optional package

from livekit.plugins.openai.realtime import RealtimeModel

async def main():
    before = state()
    session = RealtimeModel(api_key="none", base_url="http://127.0.0.1:9").session()
    hooked = session._traced_retry._config.policy.deadline
    await session.aclose()
    return before["sdk"], state()["sdk"], hooked

print(json.dumps(asyncio.run(main())))
""",
        tmp_path,
        TRACED_RETRY_DEADLINE="7",
    )

    assert [[], ["opentelemetry.sdk.trace"], 7.0] == found


def test_policy_of_the_program_itself_wins(tmp_path):
    """A call of instrument() before the first session is kept, without a warning."""
    found = run(
        """
import asyncio, warnings
import traced_retry
from livekit.plugins.openai.realtime import RealtimeModel

async def main():
    session = RealtimeModel(api_key="none", base_url="http://127.0.0.1:9").session()
    await session.aclose()
    return session._traced_retry._config.policy.deadline

warnings.simplefilter("error")
traced_retry.instrument(policy=traced_retry.RetryPolicy(deadline=3))
print(json.dumps(asyncio.run(main())))
""",
        tmp_path,
        TRACED_RETRY_DEADLINE="7",
    )

    assert 3 == found
