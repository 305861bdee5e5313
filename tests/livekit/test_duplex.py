# SPDX-License-Identifier: Apache-2.0
"""GPT-Live, a duplex model: its requests and its own replies are traced, recovered and reported."""

from __future__ import annotations

import asyncio
import random
from typing import NamedTuple

import pytest
from livekit.agents import Agent, AgentSession, function_tool, inference, llm
from support.conversation import actions, codes, ended, late, now
from support.providers import CONN_OPTIONS, GPT_LIVE, KEY, gpt_live_model, openai

import traced_retry
from traced_retry import semconv
from traced_retry.livekit import hook
from traced_retry.livekit.duplex import DuplexAdapter

pytestmark = pytest.mark.skipif(
    not hasattr(llm, "DuplexModel"), reason="LiveKit got duplex models after livekit-agents 1.7.0"
)


@pytest.fixture
def provider():
    """Return GPT-Live."""
    return GPT_LIVE


class Clerk(Agent):
    """An agent with a tool."""

    def __init__(self):
        super().__init__(instructions="SECRET instructions")
        self.called_at = []

    @function_tool
    async def look_up(self) -> str:
        """Look an order up."""
        self.called_at.append(now())
        return "SECRET result"


class Row(NamedTuple):
    """The expected result of one request."""

    heard: list[str]
    outcome: str
    stop_reason: str | None
    actions: list[str]
    codes: list[str | None]
    seconds: float
    """The longest time until the agent's code knew."""
    requests: int
    late: int = 0


SENT_AGAIN = ["send", "send"]
LISTENED = ["send", "listen"]
DEADLINE = ("exhausted", "deadline", LISTENED, ["timeout", "timeout"], 20.0)
ROWS = {
    "ok": Row(["reply 1"], "succeeded", None, ["send"], [None], 0.0, 1),
    "late:7": Row(["reply 1"], "succeeded", None, ["send"], [None], 7.0, 1),
    "slow:0.5": Row(["reply 1"], "succeeded", None, ["send"], [None], 0.5, 1),
    # The request may still be answered, so it is not sent again.
    "late:9.95": Row(["reply 1"], "recovered", None, LISTENED, ["timeout", None], 9.95, 1),
    "late:12": Row(["reply 1"], "recovered", None, LISTENED, ["timeout", None], 12.0, 1),
    "late:25": Row(["reply 1"], *DEADLINE, 1, late=1),
    "silence,ok": Row([], *DEADLINE, 1),
    "uncorrelated,ok": Row([], *DEADLINE, 1),
    # The server refused the request by its id.
    "error:server_error,ok": Row(
        ["reply 2"], "recovered", None, SENT_AGAIN, ["server_error", None], 1.5, 2
    ),
    "rate_limit:3,ok": Row(
        ["reply 2"], "recovered", None, SENT_AGAIN, ["rate_limit_exceeded", None], 3.0, 2
    ),
    "rate_limit,silence": Row(
        [],
        "exhausted",
        "deadline",
        ["send", "send", "listen"],
        ["rate_limit_exceeded", "timeout", "timeout"],
        20.0,
        2,
    ),
    "quota": Row(
        [], "not_recoverable", "not_recoverable", ["send"], ["insufficient_quota"], 0.0, 1
    ),
    # The request is gone with its connection.
    "drop_before,ok": Row(
        ["reply 2"], "recovered", None, SENT_AGAIN, ["connection_lost", None], 1.5, 2
    ),
    "drop_during,ok": Row(
        ["reply"], "not_recoverable", "output_started", ["send"], ["connection_lost"], 0.1, 1
    ),
    # The request waits for the next connection, and is sent there.
    "unauthorized,ok": Row(
        ["reply 1"], "recovered", None, LISTENED, ["connection_lost", None], 0.2, 1
    ),
    # The plugin gives up after three attempts to connect.
    "drop_queued:60": Row(
        [], "not_recoverable", "not_recoverable", ["send"], ["connection_lost"], 2.0, 1
    ),
}


