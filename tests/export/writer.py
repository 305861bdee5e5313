# SPDX-License-Identifier: Apache-2.0
"""A process that makes reply spans; run by the tests of this folder as ``writer.py NAME ...``."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from traced_retry import semconv
from traced_retry.export.file_store import StoreExporter, new_store
from traced_retry.export.processor import BoundedSpanProcessor
from traced_retry.export.setup import store_providers


def say(text):
    """One line on stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Store:
    """A tracer that writes to a local store."""

    def __init__(self, path):
        self.exporter = StoreExporter(path)
        self.processor = BoundedSpanProcessor(self.exporter, "local_store", delay=0.02)
        self.provider = TracerProvider()
        self.provider.add_span_processor(self.processor)

    def span(self, number):
        reply(self.provider, number)

    def close(self):
        self.provider.shutdown()


def reply(provider, number):
    """End a reply span with that number."""
    attributes = {semconv.PROVIDER: "openai", semconv.ATTEMPTS: number, "padding": "x" * 400}
    provider.get_tracer("writer").start_span(semconv.SPAN_REPLY, attributes=attributes).end()


def flood(path):
    """Numbered spans without end; ``flushed N`` once N are in the store."""
    store = Store(path)
    number = 0
    while True:
        for _ in range(50):
            number += 1
            store.span(number)
        assert store.processor.force_flush()
        say(f"flushed {number}")


def some(path, count):
    """That many, and an orderly end."""
    store = Store(path)
    for number in range(1, int(count) + 1):
        store.span(number)
    store.close()


def fork(path):
    """One here, one in a forked child, one more here."""
    store = Store(path)
    store.span(1)
    child = os.fork()
    store.span(3 if child else 2)
    store.close()
    if child:
        os.waitpid(child, 0)


def full(path):
    """As many as a limit of file size lets through and one more; then one without the limit."""
    limit = 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    exporter = StoreExporter(path)
    made = []
    provider = TracerProvider()
    provider.add_span_processor(_Kept(made))
    while True:
        reply(provider, len(made) + 1)
        if exporter.export(made[-1:]) is not SpanExportResult.SUCCESS:
            break
    say(f"{exporter.reason} {len(made)} {Path(path).stat().st_size}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    reply(provider, len(made) + 1)
    say(exporter.export(made[-1:]).name)
    exporter.shutdown()


class _Kept:
    """A span processor that keeps what ended."""

    def __init__(self, spans):
        self.spans = spans

    def on_start(self, span, parent_context=None):
        pass

    def _on_ending(self, span):
        pass

    def on_end(self, span):
        self.spans.append(span)

    def shutdown(self):
        pass


def leave(path, count):
    """That many by ``providers``; says ``made`` and leaves the rest to the exit."""
    tracer_provider, *_ = store_providers(Path(path), "writer")
    for number in range(1, int(count) + 1):
        reply(tracer_provider, number)
    say("made")


def named(name, count):
    """That many, in a new store of that name."""
    some(new_store(name), count)


if __name__ == "__main__":
    {f.__name__: f for f in (flood, some, fork, full, leave, named)}[sys.argv[1]](*sys.argv[2:])
