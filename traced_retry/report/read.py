# SPDX-License-Identifier: Apache-2.0
"""Read replies from spans stored as OTLP-JSON lines, the Collector's own file format.

Written by ``FileSpanExporter`` of ``opentelemetry-exporter-otlp-json-file`` or by a Collector's
``file`` exporter: one ``{"resourceSpans": [...]}`` a line, gzipped or not. Spans of others pass.

A file may be larger than the memory. Only the spans of this project are decoded, out of the text of
their line. A reply is given out as soon as all its spans are read. Memory then holds only 64 bits
of it, which identify a second copy. Replies with missing spans stay in memory.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Final, TypeAlias

from traced_retry import semconv
from traced_retry.core.sanitize import printable
from traced_retry.errors import UsageError
from traced_retry.report.model import Attempt, Reply
from traced_retry.report.selection import Selection

StrPath: TypeAlias = "str | os.PathLike[str]"
OnProgress: TypeAlias = "Callable[[int, int], None]"
"""Called with the bytes read of all files, and the replies found."""

STDIN: Final = "-"
"""The path of the standard input."""

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
"""Nanoseconds, as an int because a float would round them."""
_SAMPLE_BYTES: Final = 4096
_REPORT_EVERY: Final = 8 * 2**20
"""Bytes between two reports of progress."""
_REMEDY: Final = "Give a file or folder that the local store or a Collector's file exporter writes."

# The text of a batch as the known writers write it: resource before scopes, trace id first.
_USUAL: Final = re.compile(r'\{"resourceSpans": ?\[\{"resource": ?\{')
_NAME: Final = re.compile(r'"name": ?"(?:generate_reply|say)(?:\.attempt)?"')
_SPAN: Final = '{"traceId"'
_RESOURCE: Final = '"resource":'
_SUCCEEDED: Final = re.compile(
    r'"traced_retry\.(?:outcome|result)", ?"value": ?\{"stringValue": ?"succeeded"'
)
"""In the spans of a reply that succeeded at its first attempt, and in the last attempt of one that
recovered."""
_decode: Final = json.JSONDecoder().raw_decode


class ReportError(UsageError):
    """A path without replies. The message names the path and the remedy."""


class Replies(list[Reply]):
    """Replies in the order of their start."""

    unreadable_lines: int = 0
    """Lines that could not be read: a process was killed while it wrote them."""


@dataclass(frozen=True, slots=True)
class _Span:
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start: int | None
    end: int | None
    """Unix nanoseconds, or None if unknown."""
    attributes: dict[str, Any]
    service: str | None

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
    stream = ReplyStream(paths)
    replies = Replies(sorted(stream, key=order))
    replies.unreadable_lines = stream.unreadable_lines
    return replies


def order(reply: Reply) -> tuple[float, str]:
    """Return the key that sorts replies: their start."""
    return reply.start, reply.trace_id


def replies_of(raw_spans: Iterable[dict[str, Any]]) -> Iterator[Reply]:
    """Return the replies of spans that are as in OTLP-JSON, in no order."""
    parts: dict[tuple[str, str], _Parts] = {}
    for raw in raw_spans:
        for span in _ours(raw, None):
            own = span.name in _REPLIES
            ids = (span.trace_id, span.span_id if own else span.parent_id)
            parts.setdefault(ids, _Parts()).add(span, own=own)
    return (part.reply(ids) for ids, part in parts.items())


class ReplyStream:
    """The replies of files, each given out when its last span was read. Iterate over it once.

    Args:
        paths: files, folders, or "-" for the standard input.
        selection: the replies to give out.

    Raises:
        ReportError: if a path cannot be read. If no path holds a span of ours, the iteration
            raises it at the end.
    """

    def __init__(
        self,
        paths: StrPath | Iterable[StrPath],
        selection: Selection | None = None,
    ) -> None:
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        self.given = given
        self.files = list(_files(given))
        self.unreadable_lines = 0
        """Lines that could not be read: a process was killed while it wrote them."""
        self.found = 0
        """The number of replies read, selected or not."""
        self.on_progress: OnProgress | None = None
        """Called after each 8 MiB."""
        self._selection = selection or Selection()
        self._spans = 0
        self._open: dict[tuple[str, str], _Parts] = {}
        self._seen: set[int] = set()

    @property
    def total_bytes(self) -> int | None:
        """Size of all files, or None if the standard input is one of them."""
        if any(str(path) == STDIN for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def __iter__(self) -> Iterator[Reply]:
        """Read all files.

        Raises:
            ReportError: if a file cannot be read, or if no file holds a span of ours.
        """
        before = 0
        for path in self.files:
            for ids, parts in self._complete(path, before):
                yield from self._selected(ids, parts)
            with suppress(OSError):
                before += path.stat().st_size
        while self._open:
            ids, parts = self._open.popitem()
            yield from self._selected(ids, parts)
        if not self._spans:
            raise ReportError(_explain(self.given, self.files, self.unreadable_lines))

    def _selected(self, ids: tuple[str, str], parts: _Parts) -> Iterator[Reply]:
        self.found += 1
        reply = parts.reply(ids)
        if self._selection.matches(reply):
            yield reply

    def _complete(self, path: Path, before: int) -> Iterator[tuple[tuple[str, str], _Parts]]:
        """Read one file. Yield each reply as soon as all its spans were read."""
        reported = 0
        try:
            with _open(path) as (file, raw):
                for line in _lines(file, path):
                    for span in self._line(line):
                        if (done := self._add(span)) is not None:
                            yield done
                    reported += len(line)
                    if self.on_progress is not None and reported >= _REPORT_EVERY:
                        reported = 0
                        at = raw.tell() if raw.seekable() else 0
                        self.on_progress(before + at, self.found)
        except (EOFError, zlib.error):  # a gzipped file that was cut off
            self.unreadable_lines += 1
        except OSError as error:
            raise ReportError(f"{path} cannot be read: {error.strerror or error}.") from error

    def _line(self, line: str) -> Iterable[_Span]:
        """Return the spans of one line. Decode the whole line only if its form is unusual."""
        if line.endswith("}\n") and _USUAL.match(line) and line.find(_BATCH, 1) < 0:
            try:
                return self._usual(line)
            except (ValueError, RecursionError):  # a span in another form
                pass
        batch, whole = _parse(line)
        self.unreadable_lines += not whole
        spans = list(_spans(batch))
        self._spans += len(spans)
        return spans

    def _usual(self, line: str) -> list[_Span]:
        """Find the spans in the text of a line.

        An unescaped quote cannot be inside of a JSON string, so the marks are never in a value.

        Raises:
            ValueError: if a span cannot be decoded, or if it does not begin with its trace id.
        """
        spans: list[_Span] = []
        skipped = 0
        services: dict[int, str | None] = {}
        for match in _NAME.finditer(line):
            start = line.rfind(_SPAN, 0, match.start())
            if self._selection.failed or self._selection.trace:
                end = line.find(_SPAN, match.end())
                if self._skips(line, start, end if end >= 0 else len(line)):
                    skipped += 1
                    continue
            if start < 0:
                raise ValueError("the trace id is not first")
            raw, end = _decode(line, start)
            if end < match.end():
                raise ValueError("the name is not in the span")
            at = line.rfind(_RESOURCE, 0, start)
            if at not in services:
                services[at] = _service(_decode(line, line.index("{", at))[0])
            spans.extend(_ours(raw, services[at]))
        self._spans += len(spans) + skipped
        return spans

    def _skips(self, line: str, start: int, end: int) -> bool:
        """Return whether the text of a span shows that its reply is not selected."""
        trace = self._selection.trace
        if trace is not None and line.find(trace, start, end) < 0:
            return True
        return self._selection.failed and _SUCCEEDED.search(line, start, end) is not None

    def _add(self, span: _Span) -> tuple[tuple[str, str], _Parts] | None:
        """Keep a span until its reply is complete, then return the reply's parts."""
        own = span.name in _REPLIES
        ids = (span.trace_id, span.span_id if own else span.parent_id)
        key = hash(ids)
        if key in self._seen:  # a copy
            return None
        parts = self._open.get(ids)
        if parts is None:
            parts = self._open[ids] = _Parts()
        parts.add(span, own=own)
        if not parts.complete:
            return None
        self._seen.add(key)
        return ids, self._open.pop(ids)


