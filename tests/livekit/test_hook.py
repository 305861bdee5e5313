# SPDX-License-Identifier: Apache-2.0
"""wrap, instrument, and what stays as it was."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import weakref
from importlib.metadata import entry_points

import pytest
from livekit.agents import llm
from livekit.agents import telemetry as livekit_telemetry
from livekit.plugins import openai, xai
from opentelemetry import trace

import traced_retry
from traced_retry import RetryingRealtimeSession, RetryPolicy, semconv
from traced_retry.core import switch
from traced_retry.livekit import hook
from traced_retry.livekit.openai import OpenAIAdapter


@pytest.fixture
def instrumented(recorder):
    """LiveKit instrumented with in-memory providers, undone afterwards."""
    traced_retry.instrument(policy=RetryPolicy(), **recorder.providers)
    yield recorder
    traced_retry.uninstrument()


@pytest.fixture
def model():
    """A real model that has not connected to anything."""
    return openai.realtime.RealtimeModel(api_key="sk-SECRET", base_url="http://127.0.0.1:1/v1")


WRONG = pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"policy": {"max_retries": 1}}, "policy is a dict; it must be a RetryPolicy, for example"),
        ({"policy": 3}, "policy is a int; it must be a RetryPolicy"),
        ({"on_exhausted": "nope"}, "on_exhausted is 'nope'; it must be a function of one Failed"),
        ({"on_exhausted": False}, "on_exhausted is False; it must be a function"),
        ({"on_waiting": "nope"}, "on_waiting is 'nope'; it must be a function of one WaitingReply"),
    ],
)


class TestWrap:
    def test_wrap_returns_same_model(self, model):
        """wrap() returns the model that it gets."""
        label = model.label

        assert model is traced_retry.wrap(model)
        assert (openai.realtime.RealtimeModel, label) == (type(model), model.label)

    def test_second_wrap_warns_and_changes_nothing(self, model):
        """A second wrap() changes nothing and logs a warning."""
        traced_retry.wrap(model)
        session = model.session

        with pytest.warns(RuntimeWarning, match="wrapped already"):
            traced_retry.wrap(model)
        assert session is model.session

    def test_wrap_refuses_other_models(self):
        """The error names the models that wrap() takes, and those that retry by themselves."""
        with pytest.raises(TypeError, match=r"takes a livekit.agents.llm.RealtimeModel.*a str"):
            traced_retry.wrap("gpt-realtime")

    def test_invalid_environment_is_refused_at_wrap(self, model, monkeypatch):
        """An invalid variable raises an error at start-up, not at the first failure."""
        monkeypatch.setenv("LIVEKIT_REALTIME_MAX_RETRIES", "lots")

        with pytest.raises(
            traced_retry.PolicyError, match="LIVEKIT_REALTIME_MAX_RETRIES is 'lots'"
        ):
            traced_retry.wrap(model)

    @WRONG
    def test_wrong_argument_is_refused_at_wrap(self, wrong, message, model):
        """The error names the argument and what is expected, and the model stays as it was."""
        session = model.session

        with pytest.raises(TypeError, match=message):
            traced_retry.wrap(model, **wrong)
        assert session == model.session
        traced_retry.wrap(model)
        with pytest.raises(TypeError, match=message):
            traced_retry.wrap(model, **wrong)

    def test_misspelt_variable_is_logged_at_wrap(self, model, monkeypatch, caplog):
        """The warning suggests the right name, also if the policy comes from code."""
        monkeypatch.setenv("TRACED_RETRY_UNTESTD_LIVEKIT", "allow")
        traced_retry.wrap(model, policy=RetryPolicy())

        assert (
            "TRACED_RETRY_UNTESTD_LIVEKIT is not read; did you mean TRACED_RETRY_UNTESTED_LIVEKIT?"
        ) in caplog.messages

    async def test_wrapped_session_keeps_identity_and_state(self, start_conversation):
        """Identity, class, events and private state of the session are the plugin's."""
        talk = await start_conversation("ok")
        events = []
        talk.realtime.on("openai_server_event_received", lambda e: events.append(e["type"]))

        await talk.reply()

        assert openai.realtime.RealtimeSession is type(talk.realtime)
        assert talk.model is talk.realtime.realtime_model is talk.session.llm
        assert talk.realtime in talk.model._sessions
        assert "response.done" in events

    async def test_wrap_changes_only_methods_and_mark(self, start_conversation):
        """Only methods and our mark are set on the instance."""
        wrapped, bare = await start_conversation("ok"), await start_conversation("ok", bare=True)

        methods = {"generate_reply", "interrupt", "aclose", "emit"}
        assert {*methods, hook._HOOK} == set(vars(wrapped.realtime)) - set(vars(bare.realtime))

    async def test_closed_session_is_released(self, recorder):
        """A closed session is collected with all that we attached to it."""

        class Session(FakeSession):
            pass

        model = FakeModel(Session)
        traced_retry.wrap(model, **recorder.providers)
        session = model.session()
        await session.generate_reply()
        await session.aclose()
        gone = weakref.ref(session)
        del session
        gc.collect()

        assert None is gone()


