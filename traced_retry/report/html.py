# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML page: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from traced_retry.report.model import Attempt, Reply, Wait
from traced_retry.report.read import ReportError
from traced_retry.report.sentence import note, overview, sentence, when
from traced_retry.report.summary import LEGEND, summarize, table

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #e4e7ec;
  --page: #f7f8fa; --card: #fff; --first_try: #1a7f4b; --recovered: #a15c00; --failed: #c4281c;
  --cut_short: #0b7285; --unknown: #7a3fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3340;
  --page: #12151b; --card: #1a1f28; --first_try: #4cc38a; --recovered: #f0a840;
  --failed: #ff7a6e; --cut_short: #4fc3d9; --unknown: #c59bf5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table.sum { border-collapse: collapse; width: 100%; margin: 1rem 0; }
.sum th, .sum td { padding: .4rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; font-variant-numeric: tabular-nums; vertical-align: bottom; }
.sum th:first-child, .sum td:first-child { text-align: left;
  min-width: 9.5rem; overflow-wrap: anywhere; }
.sum th { font-weight: 600; font-size: .85rem; color: var(--soft); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0; display: flex; flex-wrap: wrap; gap: 0 .8rem; }
code { font: .8rem ui-monospace, monospace; font-weight: normal; }
h2 code { margin-left: auto; }
article p { margin: .2rem 0 .6rem; }
.step { display: grid; grid-template-columns: 5.5rem 1fr 4.5rem 22rem; gap: 0 .8rem;
  align-items: center; font-size: .85rem; }
.step > :nth-child(3) { text-align: right; font-variant-numeric: tabular-nums; }
.scale { display: flex; }
.scale i { height: .6rem; min-width: 3px; border-radius: 2px; background: var(--soft); }
.wait i { height: 0; border-top: 2px dotted var(--soft); border-radius: 0; background: none; }
.wait { color: var(--soft); }
.first_try i { background: var(--first_try); } .recovered i { background: var(--recovered); }
.failed i { background: var(--failed); } .cut_short i { background: var(--cut_short); }
.unknown i { background: var(--unknown); }
b.first_try { color: var(--first_try); } b.recovered { color: var(--recovered); }
b.failed { color: var(--failed); } b.cut_short { color: var(--cut_short); }
b.unknown { color: var(--unknown); }
@media (max-width: 40rem) { .step { grid-template-columns: 5.5rem 1fr 4.5rem; }
  .step > :nth-child(4) { grid-column: 2 / 4; } }
"""

_HEAD: Final = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>Replies and their retries</title>
<style>{_STYLE}</style>
<h1>Replies and their retries</h1>"""


def write_html(
    path: str | os.PathLike[str], replies: Sequence[Reply], *, unreadable_lines: int = 0
) -> None:
    """Write the report of ``replies`` as one HTML page.

    Only the user can read a new file, like the store.

    Args:
        path: the file to write.
        replies: the replies to show, in this order.
        unreadable_lines: the number of lines that could not be read.

    Raises:
        ReportError: if the file cannot be written.
    """
    lines = [_HEAD, *_overview(replies, unreadable_lines)]
    for number, reply in enumerate(replies, 1):
        lines.extend(_reply(number, reply))
    try:
        with open(path, "w", encoding="utf-8", opener=_private) as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise ReportError(
            f"{os.fspath(path)} cannot be written ({error.strerror}): name another file."
        ) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _overview(replies: Sequence[Reply], unreadable_lines: int) -> Iterator[str]:
    yield f'<p class="soft">{escape(overview(replies, unreadable_lines=unreadable_lines))}</p>'
    head, *rows = table(summarize(replies))
    yield '<div class="scroll"><table class="sum"><thead>'
    yield _row("th", head)
    yield "</thead><tbody>"
    yield from (_row("td", row) for row in rows)
    yield "</tbody></table></div>"
    yield f'<p class="soft">{escape(LEGEND)}</p>'


def _row(cell: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in texts) + "</tr>"


def _reply(number: int, reply: Reply) -> Iterator[str]:
    port = f":{reply.server_port}" if reply.server_port else ""
    facts = (reply.model, reply.server_address and reply.server_address + port, when(reply.start))
    say = "say: " if reply.say else ""
    yield f"<article><h2><span>{number}. {say}{escape(reply.provider)}</span>"
    yield f'<b class="{reply.group}">{escape(reply.outcome or "incomplete")}</b>'
    yield f"<code>{escape(reply.trace_id)}</code></h2>"
    yield f'<div class="soft">{escape(", ".join(fact for fact in facts if fact))}</div>'
    yield f"<p>{escape(sentence(reply))}</p>"
    yield from (_step(reply, step) for step in reply.steps)
    yield "</article>"


def _step(reply: Reply, step: Attempt | Wait) -> str:
    begins, ends = reply.place(step)
    kind, label = "wait", "wait"
    if isinstance(step, Attempt):
        kind, label = step.group, f"{step.number} {step.action or 'attempt'}"
    bar = f"margin-left:{begins:.2%};width:{ends - begins:.2%}"
    return (
        f'<div class="step {kind}"><span>{escape(label)}</span>'
        f'<span class="scale"><i style="{bar}"></i></span>'
        f"<span>{step.seconds:.2f} s</span><span>{escape(note(step))}</span></div>"
    )
