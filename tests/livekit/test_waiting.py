# SPDX-License-Identifier: Apache-2.0
"""on_waiting: a reply without output is reported once, whoever started it."""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import Agent, function_tool
from livekit.agents.llm import RealtimeModelFallbackAdapter
from support.conversation import Calls, now
from support.providers import GOOGLE, NOVA_SONIC, OPENAI, PHONIC, PROVIDERS, ULTRAVOX

import traced_retry
from traced_retry.simulator.openai_compatible import XAISimulator

OBSERVED = {"google": GOOGLE, "ultravox": ULTRAVOX, "phonic": PHONIC}


@pytest.fixture
def waits():
    """Return an empty list of waiting replies."""
    return Calls()


async def speak(talk, transcript="hello"):
    """Have the caller speak once, and return the time at which they stopped."""
    await talk.server.wait_for("connected")
    await asyncio.sleep(1.0)  # until the server knows the session's configuration
    await talk.server.caller_speaks(transcript)
    return now()


class TestAgent:
    @pytest.mark.parametrize("provider", PROVIDERS, indirect=True)
    async def test_late_answer_is_reported_once(self, provider, start_conversation, waits):
        """The callback gets provider, model, session and speech of a reply that takes 3 s."""
        talk = await start_conversation("late:3", on_waiting=waits)
        began = now()
        handle = talk.ask()
        await handle
        await talk.settle()

        assert 1 == len(talk.heard)
        (waiting,) = waits
        assert (provider.name, talk.model.model) == (waiting.provider, waiting.model)
        assert (handle, talk.session) == (waiting.speech, waiting.session)
        assert ("agent", False) == (waiting.initiator, waiting.started)
        assert 2.0 == pytest.approx(waiting.seconds, abs=0.01)
        assert began + 2.0 == pytest.approx(waits.at[0], abs=0.6)

    @pytest.mark.parametrize("script", ["ok", "late:1", "error:invalid_value", "slow:5"])
    async def test_reply_with_output_or_end_in_time_is_not_reported(
        self, script, start_conversation, waits
    ):
        """There is no call for a reply that was heard or lost within 2 s."""
        talk = await start_conversation(script, on_waiting=waits)
        await talk.reply()
        await talk.settle()

        assert [] == waits

    async def test_reply_that_is_lost_is_reported_once(self, start_conversation, waits, recorder):
        """All attempts of a reply cause one call, with the trace id of the reply's span."""
        talk = await start_conversation("silence", on_waiting=waits)
        assert await talk.reply() is not None

        (waiting,) = waits
        (span,) = recorder.spans("generate_reply")
        assert format(span.context.trace_id, "032x") == waiting.trace_id

    async def test_response_without_words_has_started(self, start_conversation, waits):
        """The callback knows that the provider has begun a response."""
        talk = await start_conversation("stalled", on_waiting=waits)
        await talk.reply()

        assert [True] == [waiting.started for waiting in waits]

    @pytest.mark.parametrize("after", [0, 0.5, 4.0])
    async def test_time_is_a_setting(self, after, start_conversation, waits):
        """waiting_after sets the time of the call."""
        talk = await start_conversation("late:6", on_waiting=waits, waiting_after=after)
        await talk.reply()

        assert [after] == [pytest.approx(waiting.seconds, abs=0.01) for waiting in waits]

    async def test_interrupted_reply_is_not_reported(self, start_conversation, waits):
        """There is no call for a reply that nobody waits for."""
        talk = await start_conversation("silence", on_waiting=waits)
        handle = await talk.ask_agent()
        handle.interrupt()
        await talk.settle()

        assert [] == waits

    async def test_reply_to_tool_result_is_reported(self, start_conversation, waits):
        """The tool call is output, and the reply to its result is another reply."""

        @function_tool
        async def look_up() -> str:
            """Look an order up."""
            await asyncio.sleep(5)
            return "SECRET"

        agent = Agent(instructions="SECRET", tools=[look_up])
        talk = await start_conversation("tool:look_up,late:3", agent=agent, on_waiting=waits)
        talk.ask()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert [7.0] == [pytest.approx(at, abs=0.1) for at in waits.at]

    async def test_say_is_not_reported(self, start_conversation, waits):
        """The callback may itself use say()."""
        talk = await start_conversation(
            "ok",
            provider=PROVIDERS["xai"],
            simulator=lambda script: XAISimulator(script, say="late:3"),
            on_waiting=waits,
        )
        await talk.session.say("hello")

        assert [] == waits

    async def test_model_that_falls_back_names_its_session(self, start_conversation, waits):
        """The session is the agent's, also if the model is one of several."""
        talk = await start_conversation(
            "late:3",
            model=lambda **kwargs: RealtimeModelFallbackAdapter([OPENAI.model(**kwargs)]),
            on_waiting=waits,
        )
        await talk.reply()

        assert [("openai", talk.session)] == [(w.provider, w.session) for w in waits]


