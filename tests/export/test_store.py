# SPDX-License-Identifier: Apache-2.0
"""Test the local store: whole lines, bounded files, and the remains of a killed process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.fresh import fresh

from traced_retry import report, semconv
from traced_retry.errors import ExportError
from traced_retry.export.file_store import StoreExporter, latest_store, new_store, store_directory
from traced_retry.export.setup import store_providers

WRITER = Path(__file__).with_name("writer.py")


@pytest.fixture
def state(tmp_path, monkeypatch):
    """Return the user's state directory for this test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return store_directory()


def spans(count, first=1):
    """Return numbered reply spans, each about 900 bytes as JSON."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    for number in range(first, first + count):
        attributes = {semconv.PROVIDER: "openai", semconv.ATTEMPTS: number, "padding": "x" * 400}
        provider.get_tracer("test").start_span(semconv.SPAN_REPLY, attributes=attributes).end()
    return kept.get_finished_spans()


def numbers(*paths):
    """Return the numbers of the replies in files or folders, as a report reads them."""
    return sorted(reply.attempt_count for reply in report.read(paths))


def run(*words, **kwargs):
    """Yield the writer's output line by line."""
    done = subprocess.run(
        [sys.executable, WRITER, *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_batch_is_one_line_of_otlp_json(tmp_path):
    """A line is OTLP's TracesData as JSON with hex ids, in a file for the user alone."""
    made = spans(3)
    store = StoreExporter(tmp_path / "new" / "spans.jsonl")
    assert store.export(made[:2]) is SpanExportResult.SUCCESS
    assert store.export(made[2:]) is SpanExportResult.SUCCESS
    store.shutdown()
    lines = (tmp_path / "new" / "spans.jsonl").read_text().splitlines()
    parsed = [json_format.Parse(line, TracesData()) for line in lines]
    sizes = [len(p.resource_spans[0].scope_spans[0].spans) for p in parsed]
    assert sizes == [2, 1]
    first = json.loads(lines[0])["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert first["traceId"] == f"{made[0].context.trace_id:032x}"
    assert numbers(tmp_path / "new") == [1, 2, 3]
    assert (tmp_path / "new" / "spans.jsonl").stat().st_mode & 0o777 == 0o600


def test_rotates_and_keeps_the_newest(tmp_path):
    """Each file and all files keep their limits, and the oldest spans are deleted first."""
    store = StoreExporter(tmp_path / "spans.jsonl", file_bytes=5_000, total_bytes=20_000)
    for span in spans(60):
        assert store.export([span]) is SpanExportResult.SUCCESS
    store.shutdown()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert max(sizes) <= 5_000
    assert 20_000 <= sum(sizes) <= 25_000
    kept = numbers(tmp_path)
    assert kept == list(range(61 - len(kept), 61))


def test_a_batch_larger_than_a_file_is_written(tmp_path):
    """A batch that is larger than a file gets its own file and is not split."""
    store = StoreExporter(tmp_path / "spans.jsonl", file_bytes=1_000)
    for first in (1, 6):
        assert store.export(spans(5, first)) is SpanExportResult.SUCCESS
    store.shutdown()
    assert len(list(tmp_path.iterdir())) == 2
    assert numbers(tmp_path) == list(range(1, 11))


def test_deletes_nothing_of_others(tmp_path):
    """Outside our folder only files that this store rotated are deleted."""
    others = [tmp_path / name for name in ("notes.jsonl", "spans-2026Z.jsonl", "spans-Z.txt")]
    for path in others:
        path.write_text("x" * 1_000)
        os.utime(path, (0, 0))
    store = StoreExporter(tmp_path / "spans.jsonl", file_bytes=1_000, total_bytes=1_000)
    for span in spans(9):
        store.export([span])
    store.shutdown()
    assert [path.exists() for path in others] == [True] * 3
    assert len(list(tmp_path.iterdir())) <= len(others) + 2


def test_our_own_folder_is_bounded(state):
    """Stores of earlier processes are deleted, oldest first, when a new one is opened."""
    state.mkdir(parents=True)
    for age in range(10):
        old = state / f"agent-{age}.jsonl"
        old.write_text("x" * 1_000)
        os.utime(old, (1_000 - age, 1_000 - age))
    StoreExporter(new_store("agent"), total_bytes=3_500).shutdown()
    assert {p.name for p in state.glob("agent-?.jsonl")} == {f"agent-{n}.jsonl" for n in range(3)}


def test_a_deleted_file_is_begun_anew(tmp_path):
    """A store with a deleted file continues in a new one, and reports no loss."""
    path = tmp_path / "spans.jsonl"
    store = StoreExporter(path)
    made = spans(2)
    store.export(made[:1])
    path.unlink()
    assert store.export(made[1:]) is SpanExportResult.SUCCESS
    store.shutdown()
    assert numbers(path) == [2]


def test_an_unfinished_line_does_not_spoil_the_next(tmp_path):
    """The unfinished line of a killed process is ended before the next one."""
    path = tmp_path / "spans.jsonl"
    store = StoreExporter(path)
    store.export(spans(1))
    store.shutdown()
    with path.open("a") as file:
        file.write('{"resourceSpans":[{"scopeSpans":[{"spans":[{"name":"gener')
    store = StoreExporter(path)
    store.export(spans(1, first=2))
    store.shutdown()
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    json.loads(lines[0])
    json.loads(lines[2])
    read = report.read(path)
    assert sorted(r.attempt_count for r in read) == [1, 2]
    assert read.unreadable_lines == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_a_full_disk_is_said():
    """ENOSPC fails the batch with that reason, and no exception is raised."""
    store = StoreExporter("/dev/full")
    assert store.export(spans(1)) is SpanExportResult.FAILURE
    assert store.reason == "disk_full"
    store.shutdown()


@pytest.mark.skipif(sys.platform == "win32", reason="needs file-size limits")
def test_what_fits_no_longer_is_taken_back(tmp_path):
    """A batch that fits in part leaves no partial line, and later batches follow."""
    path = tmp_path / "spans.jsonl"
    said, then = run("full", str(path))
    reason, failed, size = said.split()
    assert reason == "disk_full"
    assert then == "SUCCESS"
    assert int(size) < 20_000
    kept = numbers(path)
    assert kept == [*range(1, int(failed)), int(failed) + 1]
    assert report.read(path).unreadable_lines == 0


@pytest.mark.parametrize(
    "name", ["team/agent", "../../../x", "{state}/absolute", "x" * 300, "ü" * 300, ".."]
)
@pytest.mark.parametrize("preset", [None, "local"])
def test_any_service_name_gives_a_store_in_the_folder(name, preset, state):
    """A service name is part of the file's name and never leads to another folder."""
    ended = fresh(
        f"""
import traced_retry
from opentelemetry import trace
tracing = traced_retry.enable(preset={preset!r})
trace.get_tracer("t").start_span("s").end()
result = tracing.flush()
""",
        XDG_STATE_HOME=state.parents[1],
        OTEL_SERVICE_NAME=name.format(state=state.parents[1]),
    )

    assert ("", True) == (ended.error, ended.result)
    (store,) = [path for path in state.parents[2].rglob("*") if path.is_file()]
    assert (state, store) == (store.parent, latest_store())


def test_only_files_count_as_stores(state):
    """A pipe or a folder with the name of a store is neither read nor deleted."""
    state.mkdir(parents=True)
    os.mkfifo(state / "pipe.jsonl")
    (state / "folder.jsonl").mkdir()
    StoreExporter(new_store("agent"), total_bytes=0).shutdown()

    assert latest_store().name.startswith("agent-")
    assert {"pipe.jsonl", "folder.jsonl"} <= {path.name for path in state.iterdir()}


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    """A store below a file is an error that names it and the remedy."""
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"spans\.jsonl cannot be written .*--store"):
        store_providers(tmp_path / "file" / "spans.jsonl", "test")


def test_nothing_is_written_after_shutdown(tmp_path):
    """After shutdown the store fails a late batch and does not change its file."""
    store = StoreExporter(tmp_path / "spans.jsonl")
    made = spans(2)
    store.export(made[:1])
    store.shutdown()
    assert store.export(made[1:]) is SpanExportResult.FAILURE
    assert numbers(tmp_path) == [1]


def test_a_lost_folder_comes_back(tmp_path):
    """Without its folder the store fails the batch, and stores spans once it can create it."""
    folder = tmp_path / "gone"
    store = StoreExporter(folder / "spans.jsonl")
    (folder / "spans.jsonl").unlink()
    folder.rmdir()
    folder.write_text("in the way")
    assert store.export(spans(1)) is SpanExportResult.FAILURE
    assert store.reason == "failed"
    folder.unlink()
    assert store.export(spans(1, first=2)) is SpanExportResult.SUCCESS
    store.shutdown()
    assert numbers(folder) == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_writes_its_own_file(tmp_path):
    """Each process's spans are stored once, in its own file."""
    run("fork", str(tmp_path / "spans.jsonl"), env={**os.environ, "PYTHONWARNINGS": "ignore"})
    files = {path.name == "spans.jsonl": numbers(path) for path in tmp_path.iterdir()}
    assert files == {True: [1, 3], False: [2]}


def test_several_processes_write_at_once(state):
    """Each process has its own file, also with the same name, and no span is lost or mixed."""
    command = [sys.executable, WRITER, "named", "agent", "300"]
    writers = [subprocess.Popen(command) for _ in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert [numbers(path) for path in state.iterdir()] == [list(range(1, 301))] * 4
    assert latest_store() in set(state.iterdir())


@pytest.mark.parametrize("seed", range(6))
def test_survives_sigkill(tmp_path, seed):
    """A process killed at any moment leaves each flushed span once, in readable lines."""
    path = tmp_path / "spans.jsonl"
    writer = subprocess.Popen(
        [sys.executable, WRITER, "flood", str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "flushed 50\n"
    time.sleep(random.Random(seed).uniform(0, 0.3))
    writer.send_signal(signal.SIGKILL)
    said = [50, *(int(line.split()[1]) for line in writer.communicate()[0].splitlines())]
    assert writer.returncode == -signal.SIGKILL
    *whole, last = path.read_bytes().split(b"\n")
    for line in whole:
        json.loads(line)
    found = report.read(path)
    counts = Counter(reply.attempt_count for reply in found)
    kept = len(counts)
    assert counts == dict.fromkeys(range(1, kept + 1), 1)
    assert said[-1] <= kept <= said[-1] + 50
    assert found.unreadable_lines == (1 if last else 0)
    # And whoever opens it next goes on with a whole line.
    store = StoreExporter(path)
    store.export(spans(1, first=kept + 1))
    store.shutdown()
    assert numbers(path) == list(range(1, kept + 2))
