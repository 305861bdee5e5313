# SPDX-License-Identifier: Apache-2.0
"""Send requests to servers, and diagnose failures."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from traced_retry.core.sanitize import is_url, redact_url

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span

JAEGER_PORT: Final = 16686
"""Jaeger's query port, used on the endpoint's host if ``jaeger`` is not given."""


def deliver(exporter: Any, export: Callable[[], Any], until: float) -> tuple[bool, int | None]:
    """Return whether an export succeeded in time, and the last HTTP status if there was one."""
    statuses: list[int] = []
    session = _session(exporter)
    if session is not None:
        session.hooks["response"].append(lambda r, **_: statuses.append(r.status_code))
    # Use half of the time, so that a dead server leaves time for the next one.
    result = _in_time(export, max(0.5, (until - time.monotonic()) / 2))
    return getattr(result, "name", "") == "SUCCESS", statuses[-1] if statuses else None


T = TypeVar("T")


def _in_time(function: Callable[[], T], seconds: float) -> T | Exception | None:
    """Return the result or the exception, or None after a timeout. DNS lookups have no timeout."""
    results: list[T | Exception] = []

    def work() -> None:
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001 - the caller handles it
            results.append(error)

    thread = threading.Thread(target=work, name="traced_retry doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _session(exporter: Any) -> Any:
    """Return the exporter's requests.Session. In newer SDKs its client's transport holds it."""
    transport = getattr(getattr(exporter, "_client", None), "_transport", None)
    session = getattr(exporter, "_session", None) or getattr(transport, "_session", None)
    return session if hasattr(session, "hooks") else None


_GRPC = re.compile(r"[\w.:\[\]-]+:\d+")


def server(endpoint: str) -> str:
    """Return an endpoint without secrets."""
    return endpoint if _GRPC.fullmatch(endpoint) else redact_url(endpoint)


def diagnose(exporter: Any, endpoint: str | None, status: int | None, path: str) -> tuple[str, str]:
    """Return the problem and the fix."""
    if status is not None:
        fix = _STATUS_FIX.get(status, "see the server's log, and that the endpoint is an OTLP one")
        return f"it answers {status}", fix.format(path=path)
    if getattr(exporter, "reason", "") == "certificate":
        return "its certificate is not trusted", (
            "set OTEL_EXPORTER_OTLP_CERTIFICATE to the file of the authority that signed it"
        )
    if not endpoint:
        return "a test span was not accepted", "see the exporter's own log"
    if not is_url(endpoint) and not _GRPC.fullmatch(endpoint):
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


def jaeger_query_url(endpoint: str | None) -> str | None:
    """Return the query URL of a Jaeger that takes spans at ``endpoint``."""
    if endpoint is None or not (is_url(endpoint) or _GRPC.fullmatch(endpoint)):
        return None
    url = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    if url.username is not None or url.query:
        return None  # A server that needs a key is not a Jaeger on the same host.
    host = url.hostname or ""
    return f"http://[{host}]:{JAEGER_PORT}" if ":" in host else f"http://{host}:{JAEGER_PORT}"


_JAEGERS = re.compile(r'\s*{\s*"(result|error)"')
"""Start of a Jaeger's answer: a trace, or 404 with an error (text/plain in 2.13)."""


def in_jaeger(query: str, span: Span, until: float) -> bool | None:
    """Return whether Jaeger has the span in time, or None if no Jaeger answers."""
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
