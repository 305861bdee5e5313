# SPDX-License-Identifier: Apache-2.0
"""Test backends that fail: no reply waits, and each span is delivered or counted."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
import trustme
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from traced_retry import report, semconv
from traced_retry.errors import ExportError
from traced_retry.export.file_store import StoreExporter
from traced_retry.export.otlp import OtlpMetricExporter, OtlpSpanExporter
from traced_retry.export.processor import BoundedMetricReader, BoundedSpanProcessor

WRITER = Path(__file__).with_name("writer.py")
SDK = tuple(map(int, version("opentelemetry-sdk").split(".")[:2]))

pytestmark = pytest.mark.real_time


class Backend(ThreadingHTTPServer):
    """An OTLP/HTTP backend on 127.0.0.1 that answers as it is told, and keeps what it took.

    Args:
        answers: statuses, or None for no answer until the end; the last one repeats.
        tls: an SSL context, for https.
        headers: sent with each answer.
    """

    daemon_threads = True

    def __init__(self, *answers, tls=None, headers=(), delay=0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.headers = headers
        self.delay = delay
        self.asked = 0
        self.names = []
        self.over = threading.Event()
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.server_port}/v1/traces"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = server.answers[min(server.asked, len(server.answers) - 1)]
        server.asked += 1
        if answer is None:
            server.over.wait(60)
            return
        time.sleep(server.delay)
        if answer == 200:
            request = ExportTraceServiceRequest.FromString(body)
            server.names += [
                span.name
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        self.send_response(answer)
        for name, value in server.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Blocked(SpanExporter):
    """An exporter that keeps each batch once it is released."""

    def __init__(self, *, blocked=True):
        self.go = threading.Event()
        self.busy = threading.Event()
        self.names = []
        self.batches = []
        self.ended = False
        if not blocked:
            self.go.set()

    def export(self, spans):
        self.busy.set()
        self.go.wait(30)
        self.batches.append(len(spans))
        self.names += [span.name for span in spans]
        return SpanExportResult.SUCCESS

    def shutdown(self):
        self.ended = True


class Pipeline:
    """A tracer provider with one exporter behind our processor, and its drops."""

    def __init__(self, recorder, exporter, sampler=None, **settings):
        self.recorder = recorder
        self.exporter = exporter
        self.processor = BoundedSpanProcessor(
            exporter, "otlp", meter_provider=recorder.meter_provider, **settings
        )
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(self.processor)

    def make(self, count, first=0):
        tracer = self.provider.get_tracer("test")
        for number in range(first, first + count):
            tracer.start_span(str(number)).end()

    def close(self):
        """Shut down, and return the seconds that it took."""
        began = time.monotonic()
        self.provider.shutdown()
        return time.monotonic() - began

    @property
    def dropped(self):
        return self.recorder.counted(
            semconv.METRIC_EXPORT_DROPPED, semconv.EXPORTER, semconv.DROP_REASON
        )


@pytest.fixture
def pipeline(recorder):
    """Return a function that makes pipelines, and shut them down afterwards."""
    made = []

    def make(exporter, **settings):
        made.append(Pipeline(recorder, exporter, **settings))
        return made[-1]

    yield make
    for one in made:
        if isinstance(one.exporter, Blocked):
            one.exporter.go.set()
        one.close()


def messages(caplog):
    """Return the messages of all log records, at any level and from any logger."""
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def refused():
    """Return a URL with a key on a port that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces?key=sk-SECRET"


# --- faults -----------------------------------------------------------------------------------


def test_a_sound_backend_gets_all(pipeline, caplog):
    """Every span is delivered once. There is no drop and no log record."""
    with Backend(200) as backend:
        pipe = pipeline(OtlpSpanExporter(endpoint=backend.url))
        pipe.make(1_000)
        pipe.close()
    assert sorted(backend.names, key=int) == [str(n) for n in range(1_000)]
    assert pipe.dropped == {}
    assert messages(caplog) == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [(429, "rate_limited"), (502, "unavailable"), (503, "unavailable"), (504, "unavailable")]
    + [(status, "rejected") for status in (400, 401, 404, 413, 500)],
)
def test_a_status_is_the_reason(pipeline, caplog, status, reason):
    """A refused batch is counted by its reason, and logged at its start and at exit."""
    caplog.set_level(logging.DEBUG, "traced_retry")
    with Backend(status) as backend:
        pipe = pipeline(OtlpSpanExporter(endpoint=backend.url, timeout=0.1))
        pipe.make(30)
        assert not pipe.processor.force_flush()
        pipe.make(12)
        pipe.close()
    assert pipe.dropped == {("otlp", reason): 42}
    begins, sums = messages(caplog)
    assert begins.startswith(f"exporter otlp drops spans ({reason}); replies go on")
    assert sums == f"exporter otlp dropped 42 span(s): {reason} 42"


