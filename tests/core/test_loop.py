# SPDX-License-Identifier: Apache-2.0
"""The loop through ``@retry``, on a virtual clock, for coroutine functions and for futures."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import logging
import sys

import pytest
from support.scripted import HANG, SUPERSEDED, ProviderError, Scripted

from traced_retry import RetryPolicy, retry
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest
from traced_retry.core.telemetry import Target, Telemetry

SERVER_ERROR = ProviderError("server_error")


@pytest.fixture(params=["coroutine", "future"])
def ask(request, recorder):
    """``ask(*steps, **policy)`` -> (the script, the future of the reply)."""

    def ask(*steps, **policy):
        script = Scripted(*steps)
        decorated = retry(provider="openai", policy=RetryPolicy(**policy), **recorder.providers)(
            getattr(script, request.param)
        )
        return script, asyncio.ensure_future(decorated())

    return ask


def outcome(recorder):
    """Outcome and stop reason of the only reply."""
    (reply,) = recorder.replies
    return reply["traced_retry.outcome"], reply.get("traced_retry.stop_reason")


class CallableObject:
    """An object whose call returns a future."""

    __name__ = "CallableObject"

    def __init__(self, script):
        self.script = script

    def __call__(self) -> asyncio.Future[str]:
        """Return the next step's future."""
        return self.script.future()


class TestSuccess:
    async def test_success_calls_once(self, ask, recorder):
        """A successful call is made once and returns its value."""
        script, reply = ask("hello")

        assert "hello" == await reply
        assert (1, 0) == (script.calls, script.cancelled)
        assert ("succeeded", None) == outcome(recorder)

    async def test_recoverable_failures_are_retried(self, ask, recorder):
        """Recoverable failures are retried until the call succeeds."""
        script, reply = ask(SERVER_ERROR, TimeoutError(), ProviderError("odd_code"), "hello")

        assert "hello" == await reply
        assert 4 == script.calls
        assert ("recovered", None) == outcome(recorder)

    async def test_decorated_function_keeps_arguments_and_name(self):
        """The decorated function receives its arguments and keeps its name."""

        @retry(provider="openai")
        async def say(text, *, loud=False):
            """Say it."""
            return text.upper() if loud else text

        assert "HI" == await say("hi", loud=True)
        assert ("say", "Say it.") == (say.__name__, say.__doc__)

    async def test_object_with_async_call_is_retried(self):
        """Backoff and tenacity take such an object for a plain function and never retry it."""
        script = Scripted(SERVER_ERROR, "hello")

        class Asker:
            async def __call__(self):
                return await script.coroutine()

        asker = Asker()
        asker.__name__ = "asker"

        decorated = retry(provider="openai")(asker)
        assert inspect.iscoroutinefunction(decorated)
        assert "hello" == await decorated()
        assert 2 == script.calls

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks")
    async def test_call_that_need_not_wait_costs_no_turn(self):
        """The reply of such a call is there when start() returns."""

        async def call():
            return "hello"

        reply = Reply(CallRequest(call), RetryPolicy(), Telemetry().reply(Target("openai")))

        assert "hello" == reply.start().result()