class TestOnExhausted:
    async def test_on_exhausted_gets_failed_reply(self, start_conversation, recorder):
        """on_exhausted gets provider, model, codes, attempts, seconds and trace id."""
        told = []
        talk = await start_conversation("rate_limit,error:server_error,ok", bare=True)
        traced_retry.wrap(
            talk.model,
            policy=RetryPolicy(max_retries=1),
            on_exhausted=told.append,
            **recorder.providers,
        )
        session = talk.model.session()
        with pytest.raises(llm.RealtimeError):
            await session.generate_reply()
        await session.generate_reply()
        await session.aclose()

        (failed,) = told
        trace_id = format(recorder.spans("generate_reply")[0].context.trace_id, "032x")
        assert ("openai", "gpt-realtime", "exhausted", "max_attempts", 2, trace_id) == (
            failed.provider,
            failed.model,
            failed.outcome,
            failed.stop_reason,
            failed.attempts,
            failed.trace_id,
        )
        assert ("rate_limit_exceeded", "server_error") == failed.codes
        assert 0 < failed.seconds <= 1

    @pytest.mark.parametrize("kind", ["raises", "raises later", "hangs"])
    async def test_broken_on_exhausted_does_not_change_result(self, kind, caplog):
        """The agent gets the provider's error in time, whatever the callback does."""

        async def later(_):
            await asyncio.sleep(1)
            raise ValueError("SECRET")

        async def hang(_):
            await asyncio.sleep(3600)

        def now(_):
            raise ValueError("SECRET")

        model = FakeModel(FakeSession, errors=[llm.RealtimeError("no", code="invalid_value")])
        traced_retry.wrap(
            model, on_exhausted={"raises": now, "raises later": later, "hangs": hang}[kind]
        )

        with pytest.raises(llm.RealtimeError):
            await model.session().generate_reply()
        assert 0 == asyncio.get_running_loop().time()
        await asyncio.sleep(2)

        messages = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert ([] if kind == "hangs" else ["on_exhausted raised ValueError"]) == [
            m.split(" at ")[0] for m in messages
        ]
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


class TestInstrument:
    async def test_instrument_hooks_new_sessions(self, instrumented, start_conversation):
        """After instrument() every new realtime session retries."""
        talk = await start_conversation("rate_limit,ok", bare=True)

        assert None is await talk.reply()
        assert ["reply 2"] == talk.heard
        assert ["recovered"] == [r["traced_retry.outcome"] for r in instrumented.replies]

    async def test_second_instrument_warns_and_adds_no_loop(self, instrumented, start_conversation):
        """A second instrument() adds no loop around the first, and logs a warning."""
        with pytest.warns(RuntimeWarning, match="instrumented already"):
            traced_retry.instrument()
        talk = await start_conversation("rate_limit", bare=True)
        await talk.reply()

        assert 4 == len(talk.server.requests)

    @WRONG
    def test_wrong_argument_is_refused_at_instrument(self, wrong, message):
        """The class stays as it was, whether it was instrumented or not."""
        original = llm.RealtimeSession.__init__
        for _ in range(2):
            before = llm.RealtimeSession.__init__
            with pytest.raises(TypeError, match=message):
                traced_retry.instrument(**wrong)
            assert before is llm.RealtimeSession.__init__
            with contextlib.suppress(RuntimeWarning):
                traced_retry.instrument()
        traced_retry.uninstrument()
        assert original is llm.RealtimeSession.__init__

    async def test_uninstrument_restores_class(self, recorder, start_conversation):
        """uninstrument() restores the class, and a second call does nothing."""
        before = llm.RealtimeSession.__init__
        traced_retry.instrument(**recorder.providers)
        traced_retry.uninstrument()
        traced_retry.uninstrument()
        talk = await start_conversation("rate_limit,ok", bare=True)

        assert before is llm.RealtimeSession.__init__
        assert await talk.reply() is not None
        assert [] == recorder.replies

    async def test_wrapped_model_under_instrument_has_one_loop(
        self, instrumented, start_conversation
    ):
        """A wrapped model has one loop, with the policy of its wrap()."""
        talk = await start_conversation("rate_limit", max_retries=1)
        await talk.reply()

        assert 2 == len(talk.server.requests)
        assert 1 == len(instrumented.replies)

    async def test_opentelemetry_instrument_loads_entry_point(self, recorder, start_conversation):
        """opentelemetry-instrument loads the instrumentor by its entry point."""
        (entry,) = entry_points(group="opentelemetry_instrumentor", name="traced_retry")
        instrumentor = entry.load()()
        instrumentor.instrument(policy=RetryPolicy(), **recorder.providers)
        try:
            talk = await start_conversation("rate_limit,ok", bare=True)
            await talk.reply()
        finally:
            instrumentor.uninstrument()

        assert ["recovered"] == [r["traced_retry.outcome"] for r in recorder.replies]


