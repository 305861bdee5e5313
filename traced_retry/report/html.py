# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML page without scripts or other files, light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from traced_retry.report.model import Attempt, Group, Reply, Wait
from traced_retry.report.read import ReportError
from traced_retry.report.sentence import note, overview, sentence, when
from traced_retry.report.summary import LEGEND, Summary, table

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
.step.first_try i { background: var(--first_try); }
.step.recovered i { background: var(--recovered); }
.step.failed i { background: var(--failed); } .step.cut_short i { background: var(--cut_short); }
.step.unknown i { background: var(--unknown); }
b.first_try { color: var(--first_try); } b.recovered { color: var(--recovered); }
b.failed { color: var(--failed); } b.cut_short { color: var(--cut_short); }
b.unknown { color: var(--unknown); }
.filters { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1rem 0; }
.filters fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .2rem .8rem; }
.filters legend { float: left; font-weight: 600; }
@media (max-width: 40rem) { .step { grid-template-columns: 5.5rem 1fr 4.5rem; }
  .step > :nth-child(4) { grid-column: 2 / 4; } }
"""

_GROUPS: Final[dict[Group, str]] = {
    "first_try": "first try",
    "recovered": "recovered",
    "failed": "failed",
    "cut_short": "cut short",
    "unknown": "unknown",
}
"""The names of the groups, as in the table."""

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
    path: str | os.PathLike[str],
    replies: Sequence[Reply],
    summary: Summary | None = None,
    *,
    unreadable_lines: int = 0,
) -> None:
    """Write the report of ``replies`` as one HTML page.

    Only the user can read a new file, like the store.

    Args:
        path: the file to write.
        replies: the replies to show, in this order.
        summary: the numbers of all replies, if ``replies`` are only some of them.
        unreadable_lines: the number of lines that could not be read.

    Raises:
        ReportError: if the file cannot be written.
    """
    summary = summary or Summary(replies)
    providers = {name: n for n, name in enumerate(sorted({reply.provider for reply in replies}))}
    lines = [_HEAD, *_overview(summary, len(replies), unreadable_lines)]
    lines.extend(_filters(replies, providers))
    for number, reply in enumerate(replies, 1):
        lines.extend(_reply(number, reply, providers[reply.provider]))
    try:
        with open(path, "w", encoding="utf-8", opener=_private) as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise ReportError(
            f"{os.fspath(path)} cannot be written ({error.strerror}): name another file."
        ) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _overview(summary: Summary, shown: int, unreadable_lines: int) -> Iterator[str]:
    text = overview(summary, shown=shown, unreadable_lines=unreadable_lines)
    yield f'<p class="soft">{escape(text)}</p>'
    head, *rows = table(summary.rows())
    yield '<div class="scroll"><table class="sum"><thead>'
    yield _row("th", [f"{name} (s)" if name.startswith("added") else name for name in head])
    yield "</thead><tbody>"
    yield from (_row("td", row) for row in rows)
    yield "</tbody></table></div>"
    yield f'<p class="soft">{escape(LEGEND)}</p>'


def _filters(replies: Sequence[Reply], providers: dict[str, int]) -> Iterator[str]:
    """Yield the choices of outcome and provider. They need no script: a style rule hides the rest.

    A choice with one option is left out.
    """
    groups = [g for g in _GROUPS if any(reply.group == g for reply in replies)]
    outcomes = {f"g-{group}": (_GROUPS[group], group) for group in groups}
    by_provider = {f"p-{n}": (name, f"p{n}") for name, n in providers.items()}
    chosen = [
        (title, name, options)
        for title, name, options in (
            ("Outcome", "outcome", outcomes),
            ("Provider", "provider", by_provider),
        )
        if len(options) > 1
    ]
    if not chosen:
        return
    yield "<style>"
    for _, _, options in chosen:
        for mark, (_, kind) in options.items():
            yield f"body:has(#{mark}:checked) article:not(.{kind}) {{ display: none; }}"
    yield '</style><form class="filters">'
    for title, name, options in chosen:
        yield f"<fieldset><legend>{title}&nbsp;</legend>"
        yield f'<label><input type="radio" name="{name}" checked> all</label>'
        for mark, (label, _) in options.items():
            radio = f'<input type="radio" name="{name}" id="{mark}">'
            yield f"<label>{radio} {escape(label)}</label>"
        yield "</fieldset>"
    yield "</form>"


def _row(cell: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in texts) + "</tr>"


def _reply(number: int, reply: Reply, provider: int) -> Iterator[str]:
    port = f":{reply.server_port}" if reply.server_port else ""
    facts = (reply.model, reply.server_address and reply.server_address + port, when(reply.start))
    say = "say: " if reply.say else ""
    yield f'<article class="{reply.group} p{provider}">'
    yield f"<h2><span>{number}. {say}{escape(reply.provider)}</span>"
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
