# SPDX-License-Identifier: Apache-2.0
"""The loop around any callable: ``@retry``, and the seed shape for plugin authors."""

from __future__ import annotations

import asyncio
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from opentelemetry import metrics, trace

from traced_retry.core import switch
from traced_retry.core.loop import Reply
from traced_retry.core.policy import RetryPolicy, check_policy
from traced_retry.core.request import CallRequest
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.core.variables import warn_about_misspelt

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def retry(
    *,
    provider: str,
    model: str | None = None,
    on: type[Exception] | tuple[type[Exception], ...] = Exception,
    policy: RetryPolicy | None = None,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> Callable[[F], F]:
    """Retry an async function, or a plain one that returns a future, with a span per attempt.

    The decorated function returns and raises the same as the function itself. Each failed attempt
    is cancelled before the next one. Decorate only functions that can safely be called twice.

    Args:
        provider: ``gen_ai.provider.name`` of the telemetry, such as ``"openai"``.
        model: ``gen_ai.request.model``, if it is known.
        on: the exceptions to retry, for example ``(ConnectionError, TimeoutError)``. Others end
            the call at once. By default, every exception is retried if its code, its HTTP status
            or its class does not exclude it: mistakes in the code, such as a ``TypeError``, are
            excluded, and a bare ``Exception`` is retried. An attempt that exceeds
            ``attempt_timeout`` or the deadline is a ``TimeoutError``.
        policy: default: :meth:`RetryPolicy.from_env`.
        tracer_provider: default: the global one.
        meter_provider: default: the global one.

    Raises:
        PolicyError: if an environment variable is invalid.
        TypeError: if ``policy`` is not a policy, if ``on`` is not an exception class, or
            if the function cannot be retried: an async generator, or a function that is neither
            async nor annotated to return a future.
    """
    kinds = on if isinstance(on, tuple) else (on,)
    if not kinds or not all(isinstance(k, type) and issubclass(k, Exception) for k in kinds):
        raise TypeError(f"on is {on!r}; expected an exception class, or a tuple of them")
    check_policy(policy)
    warn_about_misspelt()
    policy = policy or RetryPolicy.from_env()
    telemetry = Telemetry(tracer_provider, meter_provider)
    target = Target(provider, model)

    def decorate(function: F) -> F:
        is_async = _check(function)

        def reply_to(args: Any, kwargs: Any) -> Reply[Any]:
            telemetry.initialize_counters(provider)
            request: CallRequest[Any] = CallRequest(function, args, kwargs, kinds)
            return Reply(request, policy, telemetry.reply(target))

        if is_async:

            @functools.wraps(function)
            async def retried(*args: Any, **kwargs: Any) -> Any:
                if switch.is_off():
                    return await function(*args, **kwargs)
                reply = reply_to(args, kwargs)
                try:
                    future = reply.start()
                    return future.result() if future.done() else await future
                except asyncio.CancelledError:
                    reply.interrupt()  # now, for this may be the event loop's last turn
                    raise
        else:

            @functools.wraps(function)
            def retried(*args: Any, **kwargs: Any) -> Any:
                if switch.is_off():
                    return function(*args, **kwargs)
                return reply_to(args, kwargs).start()

        return retried  # type: ignore[return-value]

    return decorate


def _check(function: Callable[..., Any]) -> bool:
    """Return whether ``function`` is async.

    Raises:
        TypeError: if it cannot be retried.
    """
    call = getattr(function, "__call__", function)  # noqa: B004 - an object may be async too
    name = getattr(function, "__qualname__", None) or repr(function)
    if inspect.isasyncgenfunction(function) or inspect.isasyncgenfunction(call):
        raise TypeError(f"{name} is an async generator, which cannot be retried")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
        return True
    if not _returns_awaitable(function):
        raise TypeError(
            f"{name} is not async, and retry() cannot wait for it: write `async def`, or annotate "
            "a function that returns a future with `-> asyncio.Future[...]`"
        )
    return False


def _returns_awaitable(function: Callable[..., Any]) -> bool:
    """Return whether the annotation of a plain function promises a result to await."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):  # an object
        function = type(function).__call__
    returns = getattr(function, "__annotations__", {}).get("return")
    text = returns if isinstance(returns, str) else getattr(returns, "__name__", str(returns))
    return any(word in text for word in ("Future", "Task", "Awaitable", "Coroutine", "Any"))


class RetryingRealtimeSession(ABC):
    """Base for a plugin's session: write ``_do_generate_reply``, get ``generate_reply``.

    Put it before LiveKit's class: ``class MySession(RetryingRealtimeSession,
    llm.RealtimeSession)``. The model's ``provider`` and ``model`` name the telemetry.
    """

    retry_policy: RetryPolicy | None = None
    """Default: :meth:`RetryPolicy.from_env`."""
    retry_telemetry: Telemetry | None = None
    """Default: one on the global providers."""
    resend_after_timeout: bool = False
    """Set it True only if the provider's replies carry the id of their request, and a late
    reply to an abandoned one is dropped. Else the caller may hear two."""

    def generate_reply(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Request a reply, with the arguments of ``_do_generate_reply``.

        Raises:
            Exception: a programming error of ``_do_generate_reply``, untouched.
            TypeError: if ``retry_policy`` is not a policy.
        """
        if switch.is_off():
            return self._do_generate_reply(*args, **kwargs)
        check_policy(self.retry_policy)
        if self.retry_policy is None:
            warn_about_misspelt()
            self.retry_policy = RetryPolicy.from_env()
        if self.retry_telemetry is None:
            self.retry_telemetry = Telemetry()
        of = getattr(self, "realtime_model", None)
        target = Target(
            str(getattr(of, "provider", type(self).__name__)).lower(), getattr(of, "model", None)
        )
        self.retry_telemetry.initialize_counters(target.provider)
        request: CallRequest[Any] = CallRequest(
            self._do_generate_reply,
            args,
            kwargs,
            resend_after_timeout=self.resend_after_timeout,
        )
        return Reply(request, self.retry_policy, self.retry_telemetry.reply(target)).start()

    @abstractmethod
    def _do_generate_reply(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Send one request. The future resolves with its ``GenerationCreatedEvent``."""
