# SPDX-License-Identifier: Apache-2.0
"""Export spans without delaying replies, end in time, and count dropped spans.

The SDK's exporters send the spans. The SDK's ``BatchSpanProcessor`` does not fit (1.45, read and
run):

* ``shutdown`` may take 30 s, and no provider passes a shorter timeout. LiveKit kills a job process
  after 10 s.
* ``force_flush`` ignores its timeout.
* A failed batch is counted only by the SDK's own metrics, if these are turned on. They do not count
  the spans left in the queue at exit.

A wrapper cannot fix this, because Python 3.12 cannot start a thread at exit.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Final

from opentelemetry import context, metrics
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_SCHEDULE_DELAY,
)
from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from traced_retry import semconv
from traced_retry._version import __version__
from traced_retry.core.guard import log_suppressed, logger
from traced_retry.core.sanitize import shown
from traced_retry.errors import ExportError

SPANS_WITHIN: Final = 2.0
"""Seconds that spans may take at exit. With 1 s each for a local store and for metrics, an exit
takes less than 5 s, half of the time that LiveKit allows a job process."""
METRICS_WITHIN: Final = 1.0
"""Seconds that metrics may take at exit."""

QUEUE_SIZE: Final = 2048
BATCH_SIZE: Final = 512
DELAY: Final = 5.0
"""Seconds. All three values are the SDK's defaults."""
_DIGITS: Final = 9


class BoundedSpanProcessor(SpanProcessor):
    """Processor that passes ended spans to ``exporter`` in batches, from its own thread.

    Each sampled span is either delivered or counted once in ``traced_retry.export.dropped``. The
    metric has the reason of the last failed export, ``exporter.reason``, if the exporter has this
    attribute. The log has one WARN record for the first drop and one with the totals at shutdown.

    Args:
        exporter: the exporter. One thread at a time calls its ``export``.
        name: ``traced_retry.exporter`` in the metric.
        meter_provider: the provider of the metric. Default: the global one. Shut it down after the
            tracer provider, so that it exports the last drops.
        within: the longest duration of ``shutdown`` in seconds. A span counts as dropped if its
            delivery is not confirmed by then.
        queue_size: the largest number of spans held, including those being sent. Further spans are
            dropped. Default: ``OTEL_BSP_MAX_QUEUE_SIZE``, else 2048.
        batch_size: the largest number of spans per export. Default:
            ``OTEL_BSP_MAX_EXPORT_BATCH_SIZE``, else 512, or the queue's size if that is less.
        delay: the longest wait of a span for its batch to fill, in seconds. Default:
            ``OTEL_BSP_SCHEDULE_DELAY`` (milliseconds), else 5.

    Raises:
        ExportError: if one of the variables is not a whole number above 0.
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
        self._size = queue_size or _positive_integer(OTEL_BSP_MAX_QUEUE_SIZE, QUEUE_SIZE)
        self._batch = min(
            batch_size or _positive_integer(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, BATCH_SIZE), self._size
        )
        self._delay = delay or _positive_integer(OTEL_BSP_SCHEDULE_DELAY, int(DELAY * 1000)) / 1000
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
        """Restart in the child: it has no thread, and the parent sends the queued spans."""
        if not self._closed:
            self._drops.forget()
            self._start()

    # --- the SDK's side -------------------------------------------------------------------------

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        """Do nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a sampled span, or count it as dropped. Never wait for the exporter."""
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
            self._drops.add(1, reason)
        self._drops.log_first(reason)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send queued spans.

        Return False if time was up, or if spans were dropped since the last call.
        """
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            done = self._changed.wait_for(self._idle, timeout_millis / 1000)
            self._flushing -= 1
            dropped = self._drops.take_news()
        return done and not dropped

    def shutdown(self) -> None:
        """Send queued spans for at most ``within`` seconds, and count the rest as dropped."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(self._idle, self._within)
            left = self._pending
            self._given_up = True
            self._queue.clear()
            self._pending = 0  # a flush must not wait for them
            self._changed.notify_all()
            if left:
                self._drops.add(left, "shutdown")
        try:
            self._exporter.shutdown()
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises, at exit
            log_suppressed("shutting an exporter down", error)
        self._drops.log_totals()

    # --- the thread's side ----------------------------------------------------------------------

    def _idle(self) -> bool:
        return not self._pending

    def _due(self) -> bool:
        hurry = self._flushing > 0 and len(self._queue) > 0
        return hurry or self._closed or len(self._queue) >= self._batch

    def _work(self) -> None:
        # Otherwise an instrumented HTTP client would create a span for each export, without end.
        context.attach(context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        while batch := self._next():
            why = self._export(batch)
            if why is not None:  # Before it counts, because ``shutdown`` waits for the count only.
                self._drops.log_first(why)
            with self._changed:
                if self._given_up:  # These spans already count as dropped.
                    return
                self._pending -= len(batch)
                if why is not None:
                    self._drops.add(len(batch), why)
                self._changed.notify_all()

    def _next(self) -> list[ReadableSpan]:
        """Wait for the next batch and return it. It is empty after shutdown."""
        with self._changed:
            while True:
                self._changed.wait_for(self._due, self._delay)
                if self._queue or self._closed:
                    count = min(self._batch, len(self._queue))
                    return [self._queue.popleft() for _ in range(count)]

    def _export(self, batch: Sequence[ReadableSpan]) -> semconv.DropReason | None:
        """Send the batch, and return the reason if that failed."""
        try:
            if self._exporter.export(batch) is SpanExportResult.SUCCESS:
                return None
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises
            log_suppressed("exporting spans", error)
            return "failed"
        why: semconv.DropReason = getattr(self._exporter, "reason", "failed")
        return why


class BoundedMetricReader(PeriodicExportingMetricReader):
    """The SDK's periodic reader with a shutdown of at most ``METRICS_WITHIN`` seconds.

    Metrics are cumulative: the next export includes the values of a failed one.
    """

    def __init__(self, exporter: MetricExporter, **settings: Any) -> None:
        super().__init__(exporter, **settings)
        _metric_exporters.add(exporter)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: object) -> None:
        """Export a last time and stop."""
        super().shutdown(min(timeout_millis, METRICS_WITHIN * 1000), **kwargs)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Export now, and return whether that ended in time.

        The SDK's own method waits for the exporter. Do not call this one at exit: Python cannot
        start its thread then and raises RuntimeError.
        """
        flushing = threading.Thread(
            target=super().force_flush, args=(timeout_millis,), name="flush metrics", daemon=True
        )
        flushing.start()
        flushing.join(timeout_millis / 1000)
        return not flushing.is_alive()


