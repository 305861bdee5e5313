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
from traced_retry import RetryingRealtimeSession, RetryPolicy
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


class TestWrap:
    def test_returns_the_same_model(self, model):
        """The caller keeps the object and its type."""
        label = model.label

        assert model is traced_retry.wrap(model)
        assert (openai.realtime.RealtimeModel, label) == (type(model), model.label)

    def test_twice(self, model):
        """The second time is a no-op with a warning."""
        traced_retry.wrap(model)
        session = model.session

        with pytest.warns(RuntimeWarning, match="wrapped already"):
            traced_retry.wrap(model)
        assert session is model.session

    def test_what_is_no_realtime_model(self):
        """The error says what is taken, and what retries by itself."""
        with pytest.raises(TypeError, match=r"takes a livekit.agents.llm.RealtimeModel.*a str"):
            traced_retry.wrap("gpt-realtime")

    def test_a_bad_environment(self, model, monkeypatch):
        """It is told at start-up, not at the first failure."""
        monkeypatch.setenv("LIVEKIT_REALTIME_MAX_RETRIES", "lots")

        with pytest.raises(
            traced_retry.PolicyError, match="LIVEKIT_REALTIME_MAX_RETRIES is 'lots'"
        ):
            traced_retry.wrap(model)

    async def test_the_session_stays_what_it_was(self, start_conversation):
        """Identity, class, events and private state are the plugin's."""
        talk = await start_conversation("ok")
        events = []
        talk.realtime.on("openai_server_event_received", lambda e: events.append(e["type"]))

        await talk.reply()

        assert openai.realtime.RealtimeSession is type(talk.realtime)
        assert talk.model is talk.realtime.realtime_model is talk.session.llm
        assert talk.realtime in talk.model._sessions
        assert "response.done" in events

    async def test_few_attributes_of_the_instance_change(self, start_conversation):
        """Methods, and a mark of ours."""
        wrapped, bare = await start_conversation("ok"), await start_conversation("ok", bare=True)

        methods = {"generate_reply", "interrupt", "aclose", "emit"}
        assert {*methods, hook._HOOK} == set(vars(wrapped.realtime)) - set(vars(bare.realtime))

    async def test_a_session_is_not_kept_alive(self, recorder):
        """A closed session goes, with all that we hung on it."""

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
    async def test_is_told(self, start_conversation, recorder):
        """Provider, model, codes, attempts, seconds and trace id of each reply that failed."""
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
    async def test_a_broken_one_changes_nothing(self, kind, caplog):
        """The agent gets the provider's error, in time, whatever the callback does."""

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
    async def test_sessions_created_from_then_on(self, instrumented, start_conversation):
        """One call, and every realtime session retries."""
        talk = await start_conversation("rate_limit,ok", bare=True)

        assert None is await talk.reply()
        assert ["reply 2"] == talk.heard
        assert ["recovered"] == [r["traced_retry.outcome"] for r in instrumented.replies]

    async def test_twice(self, instrumented, start_conversation):
        """No second loop around the first, and a warning."""
        with pytest.warns(RuntimeWarning, match="instrumented already"):
            traced_retry.instrument()
        talk = await start_conversation("rate_limit", bare=True)
        await talk.reply()

        assert 4 == len(talk.server.requests)

    async def test_undone(self, recorder, start_conversation):
        """uninstrument() restores the class; calling it again does nothing."""
        before = llm.RealtimeSession.__init__
        traced_retry.instrument(**recorder.providers)
        traced_retry.uninstrument()
        traced_retry.uninstrument()
        talk = await start_conversation("rate_limit,ok", bare=True)

        assert before is llm.RealtimeSession.__init__
        assert await talk.reply() is not None
        assert [] == recorder.replies

    async def test_with_wrap(self, instrumented, start_conversation):
        """A wrapped model has one loop, and the policy it was wrapped with."""
        talk = await start_conversation("rate_limit", max_retries=1)
        await talk.reply()

        assert 2 == len(talk.server.requests)
        assert 1 == len(instrumented.replies)

    async def test_is_an_opentelemetry_instrumentor(self, recorder, start_conversation):
        """opentelemetry-instrument loads it by this entry point."""
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

    async def test_one_loop(self, talk, recorder):
        """The child retries, with its own provider's name; the adapter passes it through."""
        await talk.reply()

        assert 4 == len(talk.server.requests)
        assert ["openai"] == [r["gen_ai.provider.name"] for r in recorder.replies]


