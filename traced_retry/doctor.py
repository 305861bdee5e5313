# SPDX-License-Identifier: Apache-2.0
"""What ``traced-retry doctor`` looks at: where spans go, whether they arrive, what is retried.

The set-up is that of :func:`traced_retry.enable`. One test span goes to each exporter directly,
past sampler and queue, so that a sampler that would drop it does not hide a dead endpoint.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

from traced_retry import semconv
from traced_retry._version import __version__
from traced_retry.errors import UsageError
from traced_retry.policy import _ENV, PolicyError, RetryPolicy

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span, TracerProvider

WITHIN: Final = 9.0
"""Seconds that it all takes at most, one of ten left for the process's start."""
TEST_SPAN: Final = "traced_retry doctor"
"""Name of the span that is sent."""
JAEGER_PORT: Final = 16686
"""Jaeger's own for queries, asked on the endpoint's host where ``jaeger`` is not given."""

Status = Literal["ok", "warn", "fail"]


class DoctorError(UsageError):
    """What the doctor was given cannot be."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    check: str
    """What was looked at, in a word or a variable's name."""
    status: Status
    message: str
    fix: str = ""
    """What to do; empty where all is well."""


def examine(
    preset: str | None = None, jaeger: str | None = None, within: float = WITHIN
) -> Iterator[Check]:
    """Look at this process as :func:`traced_retry.enable` would find it.

    Where no tracer provider is set yet, this sets the SDK up, as ``enable`` would. It waits for
    servers, so an event loop is not the place for it.

    Args:
        preset: as for ``enable``.
        jaeger: URL of a Jaeger's query API; default: port 16686 of the endpoint's host, if a
            Jaeger answers there.
        within: seconds that it takes at most; what imports leave of them is the servers'.

    Raises:
        DoctorError: ``jaeger`` is no URL.
    """
    if jaeger is not None and not _is_url(jaeger):
        raise DoctorError("--jaeger is no http:// or https:// URL, such as http://127.0.0.1:16686")
    until = time.monotonic() + within
    yield from _policy()
    yield from _variables()
    yield from _plugins()
    yield from _telemetry(preset, jaeger, until)


# --- policy and variables -----------------------------------------------------------------------


def _policy() -> Iterator[Check]:
    """Each variable by itself, then all together."""
    alone = [_problem({name: os.environ.get(name, "")}) for name in _ENV]
    # That base_delay is above max_delay can only be told with both.
    problems = [problem for problem in alone if problem and "base_delay" not in problem]
    if not problems and (problem := _problem(os.environ)):
        problems.append(problem)
    for problem in problems:
        yield Check("policy", "fail", problem, "correct the variable, or unset it")
    if not problems:
        said = [name for name in _ENV if os.environ.get(name, "").strip()]
        yield Check("policy", "ok", f"from {', '.join(said)}" if said else "the defaults")


def _problem(environ: Mapping[str, str]) -> str | None:
    try:
        RetryPolicy.from_env(environ)
    except PolicyError as error:
        return str(error)
    return None


_READ = re.compile(
    r"OTEL_|TRACED_RETRY_|LIVEKIT_REALTIME_|LIVEKIT_TELEMETRY_|XDG_STATE_HOME$"
    r"|REQUESTS_CA_BUNDLE$|(HTTPS?|ALL)_PROXY$",
    re.IGNORECASE,
)
_PLAIN = re.compile(
    r"OTEL_(SERVICE_NAME|SDK_DISABLED|CONFIG_FILE|PROPAGATORS|(TRACES|METRICS|LOGS)_EXPORTER"
    r"|TRACES_SAMPLER(_ARG)?|(BSP|SPAN|ATTRIBUTE)_\w+|METRIC_EXPORT_\w+"
    r"|EXPORTER_OTLP_(\w+_)?(PROTOCOL|TIMEOUT|COMPRESSION|INSECURE)"
    r"|PYTHON_DISABLED_INSTRUMENTATIONS)|LIVEKIT_TELEMETRY_ALLOW_PII|XDG_STATE_HOME"
)
"""Variables that no secret belongs into; what is neither here nor shown in part stays hidden."""
_FILES = re.compile(r"OTEL_EXPORTER_OTLP_\w*(CERTIFICATE|CLIENT_KEY)|REQUESTS_CA_BUNDLE")
_NAME = re.compile(r"[\w.-]{1,40}")


