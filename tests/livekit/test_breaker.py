# SPDX-License-Identifier: Apache-2.0
"""The circuit breaker in 50 job processes with OpenAI's real plugin and one server."""

from __future__ import annotations

import asyncio
import itertools
import signal

import pytest
from livekit.agents import llm
from support.brownout import open_circuit
from support.callers import Callers
from support.conversation import ended

from traced_retry.core import breaker
from traced_retry.core.breaker import INTERVAL, SPAN
from traced_retry.simulator import OpenAISimulator, Script

CALLS = 50
OK, DOWN = Script.parse("ok"), Script.parse("error:server_error")


@pytest.fixture
def path(tmp_path):
    """Return the path of a new file. It is closed after the test."""
    yield tmp_path / "breaker"
    breaker.forget()


@pytest.mark.parametrize("provider", ["openai", "google", "ultravox"], indirect=True)
async def test_agent_learns_at_once_that_circuit_is_open(start_conversation, path, recorder):
    """The agent gets an error with the code, the callback is called, and the probe is heard."""
    failed = []
    conversation = await start_conversation("ok", breaker=str(path), on_exhausted=failed.append)
    await asyncio.sleep(SPAN)
    key = conversation.realtime._traced_retry._target.key
    open_circuit(path, key, asyncio.get_running_loop().time())
    error, seconds = await conversation.timed_reply()

    assert (0.0, 0) == (seconds, len(conversation.server.requests))
    assert isinstance(error, llm.RealtimeError)
    assert "circuit_open" == error.code
    assert ["circuit_open"] == [each.stop_reason for each in failed]
    await asyncio.sleep(INTERVAL)
    for _ in range(2):
        assert None is await conversation.reply()
    await conversation.settle()
    assert ["reply 1", "reply 2"] == conversation.heard
    assert [("exhausted", "circuit_open"), ("succeeded", None), ("succeeded", None)] == ended(
        recorder
    )


async def test_probe_is_neither_hedged_nor_retried(start_conversation, path, recorder):
    """A probe is one request, although the policy would hedge it and send it again."""
    conversation = await start_conversation("silence", breaker=str(path), hedge_after=2.5)
    await asyncio.sleep(SPAN)
    key = conversation.realtime._traced_retry._target.key
    open_circuit(path, key, asyncio.get_running_loop().time())
    await asyncio.sleep(INTERVAL)
    error = await conversation.reply()

    assert isinstance(error, llm.RealtimeError)
    assert 1 == len(conversation.server.requests)
    assert [("exhausted", "circuit_open")] == ended(recorder)


@pytest.mark.real_time
async def test_outage_of_50_processes(tmp_path):
    """Replies fail at once while the provider is down, and all calls work soon after it is back.

    Meanwhile five processes are killed and five are stopped for a while. The others go on.
    """
    killed, stopped = range(5), range(5, 10)
    now = asyncio.get_running_loop().time
    async with (
        asyncio.timeout(100),
        OpenAISimulator(OK) as server,
        Callers(CALLS, server.url, tmp_path / "breaker") as callers,
    ):
        replies = callers.replies
        await callers.until(lambda: CALLS == len({each.process for each in replies}))
        assert [] == [each for each in replies if each.stop_reason]

        server.script, down = DOWN, now()
        await callers.until(lambda: any(each.stop_reason == "circuit_open" for each in replies))
        opened = now()
        for number in killed:
            callers.send(number, signal.SIGKILL)
        for number in stopped:
            callers.send(number, signal.SIGSTOP)

        def probes():
            return [request.at for request in server.requests if request.at > opened + 0.5]

        await server.wait_for(lambda: len(probes()) >= 2)
        server.script, up, sent = OK, now(), probes()
        for number in stopped:
            callers.send(number, signal.SIGCONT)

        def well():
            return {each.process for each in replies if each.began > up and not each.stop_reason}

        await callers.until(lambda: CALLS - len(killed) == len(well()))

    assert opened - down <= 12
    refused = [
        each.notified
        for each in replies
        if opened < each.began < up and each.process not in stopped
    ]
    assert len(refused) > 100
    assert max(refused) <= 0.3
    between = [after - before for before, after in itertools.pairwise([opened, *sent])]
    assert [INTERVAL, INTERVAL] == pytest.approx(between, abs=1.0)
    assert max(each.began for each in replies if each.stop_reason) <= up + 6
