# SPDX-License-Identifier: Apache-2.0
"""A filler: heard while the caller waits, and in no other place."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest
from livekit import rtc
from livekit.agents import Agent, AgentSession, APIStatusError
from livekit.agents.voice.io import TextOutput
from livekit.agents.voice.room_io._output import _ParticipantAudioOutput
from livekit.agents.voice.transcription import TranscriptSynchronizer
from support.conversation import Conversation, ended, now
from support.providers import CONN_OPTIONS, KEY, openai_model
from support.speaker import Speaker
from support.voice import SECONDS, Voice

import traced_retry
from traced_retry import Filler, RetryPolicy
from traced_retry.livekit.filler import FillerOutput
from traced_retry.simulator import OpenAISimulator

AFTER = 2.0
REPLY = 1.0  # seconds of sound


class Transcript(TextOutput):
    """The words that the room gets."""

    def __init__(self):
        super().__init__(label="transcript", next_in_chain=None)
        self.words = ""

    async def capture_text(self, text):
        self.words += text

    def flush(self):
        """Do nothing."""


@pytest.fixture(params=["alone", "below wrapper"])
def chain(request):
    """Say if the speaker is the session's output, or if the transcript synchronizer is above it."""
    return request.param


@pytest.fixture
async def start_call(recorder, chain):
    """Return a function that starts a conversation with a speaker at ``talk.speaker``."""
    async with contextlib.AsyncExitStack() as stack:

        async def start_call(script, filler=None, *, speaker=None, sound=REPLY, **policy):
            events = []
            server = OpenAISimulator(script, on_event=lambda *event: events.append(event))
            server.sound = sound
            await stack.enter_async_context(server)
            http = await stack.enter_async_context(aiohttp.ClientSession())
            model = openai_model(
                api_key=KEY,
                base_url=server.url,
                http_session=http,
                conn_options=CONN_OPTIONS,
                modalities=["audio"],
            )
            traced_retry.wrap(
                model,
                policy=RetryPolicy(**policy),
                on_waiting=Filler() if filler is None else filler,
                **recorder.providers,
            )
            session = await stack.enter_async_context(AgentSession(llm=model))
            speaker = speaker or Speaker()
            session.output.audio = speaker
            if chain == "below wrapper":
                wrapper = TranscriptSynchronizer(
                    next_in_chain_audio=speaker, next_in_chain_text=Transcript()
                )
                stack.push_async_callback(wrapper.aclose)
                session.output.audio = wrapper.audio_output
                session.output.transcription = wrapper.text_output
            await session.start(Agent(instructions="SECRET instructions"))
            await server.wait_for("connected")
            await asyncio.sleep(1.0)  # until the server knows the session's configuration
            talk = Conversation(server, model, session)
            talk.speaker, talk.events = speaker, events
            talk.states = []
            session.on("agent_state_changed", lambda event: talk.states.append(event.new_state))
            return talk

        yield start_call


@pytest.fixture(params=["agent", "provider"])
def initiator(request):
    """Say who starts the reply."""
    return request.param


async def begin(talk, initiator):
    """Start a reply, and return the time at which the caller begins to wait."""
    if initiator == "agent":
        await talk.ask_agent(instructions="SECRET")
    else:
        await talk.server.caller_speaks()
    return now()


def of(initiator, script):
    """Return the script for a reply with this initiator."""
    prefix = "turn:" if initiator == "provider" else ""
    return ",".join(prefix + element for element in script.split(","))


def check_heard(talk, began, *, replies=1):
    """Check that the filler was heard alone, and each reply complete."""
    first, last = talk.speaker.fillers[0], talk.speaker.fillers[-1]
    assert began + AFTER <= first[0] <= began + AFTER + 0.2
    assert [] == talk.speaker.mistakes
    assert replies * REPLY == pytest.approx(sum(end - start for start, end in talk.speaker.replies))
    if replies:
        assert last[1] <= talk.speaker.replies[0][0]


def check_no_trace(talk, words):
    """Check that neither the history nor the provider knows of the filler."""
    items = talk.session.history.items
    assert words == [(i.role, i.text_content, i.interrupted) for i in items if i.type == "message"]
    sent = [event["type"] for direction, event in talk.events if direction == "received"]
    assert not [kind for kind in sent if "truncate" in kind or "item.create" in kind]