class TestFallbackAdapter:
    @pytest.fixture(params=["wrap", "instrument"])
    async def talk(self, request, start_conversation, recorder):
        """An agent on a fallback adapter over one OpenAI model."""
        made = []

        def model(**kwargs):
            child = openai.realtime.RealtimeModel(modalities=["text"], **kwargs)
            adapter = llm.RealtimeModelFallbackAdapter([child])
            made.append(adapter)
            if request.param == "wrap":
                traced_retry.wrap(adapter, policy=RetryPolicy(), **recorder.providers)
            return adapter

        if request.param == "instrument":
            traced_retry.instrument(policy=RetryPolicy(), **recorder.providers)
        yield await start_conversation("rate_limit", bare=True, model=model)
        traced_retry.uninstrument()

    async def test_fallback_adapter_has_one_loop(self, talk, recorder):
        """The child retries under its own provider's name, and the adapter passes it through."""
        await talk.reply()

        assert 4 == len(talk.server.requests)
        assert ["openai"] == [r["gen_ai.provider.name"] for r in recorder.replies]


class TestWhereSpansGo:
    async def test_reply_span_is_child_of_agent_session(self, start_conversation, recorder):
        """The reply's span is a child of LiveKit's span of the session."""
        livekit_telemetry.set_tracer_provider(recorder.tracer_provider)
        try:
            talk = await start_conversation("rate_limit,ok")
            await talk.reply()
            await talk.session.aclose()
        finally:
            livekit_telemetry.set_tracer_provider(trace.get_tracer_provider())
        names = {s.context.span_id: s.name for s in recorder.spans()}
        (reply,) = recorder.spans("generate_reply")

        assert "agent_session" == names[reply.parent.span_id]

    async def test_livekit_tracer_provider_is_used(self, start_conversation, recorder):
        """LiveKit's set_tracer_provider does not set the global one, and is enough."""
        livekit_telemetry.set_tracer_provider(recorder.tracer_provider)
        try:
            talk = await start_conversation("rate_limit,ok", bare=True)
            traced_retry.wrap(talk.model, policy=RetryPolicy())
            session = talk.model.session()
            await session.generate_reply()
            await session.aclose()
        finally:
            livekit_telemetry.set_tracer_provider(trace.get_tracer_provider())

        assert [1, 2] == [a["traced_retry.attempt"] for a in recorder.attempts]
        assert [0, 1] == [a["lk.retry_count"] for a in recorder.attempts]


class TestCounters:
    async def test_counters_start_at_zero_with_session(self, recorder):
        """Counters start before the first reply, so that a first failure is an increase."""
        traced_retry.wrap(FakeModel(FakeSession), **recorder.providers).session()
        points = recorder.points("traced_retry.replies")

        assert {0} == set(points.values())
        assert {"somebody.example"} == {dict(p)["gen_ai.provider.name"] for p in points}

    async def test_attempts_of_each_initiator_start_at_zero(self, recorder):
        """OpenAI's own answer is listened to, and can be requested again."""
        model = openai.realtime.RealtimeModel(api_key="x")
        session = traced_retry.wrap(model, **recorder.providers).session()
        points = [dict(p) for p in recorder.points("traced_retry.attempts")]
        await session.aclose()

        assert {
            "agent": {"send", "hedge", "listen"},
            "provider": {"listen", "send"},
        } == {
            initiator: {p[semconv.ACTION] for p in points if p[semconv.INITIATOR] == initiator}
            for initiator in ("agent", "provider")
        }


