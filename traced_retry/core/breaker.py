# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker that the processes of one machine share: :class:`Circuit`.

If a provider fails for every call, each new caller would wait for the whole deadline although other
processes know better. The processes therefore share a few words of a memory-mapped file. There is
no server and no thread.

The circuit of a provider, model and server opens after :data:`FAILURES` failed attempts in a row
that cover :data:`SPAN` and come from at least two processes. Any success closes it. While it is
open, one new reply per :data:`INTERVAL` is sent as a probe, and every other one fails at once.

The usual rules (5 failures in a row, or half of the requests) turn a provider that fails half of
its requests into an outage: the retries would have won most of those replies. ``make bench``
simulates both. One process alone never opens the circuit, because its own connection may be the
cause.

Each value is one aligned 8-byte word, and one store writes it. A process that is killed or stopped
between two stores leaves a valid state, and every state expires by time:

* Success is a time. Failures that began earlier do not count.
* The failures in a row are one word. Two processes that count at once may lose one count.
* The open state is the time of the next probe. If its process dies, the next probe is due one
  interval later. A time that is far away belongs to another boot, or to an outage long ago, and
  is ignored.

Only the choice of the prober takes a lock, and does not wait for it. If a stopped process holds the
lock, the others choose without it after :data:`_LOCK_LEASE`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import stat
import tempfile
import threading
from pathlib import Path
from typing import Final

from traced_retry.core.failure import Failure, Kind
from traced_retry.core.guard import log_once, log_suppressed, logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AUTO: Final = "auto"
"""The setting for one file per user and machine."""

FAILURES: Final = 30
"""Failed attempts in a row. If 70 % of the attempts fail, 30 in a row have a chance of 0.002 %."""
SPAN: Final = 8.0
"""Seconds from the start of the first of these attempts to the end of the last one. A restart of a
provider's server or a lost network takes less."""
WINDOW: Final = 60.0
"""Seconds until a failure is too old to count."""
INTERVAL: Final = 4.0
"""Seconds between two probes. A probe needs up to 2 s for its first word, and all calls are to work
6 s after the provider does."""
COUNTED: Final[frozenset[Kind]] = frozenset(
    {"timeout", "connection_lost", "server_error", "overloaded"}
)
"""The failures that count. A rate limit, a quota, a key or an invalid request may concern one
customer or one request."""

_LOCK_LEASE: Final = 0.1
"""Seconds that a process may hold the lock. It needs some microseconds."""

_SLOTS: Final = 256
_KEY, _NEXT_PROBE, _SUCCESS, _RUN, _WORDS = range(5)
"""The words of a slot: the circuit's key, the time of the next probe in microseconds (0 if the
circuit is closed), the time of the last success in milliseconds, and the failures in a row."""
_MAGIC: Final = b"trbreak1"
"""The first 8 bytes of the file. The number is the version of the layout."""
_SIZE: Final = (_SLOTS + 1) * _WORDS * 8
"""Bytes of the file. Its first slot has only the magic number."""

_TIME_BITS, _COUNT_BITS, _PROCESS_BITS = 38, 9, 16
_MOST: Final = (1 << _COUNT_BITS) - 1

REFUSED: Final = "the provider fails for all processes: the circuit breaker is open"


class CircuitOpenError(ConnectionError):
    """The provider fails for all processes of this machine, so the request was not sent."""

    code = "circuit_open"


