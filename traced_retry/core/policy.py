# SPDX-License-Identifier: Apache-2.0
"""The limits of one reply: :class:`RetryPolicy`, from code or environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

import backoff

from traced_retry.core.breaker import AUTO
from traced_retry.core.budget import RetryBudget, process_budget
from traced_retry.core.failure import Failure, finite
from traced_retry.core.sanitize import shown
from traced_retry.errors import ArgumentError, UsageError

OnSilence = Literal["restart", "listen", "resend"]

_LEAST_DELAY: Final = 1e-9
"""Seconds. A shorter ``base_delay`` counts as 0."""


class _Default(float):
    """A number that the user did not set. It stays recognizable in a copied or pickled policy."""


_BASE_DELAY: Final = _Default(1.0)
_FAST_DELAY: Final = 0.1
"""Seconds. The bound of the first wait after a failure that does not ask for fewer requests.

Such a failure is seldom repeated, and the caller hears silence meanwhile. The budget limits the
load on a provider that is down."""
_NOT_ABOVE: Final = {"base_delay": "max_delay", "attempt_timeout": "deadline"}
"""Each field that is limited by another."""

ENV: Final = {
    "LIVEKIT_REALTIME_MAX_RETRIES": "max_retries",
    "LIVEKIT_REALTIME_RETRY_BASE_DELAY": "base_delay",
    "LIVEKIT_REALTIME_RETRY_MAX_DELAY": "max_delay",
    "TRACED_RETRY_DEADLINE": "deadline",
    "TRACED_RETRY_ATTEMPT_TIMEOUT": "attempt_timeout",
    "TRACED_RETRY_HEDGE_AFTER": "hedge_after",
    "TRACED_RETRY_FIRST_WORD_TIMEOUT": "first_word_timeout",
    "TRACED_RETRY_RETRY_RATE_LIMITS": "retry_rate_limits",
    "TRACED_RETRY_ON_SILENCE": "on_silence",
    "TRACED_RETRY_BUDGET": "budget",
    "TRACED_RETRY_BREAKER": "breaker",
    "TRACED_RETRY_WAITING_AFTER": "waiting_after",
}
"""The variable of each field that has one."""


class PolicyError(UsageError):
    """An invalid retry setting. The message names the setting, its value and the allowed values."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The limits of one reply. All times are in seconds.

    Args:
        max_retries: attempts after the first, a whole number. 0 means one attempt, still traced.
            Default: 3.
        base_delay: upper bound of the first wait, in seconds. It doubles with each retry. The wait
            itself is drawn evenly from zero to the bound (full jitter), so that agents do not come
            back in step. Default: 1.0 s after a rate limit or an overload, and 0.1 s after any
            other failure. A value that you set applies to all failures.
        max_delay: the largest bound, in seconds. A provider's own ``retry_after`` may exceed it.
            Default: 10.0 s.
        deadline: time for the whole reply, in seconds from the call. A wait that would pass it is
            not started. Default: 20.0 s.
        attempt_timeout: time for one attempt until its first word, in seconds. Default: None, which
            leaves it to the plugin (5 to 10 s, only until the response is created) and to the
            deadline. It must not be above the deadline.
        retry_rate_limits: whether a rate limit is retried. Default: True.
        on_silence: the action if a request seems lost on a live connection and the provider's
            replies carry no id of the request: ``"listen"``, ``"restart"`` or ``"resend"``. With
            ``"resend"`` the caller may hear two replies. OpenAI-compatible providers ignore it,
            because their replies carry the id. Default: None, the provider's safe action.
        budget: the retries that this process may send, per provider. None means no limit. Default:
            one budget for all policies, with 10 retries at once, and then one per 10 replies and
            one per 30 s.
        breaker: whether new replies fail at once while a provider fails for all processes of this
            machine. ``"auto"`` shares the state in a small file of this user, and an absolute path
            names another file. It needs a POSIX system. Default: None, no breaker.
        waiting_after: seconds without output until ``on_waiting`` is called. Default: 2.0 s.
            A healthy realtime model starts to speak within about 1 s, and a caller who hears no
            sound for longer than 2 s assumes that the line is dead.
        classify: a function that overrules the default table for one failure, and returns None to
            keep it. For example ``lambda f: dataclasses.replace(f, recoverable=True) if f.code ==
            "busy" else None``. Default: None.
        hedge_after: time without an answer, in seconds, after which a second request is sent while
            the first one stays open. The first answer becomes the reply, and the other request is
            cancelled by its id. OpenAI, Azure OpenAI and LiveKit inference only. None sends no
            second request. Default: 2.5 s.
        first_word_timeout: time from the start of a response to its first word, in seconds, after
            which the response is cancelled by its id and requested again, once per reply. OpenAI
            and compatible providers only. None waits until the deadline. Default: 8.0 s.

    Raises:
        PolicyError: if a value is not a number, or negative, NaN or infinite, if ``base_delay`` is
            above ``max_delay``, or if ``attempt_timeout`` is above ``deadline``.
    """

    max_retries: int = 3
    base_delay: float = _BASE_DELAY
    max_delay: float = 10.0
    deadline: float = 20.0
    attempt_timeout: float | None = None
    retry_rate_limits: bool = True
    on_silence: OnSilence | None = None
    budget: RetryBudget | None = field(default_factory=process_budget)
    breaker: str | None = None
    waiting_after: float = 2.0
    classify: Callable[[Failure], Failure | None] | None = None
    hedge_after: float | None = 2.5
    first_word_timeout: float | None = 8.0

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            check = _CHECKS.get(name)
            if check is not None and (allowed := check(value)):
                raise PolicyError(f"{name} is {shown(value)}; {allowed}.")
        for name, limit in _NOT_ABOVE.items():
            value, most = getattr(self, name), getattr(self, limit)
            if value is not None and value > most:
                raise PolicyError(
                    f"{name} is {shown(value)}, above {limit}, {shown(most)}; lower the one or "
                    "raise the other."
                )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> RetryPolicy:
        """Read the policy from the environment. A variable that is not set keeps the default.

        Numbers: ``LIVEKIT_REALTIME_MAX_RETRIES``, ``LIVEKIT_REALTIME_RETRY_BASE_DELAY``,
        ``LIVEKIT_REALTIME_RETRY_MAX_DELAY``, ``TRACED_RETRY_DEADLINE``,
        ``TRACED_RETRY_ATTEMPT_TIMEOUT``, ``TRACED_RETRY_WAITING_AFTER``. Numbers or ``off``:
        ``TRACED_RETRY_HEDGE_AFTER``, ``TRACED_RETRY_FIRST_WORD_TIMEOUT``. True or false (also 1, 0,
        yes, no, on, off): ``TRACED_RETRY_RETRY_RATE_LIMITS``. A word: ``TRACED_RETRY_ON_SILENCE``.
        Retries at once, or ``off``: ``TRACED_RETRY_BUDGET``. ``auto``, ``off`` or an absolute path:
        ``TRACED_RETRY_BREAKER``.

        Raises:
            PolicyError: if a value is invalid. The message names the variable.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for variable, name in ENV.items():
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                values[name] = _PARSERS.get(name, float)(text)
            except ValueError:
                values[name] = text  # the check then refuses it and names the allowed values
            if allowed := _CHECKS[name](values[name]):
                raise PolicyError(f"{variable} is {shown(text)}; {allowed}.")
        try:
            return cls(**values)
        except PolicyError as error:  # Each value is valid, but not beside another.
            pair = next(pair for pair in _NOT_ABOVE.items() if str(error).startswith(pair[0]))
            names = " and ".join(name for name, field in ENV.items() if field in pair)
            raise PolicyError(f"{names}: {error}") from None

    def delays(self, jitter: Callable[[float], float] = backoff.full_jitter) -> Delays:
        """Return the waits of one reply. ``jitter`` turns a bound into a wait, both in seconds."""
        return Delays(self, jitter)