class TestProviders:
    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            (
                lambda: openai.realtime.RealtimeModel(api_key="x"),
                ("openai", "gpt-realtime", "api.openai.com", 443),
            ),
            (
                lambda: openai.realtime.RealtimeModel(
                    api_key="x", base_url="http://127.0.0.1:36309/v1"
                ),
                ("openai", "gpt-realtime", "127.0.0.1", 36309),
            ),
            (
                lambda: openai.realtime.RealtimeModel.with_azure(
                    azure_deployment="deployed",
                    azure_endpoint="https://mine.openai.azure.com",
                    api_key="x",
                ),
                ("azure.ai.openai", "gpt-realtime", "mine.openai.azure.com", 443),
            ),
            (lambda: xai.realtime.RealtimeModel(api_key="x"), ("x_ai", None, "api.x.ai", 443)),
            (
                lambda: openai.realtime.RealtimeModel(api_key="x", base_url="http://[::1]:81/v1"),
                ("openai", "gpt-realtime", "::1", 81),
            ),
            (
                lambda: openai.realtime.RealtimeModel(api_key="x", base_url="ws://speaches/v1"),
                ("openai", "gpt-realtime", "speaches", 80),
            ),
        ],
        ids=["openai", "openai elsewhere", "azure openai", "xai", "IPv6", "one word"],
    )
    async def test_target_names_provider_without_url(self, model, expected):
        """The names are those of the semantic conventions, never a URL or a port."""
        model = model()
        session = FakeSession(model)
        target = OpenAIAdapter(session, None).target()
        provider, name, address, port = expected

        assert (provider, name or model.model, address, port) == (
            target.provider,
            target.model,
            target.server_address,
            target.server_port,
        )


class FakeModel(llm.RealtimeModel):
    """A plugin nobody has heard of."""

    def __init__(self, session_class, errors=()):
        super().__init__(
            capabilities=llm.RealtimeCapabilities(
                message_truncation=False,
                turn_detection=False,
                user_transcription=False,
                auto_tool_reply_generation=False,
                audio_output=False,
                manual_function_calls=False,
            )
        )
        self._session_class = session_class
        self.errors = list(errors)

    @property
    def provider(self):
        return "https://Somebody.example:8443"

    @property
    def model(self):
        return "some-model"

    def session(self, *, turn_detection_disabled=False):
        return self._session_class(self)

    async def aclose(self):
        pass


class FakeSession(llm.RealtimeSession):
    """Its replies come at once, unless its model has errors left, or never (None)."""

    calls = 0

    def _ask(self):
        self.calls += 1
        future = asyncio.get_running_loop().create_future()
        errors = self.realtime_model.errors
        error = errors.pop(0) if errors else "none"
        if error == "none":
            future.set_result(llm.GenerationCreatedEvent(None, None, user_initiated=True))
        elif error is not None:
            future.set_exception(error)
        return future

    def generate_reply(self, *, instructions=None, tool_choice=None, tools=None):
        return self._ask()

    chat_ctx = tools = None

    async def aclose(self):
        pass

    async def update_instructions(self, instructions): ...
    async def update_chat_ctx(self, chat_ctx): ...
    async def update_tools(self, tools): ...
    def update_options(self, **kwargs): ...
    def push_audio(self, frame): ...
    def push_video(self, frame): ...
    def commit_audio(self): ...
    def clear_audio(self): ...
    def interrupt(self): ...
    def truncate(self, **kwargs): ...


class SlowSession(FakeSession):
    """Its replies come after 25 s."""

    def generate_reply(self, *, instructions=None, tool_choice=None, tools=None):
        future = asyncio.get_running_loop().create_future()
        event = llm.GenerationCreatedEvent(None, None, user_initiated=True)
        asyncio.get_running_loop().call_later(25, lambda: future.done() or future.set_result(event))
        return future


