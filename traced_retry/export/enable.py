# SPDX-License-Identifier: Apache-2.0
"""One line at agent start-up: :func:`enable`.

LiveKit runs each job in a process of its own (fork server on Linux, spawn elsewhere) or in a
thread (Windows). It flushes only what it made itself, and in a child process Python before 3.13
runs no ``atexit`` handler, so the SDK's own are not called either (python/cpython#83856).
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process, util
from typing import Any, Final

from livekit.agents import JobContext
from livekit.agents import telemetry as livekit_telemetry
from livekit.agents.telemetry import traces as livekit_traces
from opentelemetry import metrics, trace

from traced_retry.core import telemetry
from traced_retry.core.guard import logger, suppress_and_log
from traced_retry.core.policy import RetryPolicy
from traced_retry.export.sdk import SetUp, file_policy, set_up
from traced_retry.livekit import hook
from traced_retry.livekit.hook import OnExhausted

FLUSH_WITHIN: Final = 1.5
"""Seconds that the end of a job waits for telemetry to be delivered."""
EXIT_WITHIN: Final = 3.5
"""Seconds that the end of a job's process then waits: LiveKit's own last spans end after all
callbacks. Both together are half of the 10 s after which LiveKit kills the process."""


@dataclass(frozen=True)
class Tracing:
    """What :func:`enable` found or set up."""

    destination: str
    """Where spans go, in a few words; the path of the file, where it is the local store."""

    def flush(self, within: float = FLUSH_WITHIN) -> bool:
        """Deliver what is buffered, spans and metrics; whether that was done in time.

        Args:
            within: seconds to wait at most. What is not delivered by then stays buffered.
        """
        return _within(within, [p.force_flush for p in _providers()])


_lock = threading.Lock()
_tracing: Tracing | None = None
_ours = False
_file_policy: RetryPolicy | None = None
_jobs: weakref.WeakSet[JobContext] = weakref.WeakSet()


def enable(
    ctx: JobContext | None = None,
    *,
    policy: RetryPolicy | None = None,
    preset: str | None = None,
    service_name: str | None = None,
    on_exhausted: OnExhausted | None = None,
) -> Tracing:
    """Retry and trace every realtime reply of this process, and deliver the traces.

    Call it in the agent's entrypoint, before the session is made. Calling it again is harmless.

    Spans go where a tracer provider sends them that is set already, globally or with
    ``livekit.agents.telemetry.set_tracer_provider``. Where none is, the SDK is set up from the
    first of these that says anything: ``OTEL_CONFIG_FILE``; ``OTEL_TRACES_EXPORTER``,
    ``OTEL_METRICS_EXPORTER`` and the OTLP endpoints; ``preset``; else spans are stored as OTLP-JSON
    lines under the user's state directory, and metrics nowhere. LiveKit's own spans then go there
    too, without what was said unless ``LIVEKIT_TELEMETRY_ALLOW_PII`` is set (LiveKit 1.7.0 cannot
    leave it out). Logs are left alone.

    Args:
        ctx: the job; what is buffered when it ends is then delivered, within bounds.
        policy: default: the configuration file's, else :meth:`RetryPolicy.from_env`.
        preset: one of ``traced-retry exporters list``: ``jaeger``, ``collector``, ...
        service_name: ``service.name``, unless a variable or ``OTEL_CONFIG_FILE`` says it; default:
            the agent's name, else ``livekit-agent``.
        on_exhausted: as for :func:`traced_retry.wrap`.

    ``policy`` and ``on_exhausted`` of a later call hold for sessions made after it; its ``preset``
    and ``service_name`` come too late.

    Raises:
        ExportError: there is no such preset, or a variable asks for what is not to be had.
        ConfigurationFileError: the configuration file cannot be; file, key and what is allowed.
        PolicyError: the environment holds a value that cannot be.
    """
    with _lock:
        if service_name is None and ctx is not None:
            service_name = ctx.job.agent_name or None
        tracing = _set_up_once(preset, service_name)
        _instrument(policy, on_exhausted)
        if ctx is not None and ctx not in _jobs:
            _jobs.add(ctx)
            ctx.add_shutdown_callback(_flush_job)
    return tracing


async def _flush_job(_reason: str) -> None:
    """Deliver what is buffered, without holding up the event loop."""
    assert _tracing is not None
    await asyncio.to_thread(_tracing.flush)


def configure() -> RetryPolicy | None:
    """What of :func:`enable` concerns telemetry; returns the policy of ``OTEL_CONFIG_FILE``.

    For ``opentelemetry-instrument``, which instruments by itself. Raises what :func:`enable` does.
    """
    with _lock:
        _set_up_once(None, None)
    return _file_policy


# --- inside -----------------------------------------------------------------------------------


def _set_up_once(preset: str | None, service_name: str | None) -> Tracing:
    global _tracing, _ours, _file_policy
    if _tracing is not None:
        return _tracing
    existing = _existing()
    if existing is None:
        done = set_up(preset, service_name)
        _give_to_livekit()
        telemetry.on_counters_initialized.append(_export_zeroes)
    else:
        done = SetUp(existing, file_policy())
    _tracing, _ours, _file_policy = Tracing(done.destination), existing is None, done.policy
    logger.info("spans go to %s", done.destination)
    _at_process_end()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
        # multiprocessing forgets its finalizers after that, and then calls these.
        util.register_after_fork(_jobs, lambda _: _at_process_end())
    return _tracing


def _instrument(policy: RetryPolicy | None, on_exhausted: OnExhausted | None) -> None:
    if hook.is_instrumented():
        if policy is None and on_exhausted is None:
            return
        hook.uninstrument()  # what is given now holds from now on
    hook.instrument(policy=policy or _file_policy, on_exhausted=on_exhausted)


def _existing() -> str | None:
    """The provider that is there already, in words; None where none is."""
    made_by_livekit = False
    given = getattr(livekit_telemetry.tracer, "_tracer_provider", None)
    if given is not None and _is_set(given):
        made_by_livekit = _made_by_livekit(given)
        if not made_by_livekit and given is not trace.get_tracer_provider():
            return "the tracer provider given to LiveKit"
    if not _is_set(trace.get_tracer_provider()):
        return None
    if made_by_livekit:
        _give_to_livekit()
    return "the global tracer provider"


def _is_set(provider: trace.TracerProvider) -> bool:
    return not isinstance(provider, trace.ProxyTracerProvider)


def _made_by_livekit(provider: trace.TracerProvider) -> bool:
    """Whether LiveKit made it for its cloud, before the entrypoint was called.

    It exports to LiveKit Cloud alone. LiveKit follows to a provider given to it later, and goes on
    exporting (1.8: ``_CloudTelemetry._ensure_trace_pipeline``).
    """
    targets = getattr(getattr(livekit_traces, "_cloud", None), "_exit_targets", ())
    return any(getattr(stop, "__self__", None) is provider for _, stop in targets)


def _give_to_livekit() -> None:
    provider = trace.get_tracer_provider()
    if not _is_set(provider):
        return
    give: Callable[..., None] = livekit_telemetry.set_tracer_provider
    options: dict[str, Any] = {}
    takes = inspect.signature(give).parameters  # allow_pii is not there yet in 1.7.0
    if "allow_pii" in takes and not os.environ.get("LIVEKIT_TELEMETRY_ALLOW_PII"):
        options["allow_pii"] = False
    give(provider, **options)


def _providers() -> list[Any]:
    """The providers whose data is to be delivered, each once; spans first, for what is dropped
    of them is counted in metrics.
    """
    given = getattr(livekit_telemetry.tracer, "_tracer_provider", None)
    found = (given, trace.get_tracer_provider(), metrics.get_meter_provider())
    return list({id(p): p for p in found if hasattr(p, "force_flush")}.values())


def _export_zeroes() -> None:
    """Have the counters seen at 0: the exporter's next turn may come after the first failure."""
    flush = getattr(metrics.get_meter_provider(), "force_flush", None)
    if flush is not None:

        def work() -> None:
            with suppress_and_log("exporting the counters' start"):
                flush()

        threading.Thread(target=work, name="traced_retry zeroes", daemon=True).start()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a thread that did not come along may have held it
    _lock = threading.Lock()
    _at_process_end()


def _at_process_end() -> None:
    util.Finalize(None, _deliver_the_rest, exitpriority=0)


def _deliver_the_rest() -> None:
    # In a main process the providers' own atexit handlers follow; Python 3.12 starts no thread
    # any more by then.
    if parent_process() is not None:
        _within(EXIT_WITHIN, [p.shutdown if _ours else p.force_flush for p in _providers()])


def _within(seconds: float, actions: list[Callable[[], Any]]) -> bool:
    """Do all, one after the other, in a thread; whether it was over in time.

    The SDK's own providers take 30 s if they have to (open-telemetry/opentelemetry-python#4623).
    """
    results: list[object] = []

    def work() -> None:
        for action in actions:
            with suppress_and_log("delivering telemetry"):
                results.append(action())

    thread = threading.Thread(target=work, name="traced_retry flush", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        logger.warning("telemetry was not delivered within %.1f s", seconds)
    return len(results) == len(actions) and False not in results
