# SPDX-License-Identifier: Apache-2.0
"""The spans of an incident become a script, and an agent that meets it ends the same way."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession
from support.providers import CONN_OPTIONS, PROVIDERS
from support.recorder import Recorder

import traced_retry
from traced_retry.core.budget import refill
from traced_retry.report import Reply
from traced_retry.report.read import order, replies_of
from traced_retry.simulator import PROVIDERS as SIMULATED
from traced_retry.simulator import Script
from traced_retry.simulator.reach import _LINES
from traced_retry.testing.incident import SIMULATOR_OF, incident_script, simulator_name
from traced_retry.testing.spans import _as_stored

INCIDENTS = [
    ("openai", script)
    for script in (
        "ok",
        "rate_limit,ok",
        "rate_limit:2,ok",
        "error:server_error,error:server_error,ok",
        "rate_limit",
        "error:model_not_found,ok",
        "error:insufficient_quota",
        "silence,ok",
        "late:3,ok",
        "late:12,ok",
        "drop_before,ok",
        "drop_before,drop_before,rate_limit,ok",
        "active:0.5,ok",
        "failed,ok",
        "failed_message,failed_later,ok",
        "failed_during,ok",
        "empty,ok",
        "uncorrelated,silence,ok",
    )
] + [
    ("openai", "turn:failed,ok"),
    ("openai", "turn:failed_message,turn:ok,rate_limit,ok"),
    ("xai", "turn:failed_during,ok"),
    ("xai", "error:server_error,ok"),
    ("azure openai", "rate_limit,drop_before,ok"),
    ("voicelive", "error:server_error,ok"),
    ("google", "ok,error:1011,ok"),
    ("google", "turn:ok,rate_limit"),
    ("ultravox", "late:7,ok"),
    ("ultravox", "ok,silence,ok"),
    ("ultravox", "turn:drop_before,ok"),
    ("phonic", "late:3,ok,turn:ok"),
    ("phonic", "drop_before"),
    ("aws", "late:3,ok"),
]


async def call(provider, script):
    """Have an agent give three replies, and let the caller speak; return the replies as stored."""
    refill()
    recorder, case = Recorder(), PROVIDERS[provider]
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(case.simulator(script))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        stack.enter_context(case.redirected(server))
        model = case.model(
            api_key="x", http_session=http, conn_options=CONN_OPTIONS, **case.address(server)
        )
        traced_retry.wrap(model, **recorder.providers)
        session = await stack.enter_async_context(AgentSession(llm=model))
        await session.start(Agent(instructions="Be brief."))
        await case.until_ready(case.conversation(server, model, session))
        for _ in range(3):
            with contextlib.suppress(RuntimeError):  # A fatal error has ended the call.
                await session.generate_reply(instructions="Say hello.")
                if "turn:" in script:
                    await asyncio.sleep(30)
                    await server.caller_speaks()
                    await asyncio.sleep(30)
    recorder.shutdown()
    return sorted(replies_of(_as_stored(span) for span in recorder.spans()), key=order)


@pytest.mark.parametrize(("provider", "script"), INCIDENTS)
async def test_replayed_agent_has_the_same_outcomes(provider, script):
    """Initiator, outcome, stop reason and number of requests of each reply are the same."""
    incident = await call(provider, script)
    found = incident_script(incident)
    replayed = await call(provider, str(found))

    def ended(replies):
        return [(r.initiator, r.outcome, r.stop_reason, r.attempt_count) for r in replies]

    assert ("turn:" in script) == ("provider" in {r.initiator for r in incident})
    assert incident  # a fatal error ends the call before the last reply
    assert ended(incident) == ended(replayed), str(found)
    assert found == Script.parse(str(found))


def test_several_providers_are_refused():
    """The message lists the providers."""
    replies = [Reply("t", "s", name, 0.0, 1.0, outcome="exhausted") for name in ("openai", "x_ai")]

    with pytest.raises(traced_retry.UsageError, match="for one provider, and there are openai, x_"):
        incident_script(replies)


def test_duplex_model_has_its_own_simulator():
    """GPT-Live's spans name OpenAI as their provider, and its protocol differs."""
    reply = Reply("t", "s", "openai", 0.0, 1.0, outcome="exhausted", model="gpt-live-1")

    assert "gpt-live" == simulator_name([reply])


def test_provider_without_a_simulator_is_refused():
    """The message names the provider."""
    with pytest.raises(traced_retry.UsageError, match="'mine' has no simulator"):
        incident_script([Reply("t", "s", "mine", 0.0, 1.0, outcome="exhausted")])


def test_each_provider_has_a_constructor_and_a_simulator():
    """A new simulator needs lines that reach it, and a provider name in the spans."""
    assert set(SIMULATED) == set(_LINES)
    assert set(SIMULATED) == {*SIMULATOR_OF.values(), "gpt-live", "nvidia"}
