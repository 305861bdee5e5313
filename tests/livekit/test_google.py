# SPDX-License-Identifier: Apache-2.0
"""The Google adapter with the real plugin and a real AgentSession: on the wire and at the ear."""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from google.genai import types
from livekit.agents import function_tool, llm
from livekit.plugins import google
from support.conversation import actions, codes, ended, now
from support.providers import GOOGLE

from traced_retry.livekit.google import LISTEN_WINDOW, PLUGIN_TIMEOUT, SEND_WINDOW, GoogleAdapter
from traced_retry.simulator.google import GoogleSimulator

RESTART = SEND_WINDOW + LISTEN_WINDOW
"""Seconds from the request to the restart."""

MANUAL = types.RealtimeInputConfig(
    automatic_activity_detection=types.AutomaticActivityDetection(disabled=True)
)


CALLER = {"inputTranscription": {"text": "SECRET question"}}
THOUGHT = {"modelTurn": {"parts": [{"text": "SECRET thought", "thought": True}]}}
WORDS = {"modelTurn": {"parts": [{"text": "reply 1"}]}}
SPOKEN_WORDS = {"outputTranscription": {"text": "reply 1"}}
SOUND = {
    "modelTurn": {
        "parts": [
            {
                "inlineData": {
                    "mimeType": "audio/pcm",
                    "data": base64.b64encode(bytes(960)).decode(),
                }
            }
        ]
    }
}
SEARCH = {"groundingMetadata": {"webSearchQueries": ["SECRET"]}}
CODE = {"modelTurn": {"parts": [{"executableCode": {"code": "1", "language": "PYTHON"}}]}}
END = {"generationComplete": True, "turnComplete": True}
AUDIO = {"modalities": [types.Modality.AUDIO]}


@pytest.fixture
def provider():
    """Return the provider of every conversation here."""
    return GOOGLE


SENT = ["send"]
SILENT = ["send", "listen", "restart", "listen"]
TWICE = ["send", "send"]
ALWAYS = ["send"] * 4
FULL = SEND_WINDOW * 2 + LISTEN_WINDOW * 2


class Row(NamedTuple):
    """The expected result of one reply."""

    heard: list[str]
    """The texts that the agent says."""
    outcome: str
    stop_reason: str | None
    actions: list[str]
    least: float
    """The shortest time in seconds."""
    most: float
    """The longest time in seconds."""


ROWS = {
    # script: heard, outcome, stop reason, actions, seconds at least and at most
    "ok": Row(["reply 1"], "succeeded", None, SENT, 0.0, 0.01),
    "late:3": Row(["reply 1"], "succeeded", None, SENT, 3.0, 3.01),
    "late:7": Row(["reply 1"], "recovered", None, ["send", "listen"], 7.0, 7.01),
    "late:12": Row([], "exhausted", "max_attempts", SILENT, FULL, 20.0),
    "late:12,ok": Row(["reply 2"], "recovered", None, SILENT[:3], RESTART, RESTART + 0.01),
    "late:12,late:7": Row(["reply 2"], "recovered", None, SILENT, RESTART + 7, RESTART + 7.01),
    "silence,ok": Row(["reply 2"], "recovered", None, SILENT[:3], RESTART, RESTART + 0.01),
    "silence": Row([], "exhausted", "max_attempts", SILENT, FULL, 20.0),
    "late:25": Row([], "exhausted", "max_attempts", SILENT, FULL, 20.0),
    "incomplete,ok": Row(["reply 2"], "recovered", None, SILENT[:3], RESTART, RESTART + 0.01),
    "empty,ok": Row(["reply 2"], "recovered", None, TWICE, 0.0, 1.0),
    "empty,tool:look_up,ok": Row(["reply 3"], "recovered", None, TWICE, 0.0, 1.0),
    "empty": Row([], "exhausted", "max_attempts", ALWAYS, 0.0, 7.0),
    "stalled": Row([], "exhausted", "deadline", SENT, 20.0, 20.0),
    "drop_before,ok": Row(["reply 2"], "recovered", None, TWICE, 0.1, 1.11),
    "error:1011,ok": Row(["reply 2"], "recovered", None, TWICE, 0.1, 1.11),
    "error:1008,ok": Row(["reply 2"], "recovered", None, TWICE, 0.1, 1.11),
    "error:1000,ok": Row(["reply 2"], "recovered", None, TWICE, 0.1, 1.11),
    "error:503,ok": Row(["reply 2"], "recovered", None, TWICE, 0.1, 1.11),
    "rate_limit,ok": Row(["reply 2"], "recovered", None, TWICE, 0.1, 1.11),
    "malformed,ok": Row(["reply 2"], "recovered", None, TWICE, 0.1, 1.11),
    "drop_before": Row([], "exhausted", "max_attempts", ALWAYS, 0.3, 7.1),
    "rate_limit": Row([], "exhausted", "max_attempts", ALWAYS, 0.3, 7.1),
    "drop_before,silence,ok": Row(
        ["reply 3"],
        "recovered",
        None,
        ["send", "send", "listen", "restart"],
        RESTART + 0.1,
        RESTART + 1.11,
    ),
    "drop_during": Row(["reply"], "not_recoverable", "output_started", SENT, 0.0, 0.01),
    "quota": Row([], "not_recoverable", "not_recoverable", SENT, 0.0, 0.01),
    "error:1007": Row([], "not_recoverable", "not_recoverable", SENT, 0.0, 0.01),
}

