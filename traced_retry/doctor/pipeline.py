# SPDX-License-Identifier: Apache-2.0
"""Check provider, sampler and exporters, and whether a test span arrives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traced_retry import semconv
from traced_retry._version import __version__
from traced_retry.core.sanitize import redact_url
from traced_retry.doctor.check import Check
from traced_retry.doctor.probe import deliver, diagnose, in_jaeger, jaeger_query_url, server
from traced_retry.errors import UsageError, install_command

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span, TracerProvider


def checks(preset: str | None, jaeger: str | None, until: float) -> Iterator[Check]:
    """Check the provider, the sampler, then each exporter of spans and of metrics.

    Args:
        preset: as for ``enable``.
        jaeger: as for ``run_checks``.
        until: the time, by :func:`time.monotonic`, when the wait for servers ends.
    """
    # Import late, here and below: the imports take seconds, and each needs an extra.
    try:
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

        from traced_retry.export import enable  # noqa: PLC0415

        destination = enable._set_up_once(preset, None).destination
    except ModuleNotFoundError as error:
        message = f"spans go nowhere: {error.name} is not installed"
        yield Check("provider", "fail", message, install_command("agent"))
        return
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises; its text may hold a key
        if isinstance(error, UsageError):
            said, fix = str(error), "correct the value that the message names"
        else:
            said = f"{type(error).__name__} in the set-up of the SDK"
            fix = "correct the OTEL_* variable that the SDK refuses"
        yield Check("provider", "fail", f"spans go nowhere: {said}", fix)
        return
    provider = _provider()
    if not isinstance(provider, TracerProvider):
        nowhere = destination.startswith("nowhere")
        message = f"spans go {destination}" if nowhere else f"{destination}; not the SDK's"
        fix = (
            _fix_of(destination) if nowhere else "look into its backend, because the doctor cannot"
        )
        yield Check("provider", "fail" if nowhere else "warn", message, fix)
        return
    if enable._ours:
        # The file is named after this process and is deleted after the check.
        store = destination.endswith(".jsonl")
        target = f"a file in {Path(destination).parent}" if store else destination
        yield Check("provider", "ok", f"the SDK, set up by traced_retry; spans go to {target}")
    else:
        yield Check("provider", "ok", destination)
    yield _sampler(provider)
    yield from _exporters(provider, jaeger, until)
    yield from _metrics(until)


def _fix_of(destination: str) -> str:
    """Return the remedy for a set-up without a provider."""
    if destination.endswith("says disabled"):
        return "set disabled to false in the file"
    if destination.endswith("cannot be written"):
        return "set XDG_STATE_HOME to a folder that can be written"
    return f"unset {destination.split()[1]}"


def _provider() -> object:
    """Return the provider of LiveKit's tracer, which the retries use."""
    from livekit.agents import telemetry as livekit_telemetry  # noqa: PLC0415
    from opentelemetry import trace  # noqa: PLC0415

    given = getattr(livekit_telemetry.tracer, "_tracer_provider", None)
    if given is None or isinstance(given, trace.ProxyTracerProvider):
        return trace.get_tracer_provider()
    return given


def _sampler(provider: TracerProvider) -> Check:
    from opentelemetry.sdk.trace.sampling import Decision  # noqa: PLC0415

    # Samplers by ratio take a trace by its id's last 7 or 8 bytes: those below, or above, a bound.
    kept = all(
        provider.sampler.should_sample(None, trace_id, semconv.SPAN_REPLY).decision
        is Decision.RECORD_AND_SAMPLE
        for trace_id in (1 << 127, (1 << 128) - 1)
    )
    name = provider.sampler.get_description().split(",")[0].replace("{root:", " of ")
    if kept:
        return Check("sampler", "ok", "every reply is traced")
    return Check(
        "sampler",
        "fail",
        f"{name} drops replies, and exhausted ones with them",
        "unset OTEL_TRACES_SAMPLER (in a file: sampler always_on), and let a Collector choose when "
        "the reply is over: traced-retry exporters show collector/collector.yaml",
    )


def _exporters(provider: TracerProvider, jaeger: str | None, until: float) -> Iterator[Check]:
    processors = getattr(provider._active_span_processor, "_span_processors", ())
    found = [exporter for p in processors if (exporter := _exporter(p)) is not None]
    if not found:
        fix = "set OTEL_TRACES_EXPORTER to otlp, or unset it for the local store"
        yield Check("export", "fail", "spans go nowhere: the provider has no exporter", fix)
    for exporter in found:
        span = _span(provider)
        if path := getattr(exporter, "_path", None):
            yield _stored(exporter, Path(path), span, until)
        elif type(exporter).__name__ == "ConsoleSpanExporter":
            yield Check("export", "ok", "console: spans are printed, and kept nowhere")
        else:
            yield from _sent(exporter, span, jaeger, until)


