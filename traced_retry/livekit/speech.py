# SPDX-License-Identifier: Apache-2.0
"""The ``SpeechHandle`` that requests a reply.

A reply that fails after the agent got its generation can no longer fail its future. LiveKit's own
pipeline then stores the error on the speech, and ``SpeechHandle.exception()`` returns it. This
module does the same. The future cannot be cancelled then either. LiveKit interrupts the session
instead, but 1.7.0 does not if only a speech is interrupted.

Private facts (livekit-agents 1.7.0 and 1.8.9): ``voice/agent.py`` keeps the speech of a task under
``_get_activity_task_info(task).speech_handle``, with ``function_call`` set in a tool's task.
``SpeechHandle._error`` is what ``exception()`` returns, ``_interrupt_fut`` is done once it is
interrupted. ``SpeechHandle._tasks`` are the tasks of a speech. ``AgentActivity._speech_tasks`` are
those of all speeches. The task ``AgentActivity.realtime_reply`` requests a reply, after it has sent
the chat context. ``RealtimeSession._events`` holds the listeners, and ``AgentActivity`` listens to
``error``. ``AgentSession._closing_task`` is set once the session closes.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from livekit.agents import AgentSession, llm

from traced_retry.core.guard import log_once, suppress_and_log

_WATCHERS = "_traced_retry_watchers"
_REPLY_TASK = "AgentActivity.realtime_reply"
_SOON = 0.1
"""The time in seconds that an interrupted speech normally needs to end."""
_requested: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
_failed: weakref.WeakKeyDictionary[Any, BaseException] = weakref.WeakKeyDictionary()

try:
    from livekit.agents.voice.agent import _get_activity_task_info
except ImportError:  # it has moved
    _get_activity_task_info = None  # type: ignore[assignment]


class Watcher(Protocol):
    """The receiver of an agent session's shutdown."""

    def drain(self) -> None:
        """Note that the agent session ends after its pending speeches."""


def current_speech() -> Any:
    """Return the speech of the current task, or None outside of a speech and in a tool."""
    with suppress_and_log("looking for the speech"):
        task = asyncio.current_task()
        if task is None or _get_activity_task_info is None:
            return None
        info = _get_activity_task_info(task)
        if info is not None and info.function_call is None:
            return info.speech_handle
    return None


def when_interrupted(speech: Any, callback: Callable[[], None]) -> Callable[[], None]:
    """Call back as soon as ``speech`` is interrupted, but not if it already was.

    Return a function that removes the callback, because an ``AgentSession`` keeps each speech.
    """
    interrupted: asyncio.Future[None] | None = getattr(speech, "_interrupt_fut", None)
    if interrupted is None:
        log_once("SpeechHandle has no _interrupt_fut any more: its interruption may be seen late")
        return lambda: None

    def call(_: asyncio.Future[None]) -> None:
        callback()

    if not interrupted.done():
        interrupted.add_done_callback(call)

    def forget() -> None:
        interrupted.remove_done_callback(call)

    return forget


def agent_activity(session: llm.RealtimeSession[Any]) -> Any:
    """Return LiveKit's ``AgentActivity`` that uses this realtime session, or None.

    It listens to the session's errors, or to those of a session that falls back to other models.
    """
    for listener in getattr(session, "_events", {}).get("error", ()):
        owner = getattr(listener, "__self__", None)
        if hasattr(owner, "_speech_tasks"):
            return owner
        if isinstance(owner, llm.RealtimeSession) and owner is not session:
            return agent_activity(owner)
    return None


def watch_shutdown(agent_session: AgentSession[Any], watcher: Watcher) -> None:
    """Make ``agent_session.shutdown(drain=True)`` call ``watcher.drain()``.

    LiveKit has no event for it. The watcher is referred to weakly.
    """
    watchers = getattr(agent_session, _WATCHERS, None)
    if watchers is None:
        watchers = weakref.WeakSet()
        setattr(agent_session, _WATCHERS, watchers)
        original = agent_session.shutdown

        @functools.wraps(original)
        def shutdown(*, drain: bool = True) -> None:
            for one in list(watchers) if drain else ():
                with suppress_and_log("shutting an agent session down"):
                    one.drain()
            original(drain=drain)

        agent_session.shutdown = shutdown  # type: ignore[method-assign]
    watchers.add(watcher)


def is_closing(agent_session: AgentSession[Any]) -> bool:
    """Return whether LiveKit has begun to close the agent session."""
    return getattr(agent_session, "_closing_task", None) is not None


def pending_speeches(activity: Any) -> list[Any]:
    """Return the speeches with a reply that LiveKit has scheduled and not yet requested."""
    if _get_activity_task_info is None:
        return []
    waiting = [
        info.speech_handle
        for task in activity._speech_tasks
        if task.get_name() == _REPLY_TASK and not task.done() and task not in _requested
        if (info := _get_activity_task_info(task)) is not None
    ]
    return [one for one in waiting if one is not None and not one.interrupted]


def fail_speech(speech: Any, error: BaseException) -> None:
    """End ``speech`` with ``error`` before it has requested its reply.

    LiveKit also interrupts it, without an error, and waits up to 5 s for a chat context that no
    server acknowledges.
    """
    _failed[speech] = error
    record_error(speech, error)
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: speech.interrupt(force=True))
    loop.call_later(_SOON, lambda: [task.cancel() for task in getattr(speech, "_tasks", ())])


def note_request() -> BaseException | None:
    """Note that the current task requests its reply, and return the error of a speech that failed.

    A failed speech may go on for 0.1 s.
    """
    if (task := asyncio.current_task()) is not None:
        _requested.add(task)
    speech = current_speech()
    return None if speech is None else _failed.get(speech)


def record_error(speech: Any, error: BaseException) -> None:
    """Store ``error``, so that ``speech.exception()`` returns it."""
    if not hasattr(speech, "_error"):
        log_once("SpeechHandle has no _error any more: a reply that failed late is not told there")
    elif speech._error is None:
        speech._error = error