BARE = {
    # script: heard, whether the agent is told of failure, seconds at most
    "late:7": (["reply 1"], True, 5.01),
    "late:12": (["reply 1"], True, 5.01),
    "silence,ok": ([], True, 5.01),
    "silence": ([], True, 5.01),
    "late:25": (["reply 1"], True, 5.01),
    "incomplete,ok": ([], True, 5.01),
    "empty,ok": ([], False, 0.01),
    "rate_limit,ok": ([], True, 5.01),
    "malformed,ok": ([], True, 5.01),
    # The session is resumed, and here the server answers then what it owes. Whether Google's
    # does is not known.
    "drop_before,ok": (["reply 1"], False, 0.2),
    "drop_during": (["reply"], False, 0.01),
    "quota": ([], True, 5.01),
}


class TestEachFault:
    @pytest.mark.parametrize("script", ROWS)
    async def test_each_fault_has_expected_result(self, script, start_conversation, recorder):
        """A reply is heard once or fails in time, nothing follows, and no span stays open."""
        row = ROWS[script]
        talk = await start_conversation(script)
        began = now()

        error = await talk.reply(instructions="SECRET")
        took = now() - began
        await talk.settle()

        assert row.heard == talk.heard
        assert [(row.outcome, row.stop_reason)] == ended(recorder)
        assert row.actions == actions(recorder)
        assert row.least <= took <= row.most
        told = row.outcome in ("exhausted", "not_recoverable")
        assert told == isinstance(error, llm.RealtimeError)
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", BARE)
    async def test_plugin_alone_has_expected_result(self, script, start_conversation):
        """The table shows the plugin's behavior without traced-retry."""
        heard, told, most = BARE[script]
        talk = await start_conversation(script, bare=True)
        began = now()

        error = await talk.reply(instructions="SECRET")
        took = now() - began
        await talk.settle()

        assert heard == talk.heard
        assert told == isinstance(error, llm.RealtimeError)
        assert took <= most

    @pytest.mark.parametrize(
        ("script", "code"),
        [
            ("error:1011,ok", "1011"),
            ("error:1008,ok", "1008"),
            ("error:1000,ok", "1000"),
            ("error:503,ok", "503"),
            ("rate_limit,ok", "429"),
            ("quota", "1011"),
            ("malformed,ok", "_OTHER"),
        ],
    )
    async def test_attempt_has_code_of_google(self, script, code, start_conversation, recorder):
        """The attempt has Google's close code, or the code of its message."""
        talk = await start_conversation(script)

        await talk.reply()

        assert code == codes(recorder)[0]

    async def test_refused_reconnect_is_final(self, start_conversation, recorder):
        """The plugin treats a refused connection as final, and so do we, with its status."""
        talk = await start_conversation("ok,unauthorized")
        await talk.reply()

        with pytest.raises(llm.RealtimeError) as caught:
            await talk.realtime.generate_reply()
        await talk.settle()

        assert "401" == caught.value.code
        assert ["reply 1"] == talk.heard
        assert ("not_recoverable", "not_recoverable") == ended(recorder)[1]
        assert 0 == recorder.open_spans

    async def test_request_on_refused_session_gets_status(self, start_conversation):
        """Each later request gets the status that ended the session."""
        talk = await start_conversation("ok,unauthorized")
        await talk.reply()
        told = []
        for _ in range(2):
            with pytest.raises(llm.RealtimeError) as caught:
                await talk.realtime.generate_reply()
            told.append(caught.value.code)

        assert ["401", "401"] == told

    async def test_request_refused_by_plugin_fails_at_once(self, start_conversation, recorder):
        """A request that the plugin refuses fails at once and leaves the session unchanged."""
        talk = await start_conversation("ok")
        talk.model.capabilities.mutable_chat_context = False

        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply(instructions="SECRET")
        await talk.settle()

        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert 1 == talk.server.connections