class TestRequests:
    @pytest.mark.parametrize("script", ROWS)
    async def test_each_fault_has_expected_result(self, script, start_conversation, recorder):
        """A request is sent again only if it cannot be answered any more."""
        row = ROWS[script]
        talk = await start_conversation(script)
        error, took = await talk.timed_reply()
        await talk.settle()

        assert row.heard == talk.heard
        assert [(row.outcome, row.stop_reason)] == ended(recorder, None)
        assert (row.actions, row.codes) == (actions(recorder, None), codes(recorder, None))
        assert row.seconds - 1.5 < took <= row.seconds
        assert row.requests == len(talk.server.requests)
        assert row.late == late(recorder)
        assert (row.stop_reason is not None) == (error is not None)
        assert 0 == recorder.open_spans

    async def test_plugin_alone_waits_for_time_out_of_refused_request(self, start_conversation):
        """LiveKit's adapter does not read the server's error."""
        talk = await start_conversation("error:server_error,ok", bare=True)
        error, took = await talk.timed_reply()

        assert "did not start speaking when asked" in str(error)
        assert 10.0 == took

    async def test_request_is_not_lost_if_session_ends_normally(self, start_conversation, recorder):
        """The plugin reports no error, and opens a new session."""
        talk = await start_conversation("silence,ok")
        handle = await talk.ask_agent()
        await talk.server.expire()
        await handle

        assert ["reply 2"] == talk.heard
        assert [("recovered", None)] == ended(recorder)
        assert ["connection_lost", None] == codes(recorder)

    async def test_request_during_reconnect_is_sent_once(self, start_conversation, recorder):
        """The plugin keeps the request for the next connection, so it is heard once."""
        talk = await start_conversation("drop_queued:0.3,ok")
        first = await talk.ask_plugin()
        await talk.server.wait_for("connection_lost")
        second = talk.realtime.generate_reply()
        await second
        await talk.settle()

        assert first.cancelled()
        assert {("superseded", "superseded"), ("recovered", None)} == set(ended(recorder))
        assert 2 == len(talk.server.requests)
        assert 1 == len(talk.generations)

    async def test_second_request_supersedes_first(self, start_conversation, recorder):
        """The model gets both, and its next speech is the reply to the second."""
        talk = await start_conversation("silence,late:1")
        first = await talk.ask_plugin()
        await talk.realtime.generate_reply()
        await talk.settle()

        assert first.cancelled()
        assert [("superseded", "superseded"), ("succeeded", None)] == ended(recorder)

    async def test_retry_does_not_supersede_newer_request(
        self, start_conversation, recorder, monkeypatch
    ):
        """The older request was refused, and a newer one is open when it would be sent again."""
        monkeypatch.setattr(random, "uniform", lambda _, bound: bound)  # It waits for 0.1 s.
        talk = await start_conversation("error:server_error,late:5,ok")
        first = await talk.ask_plugin()
        await asyncio.sleep(0.01)
        await talk.realtime.generate_reply()
        await talk.settle()

        assert first.cancelled()
        assert {("superseded", "superseded"), ("succeeded", None)} == set(ended(recorder))
        assert 2 == len(talk.server.requests)

    async def test_tool_call_answers_request(self, start_conversation, recorder):
        """The tool runs at once. With the plugin alone it waits until the request has failed."""
        agent = Clerk()
        talk = await start_conversation("tool:look_up,ok", agent=agent)
        began = now()
        error = await talk.reply()
        await talk.settle()

        assert (None, ["reply 2"], [began]) == (error, talk.heard, agent.called_at)
        assert [("succeeded", None)] == ended(recorder)
        assert [("succeeded", None)] == ended(recorder, "provider")
        assert 1 == sum(generation.user_initiated for generation in talk.generations)

    async def test_plugin_alone_delays_tool(self, start_conversation):
        """The request waits for speech, the speech for the tool, and the tool for the request."""
        agent = Clerk()
        talk = await start_conversation("tool:look_up,ok", agent=agent, bare=True)
        began = now()
        error = await talk.reply()
        await talk.settle()

        assert error is not None
        assert [began + 10.0] == agent.called_at

    async def test_failure_is_reported_once(self, start_conversation, caplog):
        """on_exhausted, the handle and the log get it."""
        failures = []
        talk = await start_conversation("quota", on_exhausted=failures.append)
        handle = talk.ask()
        await handle

        (failed,) = failures
        assert ("openai", "gpt-live-1", "agent") == (
            failed.provider,
            failed.model,
            failed.initiator,
        )
        assert (handle, ("insufficient_quota",)) == (failed.speech, failed.codes)
        assert handle.exception() is not None
        assert 1 == len([r for r in caplog.records if "reply failed" in r.getMessage()])

    async def test_policy_may_allow_a_second_reply(self, start_conversation, recorder):
        """on_silence="resend" accepts that the caller may hear two."""
        talk = await start_conversation("silence,ok", on_silence="resend", deadline=30.0)

        assert None is await talk.reply()
        assert ["send", "listen", "send"] == actions(recorder)


