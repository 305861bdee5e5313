# SPDX-License-Identifier: Apache-2.0
"""A real Collector keeps queued spans over a SIGKILL, hides words, and refuses unknown senders."""

from __future__ import annotations

import re
import ssl
import urllib.error
import urllib.request

import pytest
import trustme
from backends import servers
from backends.servers import EXPORTERS, Collector, Jaeger, attributes, until
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from traced_retry import semconv

pytestmark = pytest.mark.real_time

REPLIES = 20
WORDS = ("lk.pii.user_input", "gen_ai.input.messages", "gen_ai.tool.call.arguments")
HIDDEN = "****"


def lost_replies():
    """Return the spans of lost replies, which every Collector keeps, with a caller's words."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "lost"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("lost")
    known = {semconv.OUTCOME: "exhausted", semconv.PROVIDER: "openai"}
    for _ in range(REPLIES):
        with tracer.start_as_current_span("generate_reply") as span:
            span.set_attributes({**known, **dict.fromkeys(WORDS, "my card number")})
            span.add_event("said", {WORDS[0]: "my card number"})
    return memory.get_finished_spans()


def queued(collector):
    """Return the number of batches that wait for the backend."""
    url = f"http://127.0.0.1:{collector.itself}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        sizes = re.findall(
            r'^otelcol_exporter_queue_size\{.*exporter="otlp_grpc".*\} (\d+)',
            response.read().decode(),
            re.MULTILINE,
        )
    return sum(map(int, sizes))


def test_queue_outlives_a_killed_collector(tmp_path):
    """Spans that wait for Jaeger arrive after a SIGKILL and a restart, without a caller's words."""
    for name in ("otelcol", "jaeger"):
        servers.command(name)
    jaeger = Jaeger(tmp_path)
    collector = Collector(tmp_path, traces=jaeger.grpc, prometheus="http://127.0.0.1:9")
    with collector:
        exporter = OTLPSpanExporter(endpoint=f"{collector.endpoint}/v1/traces")
        assert SpanExportResult.SUCCESS is exporter.export(lost_replies())
        until(lambda: queued(collector), what="a batch in the queue")
        collector.kill()
        with jaeger:
            collector.__enter__()

            def arrived():
                found = jaeger.traces("lost")
                return found if len(found) == REPLIES else None

            traces = until(arrived, what="every lost reply in Jaeger")

    found = [attributes(span) for (span,) in traces.values()]
    assert [] == [of for of in found if "exhausted" != of[semconv.OUTCOME]]
    assert {HIDDEN} == {of[name] for of in found for name in WORDS}
    assert "card number" not in repr(traces)


def test_commented_tls_and_token_are_enforced(tmp_path):
    """With the lines after ``#:`` the Collector takes spans only with its token."""
    servers.command("otelcol")
    text = (EXPORTERS / "collector/collector.yaml").read_text()
    config = tmp_path / "collector.yaml"
    config.write_text(text.replace("#: ", ""))
    authority = trustme.CA()
    pem = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    pem.write_to_path(tmp_path / "server.pem")
    secrets = {
        "COLLECTOR_CERT": str(tmp_path / "server.pem"),
        "COLLECTOR_KEY": str(tmp_path / "server.pem"),
        "COLLECTOR_TOKEN": "token-of-the-test",
        "TRACES_AUTHORIZATION": "Bearer of-the-test",
        "PROMETHEUS_AUTHORIZATION": "Bearer of-the-test",
    }
    trusting = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())

    def status(**headers):
        url = collector.endpoint.replace("http:", "https:") + "/v1/traces"
        headers["content-type"] = "application/json"
        request = urllib.request.Request(url, b"{}", headers)
        try:
            with urllib.request.urlopen(request, timeout=5, context=trusting) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    with Collector(
        tmp_path,
        traces="127.0.0.1:9",
        prometheus="http://127.0.0.1:9",
        config=config,
        environment=secrets,
    ) as collector:
        assert 401 == status()
        assert 401 == status(authorization="Bearer another")
        assert 200 == status(authorization="Bearer token-of-the-test")