@pytest.mark.parametrize("interrupts", [False, True])
class TestReplyDuringReply:
    """A reply is requested while an earlier generation is being spoken."""

    async def talk(self, interrupts, start_conversation, **kwargs):
        """Request the second reply 1 s after the first one, and return the texts of both.

        The server adds the second answer to the first generation, or it ends that one first.
        """
        simulator = partial(GoogleSimulator, interrupts=interrupts)
        talk = await start_conversation("slow:3,ok", simulator=simulator, **kwargs)
        first = talk.ask()
        await talk.received()
        await asyncio.sleep(1)
        began = now()
        try:
            second = await _text(await talk.realtime.generate_reply())
        except llm.RealtimeError:
            second = None
        took = now() - began
        await first
        await talk.settle()
        return talk, [*talk.heard, second], took

    async def test_reply_is_not_requested_again(self, interrupts, start_conversation, recorder):
        """An answer that may have been heard is reported and not requested a second time."""
        talk, texts, took = await self.talk(interrupts, start_conversation)

        assert (["reply", "reply 2"] if interrupts else ["replyreply 2", None]) == texts
        assert 2 == len(talk.server.requests)
        outcomes = [("succeeded", None), ("exhausted", "unsafe_to_resend")]
        assert [outcomes[0], outcomes[not interrupts]] == ended(recorder)
        assert took <= RESTART + 0.01
        assert 0 == recorder.open_spans

    async def test_plugin_alone_reports_failure(self, interrupts, start_conversation):
        """The plugin alone speaks the same, and reports a failure after 5 s."""
        _, texts, took = await self.talk(interrupts, start_conversation, bare=True)

        assert (["reply", "reply 2"] if interrupts else ["replyreply 2", None]) == texts
        assert took <= PLUGIN_TIMEOUT + 0.01

    async def test_lost_connection_does_not_repeat_answer(
        self, interrupts, start_conversation, recorder
    ):
        """After a loss, too, an answer that may have been heard is not requested again."""
        simulator = partial(GoogleSimulator, interrupts=interrupts)
        talk = await start_conversation("slow:3,slow:9,ok", simulator=simulator)
        await talk.ask_agent()
        await asyncio.sleep(1)
        reply = await talk.ask_plugin()
        await asyncio.sleep(1)
        (connection,) = talk.server._open
        await connection.hang_up(1011)
        await asyncio.wait([reply])
        await talk.settle()

        assert 2 == len(talk.server.requests)
        outcome = ("not_recoverable", "output_started")
        assert (outcome if interrupts else ("exhausted", "unsafe_to_resend")) == ended(recorder)[1]


