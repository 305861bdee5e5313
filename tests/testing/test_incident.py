# SPDX-License-Identifier: Apache-2.0
"""The spans of an incident become a script, and an agent that meets it ends the same way."""

from __future__ import annotations

import pytest
from livekit.agents import Agent, AgentSession
from livekit.agents.utils import http_context
from livekit.plugins import openai, ultravox

import traced_retry
from traced_retry.core.budget import refill
from traced_retry.report import Reply
from traced_retry.report.read import order, replies_of
from traced_retry.simulator import PROVIDERS, Script, simulator
from traced_retry.simulator.reach import _LINES
from traced_retry.testing.incident import SIMULATOR_OF, incident_script
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
] + [("ultravox", "late:7,ok"), ("ultravox", "ok,silence,ok")]
MODELS = {
    "openai": lambda url: openai.realtime.RealtimeModel(
        api_key="x", base_url=url, modalities=["text"]
    ),
    "ultravox": lambda url: ultravox.realtime.RealtimeModel(
        api_key="x", base_url=url, output_medium="text"
    ),
}


async def call(provider, script, recorder, replies=3):
    """Have an agent give three replies; return them as stored."""
    refill()
    before = len(recorder.spans())
    async with simulator(provider)(script) as server, http_context.open():
        model = traced_retry.wrap(MODELS[provider](server.url), **recorder.providers)
        session = AgentSession(llm=model)
        await session.start(Agent(instructions="Be brief."))
        for _ in range(replies):
            await session.generate_reply(instructions="Say hello.")
        await session.aclose()
    return sorted(replies_of(_as_stored(span) for span in recorder.spans()[before:]), key=order)


@pytest.mark.parametrize(("provider", "script"), INCIDENTS)
async def test_replayed_agent_has_the_same_outcomes(provider, script, recorder):
    """Outcome, stop reason and number of requests of each reply are the same."""
    incident = await call(provider, script, recorder)
    found = incident_script(incident)
    replayed = await call(provider, str(found), recorder)

    def ended(replies):
        return [(r.outcome, r.stop_reason, r.attempt_count) for r in replies]

    assert incident  # a fatal error ends the call before the last reply
    assert ended(incident) == ended(replayed), str(found)
    assert found == Script.parse(str(found))


def test_several_providers_are_refused():
    """The message lists the providers."""
    replies = [Reply("t", "s", name, 0.0, 1.0, outcome="exhausted") for name in ("openai", "x_ai")]

    with pytest.raises(traced_retry.UsageError, match="for one provider, and there are openai, x_"):
        incident_script(replies)


def test_provider_without_a_simulator_is_refused():
    """The message names the provider."""
    with pytest.raises(traced_retry.UsageError, match="'mine' has no simulator"):
        incident_script([Reply("t", "s", "mine", 0.0, 1.0, outcome="exhausted")])


def test_each_provider_has_a_constructor_and_a_simulator():
    """A new simulator needs lines that reach it, and a provider name in the spans."""
    assert set(PROVIDERS) == set(_LINES)
    assert set(PROVIDERS) == {*SIMULATOR_OF.values(), "gpt-live", "nvidia"}
