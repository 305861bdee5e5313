# SPDX-License-Identifier: Apache-2.0
"""Test that an interrupted reply ends at once, in each state and by each kind of interruption.

The tests use the real plugins and a real AgentSession. The reply ends within 50 ms. Afterwards no
request is sent, no word of it is heard, no span is open, and the next reply is heard once.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from google.genai import types
from livekit.agents import Agent, vad
from livekit.agents.voice.events import CloseReason
from support.conversation import actions, ended
from support.providers import GOOGLE, OPENAI, PROVIDERS, SHARED_ENGINE, ULTRAVOX

import traced_retry
from traced_retry import semconv
from traced_retry.core.loop import Reply
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.livekit.request import PassthroughRequest
from traced_retry.livekit.speech import when_interrupted
from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.ultravox import UltravoxSimulator

SOON = 0.05
"""Seconds within which an interruption has taken effect."""
OURS = str(Path(traced_retry.__file__).parent)
MANUAL = types.RealtimeInputConfig(
    automatic_activity_detection=types.AutomaticActivityDetection(disabled=True)
)

CASES = {
    **PROVIDERS,
    # The agent itself notices that the caller speaks.
    "openai without vad": replace(OPENAI, model=partial(OPENAI.model, turn_detection=None)),
    "google without vad": replace(
        GOOGLE, model=partial(GOOGLE.model, realtime_input_config=MANUAL)
    ),
    # The server announces a reply as soon as it thinks.
    "ultravox": replace(ULTRAVOX, simulator=partial(UltravoxSimulator, thinks=True)),
}


@pytest.fixture(autouse=True)
def longest_waits(monkeypatch):
    """Each wait is as long as the jitter allows, so that it can be interrupted."""
    monkeypatch.setattr(random, "uniform", lambda _, most: most)


@pytest.fixture
def start_slow_retries(start_conversation):
    """Return a function that starts a conversation with that provider and waits of 8 s."""

    async def start_slow_retries(provider, script, **settings):
        settings = {"base_delay": 8.0, **settings}
        return await start_conversation(script, provider=CASES[provider], **settings)

    return start_slow_retries


# --- who interrupts -------------------------------------------------------------------------------


async def the_user_speaks(talk, _):
    """Let the server report speech, which calls LiveKit's ``_on_input_speech_started``."""
    if "aws" in type(talk.server).__module__:
        (client,) = talk.server._clients
        (stream,) = client.streams.values()
        content = stream.start_content("TEXT", "USER")
        stream.send("textOutput", **content, role="USER", content="SECRET words")
        return
    (connection,) = talk.server._open
    if isinstance(talk.server, OpenAISimulator):
        await connection.speech_started()
    elif isinstance(talk.server, UltravoxSimulator):
        await connection.send("playback_clear_buffer")
    else:
        await connection.send("user_started_speaking")


async def audio_activity(talk, _):
    """Let the agent's own VAD report a second of speech."""
    event = vad.VADEvent(
        type=vad.VADEventType.INFERENCE_DONE,
        samples_index=0,
        timestamp=0.0,
        speech_duration=1.0,
        silence_duration=0.0,
        speaking=True,
    )
    talk.session._activity.on_vad_inference_done(event)
    await asyncio.sleep(SOON)
    talk.session._activity.on_end_of_speech(None)


async def session_interrupt(talk, _):
    """Interrupt the current speech from the agent's code."""
    talk.session.interrupt()


async def handle_interrupt(_, handle):
    """Interrupt this reply from the agent's code."""
    handle.interrupt()


async def session_aclose(talk, _):
    """Close the session from the agent's code."""
    await talk.session.aclose()


async def the_room_closes(talk, _):
    """Do the same as LiveKit's RoomIO when the caller hangs up."""
    talk.session._close_soon(reason=CloseReason.PARTICIPANT_DISCONNECTED)


CLOSE = (session_aclose, the_room_closes)
BY_CODE = (session_interrupt, handle_interrupt, *CLOSE)

# --- what is interrupted --------------------------------------------------------------------------

