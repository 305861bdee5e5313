# SPDX-License-Identifier: Apache-2.0
"""Replies whose system clock is set back, and replies whose event loop is closed."""

from __future__ import annotations

import asyncio
import gc
import time
from itertools import pairwise

import opentelemetry.sdk.trace
import pytest
from support.scripted import HANG, ProviderError, Scripted

from traced_retry import RetryPolicy, retry, semconv
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest, Delivery
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.testing.clock import VirtualClockLoop

SERVER_ERROR = ProviderError("server_error")
LIMITED = ProviderError("rate_limit_exceeded", retry_after=5.0)
HOUR = 3600 * 10**9


def seconds(span):
    """The duration of a span."""
    return (span.end_time - span.start_time) / 1e9


class Spoken(CallRequest):
    """A request whose reply has its first output after 2 s and ends after 5 s."""

    def delivery(self, result):
        delivery = Delivery()
        loop = asyncio.get_running_loop()
        loop.call_later(2, delivery.mark_output)
        loop.call_later(5, delivery.end)
        return delivery


class Stalled(CallRequest):
    """A request whose reply has output at once and no end."""

    def delivery(self, result):
        delivery = Delivery()
        delivery.mark_activity()
        delivery.mark_output()
        return delivery


class TestSystemClock:
    @pytest.mark.parametrize("jump", [-HOUR, HOUR])
    async def test_clock_that_jumps_during_attempt_changes_no_duration(
        self, jump, recorder, monkeypatch
    ):
        """Spans last as long as the event loop's clock says, and attempts follow each other."""
        loop = asyncio.get_running_loop()
        began = time.time_ns()

        def now():
            return began + round(loop.time() * 1e9) + (jump if loop.time() > 1 else 0)

        monkeypatch.setattr(time, "time_ns", now)
        monkeypatch.setattr(opentelemetry.sdk.trace, "time_ns", now)
        ask = Scripted((2.0, SERVER_ERROR), (3.0, LIMITED), (1.5, "hello"))
        policy = RetryPolicy(base_delay=0)
        await retry(provider="openai", policy=policy, **recorder.providers)(ask.future)()

        (reply,) = recorder.spans(semconv.SPAN_REPLY)
        attempts = recorder.spans(semconv.SPAN_ATTEMPT)
        assert 11.5 == pytest.approx(seconds(reply))
        assert [2.0, 3.0, 1.5] == pytest.approx([seconds(attempt) for attempt in attempts])
        gaps = [(b.start_time - a.end_time) / 1e9 for a, b in pairwise(attempts)]
        assert [0.0, 5.0] == pytest.approx(gaps)
        assert reply.start_time <= attempts[0].start_time
        assert attempts[-1].end_time <= reply.end_time

    async def test_span_ends_with_first_output(self, recorder, monkeypatch):
        """A reply that is spoken for 3 s lasts until its first output, also if the clock jumps."""
        loop = asyncio.get_running_loop()
        jump = lambda: 10**18 - (HOUR if loop.time() > 1 else 0)  # noqa: E731
        monkeypatch.setattr(time, "time_ns", jump)
        monkeypatch.setattr(opentelemetry.sdk.trace, "time_ns", jump)
        telemetry = Telemetry(**recorder.providers)
        request = Spoken(Scripted((0.5, "hello")).future)
        await Reply(request, RetryPolicy(), telemetry.reply(Target("openai"))).start()
        await asyncio.sleep(5)

        assert [2.5, 2.5] == pytest.approx([seconds(span) for span in recorder.spans()])


