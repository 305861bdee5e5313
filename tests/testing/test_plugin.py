# SPDX-License-Identifier: Apache-2.0
"""The fixtures that pytest finds by itself, each in a test run of a user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.fresh import program

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
HEAD = """
import asyncio, pytest, traced_retry
from livekit.agents import Agent, AgentSession
from livekit.plugins import openai
"""
TEST = f"""{HEAD}import aiohttp

@pytest.mark.asyncio
@pytest.mark.virtual_clock
async def test_agent(realtime_server, retry_spans):
"""
SESSION = """
    async with realtime_server("rate_limit:3,ok") as server, aiohttp.ClientSession() as http:
        model = openai.realtime.RealtimeModel(
            api_key="a-key", base_url=server.url, modalities=["text"], http_session=http
        )
        session = AgentSession(llm=traced_retry.wrap(model))
        await session.start(Agent(instructions="Be brief."))
        await session.generate_reply()
        await session.aclose()
"""


@pytest.fixture
def user_tests(tmp_path):
    """Run a test file in a forked process, or in a new interpreter, and return its output."""

    def user_tests(code, *options, forked=True):
        (tmp_path / "pytest.ini").touch()
        (tmp_path / "test_user.py").write_text(code)
        environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
        arguments = ["-p", "no:randomly", *options, "test_user.py"]
        if forked:
            pytest_main = "import pytest; raise SystemExit(pytest.main())"
            done = program(
                pytest_main, "pytest", *arguments, environ=environ, cwd=tmp_path, timeout=120
            )
            return done.stdout
        return subprocess.run(
            [sys.executable, "-P", "-m", "pytest", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environ,
        ).stdout

    return user_tests


def test_server_spans_and_virtual_clock(user_tests):
    """A test waits for a rate limit of 3 s on the virtual clock, and reads the traced reply."""
    output = user_tests(
        TEST
        + SESSION
        + """
    (reply,) = retry_spans
    assert ("recovered", 2, ("rate_limit_exceeded",)) == (
        reply.outcome, reply.attempt_count, reply.codes
    )
    assert [] == retry_spans.failed
    assert 3 <= asyncio.get_running_loop().time() < 30
    assert 2 == len(server.requests)
"""
    )

    assert "1 passed" in output, output


def test_plain_test_uses_run(user_tests):
    """Without pytest-asyncio, ``run`` has the virtual clock."""
    output = user_tests(
        HEAD
        + """
import aiohttp
from traced_retry.testing import run

def test_agent(realtime_server, retry_spans):
    run(conversation(realtime_server))
    assert "recovered" == retry_spans[0].outcome

async def conversation(realtime_server):
"""
        + SESSION,
        "-p",
        "no:asyncio",
    )

    assert "1 passed" in output, output


RETRIES = """
import pytest, traced_retry
from traced_retry.testing import run

failures = 0
policy = traced_retry.RetryPolicy(base_delay=0.0)

@traced_retry.retry(provider="mine", policy=policy)
async def ask():
    global failures
    failures += 1
    if failures % 4:
        raise ConnectionError

@pytest.mark.parametrize("number", range(6))
def test_three_retries(number, retry_spans):
    run(ask())
    assert 4 == retry_spans[0].attempt_count
    assert 1 == len(retry_spans)
"""


def test_each_test_has_a_full_retry_budget(user_tests):
    """Eighteen retries in six tests are sent, also by a policy that is older than the tests."""
    output = user_tests(RETRIES)

    assert "6 passed" in output, output


def test_without_the_plugin_the_eleventh_retry_is_refused(user_tests):
    """The fixture is the reason for the result above: three tests spend nine of ten retries."""
    code = RETRIES.replace("number, retry_spans", "number").replace("    assert", "    # ")
    output = user_tests(code, "-p", "no:traced_retry")

    assert "stopped by budget" in output, output


def test_spans_of_enable(user_tests):
    """An agent that calls ``enable()`` is traced into the fixture, and no store is written."""
    output = user_tests(
        TEST
        + """\
    assert "the global tracer provider" == traced_retry.enable().destination
"""
        + SESSION.replace("traced_retry.wrap(model)", "model")
        + """
    assert "recovered" == retry_spans[0].outcome
"""
    )

    assert "1 passed" in output, output


@pytest.mark.parametrize("block", BLOCKS, ids=["verdict", "fixtures"])
def test_block_of_the_page_passes(user_tests, block):
    """A user can copy the tests of docs/testing.md."""
    output = user_tests(block)

    assert "1 passed" in output, output


def test_unknown_provider(user_tests):
    """The error lists the providers."""
    output = user_tests(
        """
def test_agent(realtime_server):
    realtime_server("ok", provider="opnai")
"""
    )

    assert "provider is 'opnai'; it must be one of openai, xai" in output


def test_other_tests_import_nothing_of_it(user_tests):
    """A test without the fixtures loads neither LiveKit nor the SDK."""
    output = user_tests(
        """
import sys

def test_modules():
    names = ("livekit", "opentelemetry.sdk", "aiohttp", "rich")
    assert [] == [name for name in names if name in sys.modules]
""",
        forked=False,
    )

    assert "1 passed" in output, output
