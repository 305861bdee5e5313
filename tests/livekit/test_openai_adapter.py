# SPDX-License-Identifier: Apache-2.0
"""State of the OpenAI adapter beside single replies: sound, remembered ids, a lost connection."""

from __future__ import annotations

import asyncio
import base64

import pytest
from livekit.agents import APIConnectionError, llm
from support.conversation import actions, codes, ended, now
from support.steered import SteeredServer

from traced_retry import RetryPolicy
from traced_retry.simulator._openai_protocol import output_position

AUDIO = {"options": {"modalities": ["audio"]}}


def steered(_):
    """A server that answers when a test says so."""
    return SteeredServer()


@pytest.fixture
async def talk(start_conversation):
    """A conversation with a steered server, whose model speaks."""
    return await start_conversation("-", simulator=steered, **AUDIO)


@pytest.fixture
def adapter(talk):
    """The adapter of the conversation's session."""
    return talk.realtime._traced_retry._adapter


async def connected(talk):
    """Wait until the plugin has a connection, and return it."""
    for _ in range(1000):
        if talk.server.connection is not None:
            return talk.server.connection
        await asyncio.sleep(0.01)
    raise AssertionError


async def waiting(talk):
    """Wait until the server has a request that it has not answered."""
    for _ in range(1000):
        if talk.server.waiting:
            return talk.server.connection
        await asyncio.sleep(0.01)
    raise AssertionError


async def speak(connection, *sounds):
    """Send sounds in the message of the response."""
    for sound in sounds:
        await connection.send(
            "response.output_audio.delta",
            **output_position(connection.active),
            delta=base64.b64encode(sound).decode(),
        )


class Listener:
    """Reads the streams of a generation as an agent does."""

    def __init__(self, generation):
        self.sounds, self.texts, self.messages, self.ended = [], [], 0, 0
        self._tasks = [asyncio.ensure_future(self._read(generation.message_stream, self._listen))]

    def _listen(self, message):
        self.messages += 1
        for stream, take in (
            (message.audio_stream, lambda frame: self.sounds.append(bytes(frame.data))),
            (message.text_stream, self.texts.append),
        ):
            self._tasks.append(asyncio.ensure_future(self._read(stream, take)))

    async def _read(self, stream, take):
        async for item in stream:
            take(item)
        self.ended += 1

    async def done(self):
        """Wait for the end of all streams."""
        while pending := [task for task in self._tasks if not task.done()]:
            await asyncio.wait(pending, timeout=30, return_when=asyncio.ALL_COMPLETED)


class TestSound:
    @pytest.mark.parametrize("message", [False, True])
    async def test_reply_that_failed_before_its_first_sound_is_heard(self, message, talk, recorder):
        """The agent's streams continue with the sounds of the next response, each once."""
        reply = talk.realtime.generate_reply()
        connection = await waiting(talk)
        await connection.begin_to_answer(0, message=message)
        listener = Listener(await reply)
        await asyncio.sleep(0.1)
        await connection.fail("server_error")
        await waiting(talk)
        await connection.begin_to_answer(0, message=True)
        await speak(connection, b"\1\0\2\0", b"\3\0")
        await asyncio.sleep(0.1)
        assert [b"\1\0\2\0", b"\3\0"] == listener.sounds
        connection.spoke = True
        await connection.complete()
        await listener.done()

        assert ([b"\1\0\2\0", b"\3\0"], 1) == (listener.sounds, listener.messages)
        assert [("recovered", None)] == ended(recorder)
        assert ["server_error", None] == codes(recorder)
        assert set() == talk.realtime._traced_retry._adapter._unheard  # A long call does not grow.

    async def test_reply_that_fails_after_its_first_sound_is_not_sent_again(self, talk, recorder):
        """A sound is output, also without a word."""
        reply = talk.realtime.generate_reply()
        connection = await waiting(talk)
        await connection.begin_to_answer(0, message=True)
        listener = Listener(await reply)
        await speak(connection, b"\1\0")
        await asyncio.sleep(0.1)
        await connection.fail("server_error")
        await listener.done()
        await asyncio.sleep(10)

        assert [b"\1\0"] == listener.sounds
        assert [("not_recoverable", "output_started")] == ended(recorder)
        assert 1 == talk.server.heard


