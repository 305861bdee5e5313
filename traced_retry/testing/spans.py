# SPDX-License-Identifier: Apache-2.0
"""The traced replies of a test, from the SDK's tracer provider."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from livekit.agents import telemetry as livekit_telemetry
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from traced_retry import semconv
from traced_retry.errors import UsageError
from traced_retry.report import Reply
from traced_retry.report.read import order, replies_of

_OURS = (
    semconv.SPAN_REPLY,
    semconv.SPAN_ATTEMPT,
    semconv.SPAN_SAY,
    semconv.SPAN_SAY_ATTEMPT,
)


class RetrySpans(Sequence[Reply]):
    """The replies traced since the start, in the order of their start.

    Each is a :class:`traced_retry.report.Reply`, with ``outcome``, ``stop_reason``, ``attempts``,
    ``codes`` and ``seconds``. A reply in progress has no outcome yet.
    """

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def start(self) -> None:
        """Collect the spans of the tracer provider that is set, or set one.

        A global provider cannot be removed. It stays for the following tests, and keeps no span.

        Raises:
            UsageError: if another provider than the SDK's is set.
        """
        provider: Any = getattr(livekit_telemetry.tracer, "_tracer_provider", None)
        if provider is None or isinstance(provider, trace.ProxyTracerProvider):
            provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider):
            provider = TracerProvider(shutdown_on_exit=False)
            trace.set_tracer_provider(provider)
        if not hasattr(provider, "add_span_processor"):
            raise UsageError(
                f"retry_spans cannot read the spans of a {type(provider).__name__}: set the "
                "SDK's TracerProvider in your tests, or none"
            )
        collector = _collectors.get(provider)
        if collector is None:
            collector = _collectors[provider] = _Collector()
            provider.add_span_processor(collector)
        collector.spans = self._spans
        self._collector = collector

    def stop(self) -> None:
        """Collect no more spans."""
        self._collector.spans = None

    @overload
    def __getitem__(self, index: int) -> Reply: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Reply]: ...
    def __getitem__(self, index: int | slice) -> Reply | Sequence[Reply]:
        """Return one reply, or several."""
        return self._replies()[index]

    def __len__(self) -> int:
        """Return the number of replies."""
        return len(self._replies())

    def __iter__(self) -> Iterator[Reply]:
        """Iterate over the replies."""
        return iter(self._replies())

    @property
    def failed(self) -> list[Reply]:
        """The replies that were lost or cut off."""
        return [reply for reply in self if reply.group == "failed"]

    def _replies(self) -> list[Reply]:
        return sorted(replies_of(_as_stored(span) for span in list(self._spans)), key=order)


class _Collector(SpanProcessor):
    """A processor that passes ended spans to the test that runs."""

    spans: list[ReadableSpan] | None = None

    def on_end(self, span: ReadableSpan) -> None:
        """Keep a span of ours."""
        if self.spans is not None and span.name in _OURS:
            self.spans.append(span)


_collectors: dict[object, _Collector] = {}
"""One per provider, because a provider cannot drop a processor."""


def _as_stored(span: ReadableSpan) -> dict[str, object]:
    """Return the span as in an OTLP-JSON file."""
    attributes = []
    for key, value in (span.attributes or {}).items():
        if isinstance(value, bool):
            stored: dict[str, object] = {"boolValue": value}
        else:
            kind = "stringValue" if isinstance(value, str) else "doubleValue"
            stored = {kind: value}
        attributes.append({"key": key, "value": stored})
    context = span.get_span_context()
    assert context is not None
    return {
        "traceId": format(context.trace_id, "032x"),
        "spanId": format(context.span_id, "016x"),
        "parentSpanId": format(span.parent.span_id, "016x") if span.parent else "",
        "name": span.name,
        "startTimeUnixNano": span.start_time,
        "endTimeUnixNano": span.end_time,
        "attributes": attributes,
    }
