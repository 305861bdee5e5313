# SPDX-License-Identifier: Apache-2.0
"""Turn the stored replies of an incident into a fault script.

Each request that was sent becomes one element of the script: its answer, or its fault. A span has
no content, so the script has no content either. A request that the caller interrupted, or that
ended with its session, is not answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from traced_retry.errors import UsageError
from traced_retry.report import Attempt, Reply
from traced_retry.simulator import Fault, Script, simulator

SIMULATOR_OF: Final = {
    "openai": "openai",
    "livekit": "openai",
    "x_ai": "xai",
    "azure.ai.openai": "azure-openai",
    "azure_voicelive": "azure-voicelive",
    "gcp.gemini": "google",
    "ultravox": "ultravox",
    "phonic": "phonic",
    "aws.bedrock": "aws",
}
"""The simulator of each ``gen_ai.provider.name``, except for GPT-Live."""

_SLOW: Final = 0.2
"""Seconds. A faster answer comes at once in the script."""
_BY_TYPE: Final = {
    "timeout": "silence",
    "connection_lost": "drop_before",
    "active_response": "active",
    "conversation_already_has_active_response": "active",
    "empty_response": "empty",
}
"""The fault of a failed attempt, by its code or ``error.type``."""
_AFTER_OUTPUT: Final = {"connection_lost": "drop_during", "timeout": "drop_during"}


def incident_script(replies: Iterable[Reply]) -> Script:
    """Return the script that makes a simulator repeat the provider's faults.

    Args:
        replies: the replies of one session, in the order of their start.

    Raises:
        UsageError: if there are no requests, or if the replies are of several providers or of one
            without a simulator.
    """
    asked = [reply for reply in replies if not reply.say]
    known = simulator(simulator_name(asked)).faults
    faults: list[Fault] = []
    turns: list[Fault] = []
    for reply in asked:
        of_reply = list(_faults(reply, known))
        if reply.initiator == "provider":
            turns += [_of_turn(f, known) for f in of_reply[:1]]  # Further attempts are requests.
            of_reply = of_reply[1:]
        faults += of_reply
    if not faults and not turns:
        raise UsageError("no request was sent: there is no attempt in the spans")
    ok = (Fault("ok"),)
    return Script(tuple(faults) or ok, tuple(turns) or ok)


def simulator_name(replies: Iterable[Reply]) -> str:
    """Return the name of the simulator that can repeat the faults of these replies.

    Raises:
        UsageError: if the replies are of several providers or of one without a simulator.
    """
    asked = [reply for reply in replies if not reply.say]
    providers = sorted({reply.provider for reply in asked})
    if len(providers) != 1:
        found = ", ".join(providers) or "no replies"
        raise UsageError(f"a script is for one provider, and there are {found}: give a trace id")
    if providers[0] not in SIMULATOR_OF:
        raise UsageError(f"provider {providers[0]!r} has no simulator")
    is_duplex = any("gpt-live" in (reply.model or "") for reply in asked)
    return "gpt-live" if is_duplex else SIMULATOR_OF[providers[0]]


def _of_turn(fault: Fault, known: frozenset[str]) -> Fault:
    """Return the fault of a turn. It has no request to reject, so a response fails."""
    failed = fault.name == "error" and "failed" in known
    return Fault("failed", fault.argument) if failed else fault


def _faults(reply: Reply, known: frozenset[str]) -> Iterator[Fault]:
    """Yield the fault of each request of a reply. A listen sends no request."""
    requests: list[list[Attempt]] = []
    for attempt in reply.attempts:
        if attempt.action == "listen" and requests:
            requests[-1].append(attempt)
        else:
            requests.append([attempt])
    for attempts in requests:
        final = reply.stop_reason == "output_started" and attempts[-1] is reply.attempts[-1]
        yield _fault(attempts, known, after_output=final)


def _fault(attempts: list[Attempt], known: frozenset[str], *, after_output: bool) -> Fault:
    last = attempts[-1]
    if last.result == "succeeded":
        seconds = last.end - attempts[0].start
        return Fault("late", f"{seconds:.3f}") if seconds >= _SLOW else Fault("ok")
    if last.result != "failed":
        return Fault("silence")
    code = last.code or "server_error"
    kind = code if code in _BY_TYPE else last.error_type or code
    if after_output:
        name = _AFTER_OUTPUT.get(kind, "failed_during")
    elif kind in ("rate_limit", "rate_limit_exceeded"):
        name = "rate_limit"
    else:
        name = _BY_TYPE.get(kind, "error")
    if name not in known:
        name = "drop_during" if after_output else "drop_before"
    arguments = {
        "failed_during": code,
        "error": code,
        "active": f"{max(last.next_delay or 0.0, _SLOW):.3f}",
    }
    return Fault(name, arguments.get(name, ""))
