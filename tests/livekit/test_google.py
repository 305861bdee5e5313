# SPDX-License-Identifier: Apache-2.0
"""The Google adapter with the real plugin and a real AgentSession: on the wire and at the ear."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from google.genai import types
from livekit.agents import Agent, function_tool, llm
from livekit.plugins import google
from support.conversation import actions, codes, ended, now
from support.providers import GOOGLE

from traced_retry.livekit.google import LISTEN_WINDOW, PLUGIN_TIMEOUT, SEND_WINDOW, GoogleAdapter

RESTART = SEND_WINDOW + LISTEN_WINDOW
"""Seconds from the request to the restart."""

MANUAL = types.RealtimeInputConfig(
    automatic_activity_detection=types.AutomaticActivityDetection(disabled=True)
)


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
    async def test_row(self, script, start_conversation, recorder):
        """Heard once, or known to have failed; nothing later; no span left open."""
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
        # LiveKit closes the session on 1007, and interrupts the handle before it reads our future.
        told = row.outcome in ("exhausted", "not_recoverable") and "1007" not in script
        assert told == isinstance(error, llm.RealtimeError)
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("script", BARE)
    async def test_the_plugin_alone(self, script, start_conversation):
        """What it is like without us."""
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
    async def test_the_code_is_told(self, script, code, start_conversation, recorder):
        """Google's close code, or the code of its message, is on the attempt."""
        talk = await start_conversation(script)

        await talk.reply()

        assert code == codes(recorder)[0]

    async def test_a_refused_reconnect(self, start_conversation, recorder):
        """The plugin takes any connection refused for final, and so do we, with its status."""
        talk = await start_conversation("ok,unauthorized")
        await talk.reply()

        with pytest.raises(llm.RealtimeError) as caught:
            await talk.realtime.generate_reply()
        await talk.settle()

        assert "401" == caught.value.code
        assert ["reply 1"] == talk.heard
        assert ("not_recoverable", "not_recoverable") == ended(recorder)[1]
        assert 0 == recorder.open_spans

    async def test_asked_of_a_session_that_was_refused(self, start_conversation):
        """It is told what the session died of, whoever of us heard that first."""
        talk = await start_conversation("ok,unauthorized")
        await talk.reply()
        told = []
        for _ in range(2):
            with pytest.raises(llm.RealtimeError) as caught:
                await talk.realtime.generate_reply()
            told.append(caught.value.code)

        assert ["401", "401"] == told

    async def test_what_the_model_cannot_do(self, start_conversation, recorder):
        """Refused by the plugin itself: told at once, and the session is left alone."""
        talk = await start_conversation("ok")
        talk.model.capabilities.mutable_chat_context = False

        with pytest.raises(llm.RealtimeError):
            await talk.realtime.generate_reply(instructions="SECRET")
        await talk.settle()

        assert [("not_recoverable", "not_recoverable")] == ended(recorder)
        assert 1 == talk.server.connections