class TestUnknownPlugin:
    async def test_unknown_plugin_is_traced_and_not_retried(self, recorder):
        """Nothing is known to be safe there, so the trace shows one attempt."""
        model = FakeModel(FakeSession, [llm.RealtimeError("x", code="server_error")])
        session = traced_retry.wrap(model, **recorder.providers).session()

        with pytest.raises(llm.RealtimeError):
            await session.generate_reply()

        (reply,) = recorder.replies
        assert 1 == session.calls
        assert ("exhausted", "unsafe_to_resend", "somebody.example") == (
            reply["traced_retry.outcome"],
            reply["traced_retry.stop_reason"],
            reply["gen_ai.provider.name"],
        )

    async def test_first_word_after_25_s_is_heard(self, recorder):
        """No limit of the policy applies, because the plugin alone has none."""
        policy = RetryPolicy(deadline=8, attempt_timeout=2)
        model = FakeModel(SlowSession)
        session = traced_retry.wrap(model, policy=policy, **recorder.providers).session()
        began = asyncio.get_running_loop().time()

        await session.generate_reply()

        assert 25 == asyncio.get_running_loop().time() - began
        assert ["succeeded"] == [reply["traced_retry.outcome"] for reply in recorder.replies]

    async def test_rate_limit_does_not_hold_back_next_reply(self, recorder):
        """The plugin alone sends the next request at once."""
        limited = llm.RealtimeError("Rate limit. Try again in 10s.", code="rate_limit_exceeded")
        limited.retry_after = 10.0
        model = FakeModel(FakeSession, [limited])
        session = traced_retry.wrap(model, **recorder.providers).session()
        began = asyncio.get_running_loop().time()

        with pytest.raises(llm.RealtimeError):
            await session.generate_reply()
        await session.generate_reply()

        assert began == asyncio.get_running_loop().time()

    async def test_missing_private_attribute_disables_retries(
        self, start_conversation, recorder, monkeypatch, caplog
    ):
        """Without a private attribute the session is only traced, with one clear message."""
        monkeypatch.setattr(
            OpenAIAdapter, "required_attributes", ("_response_created_futures", "_gone_one")
        )
        with caplog.at_level(logging.ERROR, logger="traced_retry"):
            talk = await start_conversation("rate_limit,ok")
            await talk.reply()
            await talk.reply()

        assert ["unsafe_to_resend", None] == [
            r.get("traced_retry.stop_reason") for r in recorder.replies
        ]
        assert 1 == len([r for r in caplog.records if "has no _gone_one any more" in r.message])


class TestUpstreamShape:
    """livekit/agents#6242 would bring `_do_generate_reply` and a loop of its own."""

    class Session(FakeSession):
        loops = 0

        def generate_reply(self, **kwargs):
            self.loops += 1
            return self._do_generate_reply(**kwargs)

        def _do_generate_reply(self, **kwargs):
            return self._ask()

    async def test_upstream_loop_is_replaced_by_ours(self, recorder):
        """The hook goes around the inner method, so upstream's loop does not run."""
        model = FakeModel(self.Session, [llm.RealtimeError("x", code="server_error")])
        session = traced_retry.wrap(model, **recorder.providers).session()

        with pytest.raises(llm.RealtimeError):
            await session.generate_reply(instructions="hi")

        assert (0, 1) == (session.loops, session.calls)
        assert 1 == len(recorder.replies)


