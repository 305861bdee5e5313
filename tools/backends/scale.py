# SPDX-License-Identifier: Apache-2.0
"""Measure the telemetry of a reply, and print the figures of docs/scale.md: spans, bytes, series.

``python tools/backends/scale.py`` takes a minute with the servers of tests/backends. It compares a
call of 1 reply with a call of 21. The difference is the cost of 20 replies.
"""

from __future__ import annotations

import gzip
import http.server
import logging
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from backends.agent import Job
from backends.fleet import play
from backends.reading import settle
from backends.servers import Collector, Jaeger, Prometheus, free_ports
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

MORE = 20
SCRIPTS = {
    "heard at once": "ok",
    "heard after one retry": ",".join(["error:server_error,ok"] * (MORE + 1)),
    "failed after three attempts": "error:server_error",
}


class Receiver:
    """An OTLP/HTTP endpoint that keeps each request."""

    def __enter__(self):
        self.bodies = {"/v1/traces": [], "/v1/metrics": []}
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.bodies[self.path].append(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def spans(self):
        """Yield each span received."""
        for body in self.bodies["/v1/traces"]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    yield from scope.spans


def call(script, replies, **environment):
    """Run one call of that many replies, and return the receiver."""
    with Receiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, **environment}
        play([(Job("openai", replies, environment=environment), script)])
        return receiver


def spans_and_bytes():
    """Print the spans and bytes per reply, and of the call around it."""
    print("| a reply | our spans | LiveKit's spans | bytes of spans | of these ours | gzip |")
    print("|---|---|---|---|---|---|")
    for name, script in SCRIPTS.items():
        one, many = call(script, 1), call(script, 1 + MORE)
        print(
            f"| {name} "
            + "".join(
                f"| {(measure(many) - measure(one)) / MORE:,.1f} "
                for measure in (_ours, _livekits, _bytes, _our_bytes, _gzipped)
            )
            + "|"
        )
    one = call("ok", 1)
    print(
        f"\nA call of one clean reply: {_ours(one) + _livekits(one)} spans, {_bytes(one):,} bytes, "
        f"gzip {_gzipped(one):,}: {dict(Counter(span.name for span in one.spans()))}"
    )
    points = Counter(
        metric.name
        for body in one.bodies["/v1/metrics"][-1:]
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for _ in getattr(metric, metric.WhichOneof("data")).data_points
    )
    size = len(one.bodies["/v1/metrics"][-1])
    print(f"its metrics, per export: {size:,} bytes, {sum(points.values())} points: {dict(points)}")


def _ours(receiver):
    return sum(span.name.startswith("generate_reply") for span in receiver.spans())


def _livekits(receiver):
    return sum(not span.name.startswith("generate_reply") for span in receiver.spans())


def _bytes(receiver):
    return sum(span.ByteSize() for span in receiver.spans())


def _our_bytes(receiver):
    ours = (span for span in receiver.spans() if span.name.startswith("generate_reply"))
    return sum(span.ByteSize() for span in ours)


def _gzipped(receiver):
    return sum(len(gzip.compress(body)) for body in receiver.bodies["/v1/traces"])


SERIES = {
    "from spans, ours": '{__name__=~"traces_span_metrics.*",span_name=~"generate_reply.*"}',
    "from spans, LiveKit's": '{__name__=~"traces_span_metrics.*",span_name!~"generate_reply.*"}',
    "from agents' metrics, ours, per process": '{__name__=~"traced_retry.*"}',
    "from agents' metrics, LiveKit's too, per process": '{job="livekit-agent"}',
}


def series(folder):
    """Print the number of series of one provider's three calls, on both paths."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with (
        Jaeger(folder) as jaeger,
        Collector(folder, traces=jaeger.grpc, prometheus=url) as collector,
        Prometheus(folder, counts=collector.counts, port=port) as prometheus,
    ):
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        play([(Job("openai", 5, environment=environment), s) for s in SCRIPTS.values()])
        settle(prometheus, "livekit-agent")
        print("\nseries, of one provider with all three kinds of reply:")
        for name, selector in SERIES.items():
            by = "by (instance) " if "per process" in name else ""
            counts = sorted(prometheus.query(f"count {by}({selector})").values())
            print(f"{name}: {', '.join(f'{count:g}' for count in counts)}")


def disk(folder):
    """Print the size of badger's files after it was closed, per reply."""
    badger = folder / "badger"
    with Jaeger(folder, badger=badger) as jaeger:
        before = _size(badger)
        to_jaeger = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": jaeger.endpoint,
            "OTEL_METRICS_EXPORTER": "none",
        }
        play([(Job("openai", 500, environment=to_jaeger), "ok")])
    print(f"badger, per clean reply of a long call: {(_size(badger) - before) / 500:,.0f} bytes")


def _size(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    spans_and_bytes()
    with tempfile.TemporaryDirectory() as made:
        series(Path(made))
        disk(Path(made))
