# SPDX-License-Identifier: Apache-2.0
"""The ``opentelemetry_instrumentor`` entry point: ``opentelemetry-instrument python agent.py``.

The module imports no LiveKit, because ``opentelemetry-instrument`` loads it in every process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal

from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined]
    BaseInstrumentor,
)

from traced_retry.core.guard import logger
from traced_retry.core.policy import OnSilence, RetryPolicy, _breaker, _budget, _number_or_off
from traced_retry.errors import UsageError
from traced_retry.livekit.first_use import at_first_use, is_imported


class OptionsError(UsageError):
    """An unknown option. The message names it and the known ones."""


@dataclass(init=False)
class RetryOptions:
    """Options below ``traced_retry`` in a declarative configuration file.

    They are the settings of :class:`traced_retry.RetryPolicy`. The environment decides about an
    option that is absent or null.

    Raises:
        OptionsError: if an option is unknown.
        PolicyError: if a value is invalid.
    """

    max_retries: int | None = None
    base_delay: float | None = None
    max_delay: float | None = None
    deadline: float | None = None
    attempt_timeout: float | None = None
    retry_rate_limits: bool | None = None
    on_silence: OnSilence | None = None
    budget: float | Literal["off"] | None = None
    """Retries at once, as in ``TRACED_RETRY_BUDGET``."""
    breaker: str | None = None
    """As in ``TRACED_RETRY_BREAKER``."""
    hedge_after: float | Literal["off"] | None = None
    first_word_timeout: float | Literal["off"] | None = None
    waiting_after: float | None = None

    def __init__(self, **options: Any) -> None:
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise OptionsError(f"{name!r} is not known; allowed: {', '.join(known)}")
        for name in known:
            setattr(self, name, options.get(name))
        self.policy()

    def policy(self) -> RetryPolicy:
        """Return the environment's policy with these options."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, parse in _OFF.items():
            if name in given:
                # YAML reads a plain off as false.
                text = "off" if given[name] is False else str(given[name])
                with contextlib.suppress(ValueError):  # the policy raises the error
                    given[name] = parse(text)
        return dataclasses.replace(RetryPolicy.from_env(), **given)


_OFF: Final[dict[str, Callable[[str], object]]] = {
    "budget": _budget,
    "hedge_after": _number_or_off,
    "first_word_timeout": _number_or_off,
    "breaker": _breaker,
}
"""Options that can be ``off``."""


class TracedRetryInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """:func:`traced_retry.instrument` for OpenTelemetry's auto-instrumentation.

    ``TracedRetryInstrumentor().instrument(policy=..., tracer_provider=..., meter_provider=...)``,
    or with the options of :class:`RetryOptions` instead of a policy.
    """

    configuration: ClassVar[type[RetryOptions]] = RetryOptions
    """The class that the SDK uses to check the options of a declarative configuration file."""

    _cancel: Callable[[], bool] | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the packages that the instrumentor needs."""
        return ("livekit-agents >= 1.7.0",)

    def instrument(self, **kwargs: Any) -> None:
        """Instrument, unless that was done.

        Under ``opentelemetry-instrument`` a configuration file does it first, and the loading of
        all instrumentors would then warn.

        If the program has not imported LiveKit, wait until it uses LiveKit. An invalid variable is
        then logged and not raised.
        """
        if not self.is_instrumented_by_opentelemetry:
            super().instrument(**kwargs)

    def _instrument(self, **kwargs: Any) -> None:
        options = {f.name: kwargs[f.name] for f in fields(RetryOptions) if f.name in kwargs}
        if options:
            kwargs["policy"] = RetryOptions(**options).policy()
        known = ("policy", "tracer_provider", "meter_provider", "on_exhausted", "on_waiting")
        given = {name: kwargs[name] for name in known if name in kwargs}
        if is_imported():
            from traced_retry.livekit.hook import instrument  # noqa: PLC0415 - it imports LiveKit

            instrument(**given)
        else:
            self._cancel = at_first_use(lambda: _instrument_unless_done(given))

    def _uninstrument(self, **kwargs: Any) -> None:
        waited = self._cancel is not None and self._cancel()
        self._cancel = None
        if not waited:
            from traced_retry.livekit.hook import uninstrument  # noqa: PLC0415 - as above

            uninstrument()


def _instrument_unless_done(given: dict[str, Any]) -> None:
    from traced_retry.livekit import hook  # noqa: PLC0415 - it imports LiveKit

    if hook.is_instrumented():  # by the program itself, with arguments of its own
        return
    try:
        hook.instrument(**given)
    except UsageError as error:
        logger.error("replies are not retried: %s", error)
