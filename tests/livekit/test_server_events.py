# SPDX-License-Identifier: Apache-2.0
"""Events of OpenAI-compatible servers whose shape or content surprises.

Each is taken from a public report. The result of the plugin alone stands beside each table.
"""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import llm
from support.conversation import codes, ended
from support.frames import OURS, FramesServer
from support.steered import SteeredServer

from traced_retry.livekit.openai import OpenAIAdapter
from traced_retry.livekit.openai_request import OpenAIRequest

BEGIN = FramesServer.BEGIN


def error(**fields):
    """An ``error`` event."""
    return {"type": "error", "error": fields}


def failed(details):
    """The end of a failed response."""
    response = {"id": "<response>", "status": "failed", "status_details": details, "output": []}
    return {"type": "response.done", "response": response}


def completed(output):
    """The end of a completed response."""
    response = {"id": "<response>", "status": "completed", "output": output}
    return {"type": "response.done", "response": response}


def answered_by(*answers):
    """Make a server that gives these answers first."""
    return lambda script: FramesServer(answers, script)


PASSING = {
    # name: the events, the error.type of the first attempt. The plugin alone: no reply, and an
    # error at once.
    "number as code": (
        [error(type="rate_limit_error", code=429, message="Too many requests", event_id=OURS)],
        "429",
    ),
    "text as status number": (
        [error(type="odd_type", code="503", message="Busy", event_id=OURS)],
        "503",
    ),
    "code is a list": ([error(type="server_error", code=[], event_id=OURS)], "server_error"),
    "code is an object": ([error(type="server_error", code={}, event_id=OURS)], "server_error"),
    "code is a float": ([error(type="server_error", code=4.5, event_id=OURS)], "server_error"),
    "code is the word None": (
        [error(type="server_error", code="None", event_id=OURS)],
        "server_error",
    ),
    "type is a number": ([error(type=7, code="server_error", event_id=OURS)], "server_error"),
    "message is null": ([error(type="server_error", message=None, event_id=OURS)], "server_error"),
    "server error with a wait": (
        [error(type="server_error", message="Please try again in 5s.", event_id=OURS)],
        "server_error",
    ),
    "failed with a number": ([BEGIN, failed({"error": {"code": 429}})], "429"),
    "failed with a word": ([BEGIN, failed("failed")], "_OTHER"),
    "failed with an error that is a word": ([BEGIN, failed({"error": "overloaded"})], "overloaded"),
    "failed without details": ([BEGIN, failed(None)], "_OTHER"),
    "failed with a list": ([BEGIN, failed([1])], "_OTHER"),
    "failed with an error that is a list": ([BEGIN, failed({"error": [1]})], "_OTHER"),
    "failed with an empty error": ([BEGIN, failed({"error": {}})], "_OTHER"),
}


class TestUnexpectedShapes:
    @pytest.mark.parametrize("name", PASSING)
    async def test_reply_is_recovered_at_once(self, name, start_conversation, recorder):
        """No shape of an error stops the retry, and its kind is found if there is one."""
        events, error_type = PASSING[name]
        talk = await start_conversation("ok", simulator=answered_by(events))

        raised, seconds = await talk.timed_reply()
        await talk.settle()

        assert raised is None
        assert ["reply 2"] == talk.heard
        assert [("recovered", None)] == ended(recorder)
        assert error_type == recorder.attempts[0]["error.type"]
        assert seconds <= 1.1
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("name", PASSING)
    async def test_agent_gets_realtime_error_if_fault_lasts(
        self, name, start_conversation, recorder
    ):
        """LiveKit catches no other class."""
        events, _ = PASSING[name]
        talk = await start_conversation("ok", simulator=answered_by(events), max_retries=0)

        raised, seconds = await talk.timed_reply()

        assert isinstance(raised, llm.RealtimeError)
        assert 0.0 == seconds
        assert [("exhausted", "max_attempts")] == ended(recorder)
        assert 0 == recorder.open_spans


PERMANENT = {
    # name: the error, its code in the trace. The plugin alone: no reply, and an error at once.
    "type with new code": (
        error(type="invalid_request_error", code="access_not_enabled", event_id=OURS),
        "access_not_enabled",
    ),
    "authentication with new code": (
        error(type="authentication_error", code="token_expired", event_id=OURS),
        "token_expired",
    ),
    **{
        f"code {code!r}": (error(type="odd_type", code=code, event_id=OURS), str(code))
        for code in ("400", "401", "403", "404", 400, 401, 403, 404, 422)
    },
}