class TestRememberedIds:
    def test_only_256_abandoned_ids_are_kept(self, adapter, talk):
        """The oldest are forgotten, so a long call does not grow."""
        adapter.errors["old_299"] = "an error"
        for number in range(300):
            adapter.discard({f"old_{number}"})

        assert [f"old_{number}" for number in range(44, 300)] == list(adapter._abandoned)
        assert {} == adapter.errors
        assert {f"old_{number}" for number in range(300)} <= talk.realtime._discarded_event_ids

    async def test_late_response_after_reconnect_is_discarded(self, talk, recorder):
        """The plugin forgets its discarded ids in a reconnect, and the adapter does not."""
        reply = talk.realtime.generate_reply()
        request = (await waiting(talk)).waiting[0]
        reply.cancel()
        await asyncio.sleep(0.1)
        talk.realtime._discarded_event_ids.clear()
        connection = talk.server.connection
        assert [request] == connection.waiting
        await connection.begin_to_answer(0, message=False)
        response_id = connection.active.id
        await asyncio.sleep(1)

        assert [None, response_id] == talk.server.cancels  # The agent's own cancel has no id.
        assert [] == talk.realtime._traced_retry._adapter.open
        assert [] == talk.generations
        assert [("interrupted", "interrupted")] == ended(recorder)


class TestConnection:
    async def test_attempt_that_times_out_while_disconnected_lost_its_connection(
        self, start_conversation, recorder
    ):
        """The error says connection_lost rather than timeout, and nothing is sent before."""
        talk = await start_conversation("-", simulator=steered, attempt_timeout=0.3)
        await connected(talk)
        await talk.server.drop(down=1.0)
        await asyncio.sleep(0.2)
        talk.server.willing = 9
        began = now()
        assert None is await talk.reply()

        assert "connection_lost" == codes(recorder)[0]
        assert ("recovered", None) == ended(recorder)[0]
        assert now() - began >= 0.8

    async def test_connection_counts_as_lost_until_server_speaks(self, adapter, talk):
        """A recoverable connection error stops requests until the next event of the server."""
        connection = await connected(talk)
        await asyncio.sleep(0.1)
        request = adapter.request(lambda: None)
        assert (True, "timeout") == (adapter.ready(), request.timed_out(1).kind)
        for error, recoverable, lost in [
            (APIConnectionError("x"), False, False),
            (RuntimeError("x"), True, False),
            (APIConnectionError("x"), True, True),
        ]:
            adapter._on_error(
                llm.RealtimeModelError(timestamp=0, label="x", error=error, recoverable=recoverable)
            )
            assert lost is not adapter.connected
        losses = adapter.connection_losses
        assert (False, "connection_lost") == (adapter.ready(), request.timed_out(1).kind)
        await connection.send("rate_limits.updated", rate_limits=[])
        await asyncio.sleep(0.1)
        assert (True, losses) == (adapter.ready(), adapter.connection_losses)

        adapter.active.add("resp_1")
        assert not adapter.ready()
        adapter._on_reconnected(None)
        assert (True, losses + 1) == (adapter.ready(), adapter.connection_losses)


class TestAdoptedAnswer:
    @pytest.mark.parametrize("which", [0, 1])
    async def test_answer_after_interruption_is_cancelled(self, which, talk, recorder):
        """The caller hears neither the answer to the first request nor that to its hedge."""
        reply = talk.realtime.generate_reply()
        connection = await waiting(talk)
        await asyncio.sleep(3.0)  # The hedge follows after 2.5 s.
        reply.cancel()
        await asyncio.sleep(0.1)
        await connection.begin_to_answer(which, message=False)
        response_id = connection.active.id
        await asyncio.sleep(1.0)

        assert response_id in talk.server.cancels
        assert [] == talk.generations
        assert {} == talk.realtime._traced_retry._adapter.earlier
        assert [("interrupted", "interrupted")] == ended(recorder)

    async def test_answer_that_fails_is_followed_by_request(self, talk, recorder):
        """An answer that came in the wait after a rejected hedge is listened to only once."""
        reply = talk.realtime.generate_reply()
        connection = await waiting(talk)
        await asyncio.sleep(3.0)  # The hedge follows after 2.5 s.
        await connection.reject_one(1, "rate_limit_exceeded")
        await asyncio.sleep(0.1)
        answered = now()
        await connection.begin_to_answer(0, message=False)
        Listener(await reply)
        assert now() - answered < 0.1
        await connection.fail("server_error")
        await waiting(talk)
        await connection.begin_to_answer(0, message=True)
        await connection.complete()
        await asyncio.sleep(0.1)

        assert ["send", "hedge", "listen", "send"] == actions(recorder)
        assert ["timeout", "rate_limit_exceeded", "server_error", None] == codes(recorder)
        assert [] == talk.realtime._traced_retry._adapter.open
        assert [("recovered", None)] == ended(recorder)