class TestReply:
    @pytest.mark.parametrize("script", ["late:4", "late:2.5", "late:2.2", "late:2.31"])
    async def test_late_reply_is_complete_after_filler(self, script, initiator, start_call):
        """The filler stops before the reply's first frame, in its tone, at its end or after it."""
        talk = await start_call(of(initiator, script))
        began = await begin(talk, initiator)
        await talk.settle()

        check_heard(talk, began)
        arrived = began + float(script.partition(":")[2])
        assert arrived <= talk.speaker.replies[0][0] <= arrived + 0.05
        word = "reply" if initiator == "agent" else "answer"
        assert f"{word} 1" == talk.heard[0]
        spoken = [("user", "hello", False)] if initiator == "provider" else []
        check_no_trace(talk, [*spoken, ("assistant", f"{word} 1", False)])

    async def test_reply_after_retry_is_complete(self, start_call, recorder):
        """A request that is never answered is sent again, and its reply is heard once."""
        talk = await start_call("silence,ok")
        began = await begin(talk, "agent")
        await talk.settle()

        check_heard(talk, began)
        check_no_trace(talk, [("assistant", "reply 2", False)])
        assert [("recovered", None)] == ended(recorder)

    async def test_answer_that_fails_is_heard_after_retry(self, start_call, recorder):
        """A response of the provider that is lost before its first word is requested again."""
        talk = await start_call("late:3,turn:failed_message")
        began = await begin(talk, "provider")
        await talk.settle()

        assert [("recovered", None)] == ended(recorder, "provider")
        assert REPLY == pytest.approx(sum(end - start for start, end in talk.speaker.replies))
        assert ["reply 1"] == talk.heard
        assert [] == talk.speaker.mistakes
        if talk.speaker.fillers:  # An output without a wrapper cannot be replaced in a response.
            check_heard(talk, began)

    async def test_agent_state_is_of_replies_only(self, start_call):
        """The agent is not "speaking" while the filler is heard."""
        talk = await start_call("late:4")
        await begin(talk, "agent")
        await asyncio.sleep(3.5)
        assert talk.speaker.fillers
        assert "speaking" not in talk.states
        await talk.settle()

        assert 1 == talk.states.count("speaking")

    async def test_second_reply_has_its_own_filler(self, start_call):
        """The output that was inserted once serves all replies of the session."""
        talk = await start_call("late:3")
        for number in (1, 2):
            heard = len(talk.speaker.fillers)
            began = await begin(talk, "agent")
            await talk.settle()
            assert began + AFTER <= talk.speaker.fillers[heard][0] <= began + AFTER + 0.2
            assert number * REPLY == pytest.approx(sum(e - s for s, e in talk.speaker.replies))

        assert ["reply 1", "reply 3"] == talk.heard  # 2 was sent after 2.5 s, and cancelled.
        assert [] == talk.speaker.mistakes

    async def test_interrupted_reply_is_cut_at_its_own_position(self, start_call):
        """The provider learns how much of the reply was heard, without the filler."""
        talk = await start_call("late:3", sound=4.0)
        began = await begin(talk, "agent")
        await asyncio.sleep(4.0)
        talk.session.interrupt()
        await talk.settle()

        seconds = began + 4.0 - talk.speaker.replies[0][0]
        assert 1.0 == pytest.approx(seconds, abs=0.05)
        assert [seconds] == [
            pytest.approx(event["audio_end_ms"] / 1000, abs=0.002)
            for direction, event in talk.events
            if direction == "received" and event["type"] == "conversation.item.truncate"
        ]

    @pytest.mark.parametrize("options", [{"confirms_after": 0.3}, {"accepts_after": 0.02}])
    async def test_slow_output_loses_no_reply(self, options, start_call):
        """The reply waits until a remote output has confirmed the end of the filler."""
        talk = await start_call("late:2.2", speaker=Speaker(**options))
        began = await begin(talk, "agent")
        await talk.settle()

        check_heard(talk, began)
        check_no_trace(talk, [("assistant", "reply 1", False)])

    @pytest.mark.parametrize("after", [0.05, 0.2])
    async def test_interruption_while_filler_ends(self, after, start_call):
        """A reply that is interrupted before its first frame is not in the history."""
        talk = await start_call("late:2.2,ok", speaker=Speaker(confirms_after=0.3))
        await begin(talk, "agent")
        await asyncio.sleep(2.2 + after)
        talk.session.interrupt()
        await talk.settle()
        assert ([], []) == (talk.heard, talk.speaker.replies)

        await talk.reply(instructions="SECRET")
        assert ["reply 2"] == talk.heard
        assert REPLY == pytest.approx(sum(end - start for start, end in talk.speaker.replies))

    async def test_output_at_another_rate(self, start_call):
        """The filler is resampled for the output."""
        talk = await start_call("late:4", speaker=Speaker(48_000))
        began = await begin(talk, "agent")
        await asyncio.sleep(3.0)

        assert talk.speaker.fillers[0][0] <= began + AFTER + 0.2
        assert 0.3 == pytest.approx(sum(e - s for s, e in talk.speaker.fillers), abs=0.02)
        assert [] == talk.speaker.mistakes

    async def test_reply_without_sound_before_end(self, start_call):
        """A reply within 2 s has no filler."""
        talk = await start_call("late:1.5")
        await begin(talk, "agent")
        await talk.settle()

        assert [] == talk.speaker.fillers
        assert ["reply 1"] == talk.heard