def _exporter(processor: object) -> Any:
    """Return the exporter of one of our processors, or of the SDK's two."""
    batch = getattr(processor, "_batch_processor", processor)
    return getattr(batch, "_exporter", None) or getattr(processor, "span_exporter", None)


def _span(provider: TracerProvider) -> Span:
    from opentelemetry.sdk.trace import Span, TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415

    apart = TracerProvider(ALWAYS_ON, provider.resource, shutdown_on_exit=False)
    span = apart.get_tracer(semconv.SCOPE, __version__).start_span(semconv.SPAN_DOCTOR)
    assert isinstance(span, Span)
    span.end()
    return span


def _stored(exporter: Any, path: Path, span: Span, until: float) -> Check:
    empty = path.is_file() and path.stat().st_size == 0
    delivered, _ = deliver(exporter, partial(exporter.export, [span]), until)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    there = f"{span.get_span_context().trace_id:032x}" in text
    if (
        empty and text.count("\n") <= 1
    ):  # keep `traced-retry report` from finding the doctor's store
        path.unlink(missing_ok=True)
    if delivered and there:
        return Check("export", "ok", f"local store in {path.parent}: a test span was read back")
    cause = {"disk_full": "the disk is full"}.get(
        getattr(exporter, "reason", ""), "it was not there"
    )
    fix = "free some space, or set XDG_STATE_HOME to a folder that can be written"
    return Check("export", "fail", f"local store {path}: a test span was lost, {cause}", fix)


def _sent(exporter: Any, span: Span, jaeger: str | None, until: float) -> Iterator[Check]:
    endpoint = getattr(exporter, "_endpoint", None)
    where = f"otlp to {server(endpoint)}" if endpoint else type(exporter).__name__
    delivered, status = deliver(exporter, partial(exporter.export, [span]), until)
    if not delivered:
        problem, fix = diagnose(exporter, endpoint, status, "/v1/traces")
        yield Check("export", "fail", f"{where}: {problem}", fix)
        return
    query = jaeger or jaeger_query_url(endpoint)
    found = in_jaeger(query, span, until) if query else None
    if found:
        said = f"{where}: a test span arrived, and Jaeger at {redact_url(query or '')} has it"
        yield Check("export", "ok", said)
    elif found is None and jaeger is None:
        said = f"{where}: a test span was accepted; no Jaeger answers that could be asked for it"
        yield Check("export", "ok", said)
    else:
        said = "does not have it" if found is False else "does not answer as one"
        yield Check(
            "export",
            "fail" if jaeger else "warn",
            f"{where}: a test span was accepted, but Jaeger at {redact_url(query or '')} {said}",
            "correct --jaeger to the query port of the Jaeger that spans reach (mostly 16686); a "
            "Collector between may sample the test span away",
        )


def _metrics(until: float) -> Iterator[Check]:
    """Check each metric exporter with an empty export."""
    from opentelemetry import metrics  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import MetricsData  # noqa: PLC0415

    provider = metrics.get_meter_provider()
    config = getattr(provider, "_sdk_config", None)  # where older SDKs have them
    readers: Iterable[Any] = (
        getattr(provider, "_metric_readers", None) or getattr(config, "metric_readers", None) or ()
    )
    if not readers:
        yield Check("metrics", "ok", "exported nowhere; a Jaeger or Collector counts the spans")
    for reader in readers:
        exporter = getattr(reader, "_exporter", None)
        endpoint = getattr(exporter, "_endpoint", None)
        if exporter is None or endpoint is None:
            yield Check("metrics", "ok", f"{type(exporter or reader).__name__}; not tried")
            continue
        delivered, status = deliver(exporter, partial(exporter.export, MetricsData([])), until)
        if delivered:
            yield Check("metrics", "ok", f"otlp to {server(endpoint)} accepts them")
        elif status == 404:  # noqa: PLR2004 - Not Found
            yield Check(
                "metrics",
                "fail",
                f"otlp to {server(endpoint)}: it takes none (404); a Jaeger takes traces only",
                "set OTEL_METRICS_EXPORTER=none (in a file: no meter_provider); Jaeger's "
                "spanmetrics connector counts the spans",
            )
        else:
            problem, fix = diagnose(exporter, endpoint, status, "/v1/metrics")
            fix += "; without a server for metrics: OTEL_METRICS_EXPORTER=none"
            yield Check("metrics", "fail", f"otlp to {server(endpoint)}: {problem}", fix)