def _variables() -> Iterator[Check]:
    found = sorted(name for name in os.environ if _READ.match(name) and os.environ[name])
    for name in found:
        if name.startswith("TRACED_RETRY_") and name not in _ENV:
            like = difflib.get_close_matches(name, _ENV, 1, cutoff=0.85)
            if like:
                yield Check(name, "warn", "is not read", f"did you mean {like[0]}?")
            continue
        value = os.environ[name].strip()
        if _FILES.fullmatch(name) and not os.path.exists(value):  # noqa: PTH110 - Path raises on a PEM
            yield Check(name, "fail", "names no file that is there", "set it to the file's path")
        else:
            yield Check(name, "ok", _shown(name, value))
    if not found:
        yield Check("environment", "ok", "no OTEL_* or retry variable is set")


def _shown(name: str, value: str) -> str:
    """The value, without what may be a secret."""
    if name in _ENV or _PLAIN.fullmatch(name) or _FILES.fullmatch(name):
        return value
    if name.endswith("_ENDPOINT") or name.upper().endswith("_PROXY"):
        return _place(value) if _is_url(value) else "(hidden: no http:// or https:// URL)"
    if name.endswith(("_HEADERS", "_RESOURCE_ATTRIBUTES")):
        pairs = [pair.partition("=") for pair in value.split(",")]
        names = [
            f"{key.strip()}=(hidden)"
            for key, _, what in pairs
            if _NAME.fullmatch(key.strip()) and what.strip("= ")
        ]
        return ", ".join(names) or "(hidden: no NAME=VALUE in it)"
    return "(hidden)"


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # no port, no host
        return False


def _place(text: str) -> str:
    """A URL without user, password and query."""
    url = urlsplit(text)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{host}{port}{url.path}"


# --- plugins ------------------------------------------------------------------------------------

TESTED: Final = ((1, 7, 0), (1, 8, 9))
"""The first and the last version of LiveKit's plugins that the adapters were tested with."""
_KIN: Final = {"xai": "openai"}
"""Plugins whose session derives from another's."""


def _plugins() -> Iterator[Check]:
    """Which adapter each installed plugin gets."""
    try:
        from traced_retry.livekit.registry import ADAPTERS  # noqa: PLC0415
    except ModuleNotFoundError as error:
        fix = "pip install 'traced-retry[livekit]'"
        yield Check("livekit", "fail", f"nothing is retried: there is no {error.name}", fix)
        return
    yield Check("livekit", "ok", f"livekit-agents {_version('livekit-agents')}")
    known = sorted({home.split(".")[2] for home in ADAPTERS if ".plugins." in home} | set(_KIN))
    for name in known:
        if installed := _version(f"livekit-plugins-{name}"):
            yield _plugin(name, installed, ADAPTERS)
    if installed := _version("livekit-plugins-nvidia"):
        yield Check("plugin nvidia", "ok", f"{installed}: has no generate_reply; nothing to retry")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _plugin(name: str, installed: str, adapters: dict[str, str]) -> Check:
    check, like = f"plugin {name}", f"livekit.plugins.{_KIN.get(name, name)}."
    adapter = next(adapter for home, adapter in adapters.items() if home.startswith(like))
    parts = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    tested = TESTED[0] <= parts <= TESTED[1]
    names = [n for home, a in adapters.items() if a == adapter and (n := _session_names(home))]
    module, _, class_name = adapter.partition(":")
    try:
        needs = getattr(importlib.import_module(module), class_name).needs
    except ModuleNotFoundError as error:
        said = f"{installed}: its realtime part is not installed (no {error.name})"
        return Check(check, "ok", said)
    missing = [need for need in needs if not any(need in there for there in names)]
    between = "tested are {}.{}.{} to {}.{}.{}".format(*TESTED[0], *TESTED[1])
    fix = f"install a version of livekit-plugins-{name} that was tested: {between}"
    if names and missing:
        gone = ", ".join(missing)
        return Check(check, "warn", f"{installed}: observe-only, for {gone} is gone", fix)
    if not names and not tested:
        said = f"{installed}: no RealtimeSession was found; it may be observe-only"
        return Check(check, "warn", said, fix)
    untested = "" if tested else f" (not a version it was tested with; {between})"
    return Check(check, "ok", f"{installed}: {class_name} is active{untested}")