HELD = {
    # state: script, seconds after the request. The agent holds its reply, and nothing was said yet.
    "created and silent": ("stalled,ok", 1.0),
    "message begun and silent": ("failed_message,ok", 0.05),
    "between two generations": ("failed_later,ok", 1.0),
    "between two, message begun": ("failed_message,ok", 1.0),
    "asked again": ("failed_later,late:5,ok", 8.5),
    "created again": ("failed_later,stalled,ok", 8.5),
}
CORRELATED = {
    "attempt": ("late:5,ok", 1.0),
    "wait": ("rate_limit,ok", 1.0),
    "second attempt": ("rate_limit,late:5,ok", 8.5),
    **HELD,
}
GOOGLE = {
    "attempt": ("late:12,ok", 1.0),
    "listening": ("late:12,ok", 7.0),
    "restarted": ("silence,late:12,ok", 12.0),
    "reconnecting": ("drop_before,ok", 0.05),
    "wait": ("drop_before,ok", 4.0),
}
LISTENING = {
    # provider: state: script, seconds. Nothing here can call off a late reply; there is none.
    "ultravox": {"attempt": ("silence,ok", 1.0), "listening": ("silence,ok", 8.0)},
    "phonic": {"attempt": ("silence,ok", 1.0), "listening": ("silence,ok", 12.0)},
    "aws": {"attempt": ("silence,ok", 1.0), "listening": ("silence,ok", 13.0)},
}
DUPLEX = {"attempt": ("silence,ok", 1.0), "listening": ("silence,ok", 13.0)}
"""LiveKit does not interrupt a duplex model if the caller speaks, because the model does."""


def cases():
    """Yield provider, state and kind of interruption."""
    table = [
        ("openai", CORRELATED, (the_user_speaks, *BY_CODE)),
        ("openai without vad", CORRELATED, (audio_activity,)),
        ("voicelive", CORRELATED, (the_user_speaks, *BY_CODE)),
        *((name, HELD, (the_user_speaks, handle_interrupt)) for name in SHARED_ENGINE),
        ("google", GOOGLE, BY_CODE),
        ("google without vad", GOOGLE, (audio_activity, *BY_CODE)),
        *((name, states, (the_user_speaks, *BY_CODE)) for name, states in LISTENING.items()),
        ("gpt-live", DUPLEX, BY_CODE),
    ]
    for provider, states, ways in table:
        for state in states:
            for way in ways:
                yield pytest.param(
                    provider, *states[state], way, id=f"{provider}, {state}, {way.__name__}"
                )


def our_tasks():
    """Return the tasks that run our code, without the simulators."""
    files = [task.get_coro().cr_code.co_filename for task in asyncio.all_tasks()]
    return [f for f in files if f.startswith(OURS) and "simulator" not in f]


