# SPDX-License-Identifier: Apache-2.0
"""Before several Collectors: all spans of a call go to the same one, whoever sent them when."""

from __future__ import annotations

import contextlib
import random

import pytest
from backends import servers
from backends.servers import EXPORTERS, Jaeger, Process, free_ports, until
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

pytestmark = pytest.mark.real_time

CALLS, REPLIES = 40, 5


@contextlib.contextmanager
def load_balancer(folder, addresses):
    """The shipped configuration, but for the name by which it asks for the Collectors; its URL."""
    ports = dict(zip(("OTLP_GRPC", "OTLP_HTTP", "HEALTH", "INTERNAL"), free_ports(4), strict=True))
    (folder / "addresses.yaml").write_text(
        "exporters: {loadbalancing: {resolver: {dns: null, static: {hostnames: "
        f"[{', '.join(addresses)}]}}}}}}}}\n"
        "service: {telemetry: {metrics: {level: none}}}\n"
    )
    with Process(
        "otelcol",
        [
            f"--config={EXPORTERS / 'collector/load-balancer.yaml'}",
            f"--config={folder / 'addresses.yaml'}",
        ],
        f"http://127.0.0.1:{ports['HEALTH']}/status",
        folder,
        {f"COLLECTOR_{name}_PORT": str(port) for name, port in ports.items()},
    ):
        yield f"http://127.0.0.1:{ports['OTLP_HTTP']}"


def calls():
    """The spans of some calls, by call."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "calls"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("calls")
    for _ in range(CALLS):
        with tracer.start_as_current_span("job_entrypoint"):
            for _ in range(REPLIES):
                tracer.start_span("generate_reply").end()
    return list(memory.get_finished_spans())


def test_a_call_is_at_one_of_them(tmp_path):
    """Sent in batches of seven, mixed; each call is whole at one, and both have some."""
    servers.command("otelcol")
    spans = calls()
    random.Random(7).shuffle(spans)
    with contextlib.ExitStack() as stack:
        jaegers = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            jaegers.append(stack.enter_context(Jaeger(tmp_path / name)))
        url = stack.enter_context(load_balancer(tmp_path, [jaeger.grpc for jaeger in jaegers]))
        exporter = OTLPSpanExporter(endpoint=f"{url}/v1/traces")
        for first in range(0, len(spans), 7):
            assert SpanExportResult.SUCCESS is exporter.export(spans[first : first + 7])

        def stored():
            found = [jaeger.traces("calls") for jaeger in jaegers]
            whole = sum(len(spans) for traces in found for spans in traces.values())
            return found if whole == len(spans) else None

        found = until(stored, what="every span being stored")

    assert all(found)
    assert CALLS == sum(len(traces) for traces in found)
    assert {REPLIES + 1} == {len(spans) for traces in found for spans in traces.values()}