class TestSilence:
    @pytest.mark.parametrize("script", ["silence", "stalled"])
    @pytest.mark.parametrize("seconds", [2.1, 3.0])
    async def test_no_sound_after_interruption(self, script, seconds, initiator, chain, start_call):
        """The caller speaks in the tone or in the pause, and hears no further sound."""
        talk = await start_call(of(initiator, script) + ",turn:silence", deadline=10.0)
        await begin(talk, initiator)
        await asyncio.sleep(seconds)
        connection = talk.server._open[-1]
        await connection.speech_started()
        at = now()
        await asyncio.sleep(0.01)
        heard = len(talk.speaker.heard)
        await talk.settle()

        assert heard == len(talk.speaker.heard)
        assert [] == talk.heard
        if script == "stalled" and chain == "alone":
            assert 0 == heard  # The response has the old output.
        else:
            assert talk.speaker.heard[-1][1] <= at + 0.01

    @pytest.mark.parametrize("seconds", [2.1, 3.0])
    async def test_no_sound_after_interrupt(self, seconds, start_call):
        """The agent's code interrupts, and the caller hears no further sound."""
        talk = await start_call("silence,silence,ok")
        await begin(talk, "agent")
        await asyncio.sleep(seconds)
        talk.session.interrupt()
        at = now()
        await talk.settle()

        assert talk.speaker.heard[-1][1] <= at + 0.01
        assert [] == talk.heard
        await talk.reply(instructions="SECRET")
        assert ["reply 3"] == talk.heard
        assert [] == talk.speaker.mistakes

    async def test_no_sound_after_loss(self, initiator, start_call, recorder):
        """The filler ends with the reply."""
        talk = await start_call(of(initiator, "silence"), deadline=5.0)
        began = await begin(talk, initiator)
        await talk.settle()

        check_heard(talk, began, replies=0)
        assert talk.speaker.heard[-1][1] <= began + 8.1
        assert {"exhausted", "not_recoverable"} & {outcome for outcome, _ in ended(recorder, None)}

    async def test_no_sound_in_response_that_has_old_output(self, chain, start_call):
        """A sound beside the response would put words into the history that were not heard."""
        talk = await start_call("stalled,ok", max_retries=0, attempt_timeout=6.0)
        await begin(talk, "agent")
        await asyncio.sleep(8.0)

        assert (chain == "below wrapper") == bool(talk.speaker.fillers)
        assert [] == talk.heard

    async def test_no_sound_beside_speech_of_agent(self, start_call):
        """The filler waits until the agent does not speak."""

        async def frames():
            yield rtc.AudioFrame(bytes(2 * 24_000 * 6), 24_000, 1, 24_000 * 6)

        talk = await start_call("late:8")
        began = now()
        talk.session.say("SECRET", audio=frames())
        await asyncio.sleep(1.0)
        await talk.ask_plugin()
        await asyncio.sleep(7.0)

        assert [(began, began + 6.0)] == [pytest.approx(of) for of in talk.speaker.replies]
        assert began + 6.0 == pytest.approx(talk.speaker.fillers[0][0], abs=0.01)
        assert [] == talk.speaker.mistakes

    async def test_no_sound_without_audio_output(self, start_call):
        """A session without audio output gets its reply as before."""
        talk = await start_call("late:3")
        talk.session.output.set_audio_enabled(False)
        await talk.reply(instructions="SECRET")

        assert ["reply 1"] == talk.heard
        assert [] == talk.speaker.heard