def _session_names(module: str) -> set[str]:
    """What the RealtimeSession in a module's source has: its methods, and attributes that it sets.

    Read and not imported: plugins take seconds, and may want keys. Empty where it has none.
    """
    depth = 3 if module.startswith("livekit.plugins.") else 2  # as deep as finding imports nothing
    package = ".".join(module.split(".")[:depth])
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    for folder in folders:
        path = Path(folder, *module.removeprefix(package + ".").split(".")).with_suffix(".py")
        if path.is_file():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name == "RealtimeSession":
                    return _names(node)
    return set()


def _names(session: ast.ClassDef) -> set[str]:
    names = set()
    for node in ast.walk(session):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


# --- provider, sampler, exporters ---------------------------------------------------------------


def _telemetry(preset: str | None, jaeger: str | None, until: float) -> Iterator[Check]:
    # Imported late, here and below: seconds, and each needs an extra.
    try:
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

        from traced_retry.export import enable  # noqa: PLC0415

        destination = enable._set_up_once(preset, None).destination
    except ModuleNotFoundError as error:
        fix = "pip install 'traced-retry[livekit,presets]'"
        yield Check("provider", "fail", f"spans go nowhere: there is no {error.name}", fix)
        return
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises; its text may hold a key
        said = str(error) if isinstance(error, UsageError) else f"{type(error).__name__} in set-up"
        fix = "correct what it names, or the OTEL_* variable that cannot be"
        yield Check("provider", "fail", f"spans go nowhere: {said}", fix)
        return
    provider = _provider()
    if not isinstance(provider, TracerProvider):
        nowhere = destination.startswith("nowhere")
        message = f"spans go {destination}" if nowhere else f"{destination}; not the SDK's"
        fix = "unset OTEL_SDK_DISABLED; or name a store that can be written, with XDG_STATE_HOME"
        other = "ask its maker whether spans arrive; the doctor cannot"
        yield Check("provider", "fail" if nowhere else "warn", message, fix if nowhere else other)
        return
    if enable._ours:
        # The file is named after a process; this one's is gone again in a moment.
        store = destination.endswith(".jsonl")
        place = f"a file in {Path(destination).parent}" if store else destination
        yield Check("provider", "ok", f"the SDK, set up by traced_retry; spans go to {place}")
    else:
        yield Check("provider", "ok", destination)
    yield _sampler(provider)
    yield from _exporters(provider, jaeger, until)
    yield from _metrics(until)


def _provider() -> object:
    """Where LiveKit's tracer, which the retries use, sends its spans."""
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
    """The exporter of one of our processors, or of the SDK's two."""
    batch = getattr(processor, "_batch_processor", processor)
    return getattr(batch, "_exporter", None) or getattr(processor, "span_exporter", None)


def _span(provider: TracerProvider) -> Span:
    from opentelemetry.sdk.trace import Span, TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415

    apart = TracerProvider(ALWAYS_ON, provider.resource, shutdown_on_exit=False)
    span = apart.get_tracer(semconv.SCOPE, __version__).start_span(TEST_SPAN)
    assert isinstance(span, Span)
    span.end()
    return span