class TestLostEndOfTurn:
    @pytest.mark.parametrize("seconds", [59, 61, 7200])
    async def test_stall_of_60_s_after_output_fails_reply(
        self, seconds, start_conversation, recorder
    ):
        """After 60 s without a sign the reply fails, and the next one is heard.

        With the plugin alone the agent waits for the end, and is mute until then.
        """
        talk = await start_conversation(f"slow:{seconds},ok")
        began = now()
        handle = talk.ask()
        await handle

        assert min(seconds, 60) == round(now() - began)
        stalled = seconds > 60
        assert [("not_recoverable", "output_started") if stalled else ("succeeded", None)] == (
            ended(recorder)
        )
        assert stalled == isinstance(handle.exception(), llm.RealtimeError)
        assert None is await talk.reply()
        assert "reply 2" == talk.heard[-1]
        assert 0 == recorder.open_spans

    async def test_plugin_alone_waits_for_lost_end(self, start_conversation):
        """The plugin alone keeps the agent waiting for an hour."""
        talk = await start_conversation("slow:7200,ok", bare=True)
        handle = await talk.ask_agent()
        await talk.settle(3600)

        assert not handle.done()

    async def test_each_message_postpones_bound(self, start_conversation, recorder):
        """A reply that speaks for 150 s with pauses of 50 s succeeds."""
        talk = await start_conversation("slow:150")
        handle = await talk.ask_agent()
        for _ in range(2):
            await asyncio.sleep(50)
            (connection,) = talk.server._open
            await connection.say(" and")
        await handle

        assert [("succeeded", None)] == ended(recorder)

    async def test_complete_generation_needs_no_end_of_turn(self, start_conversation, recorder):
        """The reply ends with its last word: the turn lasts as long as a client plays it."""
        talk = await start_conversation("silence")
        handle = await talk.ask_agent()
        (connection,) = talk.server._open
        await connection.say("reply 1")
        await connection.content(generationComplete=True)
        await talk.settle(300)
        assert [("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans

        await connection.content(turnComplete=True)
        await handle
        assert ["reply 1"] == talk.heard


class TestLateAnswer:
    """An answer to a reply that was given up is not taken for the answer to the next one."""

    @pytest.mark.parametrize("turns", range(8))
    async def test_answer_at_give_up_does_not_resolve_next_reply(self, turns, start_conversation):
        """The answer arrives as its reply is given up, and the next one is requested at once."""
        talk = await start_conversation(f"late:{SEND_WINDOW},late:1,ok", max_retries=0)
        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply()
        for _ in range(turns):
            await asyncio.sleep(0)

        assert "reply 2" == await _text(await talk.realtime.generate_reply())

    async def test_plugin_alone_resolves_next_reply(self, start_conversation):
        """The plugin alone gives the next reply the text of the one before."""
        talk = await start_conversation(f"late:{PLUGIN_TIMEOUT},late:1", bare=True)
        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply()

        assert "reply 1" == await _text(await talk.realtime.generate_reply())

    @pytest.mark.parametrize(("bare", "text"), [(False, "reply 4"), (True, "reply 2")])
    async def test_interrupted_reply_does_not_resolve_next_one(
        self, bare, text, start_conversation, recorder
    ):
        """The session is restarted only after the first reply, and the third one moves there.

        The plugin alone gives the third reply the text of the second.
        """
        talk = await start_conversation("silence,late:3,late:4,ok", bare=bare)
        first = await talk.ask_agent()
        (connection,) = talk.server._open
        await connection.say("reply 1")
        await asyncio.sleep(1)
        second = await talk.ask_plugin()
        second.cancel()
        third = await talk.ask_plugin()
        await connection.content(**END)

        assert text == await _text(await third)
        await first
        assert "reply 1" == talk.heard[0]
        if not bare:
            assert ["send", "send", "send", "restart"] == actions(recorder)
            assert [None, None] == talk.server.handles


class TestOutput:
    """A reply has succeeded only if there was a word, a sound or a tool call."""

    async def reply(self, start_conversation, *contents, **kwargs):
        """Send these messages as the answer to the first request, and return the rest as usual."""
        talk = await start_conversation("silence,ok", **kwargs)
        handle = await talk.ask_agent(instructions="SECRET")
        (connection,) = talk.server._open
        for content in contents:
            await connection.content(**content)
        await handle
        await talk.settle()
        return talk, handle.exception()

    async def test_turn_with_only_words_of_caller_is_requested_in_new_session(
        self, start_conversation, recorder
    ):
        """The empty turn may answer the caller, and the request may still be answered in it.

        With the plugin alone the reply is over at once, without a word and without an error.
        """
        talk, error = await self.reply(start_conversation, CALLER, END)

        assert None is error
        assert ["reply 2"] == talk.heard
        assert ["send", "restart"] == actions(recorder)
        assert ["empty_response", None] == codes(recorder)
        assert [("recovered", None)] == ended(recorder)
        assert 1 == len([event for event in talk.generations if event.user_initiated])

    async def test_turn_with_only_thought_is_requested_again(self, start_conversation, recorder):
        """A turn that ended after a thought is over, so the request is sent again.

        With the plugin alone the reply is over at once, without a word and without an error.
        """
        talk, error = await self.reply(start_conversation, THOUGHT, END)

        assert None is error
        assert ["reply 2"] == talk.heard
        assert TWICE == actions(recorder)
        assert 1 == talk.server.connections
        assert 1 == len([event for event in talk.generations if event.user_initiated])

    @pytest.mark.parametrize("content", [CALLER, THOUGHT])
    async def test_plugin_alone_loses_empty_turn(self, content, start_conversation):
        """The plugin alone ends the reply without a word and without an error."""
        talk, error = await self.reply(start_conversation, content, END, bare=True)

        assert None is error
        assert [] == talk.heard

    async def test_reply_after_thought_succeeds(self, start_conversation, recorder):
        """A thought is no output, and the words after it are."""
        talk, error = await self.reply(start_conversation, CALLER, THOUGHT, WORDS, END)

        assert None is error
        assert ["reply 1"] == talk.heard
        assert [("succeeded", None)] == ended(recorder)

    @pytest.mark.parametrize("tool", [SEARCH, CODE])
    async def test_turn_with_tool_of_server_is_not_requested_again(
        self, tool, start_conversation, recorder
    ):
        """A tool of the server may not run twice, so the failure is reported.

        The plugin alone reports none.
        """
        talk, error = await self.reply(start_conversation, THOUGHT, tool, END)

        assert isinstance(error, llm.RealtimeError)
        assert 1 == len(talk.server.requests)
        assert ["empty_response"] == codes(recorder)
        assert [("exhausted", "unsafe_to_resend")] == ended(recorder)

    async def test_interrupted_turn_without_output_is_no_failure(
        self, start_conversation, recorder
    ):
        """The caller spoke, so the reply is interrupted and not sent again."""
        talk, _ = await self.reply(start_conversation, THOUGHT, {"interrupted": True}, END)

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert 1 == len(talk.server.requests)

    async def test_loss_during_thought_sends_request_again(self, start_conversation, recorder):
        """A connection that is lost before the first word costs nothing but time.

        With the plugin alone the reply is over without a word and without an error.
        """
        talk = await start_conversation("stalled,ok")
        handle = await talk.ask_agent()
        await asyncio.sleep(1)
        (connection,) = talk.server._open
        await connection.hang_up(1011)
        await handle
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert ["connection_lost", None] == codes(recorder)
        assert [None, None] == talk.server.handles
        assert [("recovered", None)] == ended(recorder)

    async def test_attempt_cut_in_thought_restarts(self, start_conversation, recorder):
        """An attempt that is cut while the model thinks leaves its turn behind."""
        talk = await start_conversation("stalled,ok", attempt_timeout=6.0)

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 2"] == talk.heard
        assert ["send", "restart"] == actions(recorder)
        assert [None, None] == talk.server.handles

    @pytest.mark.parametrize("bare", [False, True])
    async def test_text_of_audio_model_is_not_heard(self, bare, start_conversation, recorder):
        """Text alone from a model with audio output is reported, and not requested again.

        It has reached the transcript, which would then hold two texts. The plugin alone reports
        nothing.
        """
        talk, error = await self.reply(
            start_conversation, SPOKEN_WORDS, END, options=AUDIO, bare=bare
        )

        assert bare == (error is None)
        assert 1 == len(talk.server.requests)
        if not bare:
            assert ["empty_response"] == codes(recorder)
            assert [("exhausted", "unsafe_to_resend")] == ended(recorder)

    async def test_sound_of_audio_model_is_heard(self, start_conversation, recorder):
        """A model with audio output that speaks has succeeded."""
        await self.reply(start_conversation, SPOKEN_WORDS, SOUND, END, options=AUDIO)

        assert [("succeeded", None)] == ended(recorder)


class TestRestart:
    async def test_restart_keeps_conversation(self, start_conversation):
        """The new session gets each earlier turn once, and then the request."""
        talk = await start_conversation("ok,silence,ok,ok")
        await talk.reply(user_input="one")
        assert None is await talk.reply(user_input="two", instructions="be brief")
        await talk.reply(user_input="three")

        said = [("user", "one"), ("model", "reply 1"), ("user", "two")]
        asked = [("model", "be brief"), ("user", ".")]
        assert [None, None] == talk.server.handles
        assert said + asked == talk.server.contexts[2]
        assert [*said, *asked, ("model", "reply 3"), ("user", "three"), ("user", ".")] == (
            talk.server.contexts[3]
        )
        assert ["reply 1", "reply 3", "reply 4"] == talk.heard

    @pytest.mark.parametrize("loss", ["drop_before", "rate_limit", "malformed"])
    async def test_loss_keeps_conversation(self, loss, start_conversation):
        """A lost connection is not resumed, because the server would answer the old turn too."""
        talk = await start_conversation(f"ok,{loss},ok")
        await talk.reply(user_input="one")

        assert None is await talk.reply(user_input="two")
        await talk.settle()

        assert [None, None] == talk.server.handles
        assert [("user", "one"), ("model", "reply 1"), ("user", "two"), ("user", ".")] == (
            talk.server.contexts[2]
        )
        assert ["reply 1", "reply 3"] == talk.heard

    @pytest.mark.parametrize(("dropped", "heard"), [(False, ["reply 1"]), (True, [])])
    async def test_resumed_session_answers_old_turn(self, dropped, heard, start_conversation):
        """A session that is resumed answers the turn of the old session."""
        talk = await start_conversation("late:8", bare=True)
        reply = talk.realtime.generate_reply()
        await talk.received()
        await asyncio.sleep(1)
        if dropped:
            talk.realtime._session_resumption_handle = None
        talk.realtime._mark_restart_needed()
        with pytest.raises(llm.RealtimeError):
            await reply
        await talk.settle()

        assert heard == talk.heard

    async def test_new_handle_of_old_session_is_dropped(self, start_conversation, monkeypatch):
        """The old session's last message may be a new handle, so that connection is dropped."""
        talk = await start_conversation("late:12,ok")
        mark = talk.realtime._mark_restart_needed
        handles = [next(reversed(talk.server.conversations), None)]

        def mark_and_hear():
            mark()
            if handles:
                talk.realtime._session_resumption_handle = f"handle-{2 + bool(handles.pop())}"

        monkeypatch.setattr(talk.realtime, "_mark_restart_needed", mark_and_hear)

        assert None is await talk.reply()
        await talk.settle()

        assert [None, "handle-2", None] == talk.server.handles
        assert ["reply 2"] == talk.heard

    @pytest.mark.parametrize("off", [-0.01, -0.001, 0.0, 0.001, 0.01])
    @pytest.mark.parametrize("at", [SEND_WINDOW, PLUGIN_TIMEOUT, RESTART])
    async def test_reply_between_windows_is_heard_once(self, at, off, start_conversation, recorder):
        """Between two windows no reply is lost and none is heard twice."""
        talk = await start_conversation(f"late:{at + off:.3f},ok")

        assert None is await talk.reply()
        await talk.settle()

        assert 1 == len(talk.heard)
        assert talk.heard[0] in ("reply 1", "reply 2")
        assert ended(recorder)[0] in (("succeeded", None), ("recovered", None))
        assert not [turn for turn in talk.server.contexts[-1] if turn[0] == "model"]
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("off", [-0.01, -0.001, 0.0, 0.001, 0.01])
    async def test_reply_at_last_moment_is_heard_or_fails(self, off, start_conversation, recorder):
        """The reply is heard and succeeds, or neither."""
        talk = await start_conversation(f"late:{RESTART + off:.3f}", max_retries=1)

        error = await talk.reply()
        await talk.settle()

        assert (["reply 1"] if error is None else []) == talk.heard
        assert 0 == recorder.open_spans

    async def test_request_between_loss_and_its_event_is_sent_once(
        self, start_conversation, monkeypatch, recorder
    ):
        """A request that is queued between the loss and its event is sent once, at the reconnect.

        The plugin alone does the same.
        """
        talk = await start_conversation("ok,late:1")
        await talk.reply()
        mark, asked = talk.realtime._mark_restart_needed, []

        def mark_and_ask(**kwargs):
            mark(**kwargs)
            if not asked:
                asked.append(talk.realtime.generate_reply())

        monkeypatch.setattr(talk.realtime, "_mark_restart_needed", mark_and_ask)
        (connection,) = talk.server._open
        await connection.hang_up(1011)
        await talk.server.wait_for(lambda: asked)
        await asked[0]
        await talk.settle()

        assert 2 == len(talk.server.requests)
        assert [("succeeded", None)] * 2 == ended(recorder)

    async def test_new_tools_during_reply_are_no_failure(self, start_conversation, recorder):
        """New tools restart the plugin's session in the middle of a reply, without a failure."""
        talk = await start_conversation("slow:5")
        handle = talk.ask()
        await talk.received()
        await asyncio.sleep(1)
        await talk.realtime.update_tools([_tool])
        await handle
        await talk.settle()

        assert [("succeeded", None)] == ended(recorder)
        assert 2 == talk.server.connections


class TestOnSilence:
    async def test_listen_hears_slow_reply_until_deadline(self, start_conversation, recorder):
        """Listening hears a slow answer up to the deadline, and does not recover a lost one."""
        talk = await start_conversation("late:18,ok", on_silence="listen", max_retries=1)

        assert None is await talk.reply()

        assert ["reply 1"] == talk.heard
        assert ["send", "listen"] == actions(recorder)

    async def test_late_reply_after_listening_is_not_heard(self, start_conversation, recorder):
        """A reply after the deadline is not heard."""
        talk = await start_conversation("late:25", on_silence="listen")
        began = now()

        assert isinstance(await talk.reply(), llm.RealtimeError)
        took = now() - began
        await talk.settle()

        assert 20.0 == pytest.approx(took)
        assert [] == talk.heard
        assert [("exhausted", "deadline")] == ended(recorder)

    async def test_resend_hears_slow_reply_twice(self, start_conversation, recorder):
        """The user's explicit choice is at least once, which is twice here."""
        talk = await start_conversation("late:12,ok", on_silence="resend")

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 1", "reply 2"] == sorted(talk.heard)
        assert ["send", "listen", "send"] == actions(recorder)

    async def test_attempt_timeout_shortens_windows(self, start_conversation, recorder):
        """The windows are shorter, and nothing is cancelled on the way."""
        talk = await start_conversation("late:3", attempt_timeout=2.0)

        assert None is await talk.reply()

        assert ["reply 1"] == talk.heard
        assert ["send", "listen"] == actions(recorder)

    async def test_late_reply_without_retries_is_not_heard(self, start_conversation, recorder):
        """One attempt is made, and a reply after its failure is not heard."""
        talk = await start_conversation("late:7", max_retries=0)

        assert isinstance(await talk.reply(), llm.RealtimeError)
        await talk.settle()

        assert [] == talk.heard
        assert [("exhausted", "max_attempts")] == ended(recorder)


class TestInterruption:
    @pytest.mark.parametrize(
        ("script", "after"),
        [
            ("late:15,ok", 1.0),  # in the attempt
            ("late:15,ok", 7.0),  # while listening
            ("late:15,late:5", 12.0),  # after the restart
            ("drop_before,late:5", 0.05),  # before the connection is back
        ],
    )
    async def test_interrupted_reply_is_never_heard(
        self, script, after, start_conversation, recorder
    ):
        """The reply ends at once; with server VAD nothing else would stop it."""
        talk = await start_conversation(script)
        handle = talk.ask(user_input="one")
        await talk.received()
        await asyncio.sleep(after)
        began = now()
        handle.interrupt()
        await handle

        assert began == now()
        await talk.settle()
        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 0 == recorder.open_spans

    async def test_plugin_alone_speaks_interrupted_reply(self, start_conversation):
        """The plugin alone speaks the reply that was interrupted."""
        talk = await start_conversation("late:4", bare=True)
        handle = talk.ask()
        await talk.received()
        handle.interrupt()
        await handle
        await talk.settle()

        assert ["reply 1"] == talk.heard

    async def test_conversation_survives_interruption(self, start_conversation):
        """The next reply knows the turns before the interruption."""
        talk = await start_conversation("ok,late:5,ok")
        await talk.reply(user_input="one")
        handle = talk.ask(user_input="two")
        await talk.received(2)
        handle.interrupt()
        await handle
        await talk.settle(0.01)

        assert None is await talk.reply(user_input="three")
        await talk.settle()
        assert ["reply 1", "reply 3"] == talk.heard
        assert [
            ("user", "one"),
            ("model", "reply 1"),
            ("user", "two"),
            ("user", "three"),
            ("user", "."),
        ] == talk.server.contexts[2]

    @pytest.mark.parametrize("after", [1.0, 7.0])
    async def test_manual_activity_detection_stops_reply_without_restart(
        self, after, start_conversation, recorder
    ):
        """The plugin signals that the user speaks, and the server stops by itself."""
        talk = await start_conversation("late:8", options={"realtime_input_config": MANUAL})
        reply = talk.realtime.generate_reply()
        await talk.received()
        await asyncio.sleep(after)
        reply.cancel()
        await talk.settle()

        assert [None] == talk.server.cancels
        assert 1 == talk.server.connections
        assert [] == talk.heard
        assert [("interrupted", "interrupted")] == ended(recorder)

    async def test_cancel_at_start_of_generation_is_not_heard(self, start_conversation, recorder):
        """A reply that is cancelled at its start is not read and not heard."""
        talk = await start_conversation("slow:5")
        talk.realtime.on("generation_created", lambda _: reply.cancel())
        reply = talk.realtime.generate_reply()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 1 == talk.server.connections

    async def test_interruption_lets_other_reply_finish(self, start_conversation, recorder):
        """The reply that is being spoken ends first, and then the session restarts."""
        talk = await start_conversation("slow:3,late:6,ok")
        first = talk.ask()
        await talk.received()
        await asyncio.sleep(1)
        second = talk.realtime.generate_reply()
        await talk.received(2)
        second.cancel()
        await asyncio.sleep(1)
        assert 1 == talk.server.connections
        await first
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert [None, None] == talk.server.handles
        assert [("succeeded", None), ("interrupted", "interrupted")] == ended(recorder)

    async def test_newer_request_supersedes_reply(self, start_conversation, recorder):
        """The plugin cancels the older request for a newer one, which is recorded."""
        talk = await start_conversation("silence,ok")
        first = talk.realtime.generate_reply()
        await talk.received()
        second = talk.realtime.generate_reply()
        await second

        with pytest.raises(asyncio.CancelledError):
            await first
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_newer_request_supersedes_listening_reply(self, start_conversation, recorder):
        """The plugin cancels our own future in the slot likewise."""
        talk = await start_conversation("silence,ok")
        first = talk.realtime.generate_reply()
        await asyncio.sleep(7)
        await talk.realtime.generate_reply()

        with pytest.raises(asyncio.CancelledError):
            await first
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)

    async def test_newer_request_passes_waiting_reply(self, start_conversation, recorder):
        """A request while another waits for the connection is heard, as is the other."""
        talk = await start_conversation("drop_before,late:2,ok")
        first = talk.realtime.generate_reply()
        await talk.server.wait_for("connection_lost")
        await asyncio.sleep(0.05)
        second = talk.realtime.generate_reply()
        await asyncio.gather(first, second)

        assert {("succeeded", None), ("recovered", None)} == set(ended(recorder))
        assert 3 == len(talk.server.requests)


class TestSessionEnds:
    @pytest.mark.parametrize(
        ("script", "after"), [("silence", 1.0), ("silence", 7.0), ("drop_before", 0.05)]
    )
    async def test_session_close_fails_pending_reply(
        self, script, after, start_conversation, recorder
    ):
        """Closing the realtime session ends a pending reply, in an attempt or in a wait."""
        talk = await start_conversation(script)
        reply = talk.realtime.generate_reply()
        await talk.received()
        await asyncio.sleep(after)
        await talk.realtime.aclose()

        with pytest.raises(llm.RealtimeError):
            await reply
        await talk.settle()
        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert 0 == recorder.open_spans


class TestAfterwards:
    @pytest.mark.parametrize("script", ["silence", "drop_before", "late:25"])
    async def test_next_reply_after_failure_is_heard(self, script, start_conversation, recorder):
        """The conversation continues after a failed reply, even without a pause."""
        talk = await start_conversation(
            f"{','.join([script] * 2)},ok", max_retries=1, on_silence="resend"
        )
        await talk.reply()

        if script == "drop_before":
            assert None is await talk.reply()
        else:
            await talk.reply()
            assert None is await talk.reply()
        await talk.settle()
        assert ["reply 3"] == talk.heard
        assert 0 == recorder.open_spans


class TestTarget:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (
                {"api_key": "k", "model": "m"},
                ("gcp.gemini", "m", "generativelanguage.googleapis.com", 443),
            ),
            (
                {"api_key": "k", "model": "m", "http_options": {"base_url": "https://h.test:8"}},
                ("gcp.gemini", "m", "h.test", 8),
            ),
            (
                {"api_key": "k", "model": "m", "http_options": {"base_url": "http://proxy"}},
                ("gcp.gemini", "m", "proxy", 80),
            ),
            (
                {"vertexai": True, "project": "p", "model": "m"},
                ("gcp.vertex_ai", "m", None, None),
            ),
        ],
    )
    def test_target_has_conventional_names(self, settings, expected):
        """The target has the names of the semantic conventions, and no URL in any of them."""
        settings = dict(settings)
        if "http_options" in settings:
            settings["http_options"] = types.HttpOptions(**settings["http_options"])
        model = google.realtime.RealtimeModel(**settings)
        session = SimpleNamespace(on=lambda *_: None, emit=None, realtime_model=model)
        target = GoogleAdapter(session, None)

        found = target.target()

        assert expected == (found.provider, found.model, found.server_address, found.server_port)