class TestClassification:
    @pytest.mark.parametrize("name", PERMANENT)
    async def test_permanent_error_is_reported_at_once(self, name, start_conversation, recorder):
        """It is sent once, and its attempt is marked as the last."""
        event, code = PERMANENT[name]
        talk = await start_conversation("ok", simulator=answered_by([event]))

        raised, seconds = await talk.timed_reply()
        await talk.settle()

        assert isinstance(raised, llm.RealtimeError)
        assert 0.0 == seconds
        assert 1 == len(talk.server.requests)
        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        (attempt,) = recorder.attempts
        assert code == attempt["traced_retry.error_code"]
        assert (False, "stop") == (
            attempt["traced_retry.recoverable"],
            attempt["traced_retry.decision"],
        )

    async def test_active_response_is_recognized_by_message(self, start_conversation, recorder):
        """OpenAI does not always send the code. The plugin alone: no reply, and an error."""
        event = error(
            type="invalid_request_error",
            code=None,
            message="Conversation already has an active response in progress: resp_1.",
            event_id=OURS,
        )
        talk = await start_conversation("ok", simulator=answered_by([event]))

        assert None is await talk.reply()
        assert ["reply 2"] == talk.heard
        assert ["active_response", None] == codes(recorder)

    async def test_expired_session_is_reported_as_such(self, start_conversation, recorder):
        """The event names no request. The plugin alone: no reply, and a bare error."""
        event = error(type="invalid_request_error", code="session_expired", message="Bye.")
        talk = await start_conversation("ok", simulator=answered_by([event]), max_retries=0)

        assert isinstance(await talk.reply(), llm.RealtimeError)
        assert ["session_expired"] == codes(recorder)

    @pytest.mark.parametrize(
        "key",
        [
            "sk-proj-abcdefghijklmnop",
            "sk_live_51H8abcdef",
            "AIzaSyA1234567890abcdefghijklmnopqrstuv",
            "eyJhbGciOiJIUzI1NiJ9.e30.abc",
            "AKIAIOSFODNN7EXAMPLE",
            "0a1b2c3d4e5f60718293a4b5c6d7e8f9",
        ],
    )
    async def test_key_in_place_of_code_is_not_recorded(
        self, key, start_conversation, recorder, caplog
    ):
        """A key that looks like one word reaches no span, metric or record of ours."""
        event = error(type="odd_type", code=key, event_id=OURS)
        talk = await start_conversation("ok", simulator=answered_by([event]))

        assert None is await talk.reply()
        assert ["_OTHER", None] == codes(recorder)
        ours = [r.getMessage() for r in caplog.records if r.name.startswith("traced_retry")]
        assert not [message for message in ours if key in message]


WORDS = {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}
EMPTY = {
    # The output of a completed response. The plugin alone: success, and nothing is heard.
    "no output": [],
    "output is null": None,
    "message without content": [{"type": "message", "content": []}],
    "message with empty text": [
        {"type": "message", "content": [{"type": "output_text", "text": ""}]}
    ],
    "message without text": [{"type": "message", "content": [{"type": "output_text"}]}],
    "reasoning alone": [{"type": "reasoning", "summary": []}],
}


class TestEmptyResponse:
    @pytest.mark.parametrize("name", EMPTY)
    async def test_completed_response_without_output_is_sent_again(
        self, name, start_conversation, recorder
    ):
        """It was not heard, and its id makes another request safe."""
        answer = [BEGIN, completed(EMPTY[name])]
        talk = await start_conversation("ok", simulator=answered_by(answer))

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 2"] == [text for text in talk.heard if text]
        assert [("recovered", None)] == ended(recorder)
        assert ["empty_response", None] == codes(recorder)

    @pytest.mark.parametrize("part", [{"text": "a"}, {"transcript": "a"}, {"audio": "a"}])
    async def test_response_with_content_is_not_empty(self, part, start_conversation, recorder):
        """The server reports output at the end, so a second request could be a second reply."""
        answer = [BEGIN, completed([{"type": "message", "content": [part]}])]
        talk = await start_conversation("ok", simulator=answered_by(answer))

        assert None is await talk.reply()

        assert 1 == len(talk.server.requests)
        assert [("succeeded", None)] == ended(recorder)

    async def test_lasting_emptiness_is_reported(self, start_conversation, recorder):
        """The agent's code learns that its caller heard silence."""
        talk = await start_conversation("empty")

        await talk.reply()

        assert [("exhausted", "max_attempts")] == ended(recorder)
        assert ["empty_response"] * 4 == codes(recorder)
        assert 0 == recorder.open_spans