def _stored(exporter: Any, path: Path, span: Span, until: float) -> Check:
    empty = path.is_file() and path.stat().st_size == 0
    delivered, _ = _deliver(exporter, partial(exporter.export, [span]), until)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    there = f"{span.get_span_context().trace_id:032x}" in text
    if empty and text.count("\n") <= 1:  # `traced-retry report` is to find the agent's, not ours
        path.unlink(missing_ok=True)
    if delivered and there:
        return Check("export", "ok", f"local store in {path.parent}: a test span was read back")
    why = {"disk_full": "the disk is full"}.get(getattr(exporter, "reason", ""), "it was not there")
    fix = "free some space, or set XDG_STATE_HOME to a folder that can be written"
    return Check("export", "fail", f"local store {path}: a test span was lost, {why}", fix)


def _sent(exporter: Any, span: Span, jaeger: str | None, until: float) -> Iterator[Check]:
    endpoint = getattr(exporter, "_endpoint", None)
    where = f"otlp to {_server(endpoint)}" if endpoint else type(exporter).__name__
    delivered, status = _deliver(exporter, partial(exporter.export, [span]), until)
    if not delivered:
        problem, fix = _why(exporter, endpoint, status, "/v1/traces")
        yield Check("export", "fail", f"{where}: {problem}", fix)
        return
    query = jaeger or _guess(endpoint)
    found = _in_jaeger(query, span, until) if query else None
    if found:
        said = f"{where}: a test span arrived, and Jaeger at {_place(query or '')} has it"
        yield Check("export", "ok", said)
    elif found is None and jaeger is None:
        said = f"{where}: a test span was accepted; no Jaeger answers that could be asked for it"
        yield Check("export", "ok", said)
    else:
        said = "does not have it" if found is False else "does not answer as one"
        yield Check(
            "export",
            "fail" if jaeger else "warn",
            f"{where}: a test span was accepted, but Jaeger at {_place(query or '')} {said}",
            "correct --jaeger to the query port of the Jaeger that spans reach (mostly 16686); a "
            "Collector between may sample the test span away",
        )


def _metrics(until: float) -> Iterator[Check]:
    """An empty export: what takes no metrics says so too."""
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
        delivered, status = _deliver(exporter, partial(exporter.export, MetricsData([])), until)
        if delivered:
            yield Check("metrics", "ok", f"otlp to {_server(endpoint)} accepts them")
        elif status == 404:  # noqa: PLR2004 - Not Found
            yield Check(
                "metrics",
                "fail",
                f"otlp to {_server(endpoint)}: it takes none (404); a Jaeger takes traces only",
                "set OTEL_METRICS_EXPORTER=none (in a file: no meter_provider); Jaeger's "
                "spanmetrics connector counts the spans",
            )
        else:
            problem, fix = _why(exporter, endpoint, status, "/v1/metrics")
            fix += "; without a server for metrics: OTEL_METRICS_EXPORTER=none"
            yield Check("metrics", "fail", f"otlp to {_server(endpoint)}: {problem}", fix)


# --- over the wire ------------------------------------------------------------------------------


def _deliver(exporter: Any, export: Callable[[], Any], until: float) -> tuple[bool, int | None]:
    """Whether an export succeeded in time, and the last HTTP status, where there was one."""
    statuses: list[int] = []
    session = _session(exporter)
    if session is not None:
        session.hooks["response"].append(lambda r, **_: statuses.append(r.status_code))
    # The half, so that a dead server leaves time for the next one.
    result = _in_time(export, max(0.5, (until - time.monotonic()) / 2))
    return getattr(result, "name", "") == "SUCCESS", statuses[-1] if statuses else None


T = TypeVar("T")