class TestEndsAtOnce:
    @pytest.mark.parametrize(("provider", "script", "after", "way"), [*cases()])
    async def test_interruption_ends_reply_and_next_is_heard(
        self, provider, script, after, way, start_slow_retries, recorder
    ):
        """The reply ends once, sends nothing more, and the next reply is heard."""
        talk = await start_slow_retries(provider, script)
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(after)
        asked, begun = len(talk.server.requests), len(talk.generations)
        attempts = len(recorder.at_start) - 1
        assert recorder.open_spans

        interruption = asyncio.ensure_future(way(talk, handle))
        await asyncio.sleep(SOON)

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 0 == recorder.open_spans
        assert handle.done()
        await talk.settle()
        await interruption
        assert (asked, begun) == (len(talk.server.requests), len(talk.generations))
        assert [] == talk.heard
        assert handle.exception() is None
        assert {"interrupted": 1} == recorder.counted(semconv.METRIC_REPLIES, semconv.OUTCOME)
        assert attempts == len(actions(recorder))
        assert attempts == recorder.counted(semconv.METRIC_ATTEMPTS)[()]
        assert {} == recorder.counted(semconv.METRIC_IN_FLIGHT)
        assert [] == our_tasks()
        if way not in CLOSE:
            await talk.reply(instructions="SECRET")
            await talk.settle()
            assert [f"reply {asked + 1}"] == talk.heard
            assert asked + 1 == len(talk.server.requests)
            assert ("succeeded", None) == ended(recorder)[-1]

    @pytest.mark.parametrize("way", BY_CODE)
    @pytest.mark.parametrize("provider", ["openai", "google", *LISTENING])
    async def test_plugin_alone_ends_attempt_as_fast(self, provider, way, start_slow_retries):
        """The plugin alone ends an attempt as fast."""
        talk = await start_slow_retries(provider, "silence", bare=True)
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(1)

        interruption = asyncio.ensure_future(way(talk, handle))
        await asyncio.sleep(SOON)

        assert handle.done()
        await interruption

    async def test_interruption_leaves_other_reply_speaking(self, start_slow_retries, recorder):
        """Google signals a cancel to its session, and the reply in progress continues."""
        talk = await start_slow_retries("google", "slow:9,silence,ok")
        first = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(1)  # it has begun
        second = talk.realtime.generate_reply()
        await talk.server.wait_for(lambda: len(talk.server.requests) > 1)
        second.cancel()
        await asyncio.sleep(SOON)
        assert [("interrupted", "interrupted")] == ended(recorder)

        (connection,) = talk.server._open
        await connection.hang_up(1011)
        await first

        assert ("not_recoverable", "output_started") in ended(recorder)

    @pytest.mark.parametrize("way", [the_user_speaks, *BY_CODE])
    @pytest.mark.parametrize("after", [1.0, 8.0], ids=["attempt", "listening"])
    async def test_interruption_while_ultravox_thinks_ends_reply(
        self, after, way, start_slow_retries, recorder
    ):
        """The reply ends as usual; the plugin decides about its messages and its speech.

        It begins to speak what nobody asked it to stop; where LiveKit interrupts the session, the
        plugin sends the message that by the protocol asks for one more reply.
        """
        talk = await start_slow_retries("ultravox", "late:15,silence")
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(after)

        interruption = asyncio.ensure_future(way(talk, handle))
        await asyncio.sleep(SOON)

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 0 == recorder.open_spans
        assert handle.done()
        await talk.settle()
        await interruption
        assert [("interrupted", "interrupted")] == ended(recorder)
        assert len(talk.server.cancels) == len(talk.server.requests) - 1

    @pytest.mark.parametrize("way", BY_CODE)
    async def test_interruption_at_creation_cancels_response(
        self, way, start_slow_retries, recorder
    ):
        """A response that LiveKit gets in that moment is not read, and it is cancelled."""
        talk = await start_slow_retries("openai", "stalled,ok")
        interruptions = []

        def interrupt(_):
            interruptions.append(asyncio.ensure_future(way(talk, handle)))

        talk.realtime.on("generation_created", interrupt)
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(SOON)

        assert handle.done()
        assert 0 == recorder.open_spans
        assert [("interrupted", "interrupted")] == ended(recorder)
        assert talk.server.cancels
        await talk.settle()
        await interruptions[0]
        assert 1 == len(talk.server.requests)

    @pytest.mark.parametrize("state", HELD)
    async def test_interrupt_of_plugin_session_ends_reply(
        self, state, start_slow_retries, recorder
    ):
        """A reply of the plugin's session, without a speech, is interrupted there."""
        script, after = HELD[state]
        talk = await start_slow_retries("openai", script)
        reply = talk.realtime.generate_reply()
        await talk.received()
        await asyncio.sleep(after)
        asked, begun = len(talk.server.requests), len(talk.generations)

        talk.realtime.interrupt()
        await asyncio.sleep(SOON)

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 0 == recorder.open_spans
        assert [] == [message async for message in (await reply).message_stream][1:]
        await talk.settle()
        assert (asked, begun) == (len(talk.server.requests), len(talk.generations))

    async def test_adapter_that_interrupts_session_counts_reply_once(self, recorder):
        """The interrupt comes back to us while we interrupt the reply, which counts once."""

        class Nosy(PassthroughRequest):
            def cancel(self, attempt):
                attempt.cancel()
                reply.interrupt(cut=True)

        trace = Telemetry(**recorder.providers).reply(Target("nosy"))
        silence = asyncio.get_running_loop().create_future()
        reply = Reply(Nosy(lambda: silence), traced_retry.RetryPolicy(), trace)
        reply.start().cancel()
        await asyncio.sleep(SOON)

        assert silence.cancelled()
        assert [("interrupted", "interrupted")] == ended(recorder)
        assert {"interrupted": 1} == recorder.counted(semconv.METRIC_REPLIES, semconv.OUTCOME)
        assert {} == recorder.counted(semconv.METRIC_IN_FLIGHT)

    @pytest.mark.parametrize("way", [the_user_speaks, session_interrupt, *CLOSE])
    async def test_interruption_ends_queued_speech_uncounted(
        self, way, start_slow_retries, recorder
    ):
        """A queued speech ends as well, unsent, so no reply is counted for it."""
        talk = await start_slow_retries("openai", "rate_limit,ok")
        first = await talk.ask_agent(instructions="SECRET")
        second = talk.ask(instructions="SECRET")
        await asyncio.sleep(1)

        interruption = asyncio.ensure_future(way(talk, first))
        await asyncio.sleep(SOON)

        assert first.done()
        assert second.done()
        assert [("interrupted", "interrupted")] == ended(recorder)
        await talk.settle()
        await interruption
        assert 1 == len(talk.server.requests)
        assert [] == talk.heard

    @pytest.mark.parametrize("way", [the_user_speaks, *BY_CODE])
    async def test_interruption_during_retry_after_sends_nothing(
        self, way, start_slow_retries, recorder
    ):
        """The next reply waits for the provider's retry-after and ends unsent."""
        talk = await start_slow_retries("openai", "rate_limit:10,ok")
        (await talk.ask_agent(instructions="SECRET")).interrupt()
        await asyncio.sleep(1)
        handle = talk.ask(instructions="SECRET")
        await asyncio.sleep(1)
        assert 1 == recorder.open_spans

        interruption = asyncio.ensure_future(way(talk, handle))
        await asyncio.sleep(SOON)

        assert [("interrupted", "interrupted")] * 2 == ended(recorder)
        assert 0 == recorder.open_spans
        assert handle.done()
        await talk.settle()
        await interruption
        assert 1 == len(talk.server.requests)
        assert [] == talk.heard

    @pytest.mark.parametrize("state", CORRELATED)
    async def test_answer_to_user_speech_is_heard_instead(
        self, state, start_slow_retries, recorder
    ):
        """The answer to the user is heard once, and the interrupted reply is not."""
        script, after = CORRELATED[state]
        talk = await start_slow_retries("openai", script)
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(after)
        request = talk.server.requests[-1]

        await the_user_speaks(talk, handle)
        await asyncio.sleep(1)
        (connection,) = talk.server._open
        response = await connection.begin(None)
        await connection.begin_message(response)
        await connection.end_reply(request, response)
        await talk.settle()

        assert [f" {request.number}"] == talk.heard
        assert [("interrupted", "interrupted")] == ended(recorder)
        assert request is talk.server.requests[-1]