@pytest.mark.skipif(SDK < (1, 45), reason="the SDK's exporter takes 429 for final")
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_delays_batch(pipeline, form):
    """A backend that is busy for a second gets the batch after it, and no span is dropped."""
    later = datetime.now(UTC) + timedelta(seconds=2)
    value = "1" if form == "seconds" else later.strftime("%a, %d %b %Y %H:%M:%S GMT")
    with Backend(429, 200, headers=[("Retry-After", value)]) as backend:
        pipe = pipeline(OtlpSpanExporter(endpoint=backend.url))
        pipe.make(5)
        began = time.monotonic()
        assert pipe.processor.force_flush(5_000)
        assert 0.9 <= time.monotonic() - began <= 3
        assert backend.asked == 2
        assert len(backend.names) == 5
    assert pipe.dropped == {}


def test_refused(pipeline, caplog, refused):
    """A refused connection counts as ``connection``, and no URL or key is in the log."""
    caplog.set_level(logging.DEBUG, "traced_retry")
    pipe = pipeline(OtlpSpanExporter(endpoint=refused, timeout=0.1))
    pipe.make(42)
    assert not pipe.processor.force_flush()
    assert pipe.processor.force_flush()  # no span since then
    pipe.close()
    assert pipe.dropped == {("otlp", "connection"): 42}
    assert len(messages(caplog)) == 2
    assert "SECRET" not in caplog.text
    assert "127.0.0.1" not in caplog.text


def test_a_certificate_that_is_not_trusted(pipeline):
    """TLS with an unknown authority has its own reason."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
    with Backend(200, tls=tls) as backend:
        pipe = pipeline(OtlpSpanExporter(endpoint=backend.url, timeout=0.1))
        pipe.make(7)
        assert not pipe.processor.force_flush()
    assert pipe.dropped == {("otlp", "certificate"): 7}


def test_a_backend_that_hangs(pipeline):
    """A request without an answer counts as a timeout when the exporter's timeout is over."""
    with Backend(None) as backend:
        pipe = pipeline(OtlpSpanExporter(endpoint=backend.url, timeout=0.1))
        pipe.make(7)
        assert not pipe.processor.force_flush()
        assert pipe.dropped == {("otlp", "timeout"): 7}


def test_a_slow_backend_gets_all(pipeline):
    """The processor waits for a slow answer, and further spans queue up."""
    with Backend(200, delay=0.2) as backend:
        pipe = pipeline(OtlpSpanExporter(endpoint=backend.url), batch_size=10)
        pipe.make(30)
        assert pipe.close() >= 0.6
        assert len(backend.names) == 30
    assert pipe.dropped == {}


def test_a_full_disk(pipeline, caplog):
    """ENOSPC in the local store is counted and logged, and no exception is raised."""
    pipe = pipeline(StoreExporter("/dev/full"))
    pipe.make(9)
    pipe.close()
    assert pipe.dropped == {("otlp", "disk_full"): 9}
    assert len(messages(caplog)) == 2


def test_an_exporter_that_does_not_say_why(pipeline, refused):
    """The SDK's own exporter works too, and its drops are ``failed``."""
    pipe = pipeline(OTLPSpanExporter(endpoint=refused, timeout=0.1))
    pipe.make(3)
    pipe.close()
    assert pipe.dropped == {("otlp", "failed"): 3}


