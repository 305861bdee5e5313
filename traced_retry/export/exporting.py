# SPDX-License-Identifier: Apache-2.0
"""Exporting that costs replies nothing, ends in time, and counts what it drops.

The SDK's exporters do the sending. Its ``BatchSpanProcessor`` is not used (1.45, read and run):
``shutdown`` may take 30 s and no provider passes it less, where LiveKit kills a job process after
10; ``force_flush`` ignores its timeout; a failed batch is counted by nobody unless the SDK's own
metrics are turned on, and those do not have what is left in the queue at exit. Threads cannot be
started at exit (Python 3.12), so none of this can be put around it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

from opentelemetry import context, metrics
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_SCHEDULE_DELAY,
)
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from traced_retry import semconv
from traced_retry._version import __version__
from traced_retry.core.guard import log_suppressed, logger
from traced_retry.errors import UsageError

SPANS_WITHIN: Final = 2.0
"""Seconds that spans have at exit. With a second each for a local store and for metrics, an exit
stays below 5 s, half of what LiveKit gives a job process."""
METRICS_WITHIN: Final = 1.0
"""Seconds that metrics have at exit."""

QUEUE_SIZE: Final = 2048
BATCH_SIZE: Final = 512
DELAY: Final = 5.0
"""Seconds. These three are the SDK's defaults."""


class ExportError(UsageError):
    """A setting of the export that cannot be; the message names it and the remedy."""


class BoundedSpanProcessor(SpanProcessor):
    """Hands ended spans to ``exporter`` in batches, from a thread of its own.

    Each sampled span is delivered, or counted once in ``traced_retry.export.dropped`` with why:
    ``exporter.reason``, where it has that attribute, says why its last export failed. The log has
    one WARN record when the first is dropped and one with the sums at shutdown.

    Args:
        exporter: its ``export`` is called by one thread at a time.
        name: ``traced_retry.exporter`` in the metric.
        meter_provider: default: the global one. Shut it down after the tracer provider, so that
            the last drops are told.
        within: seconds that ``shutdown`` takes at most. A span whose delivery is not confirmed by
            then counts as dropped.
        queue_size: spans held at most, those being sent included; further ones are dropped.
            Default: ``OTEL_BSP_MAX_QUEUE_SIZE``, else 2048.
        batch_size: spans an export takes at most. Default: ``OTEL_BSP_MAX_EXPORT_BATCH_SIZE``,
            else 512, or the queue's size if that is less.
        delay: seconds a span waits at most for a batch to fill. Default:
            ``OTEL_BSP_SCHEDULE_DELAY`` (milliseconds), else 5.

    Raises:
        ExportError: one of the variables is no whole number above 0.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        name: str,
        *,
        meter_provider: metrics.MeterProvider | None = None,
        within: float = SPANS_WITHIN,
        queue_size: int | None = None,
        batch_size: int | None = None,
        delay: float | None = None,
    ) -> None:
        self._exporter = exporter
        self._within = within
        self._size = queue_size or _whole(OTEL_BSP_MAX_QUEUE_SIZE, QUEUE_SIZE)
        self._batch = min(
            batch_size or _whole(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, BATCH_SIZE), self._size
        )
        self._delay = delay or _whole(OTEL_BSP_SCHEDULE_DELAY, int(DELAY * 1000)) / 1000
        self._drops = _Drops(name, meter_provider)
        self._closed = False
        self._start()
        if hasattr(os, "register_at_fork"):
            restart = weakref.WeakMethod(self._after_fork)
            os.register_at_fork(after_in_child=lambda: (again := restart()) and again())

    def _start(self) -> None:
        self._queue: deque[ReadableSpan] = deque()
        self._pending = 0  # Queued or being sent.
        self._flushing = 0
        self._given_up = False
        self._changed = threading.Condition()
        threading.Thread(
            target=self._work, name=f"traced_retry export {self._drops.exporter}", daemon=True
        ).start()

    def _after_fork(self) -> None:
        """In the child: no thread came along, and the parent sends what was queued."""
        if not self._closed:
            self._drops.forget()
            self._start()

    # --- the SDK's side -------------------------------------------------------------------------

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        """Nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a sampled span, or count it as dropped. Never waits for the exporter."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._changed:
            if not self._closed and self._pending < self._size:
                self._pending += 1
                self._queue.append(span)
                if len(self._queue) >= self._batch:
                    self._changed.notify_all()
                return
            reason: semconv.DropReason = "shutdown" if self._closed else "queue_full"
            first = self._drops.add(1, reason)
        if first:
            self._drops.tell_first(reason)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what is queued; whether all was dealt with in time."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            done = self._changed.wait_for(self._idle, timeout_millis / 1000)
            self._flushing -= 1
        return done

    def shutdown(self) -> None:
        """Send what is queued, for at most ``within`` seconds; count the rest as dropped."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(self._idle, self._within)
            left = self._pending
            self._given_up = True
            self._queue.clear()
            self._pending = 0  # nobody deals with them any more: a flush has nothing to wait for
            self._changed.notify_all()
            if left:
                self._drops.add(left, "shutdown")
        try:
            self._exporter.shutdown()
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises, at exit
            log_suppressed("shutting an exporter down", error)
        self._drops.tell_sums()

    # --- the thread's side ----------------------------------------------------------------------

    def _idle(self) -> bool:
        return not self._pending

    def _due(self) -> bool:
        hurry = self._flushing > 0 and len(self._queue) > 0
        return hurry or self._closed or len(self._queue) >= self._batch

    def _work(self) -> None:
        # An instrumented HTTP client would make a span of each export, and so on for ever.
        context.attach(context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        while batch := self._next():
            why = self._export(batch)
            with self._changed:
                if self._given_up:  # They count as dropped already.
                    return
                self._pending -= len(batch)
                first = why is not None and self._drops.add(len(batch), why)
                self._changed.notify_all()
            if why is not None and first:
                self._drops.tell_first(why)

    def _next(self) -> list[ReadableSpan]:
        """The next batch, waited for; empty when there will be none."""
        with self._changed:
            while True:
                self._changed.wait_for(self._due, self._delay)
                if self._queue or self._closed:
                    count = min(self._batch, len(self._queue))
                    return [self._queue.popleft() for _ in range(count)]

    def _export(self, batch: Sequence[ReadableSpan]) -> semconv.DropReason | None:
        """Why the batch could not be delivered; None if it was."""
        try:
            if self._exporter.export(batch) is SpanExportResult.SUCCESS:
                return None
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises
            log_suppressed("exporting spans", error)
            return "failed"
        why: semconv.DropReason = getattr(self._exporter, "reason", "failed")
        return why


class BoundedMetricReader(PeriodicExportingMetricReader):
    """The SDK's periodic reader, whose shutdown takes at most ``METRICS_WITHIN`` seconds.

    Metrics are cumulative: what one export could not deliver, the next one carries.
    """

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: object) -> None:
        """Export a last time, and stop."""
        super().shutdown(min(timeout_millis, METRICS_WITHIN * 1000), **kwargs)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Export now; whether that was over in time. The SDK's own waits for the exporter's end.

        Not for an exit: it needs a thread, and none can be started then (RuntimeError).
        """
        flushing = threading.Thread(
            target=super().force_flush, args=(timeout_millis,), name="flush metrics", daemon=True
        )
        flushing.start()
        flushing.join(timeout_millis / 1000)
        return not flushing.is_alive()


