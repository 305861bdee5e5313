# SPDX-License-Identifier: Apache-2.0
"""Read replies from spans stored as OTLP-JSON lines, the Collector's own file format.

Written by ``FileSpanExporter`` of ``opentelemetry-exporter-otlp-json-file`` or by a Collector's
``file`` exporter: one ``{"resourceSpans": [...]}`` a line, gzipped or not. Spans of others pass.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Final, TypeAlias

from traced_retry import semconv
from traced_retry.core.sanitize import printable
from traced_retry.errors import UsageError
from traced_retry.report.model import Attempt, Reply

StrPath: TypeAlias = "str | os.PathLike[str]"

SUFFIXES: Final = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
"""Suffixes of the files that are read in a folder."""

_REPLIES: Final = (semconv.SPAN_REPLY, semconv.SPAN_SAY)
_SAYS: Final = (semconv.SPAN_SAY, semconv.SPAN_SAY_ATTEMPT)
_OURS: Final = (*_REPLIES, semconv.SPAN_ATTEMPT, semconv.SPAN_SAY_ATTEMPT)
_SIGNS: Final = (semconv.SPAN_REPLY, f"{semconv.SCOPE}.")
"""One of these is in each line that holds a span of ours."""
_BATCH: Final = '{"resourceSpans"'
_GZIP: Final = b"\x1f\x8b"
_LINE_BYTES: Final = 32 * 2**20
"""The largest line that is read. A file of the store has 16 MiB, and a Collector's batch less. A
small gzipped file may expand to any size."""
_LATEST: Final = 2**63
_SECOND: Final = 10**9
"""Nanoseconds; an int, for a float would round them away."""
_REMEDY: Final = "Give a file or folder that the local store or a Collector's file exporter writes."


class ReportError(UsageError):
    """A path without replies. The message names the path and the remedy."""


class Replies(list[Reply]):
    """Replies in the order of their start."""

    unreadable_lines: int = 0
    """Lines that could not be read: a process was killed while it wrote them."""


@dataclass(frozen=True)
class _Span:
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start: int | None
    end: int | None
    """Unix nanoseconds; None if unknown."""
    attributes: dict[str, Any]

    def text(self, name: str) -> str | None:
        value = self.attributes.get(name)
        return _plain(value) if isinstance(value, str) else None

    def number(self, name: str) -> float | None:
        value = self.attributes.get(name)
        return value if isinstance(value, float) and math.isfinite(value) else None

    def count(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else int(value)

    def flag(self, name: str) -> bool | None:
        value = self.attributes.get(name)
        return value if isinstance(value, bool) else None


def read(paths: StrPath | Iterable[StrPath]) -> Replies:
    """Read the replies stored in a file, in all such files of a folder, or in several of either.

    A reply that was stored twice counts once. If the span of a reply is missing, the reply is made
    of its attempts and has no outcome.

    Raises:
        ReportError: if a path cannot be read, or if no path holds a span of ours.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    spans: dict[tuple[str, str], _Span] = {}
    unreadable_lines = sum(_collect(path, spans) for path in _files(given))
    if not spans:
        where = ", ".join(str(p) for p in given)
        unread = f" ({unreadable_lines} line(s) could not be read)" if unreadable_lines else ""
        raise ReportError(f"{where}: no {semconv.SPAN_REPLY} span in there{unread}. {_REMEDY}")
    replies = Replies(sorted(_replies(spans.values()), key=lambda r: (r.start, r.trace_id)))
    replies.unreadable_lines = unreadable_lines
    return replies


# --- files and lines ------------------------------------------------------------------------


def _files(given: list[StrPath]) -> Iterator[Path]:
    for path in map(Path, given):
        try:
            if path.is_dir():
                # Reading a pipe in the folder would wait for its writer.
                found = (p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
                yield from sorted(found)
                continue
            path.stat()
        except FileNotFoundError:
            raise ReportError(f"{path} does not exist. {_REMEDY}") from None
        except OSError as error:
            raise ReportError(f"{path} cannot be read: {error.strerror}. {_REMEDY}") from None
        yield path


def _collect(path: Path, spans: dict[tuple[str, str], _Span]) -> int:
    """Add the spans of one file to ``spans``, and return the number of unreadable lines."""
    unreadable_lines = 0
    try:
        with _open(path) as file:
            for line in _lines(file, path):
                batch, whole = _parse(line)
                unreadable_lines += not whole
                spans.update(((s.trace_id, s.span_id), s) for s in _spans(batch))
    except (EOFError, zlib.error):  # a gzipped file that was cut off
        unreadable_lines += 1
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}.") from error
    return unreadable_lines