class TestFailure:
    async def test_unrecoverable_failure_is_not_retried(self, ask, recorder):
        """Failures by quota, key or an invalid request are not retried."""
        error = ProviderError("insufficient_quota")
        script, reply = ask(error)

        with pytest.raises(ProviderError) as caught:
            await reply

        assert error is caught.value
        assert 1 == script.calls
        assert ("not_recoverable", "not_recoverable") == outcome(recorder)

    async def test_last_error_is_raised_after_all_attempts(self, ask, recorder):
        """The last original exception is raised with its attributes and a note."""
        errors = [ProviderError("server_error") for _ in range(3)]
        script, reply = ask(*errors, max_retries=2)

        with pytest.raises(ProviderError) as caught:
            await reply

        assert errors[2] is caught.value
        assert "server_error" == caught.value.code
        (note,) = caught.value.__notes__
        trace_id = format(recorder.spans()[0].context.trace_id, "032x")
        assert f"traced_retry: 3 attempt(s), stopped by max_attempts, trace id {trace_id}" == note
        assert 3 == script.calls
        assert ("exhausted", "max_attempts") == outcome(recorder)

    async def test_zero_retries_still_traces_one_attempt(self, ask, recorder):
        """max_retries=0 turns retries off and keeps the trace."""
        script, reply = ask(SERVER_ERROR, max_retries=0)

        with pytest.raises(ProviderError):
            await reply

        assert 1 == script.calls == len(recorder.attempts)

    @pytest.mark.parametrize("error", [TypeError("x"), NotImplementedError(), KeyError("y")])
    async def test_programming_error_passes_unchanged(self, ask, recorder, error):
        """A bug is not retried, and its exception gets no note."""
        script, reply = ask(error)

        with pytest.raises(type(error)) as caught:
            await reply

        assert error is caught.value
        assert not hasattr(error, "__notes__")
        assert 1 == script.calls
        assert type(error).__name__ == recorder.replies[0]["error.type"]

    async def test_bug_before_future_is_raised_by_call(self, recorder):
        """A plugin that raises NotImplementedError does so from the call itself."""

        @retry(provider="nvidia", **recorder.providers)
        def unsupported() -> asyncio.Future[str]:
            raise NotImplementedError

        with pytest.raises(NotImplementedError):
            unsupported()

        assert ("not_recoverable", "not_recoverable") == outcome(recorder)
        assert 0 == recorder.open_spans

    async def test_provider_error_before_future_is_retried(self):
        """A provider's error is retried if the call raises it, as if the future does."""
        script = Scripted("hello")
        raised = []

        @retry(provider="openai")
        def sometimes() -> asyncio.Future[str]:
            if not raised:
                raised.append(SERVER_ERROR)
                raise SERVER_ERROR
            return script.future()

        assert "hello" == await sometimes()

    async def test_plain_value_raises_type_error(self):
        """A function that returns a plain value is a mistake, and the error names it."""

        def ask() -> asyncio.Future[int]:
            return 1

        with pytest.raises(TypeError, match="returned a int, and only"):
            retry(provider="openai")(ask)()

    @pytest.mark.parametrize("returns", [None, int, "int", "asyncio.Event"])
    def test_sync_function_is_refused_at_decoration(self, returns):
        """A blocking function is refused by its name, before it is called."""

        def fetch_weather():
            raise AssertionError

        if returns is not None:
            fetch_weather.__annotations__["return"] = returns
        with pytest.raises(TypeError, match=r"fetch_weather is not async, .* write `async def`"):
            retry(provider="openai")(fetch_weather)

    @pytest.mark.parametrize(
        "make",
        [
            lambda script: script.future,
            lambda script: functools.partial(script.future),
            lambda script: functools.partial(script.coroutine),
            CallableObject,
        ],
    )
    async def test_function_that_promises_a_future_is_retried(self, make):
        """A method, a partial and an object with an annotation are retried."""
        script = Scripted(SERVER_ERROR, "hello")

        assert "hello" == await retry(provider="openai")(make(script))()

    @pytest.mark.parametrize("word", ["Future", "Task", "Awaitable", "Coroutine", "Any"])
    def test_function_with_annotation_to_await_is_accepted(self, word):
        """The annotation promises a result to await."""

        def ask():
            raise AssertionError

        ask.__annotations__["return"] = f"{word}[str]"
        assert ask is retry(provider="openai")(ask).__wrapped__

    async def test_exception_outside_of_on_is_final(self, recorder):
        """Only the exceptions that ``on`` names are retried."""
        script = Scripted(ConnectionError(), ProviderError("server_error"))
        ask = retry(provider="openai", on=(ConnectionError, TimeoutError), **recorder.providers)

        with pytest.raises(ProviderError):
            await ask(script.coroutine)()

        assert 2 == script.calls
        assert ("not_recoverable", "not_recoverable") == outcome(recorder)
        assert [True, False] == [a["traced_retry.recoverable"] for a in recorder.attempts]

    async def test_timeout_outside_of_on_is_final(self, recorder):
        """An attempt that exceeds its time is a TimeoutError."""
        script = Scripted(HANG)
        policy = RetryPolicy(attempt_timeout=1.0)
        ask = retry(provider="x", on=ConnectionError, policy=policy, **recorder.providers)

        with pytest.raises(TimeoutError):
            await ask(script.coroutine)()

        assert 1 == script.calls

    @pytest.mark.parametrize("on", [(), "ConnectionError", (1,), BaseException])
    def test_on_must_be_exception_classes(self, on):
        """The error shows the value and the expected type."""
        with pytest.raises(TypeError, match="expected an exception class, or a tuple"):
            retry(provider="openai", on=on)

    def test_async_generator_is_refused_at_decoration(self):
        """An async generator cannot be restarted halfway, so the decorator refuses it."""

        async def words():
            yield "hello"

        with pytest.raises(TypeError, match="async generator"):
            retry(provider="openai")(words)

    async def test_rate_limit_is_final_if_policy_says_so(self, ask, recorder):
        """retry_rate_limits=False makes rate limits final, and the span records it."""
        script, reply = ask(ProviderError("rate_limit_exceeded"), retry_rate_limits=False)

        with pytest.raises(ProviderError):
            await reply

        assert 1 == script.calls
        assert False is recorder.attempts[0]["traced_retry.recoverable"]
        assert ("not_recoverable", "not_recoverable") == outcome(recorder)


