# SPDX-License-Identifier: Apache-2.0
"""The loop through ``@retry``, on a virtual clock, for coroutine functions and for futures."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

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


class TestSuccess:
    async def test_first_try(self, ask, recorder):
        """One call, one value, and nothing else."""
        script, reply = ask("hello")

        assert "hello" == await reply
        assert (1, 0) == (script.calls, script.cancelled)
        assert ("succeeded", None) == outcome(recorder)

    async def test_recovers(self, ask, recorder):
        """Failures that can pass are tried again."""
        script, reply = ask(SERVER_ERROR, TimeoutError(), ProviderError("odd_code"), "hello")

        assert "hello" == await reply
        assert 4 == script.calls
        assert ("recovered", None) == outcome(recorder)

    async def test_arguments_and_name_pass_through(self):
        """The decorated function is called as it would be, and keeps its name."""

        @retry(provider="openai")
        async def say(text, *, loud=False):
            """Say it."""
            return text.upper() if loud else text

        assert "HI" == await say("hi", loud=True)
        assert ("say", "Say it.") == (say.__name__, say.__doc__)

    async def test_an_object_with_an_async_call(self):
        """Backoff and tenacity take such an object for a plain function, and never retry it."""
        script = Scripted(SERVER_ERROR, "hello")

        class Asker:
            async def __call__(self):
                return await script.coroutine()

        asker = Asker()
        asker.__name__ = "asker"

        assert "hello" == await retry(provider="openai")(asker)()
        assert 2 == script.calls


class TestFailure:
    async def test_not_recoverable(self, ask, recorder):
        """Quota, key and bad requests are not asked twice."""
        error = ProviderError("insufficient_quota")
        script, reply = ask(error)

        with pytest.raises(ProviderError) as caught:
            await reply

        assert error is caught.value
        assert 1 == script.calls
        assert ("not_recoverable", "not_recoverable") == outcome(recorder)

    async def test_runs_out_of_attempts(self, ask, recorder):
        """The last original exception is raised, with its attributes and a note."""
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

    async def test_no_retries_is_one_attempt_still_traced(self, ask, recorder):
        """max_retries=0 turns retrying off, not tracing."""
        script, reply = ask(SERVER_ERROR, max_retries=0)

        with pytest.raises(ProviderError):
            await reply

        assert 1 == script.calls == len(recorder.attempts)

    @pytest.mark.parametrize("error", [TypeError("x"), NotImplementedError(), KeyError("y")])
    async def test_programming_errors_pass_through_untouched(self, ask, recorder, error):
        """No second attempt mends a bug; not even a note is added."""
        script, reply = ask(error)

        with pytest.raises(type(error)) as caught:
            await reply

        assert error is caught.value
        assert not hasattr(error, "__notes__")
        assert 1 == script.calls
        assert type(error).__name__ == recorder.replies[0]["error.type"]

    async def test_a_bug_before_the_future_is_raised_at_the_call(self, recorder):
        """A plugin that raises NotImplementedError does so from the call itself."""

        @retry(provider="nvidia", **recorder.providers)
        def unsupported():
            raise NotImplementedError

        with pytest.raises(NotImplementedError):
            unsupported()

        assert ("not_recoverable", "not_recoverable") == outcome(recorder)
        assert 0 == recorder.open_spans

    async def test_an_error_before_the_future_is_retried(self):
        """A provider's error counts the same, raised at once or through the future."""
        script = Scripted("hello")
        raised = []

        @retry(provider="openai")
        def sometimes():
            if not raised:
                raised.append(SERVER_ERROR)
                raise SERVER_ERROR
            return script.future()

        assert "hello" == await sometimes()

    async def test_what_cannot_be_awaited(self):
        """A plain function's plain value is a mistake, and the error says which."""
        with pytest.raises(TypeError, match="returned a int, and only"):
            retry(provider="openai")(lambda: 1)()

    def test_async_generators_are_refused(self):
        """They cannot be asked again halfway; better told at import than in a call."""

        async def words():
            yield "hello"

        with pytest.raises(TypeError, match="async generator"):
            retry(provider="openai")(words)

    async def test_rate_limits_can_be_left_alone(self, ask, recorder):
        """retry_rate_limits=False makes them final, and the span says so."""
        script, reply = ask(ProviderError("rate_limit_exceeded"), retry_rate_limits=False)

        with pytest.raises(ProviderError):
            await reply

        assert 1 == script.calls
        assert False is recorder.attempts[0]["traced_retry.recoverable"]
        assert ("not_recoverable", "not_recoverable") == outcome(recorder)


