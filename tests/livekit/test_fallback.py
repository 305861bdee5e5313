# SPDX-License-Identifier: Apache-2.0
"""LiveKit's RealtimeModelFallbackAdapter over two different providers, both with their own plugin.

What the adapter does by itself (livekit-agents 1.8.9, ``llm/realtime_fallback_adapter.py``): on an
unrecoverable error of the active model it swaps to the next one. It first interrupts the agent, and
asks again on the new model only if the agent was "thinking" or "speaking". Of a reply that was
asked for and has not begun the agent is still "listening", unless a tool's result asked for it. So
a plain reply that is pending at a swap is lost; all we can do is to say so, and to add nothing.
"""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import Agent, function_tool, llm
from livekit.plugins import openai
from livekit.plugins.azure import realtime as azure

import traced_retry
from traced_retry import RetryPolicy
from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.azure import VoiceLiveSimulator


def make_openai(*, base_url, **kwargs):
    """A text-only OpenAI model."""
    return openai.realtime.RealtimeModel(base_url=base_url, modalities=["text"], **kwargs)


def make_voicelive(*, base_url, http_session, **kwargs):
    """A text-only VoiceLive model."""
    return azure.RealtimeModel(endpoint=base_url, modalities=["text"], **kwargs)


BOTH = {
    "openai": (OpenAISimulator, make_openai),
    "azure_voicelive": (VoiceLiveSimulator, make_voicelive),
}
ORDERS = [("openai", "azure_voicelive"), ("azure_voicelive", "openai")]
OURS = ["wrap", "instrument"]


class Helper(Agent):
    """Has a tool: the reply that its result asks for is pending while the agent is "thinking"."""

    def __init__(self):
        super().__init__(instructions="SECRET")

    @function_tool
    async def look_up(self) -> str:
        """Look it up."""
        return "found"


@pytest.fixture(params=OURS)
def how(request):
    """How the adapter is hooked."""
    return request.param


@pytest.fixture(params=ORDERS, ids=" then ".join)
def order(request):
    """Names of the primary and of the second."""
    return request.param


@pytest.fixture
async def second(order):
    """The second model's server; it answers."""
    async with BOTH[order[1]][0]("ok") as server:
        yield server


@pytest.fixture
def start_with_fallback(start_conversation, how, order, second, recorder):
    """Return a function that starts a conversation. Its script is the primary's."""

    def make(*, base_url, **kwargs):
        primary = BOTH[order[0]][1](base_url=base_url, **kwargs)
        fallback = BOTH[order[1]][1](base_url=second.url, **kwargs)
        return llm.RealtimeModelFallbackAdapter([primary, fallback])

    if how == "instrument":
        traced_retry.instrument(policy=RetryPolicy(), **recorder.providers)

    async def start(script, **kwargs):
        return await start_conversation(
            script,
            model=make,
            simulator=BOTH[order[0]][0],
            agent=Helper(),
            bare=how != "wrap",
            **kwargs,
        )

    yield start
    traced_retry.uninstrument()


def failure_from_event(recorder):
    """Provider, outcome and stop reason of each reply."""
    names = ("gen_ai.provider.name", "traced_retry.outcome", "traced_retry.stop_reason")
    return [tuple(reply.get(name) for name in names) for reply in recorder.replies]


def attempts(recorder):
    """Provider, and error code or type, of each attempt."""
    return [
        (a["gen_ai.provider.name"], a.get("traced_retry.error_code", a.get("error.type")))
        for a in recorder.attempts
    ]


async def asked(talk, number):
    """Until the primary has heard that many requests, and a second more."""
    await talk.server.wait_for(lambda: len(talk.server.requests) == number)
    await asyncio.sleep(1)


class TestWithoutASwap:
    async def test_primary_recovers_without_second_model(
        self, start_with_fallback, order, second, recorder
    ):
        """One loop runs around the active model, and the second model is not connected to."""
        talk = await start_with_fallback("rate_limit,ok")

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert [(order[0], "recovered", None)] == failure_from_event(recorder)
        assert [(order[0], "rate_limit_exceeded"), (order[0], None)] == attempts(recorder)
        assert 0 == second.connections