class TestActiveResponse:
    async def test_response_with_events_is_not_cancelled(self, talk):
        """A long response of the server's own is no silent one, so the next reply waits for it."""
        connection = await connected(talk)
        await connection.begin_its_own()
        talk.server.willing = 1
        reply = talk.realtime.generate_reply()
        for _ in range(3):
            await asyncio.sleep(5.0)
            await connection.say()
        assert ([], False) == (talk.server.cancels, reply.done())
        await connection.complete()
        await Listener(await reply).done()

        assert [] == talk.server.cancels

    async def test_own_response_has_its_own_time(self, talk, recorder):
        """A reply that waits does not cut off one that pauses after its first word."""
        first = talk.realtime.generate_reply()
        connection = await waiting(talk)
        await connection.begin_to_answer(0, message=True)
        await connection.say()
        Listener(await first)
        second = talk.realtime.generate_reply()
        await asyncio.wait([second], timeout=30.0)

        assert [("exhausted", "deadline")] == ended(recorder)
        assert isinstance(second.exception(), llm.RealtimeError)
        await connection.complete()
        await asyncio.sleep(0.1)
        assert [("succeeded", None), ("exhausted", "deadline")] == ended(recorder)


class TestEcho:
    async def answered(self, talk):
        """Have one reply answered with the id of its request."""
        talk.server.willing = 1
        reply = talk.realtime.generate_reply()
        listener = Listener(await reply)
        await listener.done()

    async def test_server_that_echoed_once_is_trusted(self, talk, adapter, recorder):
        """A response of the server's own does not end the retries of a session with ids."""
        await self.answered(talk)
        assert adapter.echoes
        reply = talk.realtime.generate_reply()
        connection = await waiting(talk)
        await connection.begin(None)
        await asyncio.sleep(0.1)
        await connection.fail("cancelled")
        await connection.reject_one(0, "server_error")
        await waiting(talk)
        await connection.begin_to_answer(0, message=True)
        await connection.complete()
        await reply

        assert ["server_error", None] == codes(recorder)[1:]
        assert adapter.echoes

    @pytest.mark.parametrize(("turns", "trusted"), [(0, False), (1, True)])
    async def test_unlabelled_response_is_the_answer_to_one_turn(
        self, turns, trusted, talk, adapter, recorder
    ):
        """Each committed turn explains one response without an id, and not a second one."""
        reply = talk.realtime.generate_reply()
        connection = await waiting(talk)
        (request,) = adapter.open
        for _ in range(turns):
            await connection.begin_its_own()
            await connection.complete()
        await asyncio.sleep(0.1)
        assert not request.may_be_answered
        await connection.begin(None)
        await asyncio.sleep(0.1)

        assert request.may_be_answered
        assert adapter.echoes is None
        reply.cancel()
        await asyncio.sleep(0.1)


class TestTurn:
    async def test_caller_who_goes_on_speaking_waits_from_the_commit(self, talk, recorder):
        """The end of the words before is not the time from which the caller waits."""
        connection = await connected(talk)
        await asyncio.sleep(0.1)
        await connection.send("input_audio_buffer.speech_stopped", audio_end_ms=0, item_id="item")
        await asyncio.sleep(5.0)
        await connection.speech_started()
        await asyncio.sleep(5.0)
        await connection.begin_its_own()
        await asyncio.sleep(1.0)
        await connection.complete()
        await asyncio.sleep(1.0)

        ((_, seconds),) = recorder.points("traced_retry.reply.duration").values()
        assert 1.0 == pytest.approx(seconds, abs=0.01)


class TestEndOfStreams:
    async def test_text_ends_with_its_message_and_not_with_the_response(self, talk):
        """The agent does not wait for the end of the response after the last word."""
        reply = talk.realtime.generate_reply()
        connection = await waiting(talk)
        await connection.begin_to_answer(0, message=True)
        listener = Listener(await reply)
        await connection.say()
        await connection.end_output(connection.active)
        await asyncio.sleep(0.1)

        assert (2, 1) == (listener.ended, len(listener.texts))
        assert connection.active
        await connection.complete()
        await listener.done()


def test_policy_is_that_of_the_session(adapter):
    """The adapter reads the policy in force from its session."""
    assert RetryPolicy() == adapter.replies.policy
