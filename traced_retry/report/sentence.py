# SPDX-License-Identifier: Apache-2.0
"""Describe a reply in one plain sentence, and an attempt in a few words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

from traced_retry import semconv
from traced_retry.core.failure import CODES, KNOWN_ERROR_TYPES, RECOVERABLE
from traced_retry.report.model import Attempt, Group, Reply, Wait
from traced_retry.report.summary import Summary

_TIMES: Final = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_LATE: Final = 0.1
"""Seconds. A wait that grew by less is not reported."""
_WHY: Final = {
    "max_attempts": "no attempts left",
    "deadline": "deadline",
    "budget": "retry budget spent",
    "circuit_open": "the provider failed for all calls of the machine",
}
"""Texts for the limits that can end a reply."""


def sentence(reply: Reply) -> str:
    """Describe the course of ``reply``, so that a tired person understands."""
    if not reply.complete:
        return _incomplete(reply)
    say = _BY_STOP_REASON.get(reply.stop_reason or "") or _BY_OUTCOME.get(reply.outcome or "")
    return say(reply) if say else f"Ended as {reply.outcome} {_after(reply)}{_colon(reply)}."


def note(step: Attempt | Wait) -> str:
    """Describe the end of an attempt and the decision, or a wait longer than planned."""
    if isinstance(step, Wait):
        grew = step.planned is not None and step.seconds - step.planned >= _LATE
        return f"{step.planned:.2f} s planned" if grew else ""
    if step.code is not None:
        return f"{step.code} -> {step.decision}" if step.decision else step.code
    heard = {"succeeded": "heard", None: "no end stored"}
    return heard.get(step.result, step.result or "")


def overview(summary: Summary, *, shown: int | None = None, unreadable_lines: int = 0) -> str:
    """Count the replies, the ``say`` calls and the unreadable lines, and give the period.

    Args:
        summary: the numbers of all replies.
        shown: the number of replies above, if only the newest are shown.
        unreadable_lines: the number of lines that could not be read.
    """
    if not summary.replies:
        return "No replies."
    asked = _count(summary.replies - summary.said.total(), "reply", "replies")
    text = f"{asked}, {when(summary.began)} to {when(summary.ended)} UTC."
    if summary.said:
        text += f" {_said(summary.said)}"
    if shown is not None and shown < summary.replies:
        text += f" Shown: the newest {shown}." if shown else " Shown: the summary."
    if unreadable_lines:
        lines = _count(unreadable_lines, "torn line", "torn lines")
        text += f" {lines} left out: a process was killed."
    return text


def when(at: float) -> str:
    """Return Unix seconds ``at`` as date and time, UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def seconds(value: float) -> str:
    """Return ``value`` seconds as text, rounded for reading."""
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"


def _said(groups: Mapping[Group, int]) -> str:
    """Return a summary such as ``say: 12 spoken, 1 failed.``."""
    words: tuple[tuple[Group, str], ...] = (
        ("first_try", "spoken"),
        ("recovered", "recovered"),
        ("failed", "failed"),
        ("cut_short", "cut short"),
        ("unknown", "unknown"),
    )
    counts = [
        f"{groups.get(group, 0)} {word}"
        for group, word in words
        if groups.get(group) or group == "first_try"
    ]
    return f"say: {', '.join(counts)}."


# --- by outcome -----------------------------------------------------------------------------


def _succeeded(reply: Reply) -> str:
    return f"Heard at the first try after {seconds(reply.seconds)}."


_HOW: Final = {"restart": " in a new session", "hedge": " with a second request"}
"""Texts for the actions of a last attempt that say more than that it was another one."""


def _recovered(reply: Reply) -> str:
    why = _list(reply.codes)
    why = f": {why}" if why else ""
    if {a.action for a in reply.attempts[1:]} == {"listen"}:
        return f"Heard late, {_after(reply)}, without asking again{why}."
    how = _HOW.get(reply.last.action or "", "") if reply.last else ""
    spent = f"{_count(reply.retries, 'retry', 'retries')} and {seconds(reply.seconds)}"
    return f"Heard{how} after {spent}{why}."