class TestSound:
    async def test_frames_of_user_are_played(self, start_call):
        """A list of frames is played as it is."""
        frames = [rtc.AudioFrame(b"\x02\x00" * 480, 24_000, 1, 480)] * 10
        talk = await start_call("late:4", Filler(frames, pause=None))
        began = await begin(talk, "agent")
        await talk.settle()

        check_heard(talk, began)
        assert 0.2 == pytest.approx(sum(end - start for start, end in talk.speaker.fillers))

    async def test_sentence_is_synthesized_once(self, start_call):
        """The second caller hears the speech that was synthesized for the first."""
        voice = Voice()
        talk = await start_call("late:4", Filler.sentence("One moment.", voice))
        for _ in range(2):
            await begin(talk, "agent")
            await talk.settle()

        assert ["One moment."] == voice.texts
        assert 2 * SECONDS == pytest.approx(
            sum(end - start for start, end in talk.speaker.fillers), abs=0.1
        )
        assert ["reply 1", "reply 3"] == talk.heard  # 2 was sent after 2.5 s, and cancelled.
        assert "One moment" not in str(talk.session.history.to_dict())

    async def test_voice_that_fails_is_logged_once(self, start_call, caplog):
        """The reply is heard as without a filler, and the error's text is not logged."""
        voice = Voice(APIStatusError("SECRET", status_code=400, retryable=False))
        talk = await start_call("late:4", Filler.sentence("One moment.", voice))
        assert [None, None] == [await talk.reply(instructions="SECRET") for _ in range(2)]

        records = [r.getMessage() for r in caplog.records if r.name == "traced_retry"]
        assert ["on_waiting raised APIStatusError"] == [r.split(" at ")[0] for r in records]
        assert ["reply 1", "reply 3"] == talk.heard  # 2 was sent after 2.5 s, and cancelled.
        assert [] == talk.speaker.fillers


STEREO = rtc.AudioFrame(bytes(4), 24_000, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sound": "none.ogg"}, "sound is 'none.ogg'; there is no such file"),
        ({"sound": 3}, "sound is 3; it must be a file or frames"),
        ({"sound": []}, "sound holds no frame"),
        ({"sound": [STEREO]}, "sound holds .*; it must hold mono AudioFrames"),
        ({"sound": ["frame"]}, "sound holds 'frame'; it must hold mono AudioFrames"),
        ({"pause": -1}, "pause is -1; it must be seconds, 0 or more, or None"),
        ({"pause": float("nan")}, "pause is nan; it must be seconds"),
        ({"pause": True}, "pause is True; it must be seconds"),
    ],
)
def test_wrong_argument_is_refused(arguments, message):
    """A filler that cannot be played fails at the start and not in a call."""
    with pytest.raises(traced_retry.UsageError, match=message):
        Filler(**arguments)


FILLER = [rtc.AudioFrame(b"\x02\x00" * 480, 24_000, 1, 480)] * 50
"""One second of sound."""
SPEECH = rtc.AudioFrame(bytes(960), 24_000, 1, 480)
"""20 ms of silence."""


