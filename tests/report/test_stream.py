# SPDX-License-Identifier: Apache-2.0
"""Large data: replies are given out while the file is read, selected, and held no longer."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest

from traced_retry.errors import UsageError
from traced_retry.report import Newest, ReplyStream, Selection, Summary, parse_since, read

from .conftest import BEGAN, FAILED, HEARD, raw_spans

LOST = {"OUTCOME": "exhausted", "STOP_REASON": "max_attempts", "ERROR_TYPE": "server_error"}


def stream(path, **conditions):
    """Return the start of each selected reply, in seconds after all began."""
    return sorted(r.start - BEGAN for r in ReplyStream(path, Selection(**conditions)))


def reformat(path, change, target):
    """Write each batch again, after ``change`` was applied to the batch."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


def name_first(batch):
    """Put the name before the trace id, as no known writer does."""
    for span in raw_spans([batch]):
        span.update({key: span.pop(key) for key in list(span) if key != "name"})


def resource_last(batch):
    """Put the resource after the scopes."""
    for holder in batch["resourceSpans"]:
        holder["resource"] = holder.pop("resource")


def links(batch):
    """Give each span a link and an event that is named like a span of ours."""
    for span in raw_spans([batch]):
        span["events"] = [{"timeUnixNano": "1", "name": "say"}]
        span["links"] = [{"traceId": "0" * 31 + "1", "spanId": "0" * 15 + "1"}]


@pytest.mark.parametrize("change", [name_first, resource_last, links])
@pytest.mark.parametrize("conditions", [{}, {"failed": True}])
def test_every_form_of_the_same_spans_gives_the_same_replies(varied, tmp_path, change, conditions):
    """Order of keys, links and events do not matter."""
    other = reformat(varied.path, change, tmp_path / "other.jsonl")
    selection = Selection(**conditions)

    expected = sorted(ReplyStream(varied.path, selection), key=lambda r: r.start)
    assert expected
    assert expected == sorted(ReplyStream(other, selection), key=lambda r: r.start)


class TestSelection:
    def test_failed(self, varied):
        """Recovered, interrupted and incomplete replies are left out, and attempts are complete."""
        (reply,) = ReplyStream(varied.path, Selection(failed=True))

        assert (20.0, 2) == (reply.start - BEGAN, len(reply.attempts))

    def test_provider(self, varied):
        """The name must be equal."""
        assert [20.0] == stream(varied.path, provider="azure.ai.openai")
        assert [] == stream(varied.path, provider="azure")

    def test_service(self, varied, tmp_path):
        """The service of each resource in one line counts for its own spans."""

        def rename(batch):
            (holder,) = batch["resourceSpans"]
            other = json.loads(json.dumps(holder).replace("unknown_service", "billing"))
            for span in raw_spans([{"resourceSpans": [other]}]):
                span["traceId"] = "g" + span["traceId"][1:]  # no other trace id has this digit
            batch["resourceSpans"].append(other)

        path = reformat(varied.path, rename, tmp_path / "two.jsonl")
        found = list(ReplyStream(path, Selection(service="billing:python")))

        assert 10 == len(read(path))
        assert 5 == len(found)
        assert {"g"} == {reply.trace_id[0] for reply in found}

    def test_since(self, varied):
        """A reply that started at the time is included."""
        assert [40.0, 50.0] == stream(varied.path, since=BEGAN + 40.0)

    def test_trace(self, varied):
        """The first digits are enough."""
        reply = varied.read()[1]

        assert [10.0] == stream(varied.path, trace=reply.trace_id)
        assert 10.0 in stream(varied.path, trace=reply.trace_id[:8])

    def test_no_match_is_no_error(self, varied):
        """The number of replies read is known."""
        replies = ReplyStream(varied.path, Selection(provider="gone"))

        assert ([], 5) == (list(replies), replies.found)

    def test_only_succeeded_replies_are_no_error(self, store):
        """Spans that are skipped as text are spans of ours."""
        store.timed((0, 1, HEARD), seconds=1, OUTCOME="succeeded")

        assert [] == stream(store.path, failed=True)

    def test_error_code_that_reads_like_a_result(self, store):
        """Only the result itself marks a reply that succeeded."""
        store.timed((0, 1, {**FAILED, "ERROR_CODE": "succeeded"}), seconds=1, **LOST)

        (reply,) = ReplyStream(store.path, Selection(failed=True))
        assert ("succeeded",) == reply.codes


class TestNewest:
    @pytest.mark.parametrize("number", [1, 2, 4, 5, 9, None])
    def test_newest_by_start(self, varied, number):
        """The newest replies come in the order of their start."""
        replies = varied.read()
        newest = Newest(number)
        for reply in reversed(replies):
            newest.add(reply)

        assert replies[-(number or 5) :] == list(newest)

    def test_zero(self, varied):
        """No reply is kept."""
        newest = Newest(0)
        newest.add(varied.read()[0])

        assert [] == list(newest)


class TestSince:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("90s", 999_910.0),
            ("5m", 999_700.0),
            ("1.5h", 994_600.0),
            ("2d", 827_200.0),
            ("1w", 395_200.0),
            ("1970-01-12", 950_400.0),
            ("1970-01-12T01:00", 954_000.0),
            ("1970-01-12T01:00:00Z", 954_000.0),
            ("1970-01-12T01:00:00+01:00", 950_400.0),
        ],
    )
    def test_times(self, text, expected):
        """A duration counts back from now. A time without a zone is UTC."""
        assert expected == parse_since(text, 1_000_000.0)

    @pytest.mark.parametrize("text", ["", "soon", "5", "-5m", "5 minutes", "2026-13-01", "9" * 400])
    def test_invalid(self, text):
        """The message shows what is expected."""
        with pytest.raises(UsageError, match=r"invalid time .*: expected for example 90s, 5m"):
            parse_since(text, 1_000_000.0)


class TestMemory:
    def test_replies_are_given_out_while_the_file_is_read(self, varied):
        """The first reply comes before the last line is read."""
        with varied.path.open("ab") as file:
            file.write(b"{}\n" + b"x" * 40 * 2**20)  # a line that is too long to be read
        replies = iter(ReplyStream(varied.path))

        assert BEGAN == next(replies).start

    def test_memory_does_not_grow_with_the_file(self, varied, tmp_path):
        """Each further reply takes at most 700 bytes, most of it for those that are incomplete."""
        text = varied.path.read_text()

        def peak(copies):
            path = tmp_path / f"{copies}.jsonl.gz"
            with gzip.open(path, "wt", 1) as file:
                for number in range(copies):
                    file.write(text.replace('"traceId":"', f'"traceId":"{number:05d}'))
            tracemalloc.start()
            try:
                summary = Summary(r for r in ReplyStream(path) if r.complete)
                return summary.replies, tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

        few, many = peak(50), peak(1000)

        assert (200, 4000) == (few[0], many[0])
        assert many[1] - few[1] < 3800 * 700

    def test_progress(self, varied, tmp_path):
        """Bytes read and replies found are reported after each 8 MiB."""
        text = varied.path.read_text()
        path = tmp_path / "large.jsonl"
        path.write_text(text + ("x" * 2**20 + "\n") * 20 + text)
        replies = ReplyStream([varied.path, path])
        seen = []
        replies.on_progress = lambda done, found: seen.append((done, found))

        assert 5 == len(list(replies))
        assert 2 == len(seen)
        assert replies.total_bytes == varied.path.stat().st_size + path.stat().st_size
        assert 8 * 2**20 < seen[0][0] < seen[1][0] < replies.total_bytes