def test_an_exporter_that_raises(pipeline, caplog):
    """An exception counts as failed, is logged without its text, and the next batch is sent."""

    class Broken(Blocked):
        def export(self, spans):
            if not self.batches:
                self.batches.append(len(spans))
                raise RuntimeError("sk-SECRET")
            return super().export(spans)

    exporter = Broken(blocked=False)
    pipe = pipeline(exporter)
    pipe.make(3)
    assert not pipe.processor.force_flush()
    pipe.make(2)
    assert pipe.processor.force_flush()
    assert exporter.batches == [3, 2]
    assert pipe.dropped == {("otlp", "failed"): 3}
    assert "RuntimeError" in caplog.text
    assert "SECRET" not in caplog.text


# --- bounds -----------------------------------------------------------------------------------


def test_a_full_queue_drops_the_newest(pipeline):
    """The queue's size limits the held spans, including those being sent."""
    exporter = Blocked()
    pipe = pipeline(exporter, queue_size=10, batch_size=4)
    pipe.make(4)
    assert exporter.busy.wait(5)
    pipe.make(96, first=4)
    assert pipe.dropped == {("otlp", "queue_full"): 90}
    exporter.go.set()
    pipe.close()
    assert exporter.names == [str(n) for n in range(10)]
    assert pipe.dropped == {("otlp", "queue_full"): 90}


def test_counts_are_exact_under_threads(pipeline):
    """Created spans are delivered or dropped, with several threads and a full queue."""
    exporter = Blocked(blocked=False)
    pipe = pipeline(exporter, queue_size=20, batch_size=7)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: pipe.make(2_000, n * 2_000), range(4)))
    pipe.close()
    assert len(exporter.names) == len(set(exporter.names))
    assert len(exporter.names) + sum(pipe.dropped.values()) == 8_000
    assert max(exporter.batches) <= 7


def test_a_full_batch_goes_out_at_once(pipeline):
    """A batch that is full does not wait for the delay."""
    exporter = Blocked(blocked=False)
    pipe = pipeline(exporter, batch_size=5, delay=3600)
    pipe.make(4)
    assert not exporter.busy.wait(0.05)
    pipe.make(1)
    assert exporter.busy.wait(5)


def test_a_span_waits_no_longer_than_the_delay(pipeline):
    """A batch that does not fill goes out when the delay is over."""
    exporter = Blocked(blocked=False)
    pipeline(exporter, delay=0.05).make(1)
    assert exporter.busy.wait(5)


def test_flush_is_bounded(pipeline):
    """``force_flush`` keeps its timeout, and returns False if spans are left."""
    pipe = pipeline(Blocked())
    pipe.make(1)
    began = time.monotonic()
    assert pipe.processor.force_flush(100) is False
    assert 0.09 <= time.monotonic() - began < 2


def test_exit_is_bounded(pipeline, caplog):
    """Shutdown keeps its timeout, and drops each unconfirmed span once."""
    exporter = Blocked()
    pipe = pipeline(exporter, batch_size=4, within=0.2)
    pipe.make(10)
    assert exporter.busy.wait(5)
    assert 0.19 <= pipe.close() < 2
    assert exporter.ended
    assert pipe.dropped == {("otlp", "shutdown"): 10}
    assert messages(caplog) == ["exporter otlp dropped 10 span(s): shutdown 10"]
    exporter.go.set()
    pipe.make(2)
    assert pipe.dropped == {("otlp", "shutdown"): 12}


def test_a_flush_after_the_exit_has_nothing_to_wait_for(pipeline):
    """A flush after the exit returns at once, because the dropped spans are never sent."""
    exporter = Blocked()
    pipe = pipeline(exporter, within=0.1)
    pipe.make(1)
    pipe.close()
    began = time.monotonic()
    assert not pipe.processor.force_flush()
    assert time.monotonic() - began < 2


