# SPDX-License-Identifier: Apache-2.0
"""The fault script: what a simulator does to each request, in order."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from traced_retry.errors import UsageError

_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}(/[A-Za-z0-9_.-]{1,64})?")


_TURN = "turn:"
"""The prefix of an element for a turn of the caller."""


class ScriptError(UsageError):
    """An invalid script. The message names the invalid element and lists the known ones."""


@dataclass(frozen=True)
class FaultKind:
    """The argument of a fault and its effect.

    Attributes:
        argument: ``SECONDS``, ``CODE`` or ``NAME``; "" for a fault that takes no argument.
        meaning: a few words for an error message or ``--help``.
        default: the argument if the script has none. None means required, "" means optional.
    """

    argument: str
    meaning: str
    default: str | None = None

    def usage(self, name: str) -> str:
        """Return the element as help shows it: ``late:SECONDS``, ``active[:SECONDS]``, ``ok``."""
        if not self.argument:
            return name
        return f"{name}:{self.argument}" if self.default is None else f"{name}[:{self.argument}]"


FAULTS: dict[str, FaultKind] = {
    "ok": FaultKind("", 'answers with the text "reply N", N counting requests'),
    "error": FaultKind("CODE", "rejects the request with that error code, or with TYPE/CODE"),
    "uncorrelated": FaultKind("", "sends a server error that names no request, and no answer"),
    "rate_limit": FaultKind("SECONDS", "rejects as rate limited, naming a wait if given", ""),
    "quota": FaultKind("", "rejects for lack of quota and closes the connection"),
    "unauthorized": FaultKind("", "refuses the next connection attempt with HTTP 401"),
    "silence": FaultKind("", "never answers the request"),
    "late": FaultKind("SECONDS", "answers, but only after that long"),
    "drop_before": FaultKind("", "closes the connection upon the request"),
    "drop_during": FaultKind("", "closes the connection in the middle of the answer"),
    "drop_queued": FaultKind(
        "SECONDS", "closes the connection before the request, and refuses new ones so long", "1"
    ),
    "active": FaultKind(
        "SECONDS", "rejects: a response of the server's own is active, for so long", "1"
    ),
    "failed": FaultKind("CODE", "begins a response that fails with that code", "server_error"),
    "failed_later": FaultKind("CODE", "the same, a tenth of a second later", "server_error"),
    "failed_message": FaultKind(
        "CODE", "the same, with a message begun that holds no word", "server_error"
    ),
    "failed_during": FaultKind("CODE", "the same, after the first words", "server_error"),
    "failed_tool": FaultKind("NAME", "calls that function, and fails a tenth of a second later"),
    "stalled": FaultKind("SECONDS", "begins a response, and speaks after that long or never", ""),
    "empty": FaultKind("", "completes a response that holds neither words nor a tool call"),
    "unlabelled": FaultKind("SECONDS", "answers after that long, without the request's id", "0"),
    "incomplete": FaultKind("", "begins a response that a content filter ends"),
    "malformed": FaultKind("", "sends a text frame that is not JSON, and no answer"),
    "tool": FaultKind("NAME", 'answers with a call of that function, arguments "{}"'),
    "slow": FaultKind("SECONDS", "answers its first words at once, the rest after that long"),
}


def describe_faults(known: Collection[str] = tuple(FAULTS)) -> str:
    """Return one line for each known fault: its form in a script and its effect."""
    kinds = ((name, kind) for name, kind in FAULTS.items() if name in known)
    return "\n".join(f"  {kind.usage(name):<24}{kind.meaning}" for name, kind in kinds)


@dataclass(frozen=True)
class Fault:
    """One element of a script, with the default if the script has no argument."""

    name: str
    argument: str = ""

    @property
    def seconds(self) -> float:
        """Return the argument of a fault that takes SECONDS, or 0 if it was left out."""
        return float(self.argument or 0)

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}" if self.argument else self.name


@dataclass(frozen=True)
class Script:
    """Two lists of faults, neither of them empty. The last fault of each repeats for ever.

    Attributes:
        faults: those of requests, in order.
        turns: those of the caller's turns, which the server answers by itself, in order.
    """

    faults: tuple[Fault, ...]
    turns: tuple[Fault, ...] = (Fault("ok"),)

    @classmethod
    def parse(cls, text: str) -> Script:
        """Parse ``name[:argument]`` elements separated by commas: ``rate_limit,late:3,ok``.

        An element of the form ``turn:name[:argument]`` is the fault of a turn of the caller. If a
        script has only elements of one kind, those of the other kind are answered as ``ok``.

        Raises:
            ScriptError: if an element is empty or unknown, or its argument is missing or invalid.
        """
        faults: list[Fault] = []
        turns: list[Fault] = []
        for element in map(str.strip, text.split(",")):
            of_turn = element.startswith(_TURN)
            fault = _parse_element(element.removeprefix(_TURN))
            (turns if of_turn else faults).append(fault)
        ok = Fault("ok")
        return cls(tuple(faults) or (ok,), tuple(turns) or (ok,))

    def at(self, position: int) -> Fault:
        """Return the fault at a position counted from 0, or the last one past the end."""
        return self.faults[min(position, len(self.faults) - 1)]

    def turn_at(self, position: int) -> Fault:
        """Return the fault of the caller's turn at that position, counted from 0."""
        return self.turns[min(position, len(self.turns) - 1)]

    def check(self, known: frozenset[str], where: str) -> None:
        """Check that the simulator called ``where`` knows each fault.

        Raises:
            ScriptError: if it does not know one.
        """
        for fault in (*self.faults, *self.turns):
            if fault.name not in known:
                raise _error(f"{fault.name!r} means nothing to {where}", known)

    def __str__(self) -> str:
        ok = (Fault("ok"),)
        turns = [] if self.turns == ok else [f"{_TURN}{fault}" for fault in self.turns]
        faults = [] if turns and self.faults == ok else map(str, self.faults)
        return ",".join([*faults, *turns])


def _parse_element(element: str) -> Fault:
    name, colon, argument = element.partition(":")
    kind = FAULTS.get(name)
    if kind is None:
        raise _error(f"unknown fault {element!r}" if element else "empty element in the script")
    if not colon and kind.default is not None:
        argument = kind.default
    elif not _fits(kind.argument, argument):
        raise _error(f"bad element {element!r}: expected {kind.usage(name)}")
    return Fault(name, argument)


def _fits(expected: str, argument: str) -> bool:
    if expected == "SECONDS":
        try:
            seconds = float(argument)
        except ValueError:
            return False
        return math.isfinite(seconds) and seconds >= 0
    return _WORD.fullmatch(argument) is not None if expected else not argument


def _error(problem: str, known: Collection[str] = tuple(FAULTS)) -> ScriptError:
    elements = describe_faults(known)
    return ScriptError(f"{problem}\nknown elements, separated by commas:\n{elements}")