class TestProvider:
    async def test_late_answer_is_reported_once(self, start_conversation, waits):
        """The time counts from the end of the caller's speech, and there is no speech handle."""
        talk = await start_conversation("turn:late:3", on_waiting=waits)
        stopped = await speak(talk)
        await talk.settle()

        assert ["answer 1"] == talk.heard
        (waiting,) = waits
        assert ("openai", "gpt-realtime", "provider") == (
            waiting.provider,
            waiting.model,
            waiting.initiator,
        )
        assert (None, talk.session, False) == (waiting.speech, waiting.session, waiting.started)
        assert stopped + 2.0 == pytest.approx(waits.at[0], abs=0.01)

    async def test_response_without_words_has_speech(self, start_conversation, waits):
        """LiveKit has a speech handle as soon as the provider has begun a response."""
        talk = await start_conversation("turn:stalled", on_waiting=waits)
        speeches = []
        talk.session.on("speech_created", lambda event: speeches.append(event.speech_handle))
        await speak(talk)
        await talk.settle()

        assert [(True, speeches[0])] == [(w.started, w.speech) for w in waits]

    @pytest.mark.parametrize("provider", OBSERVED.values(), ids=OBSERVED)
    async def test_turn_is_reported_on_providers_without_ids(
        self, provider, start_conversation, waits
    ):
        """A turn that the provider has heard and not answered is reported after 2 s."""
        talk = await start_conversation("turn:late:4", provider=provider, on_waiting=waits)
        await speak(talk)
        await talk.settle()

        assert ["answer 1"] == talk.heard
        assert [("provider", 2.0)] == [
            (w.initiator, pytest.approx(w.seconds, abs=0.2)) for w in waits
        ]

    async def test_nova_sonic_does_not_report_end_of_speech(self, start_conversation, waits):
        """The wait cannot be counted, because the first sign of a turn is its reply."""
        talk = await start_conversation("turn:late:4", provider=NOVA_SONIC, on_waiting=waits)
        await speak(talk)
        await talk.settle()

        assert (["answer 1"], []) == (talk.heard, waits)

    async def test_caller_who_speaks_again_ends_wait(self, start_conversation, waits):
        """Only the turn that the caller waits for is reported."""
        talk = await start_conversation("turn:silence,turn:late:3", on_waiting=waits)
        await speak(talk)
        await asyncio.sleep(0.5)
        stopped = await speak(talk)
        await talk.settle()

        assert [stopped + 2.0] == [pytest.approx(at, abs=0.01) for at in waits.at]


class TestCallback:
    @pytest.mark.parametrize("script", ["late:3", "silence", "stalled", "turn:late:3"])
    async def test_coroutine_is_cancelled_when_wait_ends(self, script, start_conversation):
        """A coroutine runs until the first output, or until the reply is lost."""
        times = []

        async def on_waiting(_):
            times.append(now())
            try:
                await asyncio.Event().wait()
            finally:
                times.append(now())

        talk = await start_conversation(
            script, on_waiting=on_waiting, max_retries=0, attempt_timeout=6.0
        )
        await speak(talk) if "turn" in script else await talk.ask_agent()
        began = now()
        await talk.settle()

        seconds = 3.0 if "late" in script else 6.0
        assert [began + 2.0, began + seconds] == [pytest.approx(at, abs=0.01) for at in times]

    async def test_coroutine_is_cancelled_by_interruption(self, start_conversation):
        """The callback does not outlive a reply that the caller interrupted."""
        cancelled = []

        async def on_waiting(_):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(now())

        talk = await start_conversation("silence", on_waiting=on_waiting)
        handle = await talk.ask_agent()
        await asyncio.sleep(3.0)
        handle.interrupt()
        await handle

        assert 1 == len(cancelled)

    @pytest.mark.parametrize("later", [False, True])
    async def test_exception_is_logged_once_and_changes_no_reply(
        self, later, start_conversation, caplog
    ):
        """The log record has neither the text of the exception nor of the conversation."""

        def raises(_):
            raise ValueError("SECRET")

        async def raises_later(_):
            await asyncio.sleep(0.1)
            raise ValueError("SECRET")

        talk = await start_conversation("late:3", on_waiting=raises_later if later else raises)
        assert [None, None] == [await talk.reply(), await talk.reply()]

        records = [r.getMessage() for r in caplog.records if r.name == "traced_retry"]
        assert ["on_waiting raised ValueError"] == [r.split(" at ")[0] for r in records]
        assert 2 == len(talk.heard)

    async def test_disabled_process_reports_no_wait(self, start_conversation, waits):
        """disable() switches the callback off."""
        talk = await start_conversation("late:3", on_waiting=waits)
        traced_retry.disable()
        await talk.reply()

        assert [] == waits
