# SPDX-License-Identifier: Apache-2.0
"""Retry and trace with one line at agent start-up: :func:`enable`.

LiveKit runs each job in a process of its own (fork server on Linux, spawn elsewhere) or in a
thread (Windows). LiveKit flushes only the providers that it created. In a child process, Python
before 3.13 runs no ``atexit`` handlers, and so not the SDK's (python/cpython#83856).
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

from traced_retry.core import switch, telemetry
from traced_retry.core.guard import logger, suppress_and_log
from traced_retry.core.policy import RetryPolicy
from traced_retry.export import order
from traced_retry.export.processor import metrics_delivered
from traced_retry.export.setup import SdkSetup, file_policy, set_up
from traced_retry.livekit import hook
from traced_retry.livekit.hook import OnExhausted, OnWaiting

FLUSH_WITHIN: Final = 1.5
"""Seconds that the end of a job waits for the delivery of telemetry."""
EXIT_WITHIN: Final = 3.5
"""Seconds that the end of a job's process then waits, because LiveKit's last spans end after
all callbacks. Both waits together are half of the 10 s that LiveKit allows the process."""


@dataclass(frozen=True)
class Tracing:
    """The telemetry set-up that :func:`enable` found or created."""

    destination: str
    """The target of the spans in a few words, or the path of the local store."""

    def flush(self, within: float = FLUSH_WITHIN) -> bool:
        """Deliver buffered spans and metrics, and return whether all of them were delivered.

        Return False if spans were dropped since the last flush, or if the last export of metrics
        failed. Of an exporter that the SDK runs itself, such as ``otlp_grpc`` in a configuration
        file, only a missed deadline is known.

        Args:
            within: the longest wait in seconds. Telemetry not delivered by then stays buffered.
        """
        return _run_within(within, [p.force_flush for p in _providers()]) and metrics_delivered()


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
    on_waiting: OnWaiting | None = None,
) -> Tracing:
    """Retry and trace every realtime reply of this process, and deliver the traces.

    Call it in the agent's entrypoint, before you create the session. You can call it again.

    If a tracer provider is set, globally or with
    ``livekit.agents.telemetry.set_tracer_provider``, spans go to that provider. Otherwise the SDK
    is set up from the first of these sources that is set:

    1. ``OTEL_CONFIG_FILE``
    2. ``OTEL_TRACES_EXPORTER``, ``OTEL_METRICS_EXPORTER`` and the OTLP endpoints
    3. ``preset``
    4. the local store: OTLP-JSON lines under the user's state directory, without metrics

    LiveKit's own spans then go to the same target. They hold the spoken text only if
    ``LIVEKIT_TELEMETRY_ALLOW_PII`` is set (LiveKit 1.7.0 always includes it). Logs stay as they
    are.

    Args:
        ctx: the job. When it ends, buffered telemetry is delivered for at most 1.5 s.
        policy: the retry policy. Default: the configuration file's policy, else
            :meth:`RetryPolicy.from_env`.
        preset: one of ``traced-retry exporters list``: ``jaeger``, ``collector``, ...
        service_name: ``service.name``, unless a variable or ``OTEL_CONFIG_FILE`` sets it. Default:
            the agent's name, else ``livekit-agent``.
        on_exhausted: as for :func:`traced_retry.wrap`.
        on_waiting: likewise.

    If the process was switched off by :func:`traced_retry.disable`, this call switches it on. If
    ``TRACED_RETRY_DISABLED`` is true, this call has no effect.

    A later call can change ``policy``, ``on_exhausted`` and ``on_waiting`` for new sessions. Its
    ``preset`` and ``service_name`` have no effect.

    Raises:
        ExportError: if the preset does not exist, or if a variable is invalid.
        ConfigurationFileError: if the configuration file is invalid.
        PolicyError: if an environment variable of the policy is invalid.
        TypeError: if ``policy``, ``on_exhausted`` or ``on_waiting`` has a wrong type.

    All but the last are :class:`traced_retry.UsageError`.
    """
    hook.check_arguments(policy, on_exhausted, on_waiting)
    switch.switch_on()
    if switch.check():
        logger.warning("%s is true: replies are neither retried nor traced", switch.VARIABLE)
        return Tracing(f"nowhere: {switch.VARIABLE} is true")
    with _lock:
        if service_name is None and ctx is not None:
            service_name = ctx.job.agent_name or None
        tracing = _set_up_once(preset, service_name)
        _instrument(policy, on_exhausted, on_waiting)
        if ctx is not None and ctx not in _jobs:
            _jobs.add(ctx)
            ctx.add_shutdown_callback(_flush_job)
    return tracing


async def _flush_job(_reason: str) -> None:
    """Deliver buffered telemetry without blocking the event loop."""
    assert _tracing is not None
    await asyncio.to_thread(_tracing.flush)


def configure() -> RetryPolicy | None:
    """Set telemetry up as :func:`enable` does, and return the policy of ``OTEL_CONFIG_FILE``.

    ``opentelemetry-instrument`` needs only this part, because it instruments by itself. The errors
    are those of :func:`enable`.
    """
    with _lock:
        _set_up_once(None, None)
    return _file_policy


# --- inside -----------------------------------------------------------------------------------


def _set_up_once(preset: str | None, service_name: str | None) -> Tracing:
    global _tracing, _ours, _file_policy
    if _tracing is not None:
        return _tracing
    existing = _existing_destination()
    if existing is None:
        done = set_up(preset, service_name)
        _set_livekit_provider()
        telemetry.on_counters_initialized.append(_export_initial_counters)
    else:
        done = SdkSetup(existing, file_policy())
    _tracing, _ours, _file_policy = Tracing(done.destination), existing is None, done.policy
    logger.info("spans go to %s", done.destination)
    order.watch()
    _at_process_end()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
        # multiprocessing then clears its finalizers, and calls these afterwards.
        util.register_after_fork(_jobs, lambda _: _at_process_end())
    return _tracing


def _instrument(
    policy: RetryPolicy | None, on_exhausted: OnExhausted | None, on_waiting: OnWaiting | None
) -> None:
    if not hook.is_instrumented():
        hook.instrument(
            policy=policy or _file_policy, on_exhausted=on_exhausted, on_waiting=on_waiting
        )
    elif (policy, on_exhausted, on_waiting) != (None, None, None):
        hook.reinstrument(policy or _file_policy, on_exhausted, on_waiting)


def _existing_destination() -> str | None:
    """Describe the provider that is already set, or return None."""
    made_by_livekit = False
    given = getattr(livekit_telemetry.tracer, "_tracer_provider", None)
    if given is not None and _is_set(given):
        made_by_livekit = _made_by_livekit(given)
        if not made_by_livekit and given is not trace.get_tracer_provider():
            return "the tracer provider given to LiveKit"
    if not _is_set(trace.get_tracer_provider()):
        return None
    if made_by_livekit:
        _set_livekit_provider()
    return "the global tracer provider"


def _is_set(provider: trace.TracerProvider) -> bool:
    return not isinstance(provider, trace.ProxyTracerProvider)


def _made_by_livekit(provider: trace.TracerProvider) -> bool:
    """Return whether LiveKit created the provider for its cloud before the entrypoint ran.

    Such a provider exports to LiveKit Cloud only. LiveKit continues this export with a provider
    that is set later (1.8: ``_CloudTelemetry._ensure_trace_pipeline``).
    """
    targets = getattr(getattr(livekit_traces, "_cloud", None), "_exit_targets", ())
    return any(getattr(stop, "__self__", None) is provider for _, stop in targets)


def _set_livekit_provider() -> None:
    provider = trace.get_tracer_provider()
    if not _is_set(provider):
        return
    give: Callable[..., None] = livekit_telemetry.set_tracer_provider
    options: dict[str, Any] = {}
    takes = inspect.signature(give).parameters  # 1.7.0 has no allow_pii
    if "allow_pii" in takes and not os.environ.get("LIVEKIT_TELEMETRY_ALLOW_PII"):
        options["allow_pii"] = False
    give(provider, **options)


def _providers() -> list[Any]:
    """Return each provider with buffered data once.

    Tracer providers come first, because the metrics must include spans dropped by them.
    """
    given = getattr(livekit_telemetry.tracer, "_tracer_provider", None)
    found = (given, trace.get_tracer_provider(), metrics.get_meter_provider())
    return list({id(p): p for p in found if hasattr(p, "force_flush")}.values())


def _export_initial_counters() -> None:
    """Export the counters at 0, because the next periodic export may follow the first failure."""
    flush = getattr(metrics.get_meter_provider(), "force_flush", None)
    if flush is not None:

        def work() -> None:
            with suppress_and_log("exporting the counters' start"):
                flush()

        threading.Thread(target=work, name="traced_retry counters", daemon=True).start()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a thread that did not come along may have held it
    _lock = threading.Lock()
    _at_process_end()


def _at_process_end() -> None:
    util.Finalize(None, _deliver_remaining, exitpriority=0)


def _deliver_remaining() -> None:
    # In a main process, the providers' own atexit handlers run later. Python 3.12 cannot start a
    # thread at that time.
    if parent_process() is not None:
        _run_within(EXIT_WITHIN, [p.shutdown if _ours else p.force_flush for p in _providers()])


def _run_within(seconds: float, actions: list[Callable[[], Any]]) -> bool:
    """Run all actions in order in a thread, and return whether all succeeded in time.

    The SDK's own providers may take 30 s (open-telemetry/opentelemetry-python#4623).
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
