# SPDX-License-Identifier: Apache-2.0
"""One failed attempt: the provider's code, whether trying again can help, and when.

:func:`explain` holds the default table. A policy's ``classify`` may overrule it per failure.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Final, Literal

from traced_retry import semconv

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
    "empty_response",
    "circuit_open",
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
    "empty_response": True,
    "circuit_open": True,
    "bug": False,
    "unknown": True,
}
"""Whether trying again can help, by kind. An unknown provider code is taken as recoverable:
most undocumented ones are passing faults, and the deadline bounds the price of being wrong."""

MAX_RETRY_AFTER: Final = 60.0
"""Seconds that a provider's ``retry_after`` is honored at most.

A provider has asked for "114h18m0s" because of a limit per minute. One such value must not silence
the rest of a call.
"""

CODES: Final[dict[str, Kind]] = {
    # OpenAI Realtime and those who speak its protocol (xAI, Azure, LiveKit inference)
    "server_error": "server_error",
    "internal_error": "server_error",
    "internal_server_error": "server_error",
    "engine_overloaded": "overloaded",
    "server_overloaded": "overloaded",
    "overloaded_error": "overloaded",
    "overloaded": "overloaded",
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
    "permission_error": "authentication",
    "not_found_error": "invalid_request",
    "session_expired": "connection_lost",
    # Bedrock, on opening a stream
    "AccessDeniedException": "authentication",
    "ThrottlingException": "rate_limit",
    "ServiceQuotaExceededException": "quota",
    "ValidationException": "invalid_request",
    "ResourceNotFoundException": "invalid_request",
    # Google reports only the code of the WebSocket's close, or HTTP's
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
"""Provider codes with a known meaning. A known code is its own ``error.type``."""

KNOWN_ERROR_TYPES: Final = frozenset(CODES) | frozenset(RECOVERABLE) | {semconv.OTHER}

_STATUS: Final[dict[int, Kind]] = {
    401: "authentication",
    402: "quota",
    403: "authentication",
    408: "timeout",
    409: "active_response",
    429: "rate_limit",
    503: "overloaded",
    529: "overloaded",
}

_CODE: Final = re.compile(r"[A-Za-z][\w.:/-]{0,99}|\d{3,5}")
_KEY: Final = re.compile(
    r"^(?i:sk|pk|rk|gsk|xai|ghp|hf)[-_]|^(?:eyJ|AIza|AKIA)|(?=[A-Za-z_]*\d)\w{24}"
)
"""Strings that look like an API key: a usual prefix, or 24 letters and digits in a row."""
_LARGEST_CODE: Final = 100_000
_LARGEST_STATUS: Final = 599
_STATUS_IN_CODE: Final = re.compile(r"(?<!\d)[45]\d\d(?!\d)")
_MESSAGES: Final[tuple[tuple[re.Pattern[str], Kind], ...]] = (
    (re.compile(r"(?i)already has an active response"), "active_response"),
    (re.compile(r"(?i)rate limit|too many requests"), "rate_limit"),
)
"""Messages that decide if there is no code."""
_UNIT: Final = r"(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|)(?![a-z])"
_WAIT: Final = re.compile(
    r"(?i)\b(?:try(?:ing)? again|retry(?:ing)?)[\s-]*(?:in|after)[:\s]*"
    rf"((?:\d++(?:\.\d++)?\s*{_UNIT}[\s,]*)+)"
)
_PART: Final = re.compile(rf"(?i)(\d++(?:\.\d++)?)\s*({_UNIT})")
_LONGEST_WAIT: Final = 1e9
"""Seconds. Python reads 400 digits as an infinite float."""
_PASSING_BUILTINS: Final = (OSError, EOFError)


@dataclass(frozen=True)
class Failure:
    """The reason why one attempt failed, and its meaning for the next attempt.

    A function for ``RetryPolicy.classify`` gets a failure, and may return a changed copy, made with
    ``dataclasses.replace``.

    Args:
        error: the original exception. Its text never leaves the process, because it may hold
            instructions or an API key, and is not part of the ``repr``.
        kind: the sort of failure, such as ``"timeout"``, ``"rate_limit"`` or ``"quota"``.
        recoverable: whether another attempt may follow.
        code: the provider's own code, exact, such as ``"rate_limit_exceeded"``. Default: None, if
            there is no code.
        retry_after: the least wait before the next attempt, in seconds. Jitter never goes below
            it. Default: None, if the provider named no wait.
        ended_locally: True if traced-retry ended the attempt, because its time was up. The agent
            then gets the provider's last own error, if there was one. Default: False.
    """

    error: BaseException = field(repr=False)
    kind: Kind
    recoverable: bool
    code: str | None = None
    retry_after: float | None = None
    ended_locally: bool = False

    @property
    def wait(self) -> float:
        """Seconds of :attr:`retry_after` that are honored: at most :data:`MAX_RETRY_AFTER`."""
        return min(self.retry_after or 0.0, MAX_RETRY_AFTER)

    @property
    def error_type(self) -> str:
        """The low-cardinality ``error.type``, the same on span and metric.

        A known provider code as it is. Otherwise the kind, or the class of a programming error.
        ``_OTHER`` for a code of unknown kind.
        """
        if self.code in CODES:
            return self.code
        if self.kind == "bug":
            return type(self.error.__cause__ or self.error).__name__
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
    """Classify an exception by its provider code, its HTTP status, its type or its class.

    Read ``error.code``, ``error.status_code`` or ``error.status`` (numbers or strings),
    ``error.type``, ``error.retry_after`` (seconds) and ``error.retryable`` (bool, as on LiveKit's
    ``APIError``), if they exist. Never raise.
    """
    code = plain_code(_attribute(error, "code"))
    status = _attribute(error, "status_code") or _attribute(error, "status")
    kind = kind_of(code, _attribute(error, "type"), status)
    if kind == "unknown" and code is None:
        kind = _kind_of_class(error)
    recoverable = RECOVERABLE[kind] and _attribute(error, "retryable") is not False
    return Failure(error, kind, recoverable, code, _retry_after(error))


def kind_of(
    code: object, type_: object = None, status: object = None, message: object = None
) -> Kind:
    """Classify a failure by the first of these that is known.

    1. the exact code,
    2. a status number: the status, or a number from 400 to 599 inside the code,
    3. the type,
    4. the message. It also decides between a rejected request and an active response, because
       OpenAI reports both with the type ``invalid_request_error``, and not always with a code.
    """
    code, type_ = plain_code(code), plain_code(type_)
    if code in CODES:
        return CODES[code]
    kind = _kind_of_number(status)
    if kind == "unknown" and code is not None and (number := _STATUS_IN_CODE.search(code)):
        kind = _kind_of_number(number[0])
    if kind == "unknown" and type_ is not None:
        kind = CODES.get(type_, "unknown")
    if kind in ("unknown", "invalid_request") and code is None and isinstance(message, str):
        kind = next((k for pattern, k in _MESSAGES if pattern.search(message)), kind)
    return kind


def plain_code(code: object) -> str | None:
    """Return ``code`` if it looks like an identifier, and ``_OTHER`` if it looks like free text.

    Return None if it is empty, or neither a string nor a number. Codes go into telemetry unchanged,
    and free text or a key must not be readable there.
    """
    if isinstance(code, int) and not isinstance(code, bool):
        return str(code) if 0 < code < _LARGEST_CODE else semconv.OTHER
    if not isinstance(code, str) or code.lower() in ("", "none", "null"):
        return None
    if _CODE.fullmatch(code) is None or _KEY.search(code):
        return semconv.OTHER
    return code


def kind_of_status(status: int) -> Kind:
    """Classify an HTTP status. Return ``unknown`` below 400."""
    if status < HTTPStatus.BAD_REQUEST:
        return "unknown"
    client = status < HTTPStatus.INTERNAL_SERVER_ERROR
    return _STATUS.get(status, "invalid_request" if client else "server_error")


def finite(value: object) -> float | None:
    """Return ``value`` as a float if it is a finite number, and None otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # An int of 400 digits.
        return None
    return number if math.isfinite(number) else None