@pytest.mark.parametrize("order", ORDERS[:1], indirect=True, ids=["openai first"])
class TestQuota:
    """Fatal on OpenAI: its plugin ends the session, and the adapter swaps."""

    async def test_quota_fails_at_once_and_next_reply_uses_second_model(
        self, start_with_fallback, second, recorder
    ):
        """The failure is known at once with its code, and the second model answers the next."""
        talk = await start_with_fallback("quota")
        began = asyncio.get_running_loop().time()

        error = await talk.reply()
        took = asyncio.get_running_loop().time() - began
        await talk.settle()
        assert "insufficient_quota" == error.code
        assert took <= 0.1
        assert [] == talk.heard
        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard == second.completed
        assert (1, 1) == (len(talk.server.requests), len(second.requests))
        assert [
            ("openai", "not_recoverable", "not_recoverable"),
            ("azure_voicelive", "succeeded", None),
        ] == failure_from_event(recorder)
        assert [("openai", "insufficient_quota"), ("azure_voicelive", None)] == attempts(recorder)
        assert 0 == recorder.open_spans

    async def test_reply_during_swap_is_answered_once_by_second_model(
        self, start_with_fallback, second, recorder
    ):
        """A reply that is requested during the swap is answered once, by the second model."""
        talk = await start_with_fallback("quota")

        await talk.reply()
        await talk.reply()
        await talk.settle(30)

        assert ["reply 1"] == talk.heard == second.completed
        assert (1, 1) == (len(talk.server.requests), len(second.requests))
        assert ["not_recoverable", "succeeded"] == [
            outcome for _, outcome, _ in failure_from_event(recorder)
        ]

    async def test_queued_reply_is_reported(self, start_with_fallback, second, recorder):
        """The swap interrupts a queued reply. The adapter alone: its handle has no error."""
        talk = await start_with_fallback("quota")
        first, queued = talk.ask(), talk.ask()
        await asyncio.gather(first, queued)
        await talk.settle()

        assert isinstance(queued.exception(), llm.RealtimeError)
        assert 2 * [("openai", "not_recoverable", "not_recoverable")] == failure_from_event(
            recorder
        )
        assert None is await talk.reply()
        assert ["reply 1"] == talk.heard == second.completed

    @pytest.mark.parametrize("how", ["bare"], indirect=True)
    async def test_adapter_alone_drops_reply_that_met_quota(self, start_with_fallback, second):
        """The adapter alone does not request that reply of the second model either."""
        talk = await start_with_fallback("quota")

        error = await talk.reply()
        await talk.settle()

        assert "insufficient_quota" == error.code
        assert [] == talk.heard
        assert [] == second.requests
        assert 1 == second.connections