class TestContract:
    """What the Google adapter relies on, in the installed plugin. See CONTRIBUTING."""

    async def test_slot_resolves_future_that_is_in_it(self, start_conversation):
        """The future of generate_reply is in the slot, and so is one that we put there."""
        talk = await start_conversation("late:1", bare=True)
        reply = talk.realtime.generate_reply()
        assert reply is talk.realtime._pending_generation_fut
        ours = asyncio.get_running_loop().create_future()
        talk.realtime._pending_generation_fut = ours
        reply.cancel()
        await asyncio.sleep(0.5)
        assert ours is talk.realtime._pending_generation_fut

        event = await ours

        assert event.user_initiated
        assert None is talk.realtime._pending_generation_fut

    async def test_plugin_timeout_is_longer_than_send_window(self, start_conversation):
        """Our window is a little shorter than the plugin's own timeout."""
        talk = await start_conversation("silence", bare=True)
        began = now()

        with pytest.raises(llm.RealtimeError, match="timed out"):
            await talk.realtime.generate_reply()

        assert PLUGIN_TIMEOUT == pytest.approx(now() - began)
        assert SEND_WINDOW < PLUGIN_TIMEOUT

    async def test_new_connection_emits_metrics_without_request_id(self, start_conversation):
        """The event comes before any read, and the session is active right after it."""
        talk = await start_conversation("ok", bare=True)
        seen = []

        def on_metrics(metrics):
            if metrics.request_id == "":
                seen.append(talk.realtime._active_session)
                asyncio.get_running_loop().call_soon(
                    lambda: seen.append(talk.realtime._active_session is not None)
                )

        talk.realtime.on("metrics_collected", on_metrics)
        await talk.reply()
        talk.realtime._mark_restart_needed()
        await talk.settle(1)

        assert [None, True] * 2 == seen  # the first one, and the one after the restart

    async def test_request_is_only_complete_turn_in_queue(self, start_conversation):
        """The adapter finds the request in the queue by its complete turn."""
        talk = await start_conversation("ok", bare=True)
        await talk.settle(1)
        await talk.realtime.update_chat_ctx(llm.ChatContext([_said("one")]))
        talk.realtime.generate_reply(instructions="SECRET")
        queue = talk.realtime._msg_ch
        messages = [queue.recv_nowait() for _ in range(queue.qsize())]

        assert [False, True] == [message.turn_complete for message in messages]

    async def test_generation_records_its_end(self, start_conversation):
        """The plugin's private record shows whether a generation came to its end."""
        talk = await start_conversation("slow:1", bare=True)
        seen = []
        talk.realtime.on(
            "input_speech_stopped",
            lambda _: seen.append(talk.realtime._current_generation._completed_timestamp),
        )
        event = await talk.realtime.generate_reply()
        generation = talk.realtime._current_generation
        assert event.response_id == generation.response_id
        assert (False, None) == (generation._done, generation._completed_timestamp)
        await talk.settle()

        assert generation._done
        assert [generation._completed_timestamp] == seen
        assert generation.function_ch.closed
        assert "reply 1" == generation.output_text


@function_tool
async def _tool() -> None:
    """Do nothing."""


def _said(text):
    return llm.ChatMessage(role="user", content=[text])


async def _text(event):
    return "".join([text async for m in event.message_stream async for text in m.text_stream])