async def speak(talk, seconds=30.0):
    """Have the caller speak once, and let time pass."""
    await talk.server.wait_for("connected")
    await asyncio.sleep(1.0)
    await talk.server.caller_speaks("hello")
    await asyncio.sleep(seconds)


class TestModelStartsToSpeak:
    async def test_each_reply_is_counted_once(self, start_conversation, recorder):
        """A generation that only calls a tool is no reply."""
        agent = Clerk()
        script = "ok,ok,turn:ok,turn:tool:look_up,turn:slow:0.5"
        talk = await start_conversation(script, agent=agent)
        await talk.reply()
        for _ in range(3):
            await speak(talk)

        assert ["reply 1", "answer 1", "reply 2", "answer 3"] == talk.heard
        assert 1 == len(agent.called_at)
        assert [("succeeded", None)] == ended(recorder)
        assert [("succeeded", None)] * 3 == ended(recorder, "provider")
        assert ["listen"] * 3 == actions(recorder, "provider")
        assert {0} == set(recorder.points(semconv.METRIC_IN_FLIGHT).values())
        assert 0 == recorder.open_spans

    async def test_cut_reply_is_reported(self, start_conversation, recorder):
        """The plugin alone ends it like a complete one."""
        failures, speeches = [], []
        talk = await start_conversation("turn:drop_during", on_exhausted=failures.append)
        talk.session.on("speech_created", lambda event: speeches.append(event.speech_handle))
        await speak(talk)

        assert ["answer"] == talk.heard
        assert [("not_recoverable", "output_started")] == ended(recorder, "provider")
        (failed,), (speech,) = failures, speeches
        assert ("provider", speech) == (failed.initiator, failed.speech)
        assert speech.exception() is not None

    async def test_silence_of_model_is_no_failure(self, start_conversation, recorder):
        """The model decides when it speaks."""
        failures = []
        talk = await start_conversation("turn:silence", on_exhausted=failures.append)
        await speak(talk)

        assert ([], []) == (recorder.replies, failures)

    async def test_answer_is_lost_with_connection(self, start_conversation, recorder):
        """The new session does not answer the caller, so the failure is reported at once."""
        failures = []
        talk = await start_conversation("turn:drop_before", on_exhausted=failures.append)
        await speak(talk)

        assert [("exhausted", "unsafe_to_resend")] == ended(recorder, "provider")
        assert ["connection_lost"] == codes(recorder, "provider")
        assert ["provider"] == [failed.initiator for failed in failures]
        assert [] == talk.server.requests

    async def test_later_loss_of_connection_loses_no_answer(self, start_conversation, recorder):
        """The model chose not to answer, or has answered."""
        talk = await start_conversation("turn:silence,turn:ok")
        await speak(talk)
        await talk.server.expire()
        await speak(talk, 5.0)
        await talk.server.expire()
        await talk.settle()

        assert [("succeeded", None)] == ended(recorder, None)

    async def test_late_words_are_no_reply(self, start_conversation, recorder):
        """LiveKit presents words for sound that was played as a generation of its own."""
        talk = await start_conversation("ok")
        await talk.reply()
        (connection,) = talk.server._open
        await connection.send(
            "session.output_transcript.delta", delta="!", start_ms=300, end_ms=400
        )
        await talk.settle()

        assert 2 == len(talk.generations)
        assert [("succeeded", None)] == ended(recorder, None)