_metric_exporters: weakref.WeakSet[MetricExporter] = weakref.WeakSet()


def metrics_delivered() -> bool:
    """Return whether the last export of each of our OTLP metric exporters succeeded."""
    return all(getattr(exporter, "delivered", True) for exporter in _metric_exporters)


class _Drops:
    """Number of spans that an exporter dropped, by reason.

    The caller holds a lock, except during ``log_first``.
    """

    def __init__(self, exporter: str, meter_provider: metrics.MeterProvider | None) -> None:
        self.exporter = exporter
        self._counter = metrics.get_meter(
            semconv.SCOPE, __version__, meter_provider, schema_url=semconv.SCHEMA_URL
        ).create_counter(
            semconv.METRIC_EXPORT_DROPPED, "{span}", "Spans that could not be delivered."
        )
        self.forget()
        for (
            reason
        ) in semconv.DROP_REASONS:  # Prometheus sees no increase in a counter that starts above 0.
            self._count(0, reason)

    def forget(self) -> None:
        """Reset the totals after a fork, because the parent reports its own drops."""
        self._sums: Counter[semconv.DropReason] = Counter()
        self._news = False
        self._first = threading.Lock()  # Only one thread can acquire it, and it is never released.

    def add(self, spans: int, reason: semconv.DropReason) -> None:
        """Count dropped spans."""
        self._news = True
        self._sums[reason] += spans
        self._count(spans, reason)

    def take_news(self) -> bool:
        """Return whether spans were dropped since the last call."""
        news, self._news = self._news, False
        return news

    def log_first(self, reason: semconv.DropReason) -> None:
        """Log the first drop. Later calls do not log."""
        if not self._first.acquire(blocking=False):
            return
        logger.warning(
            "exporter %s drops spans (%s); replies go on, and %s counts what is lost",
            self.exporter,
            reason,
            semconv.METRIC_EXPORT_DROPPED,
        )

    def log_totals(self) -> None:
        if sums := sorted(self._sums.items()):
            logger.warning(
                "exporter %s dropped %d span(s): %s",
                self.exporter,
                sum(count for _, count in sums),
                ", ".join(f"{reason} {count}" for reason, count in sums),
            )

    def _count(self, spans: int, reason: semconv.DropReason) -> None:
        self._counter.add(spans, {semconv.EXPORTER: self.exporter, semconv.DROP_REASON: reason})


def _positive_integer(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not int(text[:_DIGITS]) > 0 or len(text) > _DIGITS:
        raise ExportError(
            f"{variable} is {shown(text)}; it must be a whole number above 0, of at most "
            f"{_DIGITS} digits"
        )
    return int(text)
