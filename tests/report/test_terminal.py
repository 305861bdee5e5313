# SPDX-License-Identifier: Apache-2.0
"""The report in a terminal: what it says, and that any terminal can show it."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from traced_retry import semconv
from traced_retry.report import Summary
from traced_retry.report.terminal import render

from .conftest import FAILED, HEARD


def shown(replies, *, summary=None, width=80, encoding="utf-8", unreadable_lines=0, **how):
    """What is written to a pipe, or to a terminal with ``force_terminal=True``."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, **how)
    render(console, replies, summary, unreadable_lines=unreadable_lines)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_all_that_matters(varied):
    """Header, sentence and waterfall of one reply, as they are."""
    reply = varied.read()[1]

    assert [
        f"  1 openai/gpt-realtime  recovered              {reply.trace_id}",
        "    Heard after 1 retry and 2.0 s: server_error.",
        "    1 send     ━━━━━━━━                            0.50 s  server_error -> retry",
        "      wait             ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄           1.00 s",
        "    2 send                              ━━━━━━━━   0.50 s  heard",
    ] == shown([reply]).splitlines()[:5]


def test_the_table(varied):
    """One row per provider, below the time it covers."""
    lines = shown(varied.read()).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("provider"))

    assert [
        "5 replies, 2027-01-15 08:00:00 to 2027-01-15 08:00:51 UTC.",
        "",
        "                        first                    cut                 added added",
        "provider        replies   try recovered failed short unknown retries   p50   p95",
        "-" * 80,
        "azure.ai.openai       1     0         0      1     0       0       1  5.00  5.00",
        "openai                4     1         1      0     1       1       1  1.50  1.50",
        "",
    ] == lines[at - 3 : at + 5]


def test_a_wait_that_grew(store):
    """A reconnect made it longer than planned."""
    store.timed(
        (0, 1, {**FAILED, "NEXT_DELAY": 0.5}),
        (4, 5, {**HEARD, "DELAY": 3.0}),
        seconds=5,
        OUTCOME="recovered",
    )

    assert "3.00 s  0.50 s planned\n" in shown(store.read())


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_is_too_long(varied, width):
    """Whatever the width."""
    lines = shown(varied.read(), width=width, unreadable_lines=2).splitlines()

    assert [] == [line for line in lines if cell_len(line) > width]


@pytest.mark.parametrize("width", [1, 20, 40, 60])
def test_narrow_terminals(varied, width):
    """They get less, not an exception."""
    for encoding in ("utf-8", "ascii"):
        assert shown(varied.read(), width=width, encoding=encoding)


@pytest.mark.parametrize("width", [36, 50, 79])
def test_narrow_terminal_keeps_trace_id_and_code(varied, width):
    """Both have lines of their own, and a long code continues in the next line."""
    reply = varied.read()[2]
    text = shown([reply], width=width)
    joined = "".join(line.strip() for line in text.splitlines())

    assert f"    {reply.trace_id}\n" in text
    assert "conversation_already_has_active_response" in joined
    assert [] == [line for line in text.splitlines() if cell_len(line) > width]


def test_summary_counts_replies_that_are_not_shown(varied):
    """The table has the numbers of all replies, and a sentence says how many are shown."""
    replies = varied.read()
    text = shown(replies[-1:], summary=Summary(replies))

    assert "5 replies, " in text
    assert "Shown: the newest 1." in " ".join(text.split())
    assert "azure.ai.openai       1" in text


def test_long_codes_keep_their_decision(varied):
    """What is cut is the code; the sentence has it in full."""
    text = shown(varied.read())

    assert "conversation_already… -> retry\n" in text
    assert "conversation_already_has_active_response, then timeout." in text


def test_without_colour_nothing_is_lost(varied):
    """A pipe gets the same words as a terminal, and no escape sequence."""
    plain = shown(varied.read())

    assert "\x1b" not in plain
    assert "\x1b[" in shown(varied.read(), force_terminal=True, color_system="standard")
    for word in ("succeeded", "recovered", "exhausted", "interrupted", "incomplete"):
        assert word in plain


def test_ascii(varied, store):
    """A dumb terminal gets bars of its own kind, and names it can write."""
    about = {semconv.PROVIDER: "öpenai", semconv.MODEL: "モデル"}
    store.timed((0, 1, HEARD), seconds=1, at=90, about=about, OUTCOME="succeeded")

    lines = shown(varied.read(), encoding="ascii").splitlines()
    at = lines.index("    Heard after 1 retry and 2.0 s: server_error.")

    assert [
        "    1 send     ======                     0.50 s  server_error -> retry",
        "      wait           ............         1.00 s",
        "    2 send                       ======   0.50 s  heard",
    ] == lines[at + 1 : at + 4]
    assert "?penai/???  succeeded" in "\n".join(lines)


def test_wide_names(store):
    """Letters that take two columns are counted so."""
    store.timed(
        (0, 1, HEARD),
        seconds=1,
        about={semconv.PROVIDER: "提供者" * 9, semconv.MODEL: "モデル" * 9},
        OUTCOME="succeeded",
    )

    lines = shown(store.read()).splitlines()

    assert [] == [line for line in lines if cell_len(line) > 80]
    assert lines[0].endswith(store.read()[0].trace_id)


def test_markup_in_names_is_text(store):
    """Nobody's model name colours our report."""
    store.timed(
        (0, 1, HEARD), seconds=1, about={semconv.MODEL: "[red]x[/red] :bug:"}, OUTCOME="succeeded"
    )

    assert "openai/[red]x[/red] :bug:" in shown(store.read())


def test_nothing():
    """It says so."""
    assert shown([]).startswith("No replies.\n")


def test_torn(varied):
    """What is missing is said."""
    assert "2 torn lines left out" in " ".join(shown(varied.read(), unreadable_lines=2).split())