def check_policy(policy: object) -> None:
    """Check an argument that is a policy or None.

    Raises:
        ArgumentError: if it is neither.
    """
    if policy is not None and not isinstance(policy, RetryPolicy):
        raise ArgumentError(
            f"policy is a {type(policy).__name__}; it must be a RetryPolicy, for example "
            "RetryPolicy(max_retries=2)"
        )


class Delays:
    """The waits between the attempts of one reply, in seconds."""

    __slots__ = ("_bounds", "_jitter", "_policy")

    def __init__(self, policy: RetryPolicy, jitter: Callable[[float], float]) -> None:
        self._policy = policy
        self._jitter = jitter
        self._bounds: dict[float, Generator[float, Any, None]] = {}
        """The bounds of the waits that double, by the first of them."""

    def next(self, failure: Failure) -> float:
        """Return the next wait: with jitter, but never less than ``retry_after``."""
        first = self._policy.base_delay
        if isinstance(first, _Default) and failure.kind not in ("rate_limit", "overloaded"):
            first = min(_FAST_DELAY, self._policy.max_delay)
        if (bounds := self._bounds.get(first)) is None:
            bounds = self._bounds[first] = self._bounds_from(first)
        return max(self._jitter(next(bounds)), failure.wait)

    def _bounds_from(self, first: float) -> Generator[float, Any, None]:
        bounds: Generator[float, Any, None] = (
            backoff.expo(factor=first, max_value=self._policy.max_delay)
            if first >= _LEAST_DELAY
            else backoff.constant(0)  # 2.2.1's expo would overflow on its way up from zero
        )
        # The first value of backoff's generators is not a wait, in 2.2.1 and in its fork.
        bounds.send(None)
        return bounds


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _number_or_off(text: str) -> float | None:
    return None if text.lower() == "off" else float(text)