@contextmanager
def _open(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file, gzipped or not. Open it once, because a pipe cannot be read again."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not file.peek(len(_GZIP)).startswith(_GZIP):
            yield file
            return
        with gzip.open(file) as unzipped:
            yield unzipped


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe that has no writer as an empty file, instead of waiting for a writer."""
    if not hasattr(os, "O_NONBLOCK"):  # Windows
        return os.open(path, flags)
    opened = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(opened, True)
    return opened


def _lines(file: BufferedIOBase, path: Path) -> Iterator[str]:
    """Read line by line, and never hold more than one line of limited length.

    Raises:
        ReportError: if a line is too long.
    """
    for number in itertools.count(1):
        line = file.readline(_LINE_BYTES + 1)
        if len(line) > _LINE_BYTES:
            raise ReportError(
                f"{path}: line {number} is longer than {_LINE_BYTES // 2**20} MiB, which no batch "
                "of spans is. Remove the file, or give the other files by name."
            )
        if not line:
            return
        yield line.decode("utf-8-sig", errors="replace")


def _parse(line: str) -> tuple[dict[str, Any], bool]:
    """Return the batch in ``line``, empty without a span of ours, and whether all was readable."""
    begins = line.rfind(_BATCH)
    if not any(sign in line for sign in _SIGNS):  # logs, spans of others: not worth parsing
        return {}, begins < 0 or line.rstrip().endswith("}")
    try:
        return _json(line), True
    except (ValueError, RecursionError):
        if begins > 0:  # a process was killed as it wrote; the next one went on in the same line
            return _parse(line[begins:])[0], False
        return {}, begins < 0


def _json(line: str) -> dict[str, Any]:
    value = json.loads(line)
    return value if isinstance(value, dict) else {}


# --- spans ----------------------------------------------------------------------------------


def _each(holder: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    value = holder.get(name)
    return (v for v in value if isinstance(v, dict)) if isinstance(value, list) else iter(())


def _spans(batch: dict[str, Any]) -> Iterator[_Span]:
    for resource in _each(batch, "resourceSpans"):
        for scope in _each(resource, "scopeSpans"):
            for raw in _each(scope, "spans"):
                if raw.get("name") in _OURS:
                    span = _span(raw)
                    if any(name.startswith(f"{semconv.SCOPE}.") for name in span.attributes):
                        yield span


def _span(raw: dict[str, Any]) -> _Span:
    return _Span(
        trace_id=_plain(raw.get("traceId")),
        span_id=_plain(raw.get("spanId")),
        parent_id=_plain(raw.get("parentSpanId")),
        name=raw["name"],
        start=_nanoseconds(raw.get("startTimeUnixNano")),
        end=_nanoseconds(raw.get("endTimeUnixNano")),
        attributes={str(a.get("key")): _value(a.get("value")) for a in _each(raw, "attributes")},
    )


def _plain(value: object) -> str:
    """Return ``value`` as text that can be shown anywhere."""
    return printable(value if isinstance(value, str) else "")


def _nanoseconds(value: object) -> int | None:
    """Parse a time: a string in the standard, a number in some tools, 0 for a span without end."""
    try:
        time = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    return time if 0 < time < _LATEST else None


def _value(value: object) -> str | bool | float | None:
    """Return an attribute's value. Numbers of any kind, as text or not, become floats."""
    if not isinstance(value, dict):
        return None
    for kind in ("stringValue", "boolValue"):
        if isinstance(value.get(kind), (str, bool)):
            return value[kind]  # type: ignore[no-any-return]
    try:
        return float(value.get("doubleValue", value.get("intValue")))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


# --- replies --------------------------------------------------------------------------------


def _replies(spans: Iterable[_Span]) -> Iterator[Reply]:
    parents: dict[tuple[str, str], _Span] = {}
    children: dict[tuple[str, str], list[_Span]] = {}
    for span in spans:
        if span.name in _REPLIES:
            parents[span.trace_id, span.span_id] = span
        else:
            children.setdefault((span.trace_id, span.parent_id), []).append(span)
    for ids in parents.keys() | children.keys():
        yield _reply(ids, parents.get(ids), children.get(ids, []))


def _reply(ids: tuple[str, str], parent: _Span | None, children: list[_Span]) -> Reply:
    everything = children if parent is None else [parent, *children]
    starts = [s.start for s in everything if s.start]
    ends = [s.end for s in everything if s.end]
    start = parent.start if parent is not None and parent.start else min(starts, default=0)
    end = parent.end if parent is not None and parent.end else max(ends, default=start)
    attempts = sorted(
        (_attempt(span, start) for span in children), key=lambda a: (a.number, a.start)
    )
    about = everything[0]
    reply = parent or replace(about, attributes={})
    return Reply(
        trace_id=ids[0],
        span_id=ids[1],
        provider=about.text(semconv.PROVIDER) or "unknown",
        model=about.text(semconv.MODEL),
        server_address=about.text(semconv.SERVER_ADDRESS),
        server_port=about.count(semconv.SERVER_PORT),
        start=start / _SECOND,
        end=max(start, end) / _SECOND,
        attempts=tuple(attempts),
        attempt_count=max(
            [about.count(semconv.ATTEMPTS) or 0, len(attempts), *(a.number for a in attempts)]
        ),
        outcome=reply.text(semconv.OUTCOME),
        stop_reason=reply.text(semconv.STOP_REASON),
        error_type=reply.text(semconv.ERROR_TYPE),
        delay_total=reply.number(semconv.DELAY_TOTAL),
        say=about.name in _SAYS,
    )


def _attempt(span: _Span, fallback: int) -> Attempt:
    start = span.start or span.end or fallback
    return Attempt(
        number=span.count(semconv.ATTEMPT) or 1,
        start=start / _SECOND,
        end=max(start, span.end or start) / _SECOND,
        action=span.text(semconv.ACTION),
        delay=span.number(semconv.DELAY),
        result=span.text(semconv.RESULT),
        error_code=span.text(semconv.ERROR_CODE),
        error_type=span.text(semconv.ERROR_TYPE),
        recoverable=span.flag(semconv.RECOVERABLE),
        decision=span.text(semconv.DECISION),
        next_delay=span.number(semconv.NEXT_DELAY),
    )