class TestIsNoInterruption:
    async def test_speech_during_gemini_request_is_no_interruption(
        self, start_slow_retries, recorder
    ):
        """While a request is open the plugin does not report that the user speaks."""
        talk = await start_slow_retries("google", "late:7")
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(1)

        (connection,) = talk.server._open
        await connection.content(interrupted=True)
        await handle

        assert not handle.interrupted
        assert ["reply 1"] == talk.heard
        assert [("recovered", None)] == ended(recorder)

    @pytest.mark.parametrize("state", CORRELATED)
    async def test_disallowed_interruption_keeps_reply(self, state, start_slow_retries, recorder):
        """The caller speaks on, and hears the reply after all."""
        script, after = CORRELATED[state]
        talk = await start_slow_retries(
            "openai without vad", script.replace("stalled", "failed"), deadline=60.0
        )
        handle = talk.ask(instructions="SECRET", allow_interruptions=False)
        await asyncio.sleep(after)

        await audio_activity(talk, handle)
        await handle

        assert [f"reply {len(talk.server.requests)}"] == talk.heard
        assert [None] == [stop for _, stop in ended(recorder)]


HAND_OFF = {
    # provider, state: what becomes of the reply, and what of the plugin alone's: heard, and
    # whether the agent is told of failure; None where its reply never ends
    ("openai", "attempt"): (("recovered", None), (["reply 1"], False)),
    ("openai", "wait"): (("recovered", None), ([], True)),
    ("openai", "created and silent"): (("recovered", None), None),
    ("openai", "message begun and silent"): (("recovered", None), ([], False)),
    ("openai", "between two generations"): (("recovered", None), ([], False)),
    ("openai", "asked again"): (("recovered", None), ([], False)),
    ("google", "attempt"): (("recovered", None), (["reply 1"], True)),
    ("google", "listening"): (("recovered", None), (["reply 1"], True)),
    ("ultravox", "listening"): (("exhausted", "deadline"), ([], True)),
    ("phonic", "listening"): (("exhausted", "deadline"), ([], True)),
    ("aws", "listening"): (("exhausted", "deadline"), ([], True)),
}
STATES = {"openai": CORRELATED, "google": GOOGLE, **LISTENING}