class TestOutput:
    async def test_frame_of_reply_cuts_filler(self):
        """The first frame of a reply is played at once, and the filler never again."""
        speaker = Speaker()
        output = FillerOutput(speaker)
        output.start(FILLER)
        await asyncio.sleep(0.105)
        await output.capture_frame(SPEECH)
        output.flush()
        await output.wait_for_playout()
        await asyncio.sleep(2.0)

        assert 0.105 == pytest.approx(speaker.fillers[-1][1])
        assert [(0.105, 0.125)] == [pytest.approx(of) for of in speaker.replies]
        assert [] == speaker.mistakes

    @pytest.mark.parametrize("speaker", [{}, {"confirms_after": 0.3}], ids=["fast", "slow"])
    async def test_events_are_of_replies_only(self, speaker):
        """The outputs above hear of the start and the end of speech, and not of a filler."""
        output = FillerOutput(Speaker(**speaker))
        events = []
        output.on("playback_started", lambda _: events.append("started"))
        output.on("playback_finished", lambda event: events.append(event.playback_position))
        output.start(FILLER)
        await asyncio.sleep(0.1)
        assert [] == events
        for _ in range(3):
            await output.capture_frame(SPEECH)
        output.flush()
        await output.wait_for_playout()

        assert ["started", pytest.approx(0.06, abs=0.002)] == events

    async def test_speech_and_filler_do_not_overlap(self):
        """A filler does not start while a segment of speech is being played."""
        speaker = Speaker()
        output = FillerOutput(speaker)
        await output.capture_frame(SPEECH)
        output.start(FILLER)
        output.flush()
        output.start(FILLER)
        await output.wait_for_playout()

        assert ([], 1) == (speaker.fillers, len(speaker.replies))

    async def test_another_output_takes_its_place(self):
        """An avatar that comes stops the filler."""
        speaker = Speaker()
        output = FillerOutput(speaker)
        output.start(FILLER)
        await asyncio.sleep(0.1)
        output.on_detached()
        await asyncio.sleep(2.0)

        assert 0.1 == pytest.approx(speaker.fillers[-1][1])

    async def test_output_that_fails_loses_no_reply(self, caplog):
        """An error of the output ends the filler, is logged once, and lets the reply through."""

        class Broken(Speaker):
            async def capture_frame(self, frame):
                if any(bytes(frame.data)):
                    raise RuntimeError("SECRET")
                await super().capture_frame(frame)

        speaker = Broken()
        output = FillerOutput(speaker)
        output.start(FILLER)
        await asyncio.sleep(0.1)
        await output.capture_frame(SPEECH)

        assert 1 == len(speaker.replies)
        (record,) = [r.getMessage() for r in caplog.records if r.name == "traced_retry"]
        assert record.startswith("playing a filler raised RuntimeError")


class Room:
    """The part of a room that LiveKit's room output uses before it publishes its track."""


@pytest.fixture
async def room_output():
    """Return LiveKit's own room output, as after the publication of its track."""
    output = _ParticipantAudioOutput(
        Room(),
        sample_rate=24_000,
        num_channels=1,
        track_publish_options=rtc.TrackPublishOptions(),
    )
    output._subscribed_fut.set_result(None)
    output._forwarding_task = asyncio.create_task(output._forward_audio())
    yield output
    await output.aclose()


@pytest.mark.real_time
class TestRoomOutput:
    @pytest.mark.parametrize("seconds", [0.0, 0.03, 0.1, 0.5])
    async def test_reply_is_complete_after_filler(self, seconds, room_output):
        """The room output reports all of the reply as played, whenever it cuts the filler."""
        output = FillerOutput(room_output)
        finished = []
        output.on("playback_finished", finished.append)
        output.start([rtc.AudioFrame(b"\x02\x00" * 480, 24_000, 1, 480)] * 20)
        await asyncio.sleep(seconds)
        for _ in range(10):
            await output.capture_frame(rtc.AudioFrame(bytes(960), 24_000, 1, 480))
        output.flush()
        await asyncio.wait_for(output.wait_for_playout(), 5.0)

        ((position, interrupted),) = [(e.playback_position, e.interrupted) for e in finished]
        assert (0.2, False) == (pytest.approx(position, abs=0.03), interrupted)

    async def test_stopped_filler_leaves_no_audio(self, room_output):
        """The room output's queue is empty 50 ms after the stop."""
        output = FillerOutput(room_output)
        output.start([rtc.AudioFrame(b"\x02\x00" * 480, 24_000, 1, 480)] * 100)
        await asyncio.sleep(0.3)
        assert room_output._audio_source.queued_duration > 0
        output.stop()
        await asyncio.wait_for(output.over.wait(), 0.05)

        assert 0 == pytest.approx(room_output._audio_source.queued_duration, abs=0.01)
        assert room_output._audio_buf.empty()
