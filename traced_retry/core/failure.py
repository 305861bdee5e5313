# SPDX-License-Identifier: Apache-2.0
"""One failed attempt: the provider's code, whether trying again can help, and when.

:func:`explain` holds the default table; a policy's ``classify`` may overrule it per failure.
"""

from __future__ import annotations

import asyncio
import copy
import math
import re
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Final, Literal, TypeVar

from traced_retry import semconv

T = TypeVar("T")

Kind = Literal[
    "timeout",
    "connection_lost",
    "server_error",
    "overloaded",
    "rate_limit",
    "active_response",
    "quota",
    "authentication",
    "invalid_request",
    "session_closed",
    "bug",
    "unknown",
]
"""What sort of failure it was. Bounded, so it may label a metric."""

RECOVERABLE: Final[dict[Kind, bool]] = {
    "timeout": True,
    "connection_lost": True,
    "server_error": True,
    "overloaded": True,
    "rate_limit": True,
    "active_response": True,
    "quota": False,
    "authentication": False,
    "invalid_request": False,
    "session_closed": False,
    "bug": False,
    "unknown": True,
}
"""Whether trying again can help, by kind. An unknown provider code is taken as recoverable:
most undocumented ones are passing faults, and the deadline bounds the price of being wrong."""

CODES: Final[dict[str, Kind]] = {
    # OpenAI Realtime and those who speak its protocol (xAI, Azure, LiveKit inference)
    "server_error": "server_error",
    "internal_error": "server_error",
    "internal_server_error": "server_error",
    "engine_overloaded": "overloaded",
    "server_overloaded": "overloaded",
    "overloaded_error": "overloaded",
    "service_unavailable": "overloaded",
    "rate_limit_exceeded": "rate_limit",
    "inference_rate_limit_exceeded": "rate_limit",
    "rate_limit_error": "rate_limit",
    "too_many_requests": "rate_limit",
    "conversation_already_has_active_response": "active_response",
    "insufficient_quota": "quota",
    "credit_balance_exhausted": "quota",
    "billing_hard_limit_reached": "quota",
    "invalid_api_key": "authentication",
    "account_deactivated": "authentication",
    "authentication_error": "authentication",
    "permission_denied": "authentication",
    "session_expired": "connection_lost",
    # Bedrock, on opening a stream
    "AccessDeniedException": "authentication",
    "ThrottlingException": "rate_limit",
    "ServiceQuotaExceededException": "quota",
    "ValidationException": "invalid_request",
    "ResourceNotFoundException": "invalid_request",
    # Google tells only the code of the WebSocket's close, or HTTP's
    "1000": "connection_lost",
    "1001": "connection_lost",
    "1006": "connection_lost",
    "1008": "connection_lost",
    "1011": "connection_lost",
    "429": "rate_limit",
    "503": "overloaded",
    "invalid_request_error": "invalid_request",
    "invalid_value": "invalid_request",
    "missing_required_parameter": "invalid_request",
    "unknown_parameter": "invalid_request",
    "model_not_found": "invalid_request",
    "content_filter": "invalid_request",
    "max_output_tokens": "invalid_request",
    "context_length_exceeded": "invalid_request",
}
"""Provider codes whose meaning is known. A known code is its own ``error.type``."""

KNOWN_ERROR_TYPES: Final = frozenset(CODES) | frozenset(RECOVERABLE) | {semconv.OTHER}

_STATUS: Final[dict[int, Kind]] = {
    400: "invalid_request",
    401: "authentication",
    402: "quota",
    403: "authentication",
    404: "invalid_request",
    408: "timeout",
    409: "active_response",
    422: "invalid_request",
    429: "rate_limit",
    503: "overloaded",
    529: "overloaded",
}

_CODE: Final = re.compile(r"[A-Za-z][\w.:/-]{0,99}|\d{3,5}")
_PASSING_BUILTINS: Final = (OSError, EOFError, TimeoutError, asyncio.TimeoutError)