def _exhausted(reply: Reply) -> str:
    why = _WHY.get(reply.stop_reason or "", reply.stop_reason or "no reason stored")
    return f"Lost {_after(reply, attempts=True)} ({why}){_colon(reply)}."


def _circuit_open(reply: Reply) -> str:
    if reply.attempt_count:
        return _exhausted(reply)
    return f"Not sent, because {_WHY['circuit_open']}."


def _unsafe(reply: Reply) -> str:
    after = _after(reply, attempts=reply.retries > 0)
    return f"Lost {after}{_colon(reply)}; asking again might be heard twice."


def _output_started(reply: Reply) -> str:
    return f"Cut off {_after(reply)}, when part of it was already heard{_colon(reply)}."


def _not_recoverable(reply: Reply) -> str:
    error_type = reply.last.error_type if reply.last else reply.error_type
    verdict = _verdict(error_type or semconv.OTHER)
    if reply.retries == 0:
        return f"Not retried: {_list(reply.codes) or reply.error_type or 'it'} {verdict}."
    return f"Lost {_after(reply, attempts=True)}{_colon(reply)}, which {verdict}."


def _verdict(error_type: str) -> str:
    if error_type not in KNOWN_ERROR_TYPES:  # the class of an exception
        return "is a mistake in the code"
    kind = CODES.get(error_type, error_type)
    if RECOVERABLE.get(kind, True):  # type: ignore[call-overload]
        return "was declared final by the provider or the policy"
    return "cannot pass by itself"


def _session_closed(reply: Reply) -> str:
    return f"Lost {_after(reply, attempts=reply.retries > 0)}: the session was closed."


def _interrupted(reply: Reply) -> str:
    at = ""
    if reply.last is not None and reply.ended_in_wait:
        at = f", in the wait for {_nth(reply.attempt_count + 1)}"
    elif reply.attempt_count:
        at = f", in {_nth(reply.attempt_count)}"
    return f"Interrupted by the caller {_after(reply)}{at}."


def _superseded(reply: Reply) -> str:
    return f"Dropped by the provider for a newer request {_after(reply)}."


def _incomplete(reply: Reply) -> str:
    seen = _count(len(reply.attempts), "attempt", "attempts")
    why = _list(reply.codes)
    why = f", failed by {why}" if why else ""
    return f"Its end is not stored (process killed, or span not kept); {seen}{why}."


_BY_STOP_REASON: Final[dict[str, Callable[[Reply], str]]] = {
    "max_attempts": _exhausted,
    "deadline": _exhausted,
    "budget": _exhausted,
    "circuit_open": _circuit_open,
    "unsafe_to_resend": _unsafe,
    "output_started": _output_started,
    "not_recoverable": _not_recoverable,
    "session_closed": _session_closed,
    "interrupted": _interrupted,
    "superseded": _superseded,
}
_BY_OUTCOME: Final[dict[str, Callable[[Reply], str]]] = {
    "succeeded": _succeeded,
    "recovered": _recovered,
    "exhausted": _exhausted,
    "not_recoverable": _not_recoverable,
    "interrupted": _interrupted,
    "superseded": _superseded,
}


# --- parts ----------------------------------------------------------------------------------


def _after(reply: Reply, *, attempts: bool = False) -> str:
    tried = f"{_count(reply.attempt_count, 'attempt', 'attempts')} and " if attempts else ""
    return f"after {tried}{seconds(reply.seconds)}"


def _colon(reply: Reply) -> str:
    """Return the cause of a failure after a colon, or an empty text if it is unknown."""
    if set(reply.codes) == {"timeout"}:
        return ": no answer"
    text = _list(reply.codes) or reply.error_type
    return f": {text}" if text else ""


def _list(codes: Iterable[str]) -> str:
    """``rate_limit_exceeded twice, then timeout``."""
    runs = [(code, len(list(same))) for code, same in itertools.groupby(codes)]
    return ", then ".join(code + _repeated(times) for code, times in runs)


def _repeated(times: int) -> str:
    return {1: "", 2: " twice"}.get(times, f" {times} times")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _nth(number: int) -> str:
    in_words = 0 < number < len(_TIMES)
    return f"the {_TIMES[number]} attempt" if in_words else f"attempt {number}"
