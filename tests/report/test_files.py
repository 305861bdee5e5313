# SPDX-License-Identifier: Apache-2.0
"""Where replies are read from: files, folders, other tools' variants; and what cannot be."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from contextlib import closing

import pytest

from traced_retry.report import ReportError, read

from .conftest import BEGAN, HEARD, Store, raw_spans


class TestFiles:
    def test_spans_of_others(self, varied):
        """They pass, even those that share a name with ours."""
        tracer = varied.provider.get_tracer("other")
        for name in ("generate_reply", "generate_reply.attempt", "llm_request"):
            tracer.start_span(name, attributes={"gen_ai.provider.name": "x"}).end()

        assert 5 == len(varied.read())

    def test_a_span_stored_twice(self, varied, tmp_path):
        """A Collector's copy beside the local store changes nothing."""
        copy = tmp_path / "copy.json"
        copy.write_text(varied.path.read_text())

        assert varied.read() == read([varied.path, copy]) == read(tmp_path)

    def test_a_folder(self, varied, tmp_path):
        """All that is named like a store, in it."""
        with closing(Store(tmp_path / "other.json")) as other:
            other.timed((0, 1, HEARD), seconds=1, at=5, OUTCOME="succeeded")
        (tmp_path / "notes.txt").write_text("generate_reply\n")
        (tmp_path / "pretty.json").write_text('{\n  "name": "generate_reply"\n}\n')

        replies = read(str(tmp_path))

        assert ([0, 5, 10, 20, 40, 50], 0) == (
            [r.start - BEGAN for r in replies],
            replies.unreadable_lines,
        )

    def test_gzip(self, varied, tmp_path):
        """As Collectors pack it, cut off or not."""
        packed = gzip.compress(varied.path.read_bytes())
        (tmp_path / "a.jsonl.gz").write_bytes(packed)
        (tmp_path / "b.jsonl.gz").write_bytes(packed[:-20])

        assert varied.read() == read(tmp_path / "a.jsonl.gz")
        assert 1 == read([varied.path, tmp_path / "b.jsonl.gz"]).unreadable_lines

    def test_pipe_in_a_folder_is_not_read(self, varied, tmp_path):
        """A pipe that is named like a store has no stored spans, and may never have a writer."""
        os.mkfifo(tmp_path / "pipe.jsonl")

        assert varied.read() == read(tmp_path)

    def test_pipe_is_read_once(self, varied, tmp_path):
        """A shell's ``<(zcat spans.jsonl.gz)`` can be a path."""
        here, there = os.pipe()
        os.write(there, varied.path.read_bytes())
        os.close(there)
        try:
            assert varied.read() == read(f"/dev/fd/{here}")
        finally:
            os.close(here)

    def test_numbers_as_other_tools_write_them(self, varied, tmp_path):
        """Times and ints as JSON numbers, spaces between, a byte order mark."""
        lines = [json.loads(line) for line in varied.path.read_text().splitlines()]
        for span in raw_spans(lines):
            for name in ("startTimeUnixNano", "endTimeUnixNano"):
                span[name] = int(span[name])
            for attribute in span["attributes"]:
                if "intValue" in attribute["value"]:
                    attribute["value"]["intValue"] = int(attribute["value"]["intValue"])
        path = tmp_path / "numbers.jsonl"
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")

        assert varied.read() == read(path)


class TestErrors:
    def test_no_such_file(self, tmp_path):
        """The message names the path and what to give instead."""
        with pytest.raises(ReportError, match=r"gone\.jsonl does not exist\. Give a file"):
            read(tmp_path / "gone.jsonl")

    def test_no_span_of_ours(self, tmp_path):
        """Likewise, with how much of it could not be read."""
        path = tmp_path / "spans.jsonl"
        path.write_text('{"resourceSpans":[{\n')

        with pytest.raises(ReportError, match=r"spans\.jsonl: no generate_reply span.*1 line"):
            read(path)

    def test_an_empty_folder(self, tmp_path):
        """It is a ValueError, for who does not know ours."""
        with pytest.raises(ValueError, match="no generate_reply span in there"):
            read(tmp_path)

    def test_pipe_without_writer_is_empty(self, tmp_path):
        """The command does not wait for a writer."""
        os.mkfifo(tmp_path / "pipe")

        with pytest.raises(ReportError, match="pipe: no generate_reply span in there"):
            read(tmp_path / "pipe")

    @pytest.mark.parametrize("name", ["x" * 300, "spans.jsonl/below"])
    def test_path_that_cannot_exist(self, name, tmp_path):
        """The system's words, in a line."""
        (tmp_path / "spans.jsonl").touch()

        with pytest.raises(ReportError, match=r"cannot be read: (File name too|Not a dir)"):
            read(tmp_path / name)

    @pytest.mark.parametrize("sign", ["", '{"resourceSpans":[{"scope":"traced_retry.", "a":"'])
    def test_line_of_400_mib_takes_little_memory(self, sign, tmp_path):
        """A small gzipped file cannot fill the memory, and the message names file and line."""
        path = tmp_path / "spans.jsonl.gz"
        with gzip.open(path, "wb", 1) as file:
            file.write(b"{}\n" + sign.encode())
            for _ in range(400):
                file.write(b" " * 2**20)
        tracemalloc.start()
        try:
            with pytest.raises(ReportError, match=r"gz: line 2 is longer than 32 MiB.*Remove the"):
                read(path)
            assert 100 * 2**20 > tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_text_file(self, tmp_path):
        """The message says that the file has another format."""
        path = tmp_path / "notes.txt"
        path.write_text("generate_reply failed\n")

        with pytest.raises(
            ReportError, match=r"notes\.txt is a text file, not OTLP-JSON lines\. G"
        ):
            read(path)

    def test_binary_file(self, tmp_path):
        """Likewise, for example of a picture."""
        path = tmp_path / "picture.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")

        with pytest.raises(ReportError, match=r"picture\.png is a binary file, not OTLP-JSON"):
            read(path)

    def test_what_cannot_be_read(self, tmp_path):
        """Permissions and the like, in the system's words."""
        path = tmp_path / "spans.jsonl"
        path.write_bytes(b"\x1f\x8bnot gzip at all")

        with pytest.raises(ReportError, match=r"spans\.jsonl cannot be read"):
            read(path)