class TestNames:
    def target(self, model, recorder):
        """Return provider, model, address of a model's session."""
        traced_retry.wrap(model, **recorder.providers)
        session = llm.DuplexRealtimeAdapter(model).session()
        target = getattr(session, hook._HOOK)._target
        return session, (target.provider, target.model, target.server_address)

    async def test_provider_is_named_and_not_address(self, recorder):
        """The model's own ``provider`` is the address of its server."""
        models = [
            (gpt_live_model(api_key=KEY), ("openai", "gpt-live-1", "api.openai.com")),
            (
                openai.realtime.GPTLiveModel.with_azure(
                    azure_deployment="mine",
                    azure_endpoint="https://x.openai.azure.com",
                    api_key=KEY,
                    responses_options={"model": "theirs"},
                ),
                ("azure.ai.openai", "mine", "x.openai.azure.com"),
            ),
            (
                inference.DuplexModel(
                    "openai/gpt-live-1",
                    base_url="https://x.livekit.cloud/v1",
                    api_key=KEY,
                    api_secret="SECRET" * 6,
                ),
                ("livekit", "openai/gpt-live-1", "x.livekit.cloud"),
            ),
        ]
        for model, expected in models:
            session, found = self.target(model, recorder)
            await session.aclose()
            await model.aclose()

            assert expected == found


class TestHook:
    async def test_wrap_returns_model_and_keeps_session_class(self, recorder):
        """LiveKit puts its adapter around the model after ``wrap``."""
        model = gpt_live_model(api_key=KEY)

        assert model is traced_retry.wrap(model, **recorder.providers)
        with pytest.warns(RuntimeWarning, match="is wrapped already"):
            traced_retry.wrap(model)
        await model.aclose()

    async def test_adapter_can_be_wrapped_instead(self, start_conversation, recorder):
        """A program may put LiveKit's adapter around the model itself."""
        talk = await start_conversation(
            "rate_limit,ok",
            model=lambda **kwargs: llm.DuplexRealtimeAdapter(gpt_live_model(**kwargs)),
        )
        await talk.reply()

        assert [("recovered", None)] == ended(recorder)

    async def test_unwrapped_model_is_left_alone(self, start_conversation, recorder):
        """A wrapped model does not change the sessions of others."""
        wrapped = gpt_live_model(api_key=KEY)
        traced_retry.wrap(wrapped, **recorder.providers)
        talk = await start_conversation("ok", bare=True)
        await talk.reply()
        await wrapped.aclose()

        assert not hasattr(talk.realtime, hook._HOOK)
        assert [] == recorder.replies

    async def test_instrument_covers_duplex_models(self, start_conversation, recorder):
        """The hook is installed before LiveKit's adapter has finished its ``__init__``."""
        traced_retry.instrument(**recorder.providers)
        try:
            talk = await start_conversation("rate_limit,ok,turn:ok", bare=True)
        finally:
            traced_retry.uninstrument()
        await talk.reply()
        await speak(talk)

        assert ["reply 2", "answer 1"] == talk.heard
        assert [("recovered", None)] == ended(recorder)
        assert [("succeeded", None)] == ended(recorder, "provider")

    async def test_other_duplex_model_is_observed(self, recorder):
        """Without GPT-Live's events a request is sent once, and the model's refusal passes."""
        model = Mute(capabilities=llm.DuplexCapabilities(False, False))
        traced_retry.wrap(model, policy=traced_retry.RetryPolicy(), **recorder.providers)
        session = llm.DuplexRealtimeAdapter(model).session()
        with pytest.raises(llm.RealtimeError, match="decides for itself when to speak"):
            await session.generate_reply()
        await session.aclose()

        assert [("exhausted", "unsafe_to_resend")] == ended(recorder)
        assert "mute" == recorder.replies[0][semconv.PROVIDER]


class Mute(llm.DuplexModel if hasattr(llm, "DuplexModel") else object):
    """A duplex model that never speaks."""

    model = "mute-1"
    provider = "Mute"

    def session(self):
        return MuteSession(self)

    async def aclose(self):
        pass


class MuteSession(llm.DuplexSession if hasattr(llm, "DuplexSession") else object):
    """A session without sound."""

    tools = llm.ToolContext.empty()

    @property
    def audio_stream(self):
        return self._sound()

    async def _sound(self):
        await asyncio.Event().wait()
        yield

    def push_audio(self, frame):
        pass

    async def _update_instructions(self, instructions):
        pass

    async def _append_items(self, items):
        pass

    async def _update_tools(self, tools):
        pass

    def _update_options(self, *, tool_choice=None):
        pass


