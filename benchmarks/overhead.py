# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of retries and traces, side by side in one run: ``make bench``.

Each figure is the fastest of several rounds. The candidates take turns, so a busy machine slows all
of them alike. Compare the ratios. The exit status is 1 if one is worse than promised.
"""

from __future__ import annotations

import asyncio
import gc
import platform
import statistics
import sys
import time
import tracemalloc

import stamina
import tenacity
from opentelemetry import context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

import traced_retry
from traced_retry import semconv
from traced_retry.core.telemetry import Target, Telemetry

CALLS = 2_000
ROUNDS = 15
WAITING = 10_000

failures = []


def judge(what, value, most):
    """Print a ratio beside its promise."""
    kept = value <= most
    print(f"  {what:<58}{value:6.2f}  at most {most:g}: {'kept' if kept else 'BROKEN'}")
    if not kept:
        failures.append(what)


async def reply():
    return "hello"


async def microseconds(calls):
    """Return the fastest round of each, in microseconds per call."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            gc.collect()
            gc.disable()
            began = time.perf_counter()
            for _ in range(CALLS):
                await call()
            best[name] = min(best[name], (time.perf_counter() - began) / CALLS * 1e6)
            gc.enable()
    return best


async def without_sdk():
    print(f"Success without an SDK, us a call (fastest of {ROUNDS} x {CALLS} calls)")
    figures = await microseconds(
        {
            "the bare call": reply,
            "traced_retry": traced_retry.retry(provider="openai")(reply),
            "tenacity": tenacity.retry(
                stop=tenacity.stop_after_attempt(4),
                wait=tenacity.wait_random_exponential(max=10),
            )(reply),
            "stamina": stamina.retry(on=ConnectionError, attempts=4)(reply),
        }
    )
    for name, value in figures.items():
        print(f"  {name:<58}{value:6.2f}")
    judge("traced_retry / tenacity", figures["traced_retry"] / figures["tenacity"], 0.4)
    judge("traced_retry / stamina", figures["traced_retry"] / figures["stamina"], 0.4)


def by_hand(telemetry, target):
    """Record the two spans and six metrics of one reply, without retries.

    Each count gets the context of its span, so it may have an exemplar. traced-retry's replies in
    flight have none.
    """
    labels = target.labels
    of_attempt = {**labels, semconv.ACTION: "send", semconv.RESULT: "succeeded"}
    of_reply = {**labels, semconv.OUTCOME: "succeeded"}

    async def call():
        reply_span = telemetry.tracer.start_span(
            semconv.SPAN_REPLY, kind=SpanKind.INTERNAL, attributes=target.attributes
        )
        reply_context = trace.set_span_in_context(reply_span)
        telemetry.in_flight.add(1, labels, reply_context)
        attempt_span = telemetry.tracer.start_span(
            semconv.SPAN_ATTEMPT,
            context=reply_context,
            kind=SpanKind.CLIENT,
            attributes={
                **target.attributes,
                semconv.ATTEMPT: 1,
                semconv.ACTION: "send",
                semconv.DELAY: 0.0,
            },
        )
        attempt_context = trace.set_span_in_context(attempt_span, reply_context)
        token = context.attach(attempt_context)
        result = await reply()
        context.detach(token)
        attempt_span.set_attributes({semconv.RESULT: "succeeded"})
        telemetry.attempt_duration.record(0.1, of_attempt, attempt_context)
        telemetry.attempts.add(1, of_attempt, attempt_context)
        attempt_span.end()
        reply_span.set_attributes(
            {semconv.OUTCOME: "succeeded", semconv.ATTEMPTS: 1, semconv.DELAY_TOTAL: 0.0}
        )
        telemetry.in_flight.add(-1, labels, reply_context)
        telemetry.reply_duration.record(0.1, of_reply, reply_context)
        telemetry.replies.add(1, of_reply, reply_context)
        reply_span.end()
        return result

    return call


async def check_same(calls):
    """Check that both ways record the same spans and metrics, apart from the times."""
    recorded = []
    for make in calls:
        spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(spans))
        meters = MeterProvider([reader], shutdown_on_exit=False)
        await make(tracer_provider=tracers, meter_provider=meters)()
        recorded.append(
            [(span.name, dict(span.attributes)) for span in spans.get_finished_spans()]
            + [
                (metric.name, dict(point.attributes))
                for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
                for point in metric.data.data_points
                if getattr(point, "value", 1) and metric.name != semconv.METRIC_BUDGET_REMAINING
            ]
        )
    by_hand, ours = (sorted(each, key=str) for each in recorded)
    assert by_hand == ours, (by_hand, ours)


async def with_sdk():
    print(f"Success with the SDK, us a call (fastest of {ROUNDS} x {CALLS} calls)")

    def hand(**providers):
        return by_hand(Telemetry(**providers), Target("openai"))

    def ours(**providers):
        return traced_retry.retry(provider="openai", **providers)(reply)

    await check_same([hand, ours])
    providers = {
        "tracer_provider": TracerProvider(shutdown_on_exit=False),
        "meter_provider": MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False),
    }
    figures = await microseconds(
        {
            "the same spans and metrics by hand": hand(**providers),
            "traced_retry": ours(**providers),
        }
    )
    for name, value in figures.items():
        print(f"  {name:<58}{value:6.2f}")
    ratio = figures["traced_retry"] / figures["the same spans and metrics by hand"]
    judge("traced_retry / by hand", ratio, 1.1)


async def waiting():
    print(f"{WAITING:,} replies waiting in backoff at once")

    def busy() -> asyncio.Future[str]:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(OverloadedError())
        return future

    policy = traced_retry.RetryPolicy(
        base_delay=15, max_delay=15, max_retries=10, deadline=3600, budget=None
    )
    ask = traced_retry.retry(provider="openai", policy=policy)(busy)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    began = time.perf_counter()
    replies = [ask() for _ in range(WAITING)]
    print(f"  {'seconds to ask for all of them':<58}{time.perf_counter() - began:6.2f}")
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"  {'memory per waiting reply, bytes':<58}{(after - before) / WAITING:6.0f}")
    lags = []
    for _ in range(200):
        due = time.perf_counter() + 0.01
        await asyncio.sleep(0.01)
        lags.append((time.perf_counter() - due) * 1000)
    lags.sort()
    print(f"  {'loop lag while they wait and retry, ms, p50':<58}{statistics.median(lags):6.2f}")
    print(f"  {'loop lag while they wait and retry, ms, p99':<58}{lags[-2]:6.2f}")
    for one in replies:
        one.cancel()
    await asyncio.sleep(0)


class OverloadedError(Exception):
    """The error of a busy provider."""

    code = "engine_overloaded"


async def main():
    import logging  # noqa: PLC0415

    logging.disable(logging.CRITICAL)
    print(f"Python {platform.python_version()}, {platform.machine()}")
    await without_sdk()
    await with_sdk()
    await waiting()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
