# SPDX-License-Identifier: Apache-2.0
"""The local store's files: OTLP-JSON lines, the OpenTelemetry Collector's own file format.

A line is one batch, handed to the system in one piece: a killed process loses what it had not
handed over, and may leave its last line unfinished. The SDK's ``FileSpanExporter`` neither rotates
nor says why it failed, and after a full disk it writes, later, what it reported as lost.
"""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Final

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from platformdirs import user_state_path

from traced_retry import semconv

FILE_BYTES: Final = 16 * 2**20
"""A file's size at most: some 10,000 replies, which a report reads in a second or two."""
TOTAL_BYTES: Final = 256 * 2**20
"""All files' size: some 150,000 replies, and little on a laptop's disk."""

_FULL: Final = ("ENOSPC", "EDQUOT", "EFBIG")
_STAMP: Final = "%Y%m%dT%H%M%S.%fZ"
_STAMP_GLOB: Final = f"{'[0-9]' * 8}T{'[0-9]' * 6}.{'[0-9]' * 6}Z"


def store_directory() -> Path:
    """The folder of the local stores; it need not exist yet."""
    return user_state_path("traced-retry", appauthor=False) / "spans"


def new_store(name: str) -> Path:
    """A path for a new local store: named after ``name``, the time in UTC and this process."""
    return store_directory() / f"{name}-{_now()}-{os.getpid()}.jsonl"


def latest_store() -> Path | None:
    """The local store that was written last, if there is any."""
    return next((path for path, _ in _newest_first(store_directory(), "*.jsonl")), None)


def _now() -> str:
    return datetime.now(UTC).strftime(_STAMP)


class StoreExporter(SpanExporter):
    """Appends spans to ``path``, which is this process's own.

    A file that would grow beyond ``file_bytes`` is renamed after the time, and a new one begun.
    Then, and when a store is opened, the oldest files are deleted until the others fit into
    ``total_bytes``: in :func:`store_directory` those of all stores, elsewhere those of this one.
    So disk use stays below ``total_bytes`` and one ``file_bytes`` per running process. A file that
    someone else deleted is begun anew; a forked process begins its own, named after its id.

    Its folder is made. Folder and file are the user's alone, for spans of others may hold what was
    said.

    Raises:
        OSError: the file cannot be opened.
    """

    reason: semconv.DropReason = "failed"
    """Why the last export failed: ``disk_full`` or ``failed``."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        file_bytes: int = FILE_BYTES,
        total_bytes: int = TOTAL_BYTES,
    ) -> None:
        self._path = Path(path)
        self._file_bytes = file_bytes
        self._total_bytes = total_bytes
        self._over = False
        self._open()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append a batch: the whole line, or nothing."""
        if self._over:
            return SpanExportResult.FAILURE
        line = json.dumps(encode_spans(spans).to_dict(), separators=(",", ":")).encode() + b"\n"
        try:
            self._ready(len(line))
            self._append(line)
        except OSError as error:
            full = errno.errorcode.get(error.errno or 0) in _FULL
            self.reason = "disk_full" if full else "failed"
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file; nothing is written any more."""
        self._over = True
        self._file.close()

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = FileIO(self._path, "a+", opener=_private)
        self._pid = os.getpid()
        size = os.fstat(self._file.fileno()).st_size
        if size:  # A line that a killed process left unfinished is not to spoil the next one.
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        self._prune()

    def _ready(self, more: int) -> None:
        """See that the file is there, is ours, and has room for ``more`` bytes."""
        if self._file.closed:  # It could not be opened the last time.
            self._open()
        state = os.fstat(self._file.fileno())
        forked = self._pid != os.getpid()
        grown = state.st_size > 0 and state.st_size + more > self._file_bytes
        if forked or state.st_nlink == 0 or grown:
            self._file.close()
            if forked:
                path = self._path
                self._path = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")
            elif grown and state.st_nlink:
                path = self._path
                path.rename(path.with_name(f"{path.stem}-{_now()}{path.suffix}"))
            self._open()

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            if len(rest) < len(line):  # The disk is full: take back what it took.
                self._file.truncate(size)
            raise

    def _prune(self) -> None:
        """Delete the oldest files, until the others fit."""
        path = self._path
        rotated = f"{glob.escape(path.stem)}-{_STAMP_GLOB}"
        ours = "*" if path.parent == store_directory() else rotated
        kept = 0
        for file, size in _newest_first(path.parent, f"{ours}{path.suffix}"):
            if file == path:
                continue
            kept += size
            if kept > self._total_bytes:
                try:
                    file.unlink(missing_ok=True)
                except OSError:  # Windows: a process has it open.
                    continue


def _newest_first(folder: Path, pattern: str) -> list[tuple[Path, int]]:
    """The files there and their sizes in bytes, the one written last first."""
    found = []
    for file in folder.glob(pattern):
        try:
            state = file.stat()
        except OSError:  # Another process deleted it just now.
            continue
        found.append((state.st_mtime_ns, file, state.st_size))
    return [(file, size) for _, file, size in sorted(found, reverse=True)]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
