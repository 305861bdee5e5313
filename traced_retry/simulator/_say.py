# SPDX-License-Identifier: Apache-2.0
"""Scripted answers to ``say`` texts, which a simulator speaks unchanged."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from aiohttp import WSCloseCode

from traced_retry.simulator.script import Fault, Script


class SayScript:
    """A script for ``say`` texts, separate from the position in the script for replies.

    Args:
        script: a parsed script, or its text.
        known: the faults of this protocol.

    Raises:
        ScriptError: if the script is invalid.

    Attributes:
        heard: every text that the simulator was asked to speak, in order.
    """

    def __init__(self, script: Script | str, known: Collection[str]) -> None:
        self.script = Script.parse(script) if isinstance(script, str) else script
        self.script.check(frozenset(known), "say")
        self.heard: list[str] = []

    def take(self, text: str) -> Fault:
        """Return the script's next element for ``text``."""
        self.heard.append(text)
        return self.script.at(len(self.heard) - 1)


async def speak_scripted(connection: Any, text: str) -> Fault:
    """Play the next element on ``text``, and return it for elements of a single protocol."""
    fault: Fault = connection.server.say.take(text)
    connection.server.wake()
    match fault.name:
        case "ok":
            await connection.speak(text)
        case "late":
            connection.after(fault.seconds, partial(connection.speak, text))
        case "drop_before":
            await connection.hang_up(WSCloseCode.INTERNAL_ERROR, by_script=True)
    return fault