LIMITED = "Rate limit reached. "
WAITS = {
    # The wording of a wait of 6 s. The plugin alone: no reply, and an error at once.
    "Please try again in 6s.": 6.0,
    "Please try again in 6 seconds": 6.0,
    "retry after 6 seconds": 6.0,
    "Retry-After: 6": 6.0,
    "retry in 6.5s": 6.5,
    "Try again in 6s": 6.0,
    "Trying again in 6000ms": 6.0,
    "Please try again in 0m6s.": 6.0,
}


def rate_limit(words, **fields):
    """The error object of a rate limit."""
    return {
        "type": "rate_limit_error",
        "code": "rate_limit_exceeded",
        "message": LIMITED + words,
        **fields,
    }


PLACES = {
    "answer": lambda words: [{"type": "error", "error": rate_limit(words, event_id=OURS)}],
    "error without id": lambda words: [{"type": "error", "error": rate_limit(words)}],
    "failed response": lambda words: [BEGIN, failed({"error": rate_limit(words)})],
}


class TestRetryAfter:
    @pytest.mark.parametrize("words", WAITS)
    @pytest.mark.parametrize("place", PLACES)
    async def test_wait_is_honored_from_each_place(
        self, place, words, start_conversation, recorder
    ):
        """The second request follows after the wait, and is answered."""
        talk = await start_conversation("ok", simulator=answered_by(PLACES[place](words)))

        raised, seconds = await talk.timed_reply()

        assert raised is None
        assert 2 == len(talk.server.requests)
        assert WAITS[words] <= seconds <= WAITS[words] + 0.1

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("wait", ["114h18m0s", "9" * 400 + "s", "61 minutes"])
    async def test_absurd_wait_does_not_silence_later_replies(
        self, wait, place, start_conversation, recorder
    ):
        """The next reply is sent once at once, as by the plugin alone."""
        answer = PLACES[place](f"Please try again in {wait}.")
        talk = await start_conversation("ok", simulator=answered_by(answer))
        assert isinstance(await talk.reply(), llm.RealtimeError)

        raised, seconds = await talk.timed_reply()

        assert raised is None
        assert 0.0 == seconds
        assert ["reply 2"] == talk.heard


class TestMissingId:
    async def test_id_of_response_comes_with_its_end(self, start_conversation, recorder):
        """The end belongs to the only response. The plugin alone: heard, and complete."""
        place = {"item_id": "item_1", "output_index": 0, "content_index": 0}
        item = {"id": "item_1", "type": "message", "role": "assistant", "content": []}
        answer = [
            {"type": "response.created", "response": {"id": "", "metadata": "<metadata>"}},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.output_text.delta", **place, "delta": "a word"},
            completed([]),
        ]
        talk = await start_conversation("ok", simulator=answered_by(answer))

        raised, seconds = await talk.timed_reply()

        assert (None, 0.0, ["a word"]) == (raised, seconds, talk.heard)
        assert [("succeeded", None)] == ended(recorder)


class TestMissingEcho:
    async def test_reply_of_server_without_echo_is_heard_once(self, start_conversation, recorder):
        """The plugin alone: heard once, and its future ends after 10 s."""
        talk = await start_conversation("unlabelled")
        await talk.reply()
        await talk.settle(60)

        assert ["reply 1"] == talk.heard
        assert 1 == len(talk.server.requests)
        assert 0 == recorder.open_spans

    async def test_longer_deadline_sends_no_further_request(self, start_conversation, recorder):
        """With ``deadline=60`` four replies were heard."""
        talk = await start_conversation("unlabelled", deadline=60.0)
        for _ in range(2):
            await talk.reply()
        await talk.settle(60)

        assert ["reply 1", "reply 2"] == talk.heard

    async def test_own_response_of_server_does_not_look_like_missing_echo(
        self, start_conversation, recorder
    ):
        """A server that rejects the request at the same time still gets it again."""
        talk = await start_conversation("active:1,silence,ok")

        assert None is await talk.reply()
        assert ["reply 3"] == talk.heard


def broken(*_):
    """Stand for a method of ours with a mistake in it."""
    raise KeyError("SECRET of ours")