class _Drops:
    """How many spans an exporter dropped, and why. Its user holds a lock."""

    def __init__(self, exporter: str, meter_provider: metrics.MeterProvider | None) -> None:
        self.exporter = exporter
        self._counter = metrics.get_meter(
            semconv.SCOPE, __version__, meter_provider, schema_url=semconv.SCHEMA_URL
        ).create_counter(
            semconv.METRIC_EXPORT_DROPPED, "{span}", "Spans that could not be delivered."
        )
        self.forget()
        for reason in semconv.DROP_REASONS:  # A counter born above 0 has no increase.
            self._count(0, reason)

    def forget(self) -> None:
        """After a fork: what the parent dropped is the parent's to tell."""
        self._sums: Counter[semconv.DropReason] = Counter()

    def add(self, spans: int, reason: semconv.DropReason) -> bool:
        """Count; whether these are the first."""
        first = not self._sums
        self._sums[reason] += spans
        self._count(spans, reason)
        return first

    def tell_first(self, reason: semconv.DropReason) -> None:
        logger.warning(
            "exporter %s drops spans (%s); replies go on, and %s counts what is lost",
            self.exporter,
            reason,
            semconv.METRIC_EXPORT_DROPPED,
        )

    def tell_sums(self) -> None:
        if sums := sorted(self._sums.items()):
            logger.warning(
                "exporter %s dropped %d span(s): %s",
                self.exporter,
                sum(count for _, count in sums),
                ", ".join(f"{reason} {count}" for reason, count in sums),
            )

    def _count(self, spans: int, reason: semconv.DropReason) -> None:
        self._counter.add(spans, {semconv.EXPORTER: self.exporter, semconv.DROP_REASON: reason})


def _whole(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) == 0:
        raise ExportError(f"{variable} is {text!r}; it must be a whole number above 0")
    return int(text)