class TestContract:
    """The facts about LiveKit that the adapter relies on."""

    async def test_next_speech_resolves_future_in_slot(self, start_conversation):
        """The time-out fails the plugin's own future, and ours in ``_pending_reply`` waits on."""
        talk = await start_conversation("late:12", bare=True)
        theirs = await talk.ask_plugin()
        assert theirs is talk.realtime._pending_reply
        ours = talk.realtime._pending_reply = asyncio.Future()

        with pytest.raises(llm.RealtimeError, match="did not start speaking"):
            await theirs
        assert ours is talk.realtime._pending_reply
        assert (await ours).user_initiated

    async def test_time_out_is_that_of_window(self, start_conversation):
        """An attempt has to end before it."""
        talk = await start_conversation("silence", bare=True)
        _, took = await talk.timed_reply()

        assert DuplexAdapter.window == took

    async def test_commentary_has_id_and_is_reported_when_sent(self, start_conversation):
        """``send_event`` gets the event, and ``openai_client_event_queued`` comes as it is sent."""
        talk = await start_conversation("silence", bare=True)
        duplex, queued, sent = talk.realtime.duplex_session, [], []
        send = duplex.send_event
        duplex.send_event = lambda event: (queued.append(event), send(event))
        duplex.on("openai_client_event_queued", sent.append)
        await talk.ask_plugin()

        (ask,) = [event for event in queued if event.type == "session.commentary.append"]
        assert ask.event_id
        assert [ask.event_id] == [
            event["event_id"] for event in sent if event["type"] == "session.commentary.append"
        ]
        assert [ask.event_id] == [request.event_id for request in talk.server.requests]

    async def test_reconnect_fails_slot_and_keeps_queued_event(self, start_conversation):
        """The plugin reports the failure, and the model answers nevertheless."""
        talk = await start_conversation("unauthorized,ok", bare=True)
        error = await talk.reply()
        await talk.settle()

        assert "reconnected before the model replied" in str(error)
        assert ["reply 1"] == talk.heard

    async def test_raw_error_comes_before_error_of_session(self, start_conversation):
        """The session's error has no code, so the raw one must be known by then."""
        talk = await start_conversation("quota", bare=True)
        order = []
        talk.realtime.duplex_session.on(
            "openai_server_event_received", lambda event: order.append(event["type"])
        )
        talk.realtime.on("error", lambda event: order.append(type(event.error).__name__))
        await talk.reply()

        assert ["error", "APIError"] == order[-2:]

    async def test_generation_is_filled_by_public_methods_of_its_channels(self, start_conversation):
        """The adapter replaces ``send_nowait`` and ``close`` when a generation is announced."""
        talk = await start_conversation("slow:0.5", bare=True)
        order = []

        def watch(name, channel, method):
            original = getattr(channel, method)

            def replacement(*args):
                order.append(name)
                if name == "message":
                    watch("sound", args[0].audio_stream, "send_nowait")
                return original(*args)

            setattr(channel, method, replacement)

        def announced(event):
            watch("message", event.message_stream, "send_nowait")
            watch("end", event.message_stream, "close")

        talk.realtime.on("generation_created", announced)
        await talk.reply()
        await talk.settle()

        assert ["message", "sound"] == order[:2]
        assert 1 == order.count("end")
        assert "end" == order[-1]

    async def test_lists_of_required_attributes_hold(self, start_conversation):
        """A session without one of them is only observed."""
        talk = await start_conversation("ok", bare=True)

        assert [] == DuplexAdapter(talk.realtime, None).missing_attributes()


async def test_livekit_wraps_duplex_model_itself():
    """``wrap`` relies on ``DuplexRealtimeAdapter`` and its ``duplex_model``."""
    model = gpt_live_model(api_key=KEY, conn_options=CONN_OPTIONS)
    adapter = AgentSession(llm=model).llm

    assert isinstance(adapter, llm.DuplexRealtimeAdapter)
    assert model is adapter.duplex_model