@dataclass(frozen=True)
class Failure:
    """Why one attempt failed, and what that means for the next.

    ``error`` is the original exception; its text never leaves the process (it may hold
    instructions or an API key), so it is not part of the ``repr`` either.
    """

    error: BaseException = field(repr=False)
    kind: Kind
    recoverable: bool
    code: str | None = None
    """The provider's own code, exact."""
    retry_after: float | None = None
    """Seconds the provider asks to wait; a floor that jitter never undercuts."""
    ended_locally: bool = False
    """True where we ended the attempt ourselves (its time was up). The agent is then given the
    provider's last own error, if there was one."""

    @property
    def error_type(self) -> str:
        """Low-cardinality ``error.type``, the same on span and metric.

        A known provider code as it is; ``_OTHER`` for an unknown one; without a code the class
        of a programming error or the kind.
        """
        if self.code is not None:
            return self.code if self.code in CODES else semconv.OTHER
        if self.kind == "bug":
            return type(self.error).__name__
        return self.kind if self.kind != "unknown" else semconv.OTHER


def failure(
    error: BaseException,
    kind: Kind,
    *,
    code: str | None = None,
    retry_after: float | None = None,
    ended_locally: bool = False,
) -> Failure:
    """Make a :class:`Failure` of ``kind`` with that kind's default recoverability."""
    return Failure(error, kind, RECOVERABLE[kind], code, retry_after, ended_locally)


def explain(error: BaseException) -> Failure:
    """Classify an exception by its provider code, its HTTP status, or its class.

    Reads ``error.code`` (str), ``error.status_code`` or ``error.status`` (int),
    ``error.retry_after`` (seconds) and ``error.retryable`` (bool, as LiveKit's ``APIError``)
    where they exist. Never raises.
    """
    code = plain_code(_attribute(error, "code", str))
    status = _attribute(error, "status_code", int) or _attribute(error, "status", int)
    kind = _kind(error, code, status)
    recoverable = RECOVERABLE[kind] and _attribute(error, "retryable", bool) is not False
    return Failure(error, kind, recoverable, code, _retry_after(error))


def plain_code(code: str | None) -> str | None:
    """``code`` where it looks like one, ``_OTHER`` where it looks like text, None where empty.

    Codes go into telemetry as they are; text might hold what nobody should read there.
    """
    if not code:
        return None
    return code if _CODE.fullmatch(code) else semconv.OTHER


def kind_of_status(status: int) -> Kind:
    """What an HTTP status means; ``unknown`` below 400."""
    if status < HTTPStatus.BAD_REQUEST:
        return "unknown"
    client = status < HTTPStatus.INTERNAL_SERVER_ERROR
    return _STATUS.get(status, "invalid_request" if client else "server_error")


def _kind(error: BaseException, code: str | None, status: int | None) -> Kind:
    if code is not None:
        return CODES.get(code, "unknown")
    if status is not None and (kind := kind_of_status(status)) != "unknown":
        return kind
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return "timeout"
    if isinstance(error, (OSError, EOFError)):
        return "connection_lost"
    # Python's own classes (TypeError, KeyError, NotImplementedError, ...) tell of a mistake in
    # the code, which no second attempt mends; libraries' classes tell of the world.
    own = type(error).__module__ == "builtins" and type(error) is not Exception
    return "bug" if own and not isinstance(error, _PASSING_BUILTINS) else "unknown"


def _retry_after(error: BaseException) -> float | None:
    seconds = _attribute(error, "retry_after", object)
    if isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds >= 0:
        return float(seconds)
    return None


def _attribute(error: BaseException, name: str, kind: type[T]) -> T | None:
    try:
        value = getattr(error, name, None)
    except Exception:  # noqa: BLE001 - a property may do anything; aiohttp's `code` warns
        return None
    return value if isinstance(value, kind) else None


NOTE: Final = "traced_retry: "
"""The start of each note that we add to an exception."""


def copy_error(failure: Failure) -> Failure:
    """Return ``failure`` with a copy of its error, without our notes.

    The agent of another reply may hold the original, with the note of that reply.
    """
    try:
        copied = copy.copy(failure.error)
    except Exception:  # noqa: BLE001 - a provider's class may have an __init__ of its own
        return failure
    if notes := getattr(failure.error, "__notes__", None):  # The copy would share the list.
        copied.__notes__ = [note for note in notes if not note.startswith(NOTE)]
    return replace(failure, error=copied)