class TestTime:
    async def test_waits_grow(self, recorder):
        """The injected jitter's waits are the ones really waited, to the millisecond."""
        script = Scripted(SERVER_ERROR, SERVER_ERROR, SERVER_ERROR, "hello")
        telemetry = Telemetry(**recorder.providers)
        reply = Reply(
            CallRequest(script.future),
            RetryPolicy(),
            telemetry.reply(Target("openai")),
            jitter=lambda bound: bound,
        )

        assert "hello" == await reply.start()
        assert [0.0, 1.0, 3.0, 7.0] == script.times
        assert [0.0, 1.0, 2.0, 4.0] == [a["traced_retry.delay"] for a in recorder.attempts]
        assert [1.0, 2.0, 4.0] == [a["traced_retry.next_delay"] for a in recorder.attempts[:3]]
        assert 7.0 == recorder.replies[0]["traced_retry.delay.total"]

    async def test_retry_after(self, ask):
        """The provider's own wait is a floor."""
        script, reply = ask(ProviderError("rate_limit_exceeded", retry_after=5.0), "hello")

        await reply

        assert 5.0 <= script.times[1] - script.times[0] <= 5.0 + 1e-9

    async def test_a_wait_past_the_deadline_is_not_slept(self, ask, recorder):
        """Silence that can only end in failure is not added to."""
        script, reply = ask(ProviderError("rate_limit_exceeded", retry_after=60.0))

        with pytest.raises(ProviderError) as caught:
            await reply

        assert "rate_limit_exceeded" == caught.value.code
        assert 0 == asyncio.get_running_loop().time()
        assert 1 == script.calls
        assert ("exhausted", "deadline") == outcome(recorder)

    async def test_a_future_that_never_resolves(self, ask, recorder):
        """The deadline ends it: no caller hangs."""
        script, reply = ask(HANG)

        with pytest.raises(TimeoutError, match=r"no answer within 20\.0 s"):
            await reply

        assert (20.0, 1, 1) == (
            asyncio.get_running_loop().time(),
            script.calls,
            script.cancelled,
        )
        assert ("exhausted", "deadline") == outcome(recorder)

    async def test_attempt_timeout(self, ask):
        """An attempt may be given less; the abandoned one is cancelled."""
        script, reply = ask(HANG, "hello", attempt_timeout=2.0)

        assert "hello" == await reply
        assert (2, 1) == (script.calls, script.cancelled)

    async def test_the_providers_own_error_outlives_our_timeout(self, ask, recorder):
        """When time runs out the agent is told the last thing the provider said."""
        error = ProviderError("rate_limit_exceeded")
        _, reply = ask(error, HANG)

        with pytest.raises(ProviderError) as caught:
            await reply

        assert error is caught.value
        assert ("exhausted", "deadline") == outcome(recorder)
        assert "rate_limit_exceeded" == recorder.replies[0]["error.type"]
        assert ["rate_limit_exceeded", "timeout"] == [a["error.type"] for a in recorder.attempts]

    async def test_an_answer_just_in_time(self, ask):
        """What comes within the deadline is taken."""
        _, reply = ask((19.999, "hello"))

        assert "hello" == await reply


class TestCancel:
    async def test_in_the_attempt(self, ask, recorder):
        """Barge-in reaches the provider's future at once."""
        script, reply = ask(HANG)
        await asyncio.sleep(1.5)
        reply.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await asyncio.sleep(0)

        assert (1, 1.5) == (script.cancelled, asyncio.get_running_loop().time())
        assert ("interrupted", "interrupted") == outcome(recorder)

    async def test_in_the_wait(self, ask, recorder):
        """Nothing is sent after it."""
        script, reply = ask(ProviderError("rate_limit_exceeded", retry_after=5.0), "hello")
        await asyncio.sleep(1.0)
        reply.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await asyncio.sleep(30)

        assert 1 == script.calls
        assert ("interrupted", "interrupted") == outcome(recorder)
        assert 1.0 == recorder.replies[0]["traced_retry.delay.total"]

    async def test_before_the_first_step(self, recorder):
        """A task that is cancelled before it ever ran still ends its spans and its request."""
        script = Scripted(HANG)
        reply = retry(provider="openai", **recorder.providers)(script.future)()
        reply.cancel()

        with pytest.raises(asyncio.CancelledError):
            await reply
        await asyncio.sleep(0)

        assert (1, 1) == (script.calls, script.cancelled)
        assert ("interrupted", "interrupted") == outcome(recorder)
        assert 0 == recorder.open_spans

    async def test_the_provider_cancels(self, ask, recorder):
        """The upstream proposal leaves its caller pending for ever here."""
        script, reply = ask((1.0, SUPERSEDED), "never")

        with pytest.raises(asyncio.CancelledError):
            await reply

        assert reply.cancelled()
        assert 1 == script.calls
        assert ("superseded", "superseded") == outcome(recorder)

    async def test_wait_for_around_it(self, ask, recorder):
        """The usual way to bound a call works, and cleans up."""
        script, reply = ask(HANG)

        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(reply, 3.0)

        assert 1 == script.cancelled
        assert 0 == recorder.open_spans

    async def test_no_task_is_left(self, ask):
        """Whatever happened, the loop runs nothing of ours afterwards."""
        for steps in ((HANG,), (SERVER_ERROR,), ("hello",), ((1.0, SUPERSEDED),)):
            _, reply = ask(*steps)
            await asyncio.wait({reply}, timeout=25)
            reply.cancelled() or reply.exception()

        assert {asyncio.current_task()} == asyncio.all_tasks()


class TestClassify:
    async def test_overrules_the_table(self, ask):
        """A failure may be declared final, or worth a retry, or given a wait."""

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
    async def test_a_broken_one_changes_nothing(self, ask, caplog, broken):
        """It is logged once, without the exception's text, and the default holds."""
        with caplog.at_level(logging.ERROR, logger="traced_retry"):
            script, reply = ask(SERVER_ERROR, SERVER_ERROR, "hello", classify=broken)
            assert "hello" == await reply

        assert 3 == script.calls
        (record,) = caplog.records
        assert "RetryPolicy.classify" in record.getMessage()
        assert "division" not in record.getMessage()


class TestManyAtOnce:
    async def test_replies_do_not_meet(self, recorder):
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