class TestOldLoop:
    """A loop that has run for a while, so that times differ from durations."""

    async def test_durations_are_counted_from_start_of_reply(self, recorder, caplog):
        """Spans, metrics, log and on_exhausted have seconds since the request."""
        await asyncio.sleep(1000)
        script = Scripted((2.0, SERVER_ERROR), (3.0, LIMITED), HANG)
        told = []
        trace = Telemetry(**recorder.providers).reply(Target("openai"))
        before = time.time_ns()
        reply = Reply(
            CallRequest(script.future),
            RetryPolicy(base_delay=1.0, deadline=15.0, attempt_timeout=4.0, max_retries=2),
            trace,
            jitter=lambda bound: bound,
            on_failed=told.append,
        )
        future = reply.start()
        await asyncio.wait([future])

        assert [1000, 1003, 1011] == script.times
        (span,) = recorder.spans(semconv.SPAN_REPLY)
        attempts = recorder.spans(semconv.SPAN_ATTEMPT)
        assert 15.0 == pytest.approx(seconds(span))
        assert [2.0, 3.0, 4.0] == pytest.approx([seconds(attempt) for attempt in attempts])
        starts = [(attempt.start_time - span.start_time) / 1e9 for attempt in attempts]
        assert [0.0, 3.0, 11.0] == pytest.approx(starts)
        assert abs(span.start_time - before) < 5e9
        assert [(2, 6.0)] == list(recorder.points(semconv.METRIC_DELAY).values())
        durations = recorder.points(semconv.METRIC_ATTEMPT_DURATION).values()
        assert [2.0, 3.0, 4.0] == sorted(total for _, total in durations)
        assert [(1, 15.0)] == list(recorder.points(semconv.METRIC_REPLY_DURATION).values())
        assert [15.0] == [failed.seconds for failed in told]
        assert 6.0 == span.attributes[semconv.DELAY_TOTAL]
        assert "after 3 attempt(s) and 15.00 s" in caplog.text
        assert LIMITED is future.exception()

    @pytest.mark.parametrize("stalled", [False, True])
    async def test_timeout_names_its_seconds(self, stalled, recorder):
        """The error of an attempt without an answer has the seconds of the attempt."""
        await asyncio.sleep(1000)
        call = Scripted("hello" if stalled else HANG).future
        request = Stalled(call) if stalled else CallRequest(call)
        policy = RetryPolicy(deadline=12.0, attempt_timeout=None if stalled else 3.0, max_retries=0)
        ended = []
        reply = Reply(
            request,
            policy,
            Telemetry(**recorder.providers).reply(Target("openai")),
            on_ended=lambda _, error: ended.append(error),
        )
        future = reply.start()
        await asyncio.sleep(100)

        error = ended[0] if stalled else future.exception()
        assert f"no answer within {60.0 if stalled else 3.0} s" == str(error)


def closed_with(recorder, *steps, after=0.1, request=None, loop=None):
    """Start a reply, close the event loop ``after`` seconds, and return the reply's future."""
    policy = RetryPolicy(base_delay=0)

    async def start():
        if request is None:
            ask = retry(provider="openai", policy=policy, **recorder.providers)
            future = ask(Scripted(*steps).future)()
        else:
            trace = Telemetry(**recorder.providers).reply(Target("openai"))
            future = Reply(request, policy, trace).start()
        await asyncio.sleep(after)
        return future

    loop = loop or VirtualClockLoop()
    future = loop.run_until_complete(start())
    loop.close()
    return future


@pytest.mark.parametrize("make_loop", [VirtualClockLoop, asyncio.new_event_loop])
class TestClosedLoop:
    @pytest.mark.parametrize("steps", [(LIMITED, "hello"), (HANG,)], ids=["wait", "attempt"])
    def test_closed_loop_ends_reply(self, steps, make_loop, recorder):
        """Spans and counters end, in a wait as well as in an attempt."""
        future = closed_with(recorder, *steps, loop=make_loop())

        assert future.cancelled()
        assert 0 == recorder.open_spans
        assert ["interrupted"] == [r[semconv.OUTCOME] for r in recorder.replies]
        assert {"openai": 0} == {
            dict(labels)[semconv.PROVIDER]: value
            for labels, value in recorder.points(semconv.METRIC_IN_FLIGHT).items()
        }

    def test_reply_in_the_middle_of_its_words_succeeded(self, make_loop, recorder):
        """The caller has heard a part, so the reply is not lost."""
        request = Spoken(Scripted("hello").future)
        closed_with(recorder, request=request, after=2.1, loop=VirtualClockLoop())

        assert 0 == recorder.open_spans
        assert ["succeeded"] == [r[semconv.OUTCOME] for r in recorder.replies]

    def test_ended_reply_is_counted_once(self, make_loop, recorder):
        """A reply that had ended is not touched."""
        closed_with(recorder, "hello", loop=make_loop())
        gc.collect()

        assert ["succeeded"] == [r[semconv.OUTCOME] for r in recorder.replies]
        assert {"succeeded": 1} == recorder.counted(semconv.METRIC_REPLIES, semconv.OUTCOME)


def test_fault_after_the_end_of_the_loop_is_logged(recorder, caplog):
    """The garbage collector must not print it."""

    async def start():
        trace = Telemetry(**recorder.providers).reply(Target("openai"))
        request = CallRequest(Scripted(HANG).future)
        return Reply(request, RetryPolicy(), trace, on_ended=lambda *_: 1 / 0).start()

    loop = VirtualClockLoop()
    loop.run_until_complete(start())
    loop.close()

    place = "the end of a reply whose event loop was closed"
    assert f"{place} raised ZeroDivisionError" in caplog.text


def test_awaited_reply_ends_with_asyncio_run(recorder):
    """``asyncio.run`` cancels the task that waits for the reply, and no error is printed."""
    ask = retry(provider="openai", **recorder.providers)(Scripted(LIMITED).coroutine)

    async def main():
        task = asyncio.ensure_future(ask())
        await asyncio.sleep(0.05)
        return task

    assert asyncio.run(main()).cancelled()
    assert ["interrupted"] == [r[semconv.OUTCOME] for r in recorder.replies]
