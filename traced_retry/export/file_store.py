# SPDX-License-Identifier: Apache-2.0
"""Write the local store: OTLP-JSON lines, the OpenTelemetry Collector's own file format.

A line is one batch, and each batch is one write. A killed process loses the batches that it had not
written, and may leave an incomplete last line. The SDK's ``FileSpanExporter`` does not fit: it does
not rotate, reports no reason for a failure, and after a full disk it writes spans that it had
reported as failed.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import stat
from collections.abc import Sequence
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Final

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from platformdirs import user_state_path

from traced_retry import semconv
from traced_retry.core.sanitize import file_name
from traced_retry.export.processor import BoundedSpanProcessor

FILE_BYTES: Final = 16 * 2**20
"""The largest size of a file: some 4,000 replies with LiveKit's spans."""
TOTAL_BYTES: Final = 256 * 2**20
"""The largest size of all files: some 60,000 replies, and little on a laptop's disk."""

_WITHIN: Final = 1.0
"""Seconds that the local store may take at exit."""
_DELAY: Final = 1.0
"""Longest wait of a span for its batch, in seconds. It is short because a write costs little and a
killed process loses its unwritten spans."""

_FULL: Final = ("ENOSPC", "EDQUOT", "EFBIG")
_STAMP: Final = "%Y%m%dT%H%M%S.%fZ"
_STAMP_GLOB: Final = f"{'[0-9]' * 8}T{'[0-9]' * 6}.{'[0-9]' * 6}Z"


def store_directory() -> Path:
    """Return the folder of the local stores, which may not exist yet."""
    return user_state_path("traced-retry", appauthor=False) / "spans"


def new_store(name: str) -> Path:
    """Return a path for a new local store, made of ``name``, the time in UTC and the process id.

    The file is directly inside :func:`store_directory`, whatever characters ``name`` has.
    """
    return store_directory() / f"{file_name(name)}-{_now()}-{os.getpid()}.jsonl"


def latest_store() -> Path | None:
    """Return the local store that was written last, if one exists."""
    return next((path for path, _ in _newest_first(store_directory(), "*.jsonl")), None)


def _now() -> str:
    return datetime.now(UTC).strftime(_STAMP)


class StoreExporter(SpanExporter):
    """Exporter that appends spans to the file ``path``, which only this process writes.

    Before a file exceeds ``file_bytes``, it is renamed after the time, and a new file is started.
    Then, and when a store is opened, the oldest files are deleted until the others fit into
    ``total_bytes``. This applies to the files of all stores in :func:`store_directory`, and to the
    files of this store elsewhere. Disk use thus stays below ``total_bytes`` plus one
    ``file_bytes`` per running process. A deleted file is created again. A forked process starts its
    own file, named after its process id.

    The folder is created if necessary. Only the user can read folder and file, because spans of
    other libraries may hold spoken text.

    Raises:
        OSError: if the file cannot be opened.
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
        """Append a batch as one whole line, or fail without a trace of it."""
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
        """Close the file. Later exports fail."""
        self._over = True
        self._file.close()

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = FileIO(self._path, "a+", opener=_private)
        self._pid = os.getpid()
        size = os.fstat(self._file.fileno()).st_size
        if size:  # End a line that a killed process left incomplete.
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        self._prune()

    def _ready(self, more: int) -> None:
        """Ensure that the file exists, is ours, and has room for ``more`` bytes."""
        if self._file.closed:  # The last attempt to open it failed.
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
            if len(rest) < len(line):  # The disk is full: remove the part of the line that it took.
                self._file.truncate(size)
            raise

    def _prune(self) -> None:
        """Delete the oldest files until the others fit."""
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


def store_processor(
    exporter: StoreExporter, meter_provider: MeterProvider | None = None
) -> BoundedSpanProcessor:
    """Return a processor for a local store. Count drops with ``meter_provider``, else globally."""
    return BoundedSpanProcessor(
        exporter, "local_store", meter_provider=meter_provider, within=_WITHIN, delay=_DELAY
    )


def _newest_first(folder: Path, pattern: str) -> list[tuple[Path, int]]:
    """Return the files and their sizes in bytes, in order of their last write, newest first."""
    found = []
    for file in folder.glob(pattern):
        try:
            state = file.stat()
        except OSError:  # Another process deleted it just now.
            continue
        if stat.S_ISREG(state.st_mode):
            found.append((state.st_mtime_ns, file, state.st_size))
    return [(file, size) for _, file, size in sorted(found, reverse=True)]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