def test_exit_does_not_wait_for_a_retry(pipeline):
    """A wait before a retry is interrupted when the time is up, and the thread ends."""
    with Backend(503) as backend:
        pipe = pipeline(OtlpSpanExporter(endpoint=backend.url), within=0.2)
        pipe.make(3)
        assert pipe.close() < 2
        assert pipe.dropped == {("otlp", "shutdown"): 3}
        deadline = time.monotonic() + 5
        while any(t.name == "traced_retry export otlp" for t in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert pipe.dropped == {("otlp", "shutdown"): 3}


def test_an_idle_exit_is_immediate(pipeline):
    """Without spans neither flush nor shutdown waits, and a second shutdown has no effect."""
    pipe = pipeline(Blocked())
    assert pipe.processor.force_flush(0)
    assert pipe.close() + pipe.close() < 0.5


def test_only_sampled_spans_count(pipeline):
    """A span that the sampler drops is neither exported nor counted."""
    exporter = Blocked(blocked=False)
    pipe = pipeline(exporter, sampler=ALWAYS_OFF, queue_size=1)
    pipe.make(5)
    pipe.close()
    assert exporter.names == []
    assert pipe.dropped == {}


def test_counts_start_at_zero(recorder, pipeline):
    """Each reason has its series before the first drop, so that this drop is an increase."""
    pipeline(Blocked())
    points = recorder.points(semconv.METRIC_EXPORT_DROPPED)
    assert {dict(labels)[semconv.DROP_REASON]: n for labels, n in points.items()} == (
        dict.fromkeys(semconv.DROP_REASONS, 0)
    )


@pytest.mark.parametrize(
    "variable",
    ["OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_BSP_SCHEDULE_DELAY"],
)
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_bad_variable_is_an_error(monkeypatch, variable, value):
    """The message names the variable, its value and the expected values."""
    monkeypatch.setenv(variable, value)
    expected = re.escape(f"{variable} is {value!r}; it must be a whole number above 0")
    with pytest.raises(ExportError, match=expected):
        BoundedSpanProcessor(Blocked(), "otlp")


def test_the_standard_variables_hold(monkeypatch, pipeline):
    """``OTEL_BSP_*`` set the queue and batch sizes and the delay."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "6")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    exporter = Blocked()
    pipe = pipeline(exporter)
    pipe.make(9)
    exporter.go.set()
    pipe.close()
    assert exporter.batches == [2, 2, 2]
    assert pipe.dropped == {("otlp", "queue_full"): 3}


# --- metrics ----------------------------------------------------------------------------------


@pytest.fixture
def no_thread_left():
    """Wait for the threads that a test started. An exporter's thread would log in another test."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("answer", [None, 503])
def test_metrics_end_in_time_and_are_told_once(caplog, answer):
    """Flush and shutdown are bounded if a backend hangs or is busy, with one log record."""
    with Backend(answer) as backend:
        exporter = OtlpMetricExporter(endpoint=backend.url, timeout=0.3)
        provider = MeterProvider([BoundedMetricReader(exporter)], shutdown_on_exit=False)
        provider.get_meter("test").create_counter("c").add(1)
        began = time.monotonic()
        provider.force_flush(100)
        assert time.monotonic() - began < 1
        provider.shutdown()
        assert time.monotonic() - began < 3
    reason = "timeout" if answer is None else "unavailable"
    assert set(messages(caplog)) == {
        f"exporter otlp cannot deliver metrics ({reason}); the next export carries them"
    }


@pytest.mark.usefixtures("no_thread_left")
def test_metrics_never_hold_an_exit_up():
    """An exporter with a long timeout does not keep shutdown longer than a second."""
    with Backend(None) as backend:
        exporter = OtlpMetricExporter(endpoint=backend.url, timeout=60)
        provider = MeterProvider([BoundedMetricReader(exporter)], shutdown_on_exit=False)
        provider.get_meter("test").create_counter("c").add(1)
        began = time.monotonic()
        provider.shutdown()
        assert 0.9 <= time.monotonic() - began < 3


# --- a whole process --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason"), [(200, None), (None, "shutdown"), (503, "shutdown"), (400, "rejected")]
)
def test_a_process_ends_in_time(tmp_path, answer, reason):
    """A program ends within 5 s of its last line, with all spans stored and the sums logged."""
    path = tmp_path / "spans.jsonl"
    with Backend(answer) as backend:
        env = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": backend.url.removesuffix("/v1/traces")}
        writer = subprocess.Popen(
            [sys.executable, WRITER, "leave", str(path), "100"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout.readline() == "made\n"
        began = time.monotonic()
        _, said = writer.communicate(timeout=30)
        assert time.monotonic() - began < 5
    assert writer.returncode == 0
    assert len(report.read(path)) == 100
    assert "Traceback" not in said
    told = Counter(re.findall(r"otlp dropped (\d+) span\(s\): (\w+) \d+$", said, re.MULTILINE))
    assert told == ({("100", reason): 1} if reason else {})