class Circuit:
    """The shared state of one provider, model and server.

    All times are seconds of the system's monotonic clock, which all processes share.
    """

    __slots__ = ("_at", "_busy", "_file", "_name", "_process", "_words")

    def __init__(self, file: _File, at: int, name: str) -> None:
        self._file = file
        self._words = file.words
        self._at = at
        self._name = name
        self._process = file.process
        self._busy = (0, 0)
        """The probe for which the lock was taken, and the time of that in microseconds."""

    def admits(self, now: float) -> bool:
        """Return whether a new reply may be sent: if the circuit is closed, or as the probe."""
        words, at = self._words, self._at
        next_probe, time = words[at + _NEXT_PROBE], _micros(now)
        if next_probe and _is_current(time - next_probe):
            return time >= next_probe and self._claim_probe(next_probe, time)
        if words[at + _RUN]:
            # If the provider is silent, all others may wait for it, so no failure opens the
            # circuit. This reply is then the first probe.
            self._open_if_down(now)
        return True

    def is_open(self, now: float) -> bool:
        """Return whether the circuit is open, and do not claim a probe."""
        next_probe = self._words[self._at + _NEXT_PROBE]
        return next_probe != 0 and _is_current(_micros(now) - next_probe)

    def succeed(self, now: float) -> None:
        """Record a reply's first output, and close the circuit."""
        words, at = self._words, self._at
        words[at + _SUCCESS] = _millis(now)
        if words[at + _NEXT_PROBE]:
            words[at + _NEXT_PROBE] = 0
            logger.info("%s answers again: the circuit breaker is closed", self._name)

    def fail(self, failure: Failure, began: float, now: float) -> None:
        """Record the failure of an attempt that began at ``began``, if it counts."""
        if failure.kind not in COUNTED:
            return
        words, at = self._words, self._at
        ends, success = _millis(now), self._last_success(now)
        starts = min(max(_millis(began), success), ends)
        first, count, several, process = _unpack(words[at + _RUN])
        if count and success <= first and 0 <= ends - first <= WINDOW * 1e3:
            starts = min(starts, first)
            several = several or process != self._process
        else:
            count, several = 0, False
        words[at + _RUN] = _pack(starts, min(count + 1, _MOST), several, self._process)
        if not self.is_open(now):
            self._open_if_down(now)

    def _open_if_down(self, now: float) -> None:
        """Open the circuit if the failures in a row are enough."""
        words, at = self._words, self._at
        seen, success = words[at + _SUCCESS], self._last_success(now)
        first, count, several, _ = _unpack(words[at + _RUN])
        milliseconds = _millis(now) - first
        if not several or count < FAILURES or success > first:
            return
        if not SPAN * 1e3 <= milliseconds <= WINDOW * 1e3:
            return
        words[at + _NEXT_PROBE] = _micros(now + INTERVAL)
        if words[at + _SUCCESS] != seen:  # Another process has succeeded since the count.
            words[at + _NEXT_PROBE] = 0
            return
        logger.warning(
            "%s failed %s times in a row in %.1f s for all processes: the circuit breaker is open, "
            "and new replies fail at once until a probe is answered",
            self._name,
            f"{count} or more" if count == _MOST else count,
            milliseconds / 1e3,
        )

    def _last_success(self, now: float) -> int:
        """Return the time of the last success in milliseconds, or 0 if it is of another boot."""
        success = self._words[self._at + _SUCCESS]
        return success if success <= _millis(now) else 0

    def _claim_probe(self, due: int, now: int) -> bool:
        """Return whether this process may send the probe that is due."""
        locked = self._file.try_lock()
        if not locked:
            if self._busy[0] != due:
                self._busy = due, now
            if now - self._busy[1] < _LOCK_LEASE * 1e6:
                return False  # Another process claims the probe now.
        try:
            next_probe = self._words[self._at + _NEXT_PROBE]
            if next_probe == due:
                self._words[self._at + _NEXT_PROBE] = now + int(INTERVAL * 1e6)
            return next_probe in (due, 0)
        finally:
            if locked:
                self._file.unlock()


class _File:
    """The mapped file."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(path, flags, 0o600)
        try:
            found = os.fstat(self.descriptor)
            _check_owner(found, path)
            _check_magic(self.descriptor, found, path)
            # Write all bytes, because a store into a hole kills the process if the disk is full.
            # Two processes that create the file at once may lose a count.
            blank = _MAGIC.ljust(_SIZE, b"\0")[found.st_size :]
            os.pwrite(self.descriptor, blank, found.st_size)
            self._map = mmap.mmap(self.descriptor, _SIZE)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.words = memoryview(self._map).cast("Q")
        self.process = secrets.randbits(_PROCESS_BITS)
        """A number for this process. Two containers may use the same process ids."""
        self._threads = threading.Lock()

    def slot(self, key: int) -> int | None:
        """Return the position of the circuit's first word, or None if the file is full.

        If two processes take the same empty slot at once for two keys, they share it.
        """
        for step in range(_SLOTS):
            at = ((key + step) % _SLOTS + 1) * _WORDS
            if self.words[at] == 0:
                self.words[at] = key
            if self.words[at] == key:
                return at
        return None

    def try_lock(self) -> bool:
        """Take the lock, and return False if it is taken."""
        # The file's lock does not exclude other threads of this process.
        if not self._threads.acquire(blocking=False):
            return False
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._threads.release()
            return False
        return True

    def unlock(self) -> None:
        """Release the lock."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        finally:
            self._threads.release()


