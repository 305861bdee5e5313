# SPDX-License-Identifier: Apache-2.0
"""A report in the terminal: per reply a sentence and a waterfall, per provider a row of numbers.

Readable at 80 columns, without colour (each colour only repeats a word) and in ASCII.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from traced_retry.report.model import Attempt, Group, Reply, Wait
from traced_retry.report.sentence import note, overview, sentence
from traced_retry.report.summary import LEGEND, Summary, table

STYLE_OF: Final[dict[Group, str]] = {
    "first_try": "green",
    "recovered": "yellow",
    "failed": "red",
    "cut_short": "cyan",
    "unknown": "magenta",
}

_INDENT: Final = 4
_LABEL: Final = 11
_SECONDS: Final = 9
_BAR: Final = (24, 60)
"""Least and most columns of the time scale."""
_NAME: Final = 24
_ROOMY: Final = 100
_NARROW: Final = 80
"""Below this width, trace ids and notes have lines of their own, so that they are not cut."""
_RULE: Final = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""A rule below the headings, and no other lines."""


@dataclass(frozen=True)
class _Glyphs:
    attempt: str = "━"
    wait: str = "┄"
    more: str = "…"

    @classmethod
    def of(cls, console: Console) -> _Glyphs:
        """Return the glyphs that ``console`` can write."""
        glyphs = cls()
        try:
            f"{glyphs.attempt}{glyphs.wait}{glyphs.more}".encode(console.encoding)
        except UnicodeEncodeError:
            return cls(attempt="=", wait=".", more="~")
        return glyphs


def render(
    console: Console,
    replies: Sequence[Reply],
    summary: Summary | None = None,
    *,
    unreadable_lines: int = 0,
) -> None:
    """Print the report of ``replies`` on ``console``.

    Args:
        console: where to, and how wide.
        replies: as :func:`traced_retry.report.read` gives them.
        summary: the numbers of all replies, if ``replies`` are only some of them.
        unreadable_lines: the number of lines that could not be read.
    """
    page = _Page(console, replies)
    for number, reply in enumerate(replies, 1):
        page.reply(number, reply)
    page.summary(summary or Summary(replies), unreadable_lines)


class _Page:
    """One report on one console."""

    def __init__(self, console: Console, replies: Sequence[Reply]) -> None:
        self._console = console
        self._glyphs = _Glyphs.of(console)
        self._replies = replies
        # All waterfalls share their columns. The notes get their width if the bars stay readable.
        free = console.width - _INDENT - _LABEL - _SECONDS - 2
        widest = max((cell_len(note(s)) for r in replies for s in r.steps), default=0)
        least, most = _BAR
        self._bar = max(1, min(least, free), min(most, free - widest))
        self._note = max(0, free - self._bar)
        self._narrow = console.width < _NARROW

    def line(self, text: Text) -> None:
        """Print ``text``, cut at the width of the console."""
        text.rstrip()
        self._console.print(text, no_wrap=True, overflow="crop", crop=True, highlight=False)

    def reply(self, number: int, reply: Reply) -> None:
        """Print header, sentence and waterfall."""
        style = STYLE_OF[reply.group]
        outcome = self._fit(reply.outcome or "incomplete", 15)
        trace_id = "" if self._narrow else self._fit(reply.trace_id, 32)
        target = f"{reply.provider}/{reply.model}" if reply.model else reply.provider
        target = f"say: {target}" if reply.say else target
        left = f"{number:>{_INDENT - 1}} "
        room = self._console.width - len(left) - cell_len(outcome) - cell_len(trace_id) - 4
        target = self._fit(target, max(12, room))
        gap = " " * max(2, room - cell_len(target) + 2)
        styled_outcome = (outcome, f"bold {style}")
        self.line(
            Text.assemble(left, (target, "bold"), "  ", styled_outcome, gap, (trace_id, "dim"))
        )
        if self._narrow:
            self._indented(reply.trace_id, "dim")
        self._indented(sentence(reply))
        for step in reply.steps:
            self._step(reply, step)
        self.line(Text())

    def _step(self, reply: Reply, step: Attempt | Wait) -> None:
        begins, ends = reply.place(step)
        left = min(round(begins * self._bar), self._bar - 1)
        length = max(1, round(ends * self._bar) - left)
        style, quiet, label, glyph = "dim", "dim", "  wait", self._glyphs.wait
        if isinstance(step, Attempt):
            style, quiet, glyph = STYLE_OF[step.group], "", self._glyphs.attempt
            label = f"{step.number} {step.action or 'attempt'}"
        self.line(
            Text.assemble(
                " " * _INDENT,
                (set_cell_size(self._fit(label, _LABEL - 1), _LABEL), quiet),
                " " * left,
                (glyph * length, style),
                " " * (self._bar - left - length),
                (f"{step.seconds:>{_SECONDS - 2}.2f} s", quiet),
                "  ",
                ("" if self._narrow else self._remark(step), style),
            )
        )
        if self._narrow and (text := note(step)):
            self._indented(text, style)

    def _remark(self, step: Attempt | Wait) -> str:
        """Return the note, and shorten its error code before its decision."""
        code, arrow, decision = note(step).partition(" -> ")
        room = max(0, self._note - len(arrow + decision))
        return self._fit(self._fit(code, room) + arrow + decision, self._note)

    def summary(self, summary: Summary, unreadable_lines: int) -> None:
        """Print number and period of the replies, and one row per provider."""
        text = overview(summary, shown=len(self._replies), unreadable_lines=unreadable_lines)
        for part in self._wrapped(text, self._console.width):
            self.line(part)
        self.line(Text())
        head, *rows = table(summary.rows())
        gap = 1 if self._console.width >= _ROOMY else 0
        grid = Table(
            box=_RULE, show_edge=False, pad_edge=False, padding=(0, gap), header_style="bold"
        )
        for name in head:
            grid.add_column(name.replace(" ", "\n"), justify="right", overflow="fold")
        grid.columns[0].justify = "left"
        for provider, *numbers in rows:
            grid.add_row(self._fit(provider, _NAME), *numbers)
        self._console.print(grid, highlight=False)
        self.line(Text())
        for part in self._wrapped(LEGEND, min(self._console.width, 80)):
            part.stylize("dim")
            self.line(part)

    def _indented(self, text: str, style: str = "") -> None:
        """Print ``text`` in as many lines as it needs."""
        for part in self._wrapped(text, self._console.width - _INDENT):
            part.stylize(style)
            self.line(Text.assemble(" " * _INDENT, part))

    def _wrapped(self, text: str, width: int) -> Iterable[Text]:
        return Text(self._writable(text)).wrap(self._console, max(10, width))

    def _writable(self, text: str) -> str:
        encoding = self._console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def _fit(self, text: str, width: int) -> str:
        text = self._writable(text)
        if cell_len(text) <= width:
            return text
        return set_cell_size(text, max(0, width - 1)) + self._glyphs.more * (width > 0)