@dataclass(slots=True)
class _Parts:
    """The spans of one reply, as far as they are read."""

    own: Reply | None = None
    about: Reply | None = None
    """The facts that an attempt has about its reply, in case that its own span is missing."""
    count: int | None = None
    attempts: dict[str, Attempt] = field(default_factory=dict)
    """By span id."""

    @property
    def complete(self) -> bool:
        return self.own is not None and self.count is not None and len(self.attempts) >= self.count

    def add(self, span: _Span, *, own: bool) -> None:
        if own:
            self.own, self.count = _reply(span), span.count(semconv.ATTEMPTS)
            return
        if self.about is None:
            about = replace(span, attributes={**span.attributes, semconv.ERROR_TYPE: None})
            self.about = _reply(about)
        self.attempts[span.span_id] = _attempt(span)

    def reply(self, ids: tuple[str, str]) -> Reply:
        """Return the reply that the spans make."""
        about = self.own or self.about
        assert about is not None
        starts = [a.start for a in self.attempts.values() if a.start]
        ends = [a.end for a in self.attempts.values() if a.end]
        start = (self.own.start if self.own else 0.0) or min(starts, default=0.0)
        end = (self.own.end if self.own else 0.0) or max(ends, default=start)
        attempts = sorted(
            (_within(attempt, start) for attempt in self.attempts.values()),
            key=lambda a: (a.number, a.start),
        )
        numbers = (a.number for a in attempts)
        return replace(
            about,
            trace_id=ids[0],
            span_id=ids[1],
            start=start,
            end=max(start, end),
            attempts=tuple(attempts),
            attempt_count=max([self.count or 0, len(attempts), *numbers]),
        )