class TestWhereSpansGo:
    async def test_under_livekits_span(self, start_conversation, recorder):
        """The reply nests under the agent's session, LiveKit's own span."""
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

    async def test_livekits_own_provider(self, start_conversation, recorder):
        """set_tracer_provider of LiveKit does not set the global one, and is enough."""
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
    async def test_start_at_zero_with_the_session(self, recorder):
        """Before the first reply: a failure that is the first thing to happen is an increase."""
        traced_retry.wrap(FakeModel(FakeSession), **recorder.providers).session()
        points = recorder.points("traced_retry.replies")

        assert {0} == set(points.values())
        assert {"somebody.example"} == {dict(p)["gen_ai.provider.name"] for p in points}


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
        ],
        ids=["openai", "openai elsewhere", "azure openai", "xai"],
    )
    async def test_names(self, model, expected):
        """Semantic conventions' provider names, never a URL or a port."""
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


class TestUnknownPlugin:
    async def test_is_traced_and_never_asked_twice(self, recorder):
        """Nothing is known of what is safe, so nothing is done; the trace says so."""
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

    async def test_an_engine_that_has_moved_on(
        self, start_conversation, recorder, monkeypatch, caplog
    ):
        """A private attribute that is gone degrades to observing, with one clear message."""
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

    async def test_one_loop(self, recorder):
        """The hook goes around the inner method: upstream's loop does not run, ours does."""
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

    async def test_retries(self):
        """The author writes one method and has retries."""
        model = FakeModel(self.Session, [llm.RealtimeError("x", code="server_error")])
        session = model.session()
        await session.generate_reply(instructions="hi")

        assert 2 == session.calls

    async def test_silence_is_not_asked_again(self):
        """By default no late reply can make two."""
        session = FakeModel(self.Session, [None]).session()
        session.retry_policy = RetryPolicy(attempt_timeout=3)

        with pytest.raises(TimeoutError):
            await session.generate_reply()
        assert 1 == session.calls

    async def test_unless_replies_carry_the_id(self):
        """The author may say that it is safe."""
        session = FakeModel(self.Correlated, [None]).session()
        session.retry_policy = RetryPolicy(attempt_timeout=3)
        await session.generate_reply()

        assert 2 == session.calls

    async def test_with_the_hook(self, recorder):
        """wrap() goes around `_do_generate_reply` here as well: one loop."""
        model = FakeModel(self.Session, [llm.RealtimeError("x", code="insufficient_quota")])
        session = traced_retry.wrap(model, **recorder.providers).session()

        with pytest.raises(llm.RealtimeError):
            await session.generate_reply()
        assert (1, 1) == (session.calls, len(recorder.replies))

    async def test_with_the_hook_it_still_retries(self, recorder):
        """enable() in the agent does not take the plugin's retries away."""
        model = FakeModel(self.Session, [llm.RealtimeError("x", code="server_error")])
        session = traced_retry.wrap(model, **recorder.providers).session()
        await session.generate_reply(instructions="hi")

        assert (2, 1) == (session.calls, len(recorder.replies))

    @pytest.mark.parametrize(("kind", "calls"), [("Session", 1), ("Correlated", 2)])
    async def test_with_the_hook_silence_is_the_authors_to_judge(self, kind, calls):
        """And what fails is LiveKit's own error, which alone it catches."""
        model = FakeModel(getattr(self, kind), [None])
        model = traced_retry.wrap(model, policy=RetryPolicy(attempt_timeout=3))
        session = model.session()
        with contextlib.suppress(llm.RealtimeError):
            await session.generate_reply()

        assert calls == session.calls

    async def test_with_the_hook_it_may_be_async(self):
        """As without."""

        class Session(RetryingRealtimeSession, FakeSession):
            async def _do_generate_reply(self, **kwargs):
                return await self._ask()

        session = traced_retry.wrap(FakeModel(Session, [])).session()
        await session.generate_reply()

        assert 1 == session.calls

    def test_must_be_written(self):
        """Without _do_generate_reply the class cannot be made."""
        with pytest.raises(TypeError, match="_do_generate_reply"):
            type("Empty", (RetryingRealtimeSession,), {})()


class TestContract:
    """What the OpenAI adapter relies on, in the installed plugin. See CONTRIBUTING."""

    async def test_a_request_shows_up_by_its_id(self, start_conversation):
        """generate_reply adds exactly the sent event_id to _response_created_futures."""
        talk = await start_conversation("ok", bare=True)
        before = set(talk.realtime._response_created_futures)
        reply = talk.realtime.generate_reply()
        (ours,) = set(talk.realtime._response_created_futures) - before
        await reply

        assert ours == talk.server.requests[0].event_id

    async def test_a_discarded_id_is_cancelled(self, start_conversation):
        """An id in _discarded_event_ids has its response cancelled by id and not surfaced."""
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