class TestOwnFault:
    @pytest.mark.parametrize("method", ["explain", "next_action", "ready"])
    async def test_fault_in_adapter_is_raised_as_realtime_error(
        self, method, start_conversation, recorder, monkeypatch, caplog
    ):
        """The agent gets the cause, the log has the place without text, and no future is open."""
        talk = await start_conversation("error:server_error,ok")
        monkeypatch.setattr(OpenAIRequest, method, broken)

        future = talk.realtime.generate_reply()
        await asyncio.wait([future], timeout=1.1)

        raised = future.exception()
        assert isinstance(raised, llm.RealtimeError)
        assert isinstance(raised.__cause__, KeyError)
        assert "SECRET" not in str(raised)
        ours = [r.getMessage() for r in caplog.records if r.name.startswith("traced_retry")]
        assert 1 == len([m for m in ours if "raised KeyError" in m])
        assert "SECRET" not in "".join(ours)
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize(
        ("method", "script", "place"),
        [
            ("_asker_of", "ok", "reading a server event"),
            ("_turn_of", "ok", "observing a reply of the server"),
            ("stop", "active:1000,ok", "cancelling a silent response"),
            ("_lose", "drop_before,ok", "reading an error event"),
            ("_on_connected", "drop_before,ok", "reading a reconnect"),
        ],
    )
    async def test_log_names_the_part_that_failed(
        self, method, script, place, start_conversation, monkeypatch, caplog
    ):
        """The fault stays inside of us, and the log names the part."""
        talk = await start_conversation(script)
        monkeypatch.setattr(OpenAIAdapter, method, broken)

        await talk.reply()

        assert f"{place} raised KeyError" in caplog.text
        assert "SECRET" not in caplog.text

    async def test_fault_in_reading_the_delivery_leaves_the_reply(
        self, start_conversation, recorder, monkeypatch
    ):
        """The generation is valid, so the agent gets it."""
        talk = await start_conversation("ok")
        monkeypatch.setattr(OpenAIRequest, "delivery", broken)

        assert None is await talk.reply()
        assert ["reply 1"] == talk.heard
        assert [("succeeded", None)] == ended(recorder)


class TestResponseThatNeverEnds:
    @pytest.mark.parametrize(("script", "seconds"), [("active:1000,ok", 8.0), ("active:3,ok", 3.0)])
    async def test_reply_follows_after_a_limited_time(
        self, script, seconds, start_conversation, recorder
    ):
        """The server's own response is cancelled by its id. The plugin alone: an error at once."""
        talk = await start_conversation(script)

        raised, took = await talk.timed_reply()

        assert raised is None
        assert ["reply 2"] == talk.heard
        assert seconds <= took <= seconds + 0.1
        assert (1 if seconds == 8.0 else 0) == len(talk.server.cancels)
        assert None not in talk.server.cancels

    async def test_reply_follows_if_the_cancel_is_not_answered(self, start_conversation, recorder):
        """Two seconds later the response counts as ended."""

        class Deaf(FramesServer):
            def connect(self, ws, http):
                connection = super().connect(ws, http)
                connection.handlers["response.cancel"] = connection.ignore
                return connection

        busy = {"type": "response.created", "response": {"id": "own", "metadata": None}}
        rejected = error(code="conversation_already_has_active_response", event_id=OURS)
        talk = await start_conversation("ok", simulator=lambda s: Deaf([[busy, rejected]], s))

        raised, took = await talk.timed_reply()

        assert raised is None
        assert ["reply 2"] == talk.heard
        assert 10.0 <= took <= 10.1

    async def test_session_renewal_with_lost_connection_comes_back(
        self, start_conversation, recorder, caplog
    ):
        """The plugin waits for the end of a response that a lost connection cannot bring.

        The plugin alone: no reply of the call is heard after that.
        """
        talk = await start_conversation(
            "ok", simulator=lambda _: SteeredServer(), options={"max_session_duration": 5.0}
        )
        first = talk.ask()
        await talk.settle(0.1)
        await talk.server.connection.begin_to_answer(0, message=False)
        await talk.settle(6)
        await talk.server.drop(0.0)
        await asyncio.wait_for(first, 30)
        talk.server.willing = 1

        assert None is await asyncio.wait_for(talk.reply(), 30)
        assert 1 == len([text for text in talk.heard if text])
        assert 0 == recorder.open_spans
        assert "the server did not answer a cancel" in caplog.text