def _within(attempt: Attempt, reply_start: float) -> Attempt:
    """Return the attempt with the times that were not stored."""
    start = attempt.start or attempt.end or reply_start
    end = max(start, attempt.end or start)
    if (start, end) == (attempt.start, attempt.end):
        return attempt
    return replace(attempt, start=start, end=end)


def _reply(span: _Span) -> Reply:
    return Reply(
        trace_id=span.trace_id,
        span_id=span.span_id,
        provider=span.text(semconv.PROVIDER) or "unknown",
        model=span.text(semconv.MODEL),
        server_address=span.text(semconv.SERVER_ADDRESS),
        server_port=span.count(semconv.SERVER_PORT),
        service=span.service,
        start=(span.start or 0) / _SECOND,
        end=(span.end or 0) / _SECOND,
        outcome=span.text(semconv.OUTCOME),
        stop_reason=span.text(semconv.STOP_REASON),
        error_type=span.text(semconv.ERROR_TYPE),
        delay_total=span.number(semconv.DELAY_TOTAL),
        say=span.name in _SAYS,
    )


def _attempt(span: _Span) -> Attempt:
    return Attempt(
        number=span.count(semconv.ATTEMPT) or 1,
        start=(span.start or 0) / _SECOND,
        end=(span.end or 0) / _SECOND,
        action=span.text(semconv.ACTION),
        delay=span.number(semconv.DELAY),
        result=span.text(semconv.RESULT),
        error_code=span.text(semconv.ERROR_CODE),
        error_type=span.text(semconv.ERROR_TYPE),
        recoverable=span.flag(semconv.RECOVERABLE),
        decision=span.text(semconv.DECISION),
        next_delay=span.number(semconv.NEXT_DELAY),
    )


# --- files and lines ------------------------------------------------------------------------


def _files(given: list[StrPath]) -> Iterator[Path]:
    for path in map(Path, given):
        if str(path) == STDIN:
            yield path
            continue
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


def _explain(given: list[StrPath], files: list[Path], unreadable_lines: int) -> str:
    """Say why no reply was found, with the first file that has another format."""
    for path in files:
        if (kind := _other_format(path)) is not None:
            return f"{path} is {kind}. {_REMEDY}"
    where = ", ".join("the standard input" if str(p) == STDIN else str(p) for p in given)
    unread = f" ({unreadable_lines} line(s) could not be read)" if unreadable_lines else ""
    return f"{where}: no {semconv.SPAN_REPLY} span in there{unread}. {_REMEDY}"


def _other_format(path: Path) -> str | None:
    """Return the kind of a file that does not begin like OTLP-JSON lines."""
    if str(path) == STDIN or not path.is_file():
        return None
    with suppress(OSError, EOFError, zlib.error), _open(path) as (file, _):
        start = file.read(_SAMPLE_BYTES)
        if b"\0" in start:
            return "a binary file, not OTLP-JSON lines"
        text = start.decode("utf-8-sig", errors="ignore").lstrip()
        if text and not text.startswith("{"):
            return "a text file, not OTLP-JSON lines"
    return None


@contextmanager
def _open(path: Path) -> Iterator[tuple[BufferedIOBase, BufferedIOBase]]:
    """Open a file, gzipped or not. Open it once, because a pipe cannot be read again.

    Yield the file to read, and the file as it is stored.
    """
    standard_input = str(path) == STDIN
    source = 0 if standard_input else path
    opener = None if standard_input else _without_waiting
    with open(source, "rb", opener=opener, closefd=not standard_input) as file:
        if not file.peek(len(_GZIP)).startswith(_GZIP):
            yield file, file
            return
        with gzip.open(file) as unzipped:
            yield unzipped, file


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
        if (
            begins > 0
        ):  # a process was killed as it wrote, and the next one continued in the same line
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
    for holder in _each(batch, "resourceSpans"):
        service = _service(holder.get("resource"))
        for scope in _each(holder, "scopeSpans"):
            for raw in _each(scope, "spans"):
                yield from _ours(raw, service)


def _service(resource: object) -> str | None:
    attributes = _each(resource, "attributes") if isinstance(resource, dict) else ()
    values = (_value(a.get("value")) for a in attributes if a.get("key") == "service.name")
    return next((_plain(value) for value in values if isinstance(value, str)), None)


def _ours(raw: dict[str, Any], service: str | None) -> Iterator[_Span]:
    """Yield the span if it is ours: name and attributes."""
    if raw.get("name") not in _OURS:
        return
    attributes = {str(a.get("key")): _value(a.get("value")) for a in _each(raw, "attributes")}
    if any(name.startswith(f"{semconv.SCOPE}.") for name in attributes):
        yield _Span(
            trace_id=_plain(raw.get("traceId")),
            span_id=_plain(raw.get("spanId")),
            parent_id=_plain(raw.get("parentSpanId")),
            name=raw["name"],
            start=_nanoseconds(raw.get("startTimeUnixNano")),
            end=_nanoseconds(raw.get("endTimeUnixNano")),
            attributes=attributes,
            service=service,
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