class TestHandOff:
    """LiveKit does not interrupt for a hand-off.

    The new agent begins after the old one's speech.
    """

    @pytest.mark.parametrize(("provider", "state"), HAND_OFF)
    async def test_handoff_waits_for_reply_and_retries(
        self, provider, state, start_slow_retries, recorder
    ):
        """The hand-off waits for all retries, and then the new agent speaks."""
        outcome, _ = HAND_OFF[provider, state]
        script, after = STATES[provider][state]
        talk = await start_slow_retries(provider, script)
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(after)

        new = Agent(instructions="SECRET, too")
        talk.session.update_agent(new)
        await handle
        told = ended(recorder)
        heard = list(talk.heard)
        await talk.settle()

        assert not handle.interrupted
        assert [outcome] == told == ended(recorder)
        assert (outcome[0] != "exhausted") == (1 == len(heard))
        assert heard == talk.heard
        assert new is talk.session.current_agent
        assert [] == our_tasks()
        await talk.reply(instructions="SECRET")
        await talk.settle()
        assert [*heard, f"reply {len(talk.server.requests)}"] == talk.heard

    @pytest.mark.parametrize(("provider", "state"), HAND_OFF)
    async def test_handoff_with_plugin_alone_waits_too(self, provider, state, start_slow_retries):
        """LiveKit also waits there: a failure fails, and a hang delays the hand-off."""
        _, expected = HAND_OFF[provider, state]
        script, after = STATES[provider][state]
        talk = await start_slow_retries(provider, script, bare=True)
        handle = await talk.ask_agent(instructions="SECRET")
        await asyncio.sleep(after)

        new = Agent(instructions="SECRET, too")
        talk.session.update_agent(new)
        await talk.settle()

        assert not handle.interrupted
        if expected is None:
            assert not handle.done()
            assert talk.session._activity.agent is not new
        else:
            assert expected == (talk.heard, handle.exception() is not None)
            assert talk.session._activity.agent is new


class TestThePrivateFact:
    async def test_speech_signals_interruption(self, start_slow_retries):
        """``SpeechHandle._interrupt_fut`` resolves at once, and only for a new interruption."""
        talk = await start_slow_retries("openai", "silence")
        handle, told = await talk.ask_agent(instructions="SECRET"), []
        when_interrupted(handle, lambda: told.append("first"))
        handle.interrupt()
        when_interrupted(handle, lambda: told.append("second"))
        await asyncio.sleep(SOON)

        assert ["first"] == told

    def test_speech_without_signal_is_logged_once(self, caplog):
        """A handle without that attribute is logged once and left unchanged."""
        for _ in range(2):
            when_interrupted(object(), pytest.fail)

        assert ["_interrupt_fut"] == [
            word for word in caplog.text.split() if word.startswith("_interrupt")
        ]