class TestTime:
    async def test_waits_are_those_of_jitter(self, recorder):
        """The waits between attempts are those of the injected jitter, to the millisecond."""
        script = Scripted(SERVER_ERROR, SERVER_ERROR, SERVER_ERROR, "hello")
        telemetry = Telemetry(**recorder.providers)
        reply = Reply(
            CallRequest(script.future),
            RetryPolicy(base_delay=1.0),
            telemetry.reply(Target("openai")),
            jitter=lambda bound: bound,
        )

        assert "hello" == await reply.start()
        assert [0.0, 1.0, 3.0, 7.0] == script.times
        assert [0.0, 1.0, 2.0, 4.0] == [a["traced_retry.delay"] for a in recorder.attempts]
        assert [1.0, 2.0, 4.0] == [a["traced_retry.next_delay"] for a in recorder.attempts[:3]]
        assert 7.0 == recorder.replies[0]["traced_retry.delay.total"]

    async def test_retry_waits_at_least_retry_after(self, ask):
        """The wait that the provider asks for is a minimum."""
        script, reply = ask(ProviderError("rate_limit_exceeded", retry_after=5.0), "hello")

        await reply

        assert 5.0 <= script.times[1] - script.times[0] <= 5.0 + 1e-9

    async def test_wait_past_deadline_ends_reply_at_once(self, ask, recorder):
        """A wait that ends after the deadline is not slept, and the reply fails at once."""
        script, reply = ask(ProviderError("rate_limit_exceeded", retry_after=60.0))

        with pytest.raises(ProviderError) as caught:
            await reply

        assert "rate_limit_exceeded" == caught.value.code
        assert 0 == asyncio.get_running_loop().time()
        assert 1 == script.calls
        assert ("exhausted", "deadline") == outcome(recorder)

    async def test_unresolved_future_ends_at_deadline(self, ask, recorder):
        """The deadline ends a future that never resolves, so no caller hangs."""
        script, reply = ask(HANG)

        with pytest.raises(TimeoutError, match=r"no answer within 20\.0 s"):
            await reply

        assert (20.0, 1, 1) == (
            asyncio.get_running_loop().time(),
            script.calls,
            script.cancelled,
        )
        assert ("exhausted", "deadline") == outcome(recorder)

    async def test_attempt_timeout_cancels_attempt(self, ask):
        """The attempt timeout cancels an attempt before the deadline."""
        script, reply = ask(HANG, "hello", attempt_timeout=2.0)

        assert "hello" == await reply
        assert (2, 1) == (script.calls, script.cancelled)

    async def test_deadline_raises_last_provider_error(self, ask, recorder):
        """At the deadline the agent gets the last error of the provider."""
        error = ProviderError("rate_limit_exceeded")
        _, reply = ask(error, HANG)

        with pytest.raises(ProviderError) as caught:
            await reply

        assert error is caught.value
        assert ("exhausted", "deadline") == outcome(recorder)
        assert "rate_limit_exceeded" == recorder.replies[0]["error.type"]
        assert ["rate_limit_exceeded", "timeout"] == [a["error.type"] for a in recorder.attempts]

    async def test_answer_just_before_deadline_is_taken(self, ask):
        """A result that arrives within the deadline is returned."""
        _, reply = ask((19.999, "hello"))

        assert "hello" == await reply


