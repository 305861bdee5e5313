# SPDX-License-Identifier: Apache-2.0
"""Run functions when a process first uses LiveKit, without importing LiveKit.

``opentelemetry-instrument`` loads us in every Python process below it, and most of these processes
are unrelated to LiveKit. A process uses LiveKit when its first job begins or when it creates its
first realtime session. An import of ``livekit.agents`` alone is no use: LiveKit's worker and its
fork server import it and run no job.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

from traced_retry.core.guard import suppress_and_log

_LIVEKIT: Final = "livekit.agents"

_waiting: list[Callable[[], None]] = []
_running = threading.RLock()
_watching = False


def at_first_use(action: Callable[[], None]) -> Callable[[], bool]:
    """Call ``action`` before the first job or realtime session.

    Return a function that cancels this, and returns whether the action was still waiting.

    A forked child inherits the actions that its parent has not run. If an action raises, this is
    logged once, and the job or session begins in any case.
    """
    global _watching  # noqa: PLW0603 - the finder and the classes exist once per process
    _waiting.append(action)
    if not _watching:
        _watching = True
        if is_imported():
            _watch_classes()
        else:
            sys.meta_path.insert(0, _Finder())

    def cancel() -> bool:
        waited = action in _waiting
        if waited:
            _waiting.remove(action)
        return waited

    return cancel


def is_imported() -> bool:
    """Return whether the program has imported LiveKit's agents."""
    return _LIVEKIT in sys.modules


class _Finder(MetaPathFinder):
    """A finder that watches for the import of LiveKit, and leaves the search to the others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LIVEKIT:
            return None
        for finder in sys.meta_path:
            search = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = search(name, path, target) if search else None
            if spec is not None:
                with suppress_and_log("watching the import of LiveKit"):
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        # A program may also look for the module without importing it.
        execute = loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            execute(module)
            with suppress_and_log("watching for LiveKit's first use"):
                _watch_classes()

        loader.exec_module = execute_and_watch


def _watch_classes() -> None:
    from livekit.agents import JobContext, llm  # noqa: PLC0415 - the program has imported it

    for cls in (JobContext, llm.RealtimeSession):
        _watch(cls)


def _watch(cls: Any) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        with _running:
            first = bool(_waiting)
            while _waiting:
                with suppress_and_log("starting with LiveKit"):
                    _waiting.pop(0)()
        # An action may have replaced this method, for example by the hook's.
        (cls.__init__ if first else original)(self, *args, **kwargs)

    cls.__init__ = __init__
