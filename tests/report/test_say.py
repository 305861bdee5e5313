# SPDX-License-Identifier: Apache-2.0
"""What was to be said: in the list, and counted apart from the replies."""

from __future__ import annotations

import pytest
from rich.console import Console
from support.attempts import record_attempt

from traced_retry import semconv
from traced_retry.core.failure import failure
from traced_retry.core.telemetry import Target, Telemetry
from traced_retry.report import ReportError, as_dict, read, summarize, write_html
from traced_retry.report.sentence import overview, sentence
from traced_retry.report.summary import Summary
from traced_retry.report.terminal import render

from .conftest import HEARD


@pytest.fixture
def said(store):
    """A reply; and texts, told of by the code that tells of every ``say``: two spoken, one not."""
    store.timed((0, 0.25, HEARD), seconds=0.25, OUTCOME="succeeded")
    telemetry = Telemetry(store.provider)
    for stop in (None, None, "unsafe_to_resend"):
        failed = None if stop is None else failure(TimeoutError(), "timeout")
        told = telemetry.reply(Target("x_ai", "grok", say=True))
        told.begin(0.0, 0.0)
        record_attempt(told, "succeeded" if failed is None else "failed", 0.1, failed)
        told.end(stop, 0.1, failed)
    return store


def test_they_are_read(said):
    """Each with its attempt, and known for what it is."""
    texts = [reply for reply in said.read() if reply.say]

    assert ["succeeded", "succeeded", "exhausted"] == [text.outcome for text in texts]
    assert ["succeeded", "succeeded", "failed"] == [text.attempts[0].result for text in texts]
    assert ["generate_reply", "say", "say", "say"] == sorted(
        as_dict(r)["operation"] for r in said.read()
    )
    assert sentence(texts[2]).endswith(": no answer; asking again might be heard twice.")


def test_they_are_no_replies(said):
    """The numbers per provider are of replies alone; the overview has a sentence for the others."""
    assert [("openai", 1)] == [(row.provider, row.replies) for row in summarize(said.read())]
    told = overview(Summary(said.read()))
    assert told.startswith("1 reply, 20")
    assert told.endswith(" UTC. say: 2 spoken, 1 failed.")


def test_alone(said, tmp_path):
    """A file with nothing else is read as well; spans of that name that are not ours are not."""
    lines = said.path.read_text().splitlines(keepends=True)
    texts = "".join(line for line in lines if f'"{semconv.SPAN_REPLY}' not in line)
    (tmp_path / "say.jsonl").write_text(texts)
    foreign = texts.replace('"key":"traced_retry.', '"key":"others.traced_retry.')
    (tmp_path / "foreign.jsonl").write_text(foreign)

    assert [True] * 3 == [reply.say for reply in read(tmp_path / "say.jsonl")]
    with pytest.raises(ReportError):
        read(tmp_path / "foreign.jsonl")


def test_they_are_shown(said, tmp_path):
    """In the terminal and on the page."""
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    with console.file:
        render(console, said.read())
    write_html(tmp_path / "page.html", said.read())

    assert 3 == console.export_text().count("say: x_ai/grok")
    assert 3 == (tmp_path / "page.html").read_text().count("say: x_ai<")