class TestCancel:
    async def test_cancel_in_attempt_cancels_provider_future(self, ask, recorder):
        """Cancelling the reply cancels the provider's future at once."""
        script, reply = ask(HANG)
        await asyncio.sleep(1.5)
        reply.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await asyncio.sleep(0)

        assert (1, 1.5) == (script.cancelled, asyncio.get_running_loop().time())
        assert ("interrupted", "interrupted") == outcome(recorder)

    async def test_cancel_in_wait_sends_nothing(self, ask, recorder):
        """Nothing is sent after a cancel in the wait between attempts."""
        script, reply = ask(ProviderError("rate_limit_exceeded", retry_after=5.0), "hello")
        await asyncio.sleep(1.0)
        reply.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await asyncio.sleep(30)

        assert 1 == script.calls
        assert ("interrupted", "interrupted") == outcome(recorder)
        assert 1.0 == recorder.replies[0]["traced_retry.delay.total"]

    async def test_cancel_before_first_step_ends_spans_and_request(self, recorder):
        """A task that is cancelled before it runs still ends its spans and its request."""
        script = Scripted(HANG)
        reply = retry(provider="openai", **recorder.providers)(script.future)()
        reply.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await asyncio.sleep(0)

        assert (1, 1) == (script.calls, script.cancelled)
        assert ("interrupted", "interrupted") == outcome(recorder)
        assert 0 == recorder.open_spans

    async def test_cancel_by_provider_supersedes_reply(self, ask, recorder):
        """The reply is superseded; the upstream proposal leaves its caller pending forever."""
        script, reply = ask((1.0, SUPERSEDED), "never")

        with pytest.raises(asyncio.CancelledError):
            await reply

        assert reply.cancelled()
        assert 1 == script.calls
        assert ("superseded", "superseded") == outcome(recorder)

    async def test_wait_for_times_out_and_cleans_up(self, ask, recorder):
        """asyncio.wait_for limits a call, and nothing stays open."""
        script, reply = ask(HANG)

        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(reply, 3.0)

        assert 1 == script.cancelled
        assert 0 == recorder.open_spans

    async def test_no_task_is_left_after_any_end(self, ask):
        """The event loop runs no task of ours after a reply ends."""
        for steps in ((HANG,), (SERVER_ERROR,), ("hello",), ((1.0, SUPERSEDED),)):
            _, reply = ask(*steps)
            await asyncio.wait({reply}, timeout=25)
            reply.cancelled() or reply.exception()

        assert {asyncio.current_task()} == asyncio.all_tasks()


class TestClassify:
    async def test_classify_overrules_table(self, ask):
        """A classify can make a failure final, recoverable, or set its wait."""

        def verdict(why):
            return dataclasses.replace(why, recoverable=why.code == "invalid_value")

        script, reply = ask(ProviderError("invalid_value"), "hello", classify=verdict)
        assert "hello" == await reply
        assert 2 == script.calls

        script, reply = ask(SERVER_ERROR, "hello", classify=verdict)
        with pytest.raises(ProviderError):
            await reply
        assert 1 == script.calls

    @pytest.mark.parametrize("broken", [lambda _: 1 / 0, lambda _: "retry", lambda: None])
    async def test_broken_classify_falls_back_to_default(self, ask, caplog, broken):
        """A broken classify is logged once without its text, and the default applies."""
        with caplog.at_level(logging.ERROR, logger="traced_retry"):
            script, reply = ask(SERVER_ERROR, SERVER_ERROR, "hello", classify=broken)
            assert "hello" == await reply

        assert 3 == script.calls
        (record,) = caplog.records
        assert "RetryPolicy.classify" in record.getMessage()
        assert "division" not in record.getMessage()


class TestManyAtOnce:
    async def test_concurrent_replies_are_independent(self, recorder):
        """A thousand replies share one decorator and nothing else."""
        scripts = [Scripted(SERVER_ERROR, n) for n in range(1000)]
        policy = RetryPolicy(budget=None)
        decorate = retry(provider="openai", policy=policy, **recorder.providers)

        heard = await asyncio.gather(*(decorate(s.coroutine)() for s in scripts))

        assert list(range(1000)) == heard
        assert {"recovered": 1000} == recorder.counted(
            "traced_retry.replies", "traced_retry.outcome"
        )
        assert {} == recorder.counted("traced_retry.in_flight")


class _FrozenError(ConnectionError):
    """Forbids every attribute, as a frozen dataclass does."""

    def __setattr__(self, name, value):
        raise AttributeError(name)


class _NotesAreATupleError(ConnectionError):
    __notes__ = ()


class _RefusesNotesError(ConnectionError):
    def add_note(self, note):
        raise RuntimeError("SECRET")


@pytest.mark.parametrize("kind", [_FrozenError, _NotesAreATupleError, _RefusesNotesError])
async def test_exception_that_takes_no_note_is_raised_without(kind):
    """The note is only an addition, and the caller gets the exception in any case."""
    raised = kind("SECRET")

    @retry(provider="openai", policy=RetryPolicy(max_retries=0))
    async def call():
        raise raised

    with pytest.raises(kind) as caught:
        await asyncio.wait_for(call(), 30)
    assert raised is caught.value
