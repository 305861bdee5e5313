# SPDX-License-Identifier: Apache-2.0
"""Exporters that cannot be created when a job begins: a warning, and the call goes on."""

from __future__ import annotations

import socket

import pytest
from support.fresh import fresh

REPLY = """
import asyncio, traced_retry
from support.run_conversation import run_conversation
destination = traced_retry.enable().destination
result = destination, asyncio.run(run_conversation())
"""


@pytest.fixture
def used_port():
    """A port on which another process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def warnings(ended):
    """The log's records of exporters."""
    return [line for line in ended.log if line.startswith("WARNING traced_retry: exporter")]


def test_prometheus_port_in_use_leaves_the_spans(used_port, tmp_path):
    """The second job on a machine answers its call, and the log names the remedy."""
    ended = fresh(
        REPLY,
        OTEL_METRICS_EXPORTER="prometheus",
        OTEL_EXPORTER_PROMETHEUS_HOST="127.0.0.1",
        OTEL_EXPORTER_PROMETHEUS_PORT=used_port,
        XDG_STATE_HOME=tmp_path,
    )

    assert "" == ended.error
    assert {"requests": 1, "completed": 1} == ended.result[1]
    assert "generate_reply.attempt" in next(tmp_path.rglob("*.jsonl")).read_text()
    (warning,) = warnings(ended)
    assert "prometheus is left out" in warning
    assert "Address already in use" in warning
    assert "agent_prometheus.py" in warning


def test_exporter_without_an_error_number_is_named_without_its_text(tmp_path):
    """The text of an exception may hold a key."""
    ended = fresh(
        REPLY,
        OTEL_METRICS_EXPORTER="prometheus",
        OTEL_EXPORTER_PROMETHEUS_PORT="sk-secret",
        XDG_STATE_HOME=tmp_path,
    )

    assert {"requests": 1, "completed": 1} == ended.result[1]
    (warning,) = warnings(ended)
    assert "exporter prometheus is left out, because it cannot be created (ValueError)" in warning
    assert "sk-secret" not in "".join(ended.log)


FILE = """
file_format: "1.0"
tracer_provider:
  processors:
    - batch: {{exporter: {{traced_retry_store: {{}}}}}}
    - batch: {{exporter: {{console: {{}}}}}}
meter_provider:
  readers:
    - pull: {{exporter: {{prometheus/development: {{host: 127.0.0.1, port: {port}}}}}}}
instrumentation/development:
  python:
    traced_retry: {{deadline: 7}}
"""


def test_file_keeps_what_can_be_created(used_port, tmp_path):
    """A store that is not writable and a port in use are left out, and the rest is in force."""
    (tmp_path / "file").touch()
    (tmp_path / "otel.yaml").write_text(FILE.format(port=used_port))
    ended = fresh(
        REPLY
        + """
from opentelemetry import metrics, trace
processors = trace.get_tracer_provider()._active_span_processor._span_processors
ours = [p for p in processors if type(p).__name__ == "BoundedSpanProcessor"]
result = result[1], len(ours), type(metrics.get_meter_provider()).__name__
""",
        OTEL_CONFIG_FILE=tmp_path / "otel.yaml",
        XDG_STATE_HOME=tmp_path / "file",
    )

    assert "" == ended.error
    assert ({"requests": 1, "completed": 1}, 1, "_ProxyMeterProvider") == ended.result
    store, port = warnings(ended)
    assert "traced_retry_store is left out" in store
    assert "folder that this process can write" in store
    assert "Address already in use" in port


def test_exporter_of_the_sdk_leaves_ours(tmp_path):
    """An exporter that the SDK creates and that fails leaves the provider to our own."""
    (tmp_path / "file").touch()
    (tmp_path / "otel.yaml").write_text(f"""
file_format: "1.0"
tracer_provider:
  processors:
    - simple: {{exporter: {{otlp_file/development: {{output_stream: "file://{tmp_path}/file/x"}}}}}}
    - batch: {{exporter: {{traced_retry_store: {{}}}}}}
""")
    ended = fresh(REPLY, OTEL_CONFIG_FILE=tmp_path / "otel.yaml", XDG_STATE_HOME=tmp_path)

    assert "" == ended.error
    assert "generate_reply.attempt" in next(tmp_path.rglob("*.jsonl")).read_text()
    (warning,) = warnings(ended)
    assert f"of {tmp_path / 'otel.yaml'} is left out" in warning
    assert "folder that this process can write" in warning