def wait_in(text: object) -> float | None:
    """Return the seconds that a provider's message asks to wait, or None.

    Providers give the wait in words: "Please try again in 1m26.4s.", "retry after 6 seconds",
    "retry in 6.5s", "Retry-After: 6".
    """
    found = _WAIT.search(text) if isinstance(text, str) else None
    if found is None:
        return None
    parts = _PART.findall(found[1])
    seconds = sum(float(number) * _seconds_per(unit.lower()) for number, unit in parts)
    return min(seconds, _LONGEST_WAIT) or None


def _seconds_per(unit: str) -> float:
    if unit.startswith(("ms", "milli")):
        return 0.001
    return {"m": 60.0, "h": 3600.0}.get(unit[:1], 1.0)


def _kind_of_number(status: object) -> Kind:
    if isinstance(status, str) and status.isascii() and status.isdigit():
        status = int(status[:9])
    if isinstance(status, int) and not isinstance(status, bool) and status <= _LARGEST_STATUS:
        return kind_of_status(status)
    return "unknown"


def _kind_of_class(error: BaseException) -> Kind:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, (OSError, EOFError)):
        return "connection_lost"
    # Python's own classes (TypeError, KeyError, NotImplementedError, ...) report a mistake in the
    # code, and a second attempt cannot correct it. Classes of libraries report external failures.
    own = type(error).__module__ == "builtins" and type(error) is not Exception
    return "bug" if own and not isinstance(error, _PASSING_BUILTINS) else "unknown"


def _retry_after(error: BaseException) -> float | None:
    """Return the wait that an exception asks for: its attribute, or its HTTP header."""
    seconds = finite(_attribute(error, "retry_after"))
    if seconds is None:
        headers = _attribute(error, "headers")
        value = headers.get("Retry-After") if isinstance(headers, Mapping) else None
        if isinstance(value, str) and value.isascii() and value.isdigit():
            seconds = float(value[:9])
    return seconds if seconds is not None and seconds >= 0 else None


def _attribute(error: BaseException, name: str) -> object:
    try:
        return getattr(error, name, None)
    except Exception:  # noqa: BLE001 - a property may raise; aiohttp's `code` warns
        return None


NOTE: Final = "traced_retry: "
"""The start of each note that we add to an exception."""


def copy_error(failure: Failure) -> Failure:
    """Return ``failure`` with a copy of its error, without our notes.

    The agent of another reply may hold the original, with the note of that reply.
    """
    try:
        copied = copy.copy(failure.error)
        if notes := getattr(failure.error, "__notes__", None):  # The copy would share the list.
            copied.__notes__ = [note for note in notes if not note.startswith(NOTE)]
    except Exception:  # noqa: BLE001 - a class may forbid a copy or an attribute
        return failure
    return replace(failure, error=copied)