class TestRestart:
    async def test_keeps_the_conversation(self, start_conversation):
        """The new session is told all that was said, each thing once, and then asked."""
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
    async def test_so_does_a_loss(self, loss, start_conversation):
        """A lost connection is not resumed either: the server would answer the old turn too."""
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
    async def test_why_the_handle_goes(self, dropped, heard, start_conversation):
        """A session that is resumed answers the turn of the old one."""
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

    async def test_a_handle_that_comes_back(self, start_conversation, monkeypatch):
        """The old session's last word may be a new handle: the connection made is given up."""
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
    async def test_a_reply_in_the_very_moment(self, at, off, start_conversation, recorder):
        """As one window ends and the next begins, no reply is lost and none is heard twice."""
        talk = await start_conversation(f"late:{at + off:.3f},ok")

        assert None is await talk.reply()
        await talk.settle()

        assert 1 == len(talk.heard)
        assert talk.heard[0] in ("reply 1", "reply 2")
        assert ended(recorder)[0] in (("succeeded", None), ("recovered", None))
        assert not [turn for turn in talk.server.contexts[-1] if turn[0] == "model"]
        assert 0 == recorder.open_spans

    @pytest.mark.parametrize("off", [-0.01, -0.001, 0.0, 0.001, 0.01])
    async def test_a_reply_in_the_moment_of_giving_up(self, off, start_conversation, recorder):
        """It is heard and told as a success, or neither."""
        talk = await start_conversation(f"late:{RESTART + off:.3f}", max_retries=1)

        error = await talk.reply()
        await talk.settle()

        assert (["reply 1"] if error is None else []) == talk.heard
        assert 0 == recorder.open_spans

    async def test_asked_before_the_loss_is_told(self, start_conversation, monkeypatch):
        """Between the loss and the event that tells of it a request may be queued: sent once."""
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

    async def test_what_the_agent_cuts_itself(self, start_conversation, recorder):
        """New tools restart the plugin's session, also in the middle of a reply: no failure."""
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
    async def test_listen(self, start_conversation, recorder):
        """Only listens, to the deadline: a slow answer is heard, a lost one is not recovered."""
        talk = await start_conversation("late:18,ok", on_silence="listen", max_retries=1)

        assert None is await talk.reply()

        assert ["reply 1"] == talk.heard
        assert ["send", "listen"] == actions(recorder)

    async def test_listen_in_vain(self, start_conversation, recorder):
        """And after the deadline the late reply is not heard."""
        talk = await start_conversation("late:25", on_silence="listen")
        began = now()

        assert isinstance(await talk.reply(), llm.RealtimeError)
        took = now() - began
        await talk.settle()

        assert 20.0 == pytest.approx(took)
        assert [] == talk.heard
        assert [("exhausted", "deadline")] == ended(recorder)

    async def test_resend(self, start_conversation, recorder):
        """At least once: here twice, as the user chose."""
        talk = await start_conversation("late:12,ok", on_silence="resend")

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 1", "reply 2"] == sorted(talk.heard)
        assert ["send", "listen", "send"] == actions(recorder)

    async def test_an_attempt_timeout(self, start_conversation, recorder):
        """Shorter windows, and nothing is cancelled on the way."""
        talk = await start_conversation("late:3", attempt_timeout=2.0)

        assert None is await talk.reply()

        assert ["reply 1"] == talk.heard
        assert ["send", "listen"] == actions(recorder)

    async def test_no_retries(self, start_conversation, recorder):
        """One attempt, and the late reply is not heard after the agent was told."""
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
    async def test_barge_in(self, script, after, start_conversation, recorder):
        """Over at once, and never heard: with server VAD nothing else would stop the reply."""
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

    async def test_the_plugin_alone(self, start_conversation):
        """It speaks the reply that was called off."""
        talk = await start_conversation("late:4", bare=True)
        handle = talk.ask()
        await talk.received()
        handle.interrupt()
        await handle
        await talk.settle()

        assert ["reply 1"] == talk.heard

    async def test_the_conversation_goes_on(self, start_conversation):
        """The next reply knows what was said before the barge-in."""
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
    async def test_manual_activity_detection(self, after, start_conversation, recorder):
        """There the plugin tells the server that the user speaks, and it stops by itself."""
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

    async def test_as_the_reply_comes(self, start_conversation, recorder):
        """Cancelled in the very moment it began: nobody reads it, and it is not heard."""
        talk = await start_conversation("slow:5")
        talk.realtime.on("generation_created", lambda _: reply.cancel())
        reply = talk.realtime.generate_reply()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await talk.settle()

        assert [("interrupted", "interrupted")] == ended(recorder)
        assert [] == talk.heard
        assert 1 == talk.server.connections

    async def test_while_another_is_spoken(self, start_conversation, recorder):
        """What is being said is said to its end; then the session is begun anew."""
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

    async def test_superseded(self, start_conversation, recorder):
        """The plugin cancels the older request for a newer one, and so is it told."""
        talk = await start_conversation("silence,ok")
        first = talk.realtime.generate_reply()
        await talk.received()
        second = talk.realtime.generate_reply()
        await second

        with pytest.raises(asyncio.CancelledError):
            await first
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_superseded_while_listening(self, start_conversation, recorder):
        """Our own future in the slot goes the same way."""
        talk = await start_conversation("silence,ok")
        first = talk.realtime.generate_reply()
        await asyncio.sleep(7)
        await talk.realtime.generate_reply()

        with pytest.raises(asyncio.CancelledError):
            await first
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)

    async def test_a_waiting_one_lets_a_newer_one_pass(self, start_conversation, recorder):
        """Asked while another waits for the connection: both are heard."""
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
    async def test_closed(self, script, after, start_conversation, recorder):
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
    async def test_the_session_goes_on(self, script, start_conversation, recorder):
        """One lost reply is not the end of the conversation, even asked for at once."""
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

    async def test_tools(self, start_conversation, recorder):
        """A tool call is a reply; Gemini answers its result unasked."""
        called = []

        class Helper(Agent):
            @function_tool
            async def look_up(self) -> str:
                """Look it up."""
                called.append(True)
                return "found"

        talk = await start_conversation("tool:look_up,ok", agent=Helper(instructions="SECRET"))
        await talk.session.run(user_input="question")
        await talk.settle()

        assert [True] == called
        assert ["reply 2"] == talk.heard
        assert [("succeeded", None)] == ended(recorder)
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
                {"vertexai": True, "project": "p", "model": "m"},
                ("gcp.vertex_ai", "m", None, None),
            ),
        ],
    )
    def test_target(self, settings, expected):
        """Semantic conventions' names, and no URL in any of them."""
        settings = dict(settings)
        if "http_options" in settings:
            settings["http_options"] = types.HttpOptions(**settings["http_options"])
        model = google.realtime.RealtimeModel(**settings)
        target = GoogleAdapter(SimpleNamespace(on=lambda *_: None, realtime_model=model), None)

        found = target.target()

        assert expected == (found.provider, found.model, found.server_address, found.server_port)


class TestContract:
    """What the Google adapter relies on, in the installed plugin. See CONTRIBUTING."""

    async def test_the_slot(self, start_conversation):
        """The future that generate_reply returns is the slot, and so is one that we put there."""
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

    async def test_the_time_out(self, start_conversation):
        """The plugin's own is what our window is a little shorter than."""
        talk = await start_conversation("silence", bare=True)
        began = now()

        with pytest.raises(llm.RealtimeError, match="timed out"):
            await talk.realtime.generate_reply()

        assert PLUGIN_TIMEOUT == pytest.approx(now() - began)
        assert SEND_WINDOW < PLUGIN_TIMEOUT

    async def test_a_connection_is_told_by_an_empty_request_id(self, start_conversation):
        """Before anything is read from it, and with the session made active right after."""
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

    async def test_a_request_is_the_only_complete_turn_in_the_queue(self, start_conversation):
        """Which is how it is taken out again."""
        talk = await start_conversation("ok", bare=True)
        await talk.settle(1)
        await talk.realtime.update_chat_ctx(llm.ChatContext([_said("one")]))
        talk.realtime.generate_reply(instructions="SECRET")
        queue = talk.realtime._msg_ch
        messages = [queue.recv_nowait() for _ in range(queue.qsize())]

        assert [False, True] == [message.turn_complete for message in messages]

    async def test_a_generation(self, start_conversation):
        """Its private record tells whether it came to its end."""
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