def _budget(text: str) -> RetryBudget | None:
    return None if text.lower() == "off" else process_budget(float(text))


def _breaker(text: str) -> str | None:
    word = text.lower()
    return None if word == "off" else AUTO if word == AUTO else text


def _number(value: object) -> bool:
    return finite(value) is not None


def _check_count(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if ok else "it must be a whole number, 0 or more"


def _check_seconds(value: Any) -> str | None:
    return None if _number(value) and value >= 0 else "it must be seconds, a finite number >= 0"


def _check_positive(value: Any) -> str | None:
    return None if _number(value) and value > 0 else "it must be seconds, a finite number above 0"


def _check_optional(value: Any) -> str | None:
    if value is None or (_number(value) and value > 0):
        return None
    return "it must be seconds, a finite number above 0, or left unset for the plugin's own"


def _check_limit(value: Any) -> str | None:
    if value is None or (_number(value) and value > 0):
        return None
    return "it must be seconds, a finite number above 0, or off (in code: None)"


def _check_boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "it must be true or false"


def _check_silence(value: Any) -> str | None:
    if value is None or value in get_args(OnSilence):
        return None
    return f"it must be one of {', '.join(get_args(OnSilence))}, or left unset"


def _check_budget(value: Any) -> str | None:
    if value is None or isinstance(value, RetryBudget):
        return None
    return "it must be how many retries at once, 1 or more, or off (in code: a RetryBudget or None)"


def _check_breaker(value: Any) -> str | None:
    if value is None or value == AUTO or (isinstance(value, str) and Path(value).is_absolute()):
        return None
    return f"it must be {AUTO}, the absolute path of a file, or off (in code: None)"


def _check_callable(value: Any) -> str | None:
    return None if value is None or callable(value) else "it must be a function of one Failure"


_PARSERS: Final[dict[str, Callable[[str], object]]] = {
    "max_retries": int,
    "retry_rate_limits": _boolean,
    "on_silence": str,
    "budget": _budget,
    "breaker": _breaker,
    "hedge_after": _number_or_off,
    "first_word_timeout": _number_or_off,
}

_CHECKS: Final[dict[str, Callable[[Any], str | None]]] = {
    "max_retries": _check_count,
    "base_delay": _check_seconds,
    "max_delay": _check_seconds,
    "deadline": _check_positive,
    "attempt_timeout": _check_optional,
    "hedge_after": _check_limit,
    "first_word_timeout": _check_limit,
    "retry_rate_limits": _check_boolean,
    "on_silence": _check_silence,
    "budget": _check_budget,
    "breaker": _check_breaker,
    "waiting_after": _check_seconds,
    "classify": _check_callable,
}