_files: dict[str, _File | None] = {}
"""By setting. None if the file cannot be used."""
_circuits: dict[tuple[object, ...], Circuit | None] = {}
_opening = threading.Lock()


def circuit(setting: str, provider: str, *of: object) -> Circuit | None:
    """Return the circuit of a provider, or None if the file cannot be used.

    A failure is logged once, and replies are sent as without a breaker.

    Args:
        setting: :data:`AUTO`, or the path of the file.
        provider: ``gen_ai.provider.name`` of the telemetry.
        *of: further parts that have a circuit of their own: the model and the server.
    """
    key = (setting, provider, *of)
    if key not in _circuits:
        with _opening:
            _circuits[key] = _make(setting, provider, *of)
    return _circuits[key]


def is_usable(setting: str) -> bool:
    """Return whether the file of ``setting`` can be used. The reason is logged if not."""
    return _open(setting) is not None


def _make(setting: str, provider: str, *of: object) -> Circuit | None:
    file = _open(setting)
    if file is None:
        return None
    at = file.slot(_digest(provider, *of))
    if at is None:
        log_once("the circuit breaker's file has no free slot; further providers have no breaker")
        return None
    return Circuit(file, at, provider)


def _open(setting: str) -> _File | None:
    """Return the open file of ``setting``, or None if it cannot be used."""
    if setting not in _files:
        _files[setting] = None
        if fcntl is None:
            log_once("the circuit breaker needs flock, which this system lacks; it stays off")
            return None
        try:
            _files[setting] = _File(_default_path() if setting == AUTO else Path(setting))
        except (OSError, ValueError) as error:
            log_suppressed("opening the circuit breaker's file", error)
    return _files[setting]


def _digest(*parts: object) -> int:
    """Return 8 bytes that differ for each provider, model and server, and are never 0."""
    text = "\0".join(map(str, parts)).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") or 1


def _default_path() -> Path:
    """Return the path of the file of this user and machine, in memory if the system has that."""
    runtime, user = os.environ.get("XDG_RUNTIME_DIR", ""), os.getuid()
    places = (Path(runtime), Path("/dev/shm"), Path(tempfile.gettempdir()))  # noqa: S108 - 0700 below
    base = next(p for p in places if p is places[-1] or (p.is_absolute() and os.access(p, os.W_OK)))
    folder = base / f"traced-retry-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    _check_owner(found, folder)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(folder)
    return folder / "breaker"


def _check_owner(found: os.stat_result, path: Path) -> None:
    """Check that only this user may write.

    Raises:
        PermissionError: if another user may.
    """
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(path)


def _check_magic(descriptor: int, found: os.stat_result, path: Path) -> None:
    """Check that the file is empty or a breaker's, so that no other file is overwritten.

    Raises:
        FileExistsError: if it is not.
    """
    if found.st_size and os.pread(descriptor, len(_MAGIC), 0) != _MAGIC:
        raise FileExistsError(path)


def _micros(seconds: float) -> int:
    return max(int(seconds * 1e6), 0)


def _millis(seconds: float) -> int:
    return max(int(seconds * 1e3), 0)


def _is_current(late: int) -> bool:
    """Return whether an open state is valid ``late`` microseconds after its probe was due."""
    return -(INTERVAL + 1) * 1e6 <= late <= WINDOW * 1e6


def _pack(first: int, count: int, several: bool, process: int) -> int:
    """Return the failures in a row as one word: the first one's start, their number, and so on."""
    first &= (1 << _TIME_BITS) - 1
    return ((first << _COUNT_BITS | count) << 1 | several) << _PROCESS_BITS | process


def _unpack(word: int) -> tuple[int, int, bool, int]:
    rest, process = word >> _PROCESS_BITS, word & ((1 << _PROCESS_BITS) - 1)
    return rest >> (_COUNT_BITS + 1), rest >> 1 & _MOST, bool(rest & 1), process


def forget() -> None:
    """Close all files. They are opened again at the next use.

    A forked child does so, because its descriptors share the parent's locks.
    """
    global _opening  # noqa: PLW0603 - a thread of the parent may have held the lock
    _opening = threading.Lock()
    for file in _files.values():
        if file is not None:
            os.close(file.descriptor)
    _circuits.clear()
    _files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