def _in_time(function: Callable[[], T], seconds: float) -> T | Exception | None:
    """What it returned or raised in time; looking a host up knows no time-out of its own."""
    results: list[T | Exception] = []

    def work() -> None:
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001 - the asker's to tell
            results.append(error)

    thread = threading.Thread(target=work, name="traced_retry doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _session(exporter: Any) -> Any:
    """The exporter's requests.Session: its own in older SDKs, its client's transport's later."""
    transport = getattr(getattr(exporter, "_client", None), "_transport", None)
    session = getattr(exporter, "_session", None) or getattr(transport, "_session", None)
    return session if hasattr(session, "hooks") else None


_GRPC = re.compile(r"[\w.:\[\]-]+:\d+")


def _server(endpoint: str) -> str:
    if _is_url(endpoint):
        return _place(endpoint)
    return endpoint if _GRPC.fullmatch(endpoint) else "(hidden: no URL)"


def _why(exporter: Any, endpoint: str | None, status: int | None, path: str) -> tuple[str, str]:
    """What is wrong, and the fix."""
    if status is not None:
        fix = _STATUS_FIX.get(status, "see the server's log, and that the endpoint is an OTLP one")
        return f"it answers {status}", fix.format(path=path)
    if getattr(exporter, "reason", "") == "certificate":
        return "its certificate is not trusted", (
            "set OTEL_EXPORTER_OTLP_CERTIFICATE to the file of the authority that signed it"
        )
    if not endpoint:
        return "a test span was not accepted", "see the exporter's own log"
    if not _is_url(endpoint) and not _GRPC.fullmatch(endpoint):
        return "the endpoint is no URL", "set it to one such as http://127.0.0.1:4318"
    return _unreachable(endpoint) or (
        "it can be reached, and does not answer as OTLP",
        "check the port (4318 is OTLP/HTTP's, 4317 gRPC's), http or https, and the server's log",
    )


def _unreachable(endpoint: str) -> tuple[str, str] | None:
    url = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    port = url.port or {"https": 443, "http": 80}.get(url.scheme, 4317)
    found = _in_time(partial(socket.create_connection, (url.hostname, port), timeout=1.0), 1.0)
    if isinstance(found, socket.socket):
        found.close()
        return None
    if isinstance(found, socket.gaierror):
        return f"no host is named {url.hostname}", "correct the endpoint"
    if isinstance(found, ConnectionRefusedError):
        return "nothing listens there", "start the server, or correct the endpoint"
    return "it cannot be reached", "correct the endpoint, or open the way to it (firewall)"


_STATUS_FIX: Final = {
    401: "OTEL_EXPORTER_OTLP_HEADERS lacks the key, or a valid one",
    403: "OTEL_EXPORTER_OTLP_HEADERS lacks the key, or a valid one",
    404: "correct the path: it ends in {path}, which OTEL_EXPORTER_OTLP_ENDPOINT leaves out",
    429: "it is asked too much, or a quota is used up: see the server's log",
    503: "it is not ready, or overloaded: try again, then see the server's log",
}


def _guess(endpoint: str | None) -> str | None:
    if endpoint is None or _server(endpoint) != endpoint:  # user and password are for that one
        return None
    host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    return f"http://[{host}]:{JAEGER_PORT}" if ":" in host else f"http://{host}:{JAEGER_PORT}"


_JAEGERS = re.compile(r'\s*{\s*"(result|error)"')
"""How it answers: with a trace, or with 404 and an error, which 2.13 calls text/plain."""


def _in_jaeger(query: str, span: Span, until: float) -> bool | None:
    """Whether Jaeger has the span in time; None where no Jaeger answers."""
    import requests  # noqa: PLC0415

    context = span.get_span_context()
    url = f"{query.rstrip('/')}/api/v3/traces/{context.trace_id:032x}"
    until = min(until, time.monotonic() + 3.0)
    answered = None
    while time.monotonic() < until:
        response = _in_time(partial(requests.get, url, timeout=1.0), 1.5)
        if not isinstance(response, requests.Response) or not _JAEGERS.match(response.text):
            return answered
        answered = False
        if response.ok and f"{context.span_id:016x}" in response.text:
            return True
        time.sleep(0.1)
    return answered