class TestRetryingRealtimeSession:
    """The seed shape for plugin authors."""

    class Session(RetryingRealtimeSession, FakeSession):
        def _do_generate_reply(self, **kwargs):
            return self._ask()

    class Correlated(Session):
        resend_after_timeout = True

    async def test_subclass_retries(self):
        """The author writes one method and has retries."""
        model = FakeModel(self.Session, [llm.RealtimeError("x", code="server_error")])
        session = model.session()
        await session.generate_reply(instructions="hi")

        assert 2 == session.calls

    async def test_subclass_does_not_resend_after_silence(self):
        """By default no late reply can make two."""
        session = FakeModel(self.Session, [None]).session()
        session.retry_policy = RetryPolicy(attempt_timeout=3)

        with pytest.raises(TimeoutError):
            await session.generate_reply()
        assert 1 == session.calls

    async def test_subclass_resends_after_silence_if_declared_safe(self):
        """The author may declare that a resend is safe."""
        session = FakeModel(self.Correlated, [None]).session()
        session.retry_policy = RetryPolicy(attempt_timeout=3)
        await session.generate_reply()

        assert 2 == session.calls

    async def test_hooked_subclass_has_one_loop(self, recorder):
        """wrap() goes around `_do_generate_reply` here as well, so one loop runs."""
        model = FakeModel(self.Session, [llm.RealtimeError("x", code="insufficient_quota")])
        session = traced_retry.wrap(model, **recorder.providers).session()

        with pytest.raises(llm.RealtimeError):
            await session.generate_reply()
        assert (1, 1) == (session.calls, len(recorder.replies))

    async def test_hooked_subclass_still_retries(self, recorder):
        """enable() in the agent keeps the plugin's own retries."""
        model = FakeModel(self.Session, [llm.RealtimeError("x", code="server_error")])
        session = traced_retry.wrap(model, **recorder.providers).session()
        await session.generate_reply(instructions="hi")

        assert (2, 1) == (session.calls, len(recorder.replies))

    @pytest.mark.parametrize(("kind", "calls"), [("Session", 1), ("Correlated", 2)])
    async def test_hooked_subclass_keeps_its_rule_after_silence(self, kind, calls):
        """The author's rule applies, and a failure is LiveKit's own error."""
        model = FakeModel(getattr(self, kind), [None])
        model = traced_retry.wrap(model, policy=RetryPolicy(attempt_timeout=3))
        session = model.session()
        with contextlib.suppress(llm.RealtimeError):
            await session.generate_reply()

        assert calls == session.calls

    async def test_hooked_subclass_may_be_async(self):
        """`_do_generate_reply` may be async with the hook as without it."""

        class Session(RetryingRealtimeSession, FakeSession):
            async def _do_generate_reply(self, **kwargs):
                return await self._ask()

        session = traced_retry.wrap(FakeModel(Session, [])).session()
        await session.generate_reply()

        assert 1 == session.calls

    def test_subclass_without_method_is_refused(self):
        """Without _do_generate_reply the class cannot be instantiated."""
        with pytest.raises(TypeError, match="_do_generate_reply"):
            type("Empty", (RetryingRealtimeSession,), {})()


class TestContract:
    """What the OpenAI adapter relies on, in the installed plugin. See CONTRIBUTING."""

    async def test_request_is_registered_under_sent_id(self, start_conversation):
        """generate_reply adds exactly the sent event_id to _response_created_futures."""
        talk = await start_conversation("ok", bare=True)
        before = set(talk.realtime._response_created_futures)
        reply = talk.realtime.generate_reply()
        (ours,) = set(talk.realtime._response_created_futures) - before
        await reply

        assert ours == talk.server.requests[0].event_id

    async def test_discarded_id_is_cancelled(self, start_conversation):
        """The response of a discarded event id is cancelled by id and not announced."""
        talk = await start_conversation("late:1", bare=True)
        surfaced = []
        talk.realtime.on("generation_created", surfaced.append)
        reply = talk.realtime.generate_reply()
        talk.realtime._discarded_event_ids |= set(talk.realtime._response_created_futures)
        reply.set_exception(llm.RealtimeError("abandoned"))
        reply.exception()
        await talk.settle()

        assert [] == surfaced
        assert 1 == len(talk.server.cancels)
        assert None not in talk.server.cancels


@pytest.mark.parametrize("how", ["call", "variable"])
async def test_session_that_exists_is_switched_off(start_conversation, recorder, how, monkeypatch):
    """The next reply is the plugin's own: one request, its error, and no span."""
    conversation = await start_conversation("ok,error:server_error")
    assert await conversation.reply() is None
    if how == "call":
        traced_retry.disable()
    else:
        monkeypatch.setenv("TRACED_RETRY_DISABLED", "true")
        switch.switch_on()
    try:
        assert await conversation.reply() is not None
    finally:
        switch.switch_on()

    assert 2 == len(conversation.server.requests)
    assert 1 == len(recorder.replies)


async def test_wrap_leaves_a_model_alone_if_switched_off(start_conversation, recorder, monkeypatch):
    """With the variable, the session has no hook."""
    monkeypatch.setenv("TRACED_RETRY_DISABLED", "true")
    conversation = await start_conversation("error:server_error")

    assert await conversation.reply() is not None
    assert 1 == len(conversation.server.requests)
    assert not hasattr(conversation.realtime, hook._HOOK)
