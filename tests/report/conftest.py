# SPDX-License-Identifier: Apache-2.0
"""A file of stored spans, written by the SDK's own exporter."""

from __future__ import annotations

import asyncio
from contextlib import closing, suppress

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.json.file import FileSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from support.scripted import ProviderError, Scripted

from traced_retry import RetryPolicy, report, retry, semconv

BEGAN = 1_800_000_000


class Store:
    """Runs replies and stores their spans; reads them back."""

    def __init__(self, path):
        self.path = path
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(FileSpanExporter(path)))
        self._tracer = self.provider.get_tracer(semconv.SCOPE)

    async def run(self, *steps, provider="openai", model=None, cancel_at=None, **policy):
        """One real reply through ``@retry`` on the virtual clock, read back."""
        ask = retry(
            provider=provider,
            model=model,
            policy=RetryPolicy(**policy),
            tracer_provider=self.provider,
        )(Scripted(*steps).future)
        with suppress(ProviderError, TimeoutError, KeyError, asyncio.CancelledError):
            reply = asyncio.ensure_future(ask())
            if cancel_at is not None:
                await asyncio.sleep(cancel_at)
                reply.cancel()
            await reply
        await asyncio.sleep(1)  # a cancelled caller is not made to wait for the spans' end
        return report.read(self.path)[-1]

    def timed(self, *attempts, seconds, at=0.0, orphan=False, about=None, **attributes):
        """One reply with spans timed by hand: ``attempts`` are ``(start, end, attributes)``.

        Keywords of attributes are the names of :mod:`traced_retry.semconv`.
        """
        about = {semconv.PROVIDER: "openai", semconv.MODEL: "gpt-realtime", **(about or {})}
        reply = self._start(semconv.SPAN_REPLY, at, about)
        inside = trace.set_span_in_context(reply)
        for number, (start, end, more) in enumerate(attempts, 1):
            known = {**about, **named({"ATTEMPT": number, "ACTION": "send", **more})}
            span = self._start(semconv.SPAN_ATTEMPT, at + start, known, inside)
            span.end(nanoseconds(at + end))
        if not orphan:
            reply.set_attributes(named({"ATTEMPTS": len(attempts), **attributes}))
            reply.end(nanoseconds(at + seconds))

    def close(self):
        self.provider.shutdown()

    def _start(self, name, at, attributes, context=None):
        return self._tracer.start_span(
            name, context, attributes=attributes, start_time=nanoseconds(at)
        )

    def read(self):
        return report.read(self.path)


def nanoseconds(at):
    """Unix time of ``at`` seconds after all began."""
    return BEGAN * 10**9 + round(at * 1e9)


def named(attributes):
    """By the attributes' own names."""
    return {getattr(semconv, name): value for name, value in attributes.items()}


def raw_spans(lines):
    """The spans as they are in the file."""
    for line in lines:
        for resource in line["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                yield from scope["spans"]


FAILED = {
    "RESULT": "failed",
    "ERROR_TYPE": "server_error",
    "ERROR_CODE": "server_error",
    "DECISION": "retry",
}
HEARD = {"RESULT": "succeeded"}


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    with closing(Store(tmp_path / "spans.jsonl")) as store:
        yield store


@pytest.fixture
def varied(store):
    """A store with a reply of each kind: times as they would be."""
    store.timed((0, 0.25, HEARD), seconds=0.25, OUTCOME="succeeded")
    store.timed(
        (0, 0.5, {**FAILED, "NEXT_DELAY": 1.0}),
        (1.5, 2, {**HEARD, "DELAY": 1.0}),
        seconds=2,
        at=10,
        OUTCOME="recovered",
        DELAY_TOTAL=1.0,
    )
    store.timed(
        (0, 5, {**FAILED, "ERROR_CODE": "conversation_already_has_active_response"}),
        (5, 10, {"RESULT": "failed", "ERROR_TYPE": "timeout", "DECISION": "stop", "DELAY": 0.0}),
        seconds=10,
        at=20,
        about={semconv.PROVIDER: "azure.ai.openai", semconv.MODEL: "gpt-4o-realtime-preview"},
        OUTCOME="exhausted",
        STOP_REASON="deadline",
        ERROR_TYPE="server_error",
        DELAY_TOTAL=0.0,
    )
    store.timed(
        (0, 0.5, {**FAILED, "NEXT_DELAY": 4.0}),
        seconds=1.25,
        at=40,
        OUTCOME="interrupted",
        STOP_REASON="interrupted",
        DELAY_TOTAL=0.75,
    )
    store.timed((0, 1, FAILED), seconds=1, at=50, orphan=True)
    return store