class TestSwapWhileAReplyIsPending:
    @pytest.mark.parametrize("script", ["silence", "rate_limit:10"])
    async def test_swap_interrupts_pending_reply(
        self, script, start_with_fallback, order, second, recorder
    ):
        """The swap interrupts an attempt or a wait, and nothing is sent afterwards."""
        talk = await start_with_fallback(script)
        handle = talk.ask()
        await asked(talk, 1)
        await talk.model.restart_session(switch_model=True)
        await handle
        await talk.settle(30)

        assert [(order[0], "interrupted", "interrupted")] == failure_from_event(recorder)
        assert [] == talk.heard
        assert (1, 0) == (len(talk.server.requests), len(second.requests))
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", ["tool:look_up,silence", "tool:look_up,rate_limit:10"])
    async def test_swap_moves_tool_reply_to_second_model(
        self, script, start_with_fallback, order, second, recorder
    ):
        """The reply is heard once on the second model, and the retry of the first has stopped."""
        talk = await start_with_fallback(script)
        talk.ask()
        await asked(talk, 2)
        await talk.model.restart_session(switch_model=True)
        await talk.settle(30)

        assert ["reply 1"] == talk.heard == second.completed
        assert (2, 1) == (len(talk.server.requests), len(second.requests))
        assert [
            (order[0], "succeeded", None),
            (order[0], "interrupted", "interrupted"),
            (order[1], "succeeded", None),
        ] == failure_from_event(recorder)
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("how", ["bare"], indirect=True)
    @pytest.mark.parametrize(
        ("script", "heard"),
        [
            ("tool:look_up,silence", ["reply 1"]),
            ("tool:look_up,rate_limit:10", []),  # told of failure at once, so no longer "thinking"
        ],
    )
    async def test_adapter_alone_moves_tool_reply_to_second_model(
        self, script, heard, start_with_fallback
    ):
        """The adapter alone requests a tool's reply of the second model."""
        talk = await start_with_fallback(script)
        talk.ask()
        await asked(talk, 2)
        await talk.model.restart_session(switch_model=True)
        await talk.settle(30)

        assert heard == talk.heard

    async def test_swap_while_speaking_makes_two_replies(
        self, start_with_fallback, order, second, recorder
    ):
        """The adapter cuts the reply short and requests it again; both are replies."""
        talk = await start_with_fallback("slow:5")
        talk.ask()
        await asked(talk, 1)
        await talk.model.restart_session(switch_model=True)
        await talk.settle(30)

        assert ["reply", "reply 1"] == talk.heard
        assert [(order[0], "succeeded", None), (order[1], "succeeded", None)] == failure_from_event(
            recorder
        )


class TestAServerThatDies:
    async def test_dead_server_fails_pending_reply(
        self, start_with_fallback, order, second, recorder
    ):
        """The reply fails as soon as the plugin gives up, and is not requested again."""
        talk = await start_with_fallback("silence")
        handle = talk.ask()
        await asked(talk, 1)
        began = asyncio.get_running_loop().time()
        await talk.server.close()
        await handle
        took = asyncio.get_running_loop().time() - began
        await talk.settle(30)

        assert [(order[0], "not_recoverable", "not_recoverable")] == failure_from_event(recorder)
        assert [(order[0], "connection_lost")] == attempts(recorder)
        assert [] == talk.heard
        assert [] == second.requests
        assert 1 == second.connections
        assert took <= 1.2
        assert 0 == recorder.open_spans

    async def test_dead_server_moves_tool_reply_to_second_model(
        self, start_with_fallback, order, second, recorder
    ):
        """The adapter requests the reply again, and it is heard once on the second model."""
        talk = await start_with_fallback("tool:look_up,silence")
        talk.ask()
        await asked(talk, 2)
        await talk.server.close()
        await talk.settle(30)

        assert ["reply 1"] == talk.heard == second.completed
        assert [
            (order[0], "succeeded", None),
            (order[0], "not_recoverable", "not_recoverable"),
            (order[1], "succeeded", None),
        ] == failure_from_event(recorder)
        assert 0 == recorder.open_spans


class TestRefusedOnReconnect:
    """The key is revoked in the middle of a call, while a tool's reply is pending."""

    @pytest.mark.parametrize("how", ["bare"], indirect=True)
    async def test_adapter_alone_swaps_after_refused_reconnect(self, start_with_fallback, second):
        """The adapter requests of the second model once the plugin gives up, 1.1 s later."""
        talk = await start_with_fallback("tool:look_up,unauthorized")
        talk.ask()
        await asked(talk, 2)
        await talk.settle(30)

        assert ["reply 1"] == talk.heard

    async def test_refused_reconnect_is_left_to_adapter(
        self, start_with_fallback, order, second, recorder
    ):
        """Behind a fallback a refusal is left to the adapter, as without traced-retry."""
        talk = await start_with_fallback("tool:look_up,unauthorized")
        talk.ask()
        await asked(talk, 2)
        await talk.settle(30)

        assert ["reply 1"] == talk.heard
        assert [
            (order[0], "not_recoverable", "not_recoverable"),
            (order[1], "succeeded", None),
        ] == failure_from_event(recorder)[-2:]
