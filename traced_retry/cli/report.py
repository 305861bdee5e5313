# SPDX-License-Identifier: Apache-2.0
"""``traced-retry report``: stored replies as text, JSON or one HTML page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from traced_retry.errors import UsageError
from traced_retry.report import (
    Newest,
    Reply,
    ReplyStream,
    ReportError,
    Selection,
    Summary,
    as_dict,
    parse_since,
    write_html,
)

SHOWN: Final = 100
"""Replies that the terminal shows, unless ``--limit`` is given."""
SHOWN_IN_HTML: Final = 1000
"""Replies that the page shows, unless ``--limit`` is given."""


def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="OTLP-JSON files, folders with such files, or - for the standard input; default: "
            "the newest local store."
        ),
    ] = None,
    *,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only replies that failed or were cut off.")
    ] = False,
    last: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the newest N replies.")
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Only replies of this provider, for example openai.")
    ] = None,
    service: Annotated[
        str | None, typer.Option(help="Only replies of agents with this service.name.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            help="Only replies since this time: 90s, 5m, 24h or 7d ago, or 2026-11-25T14:30 (UTC)."
        ),
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Only the trace with this id. Its first digits are enough.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Show at most the newest N replies. The summary counts all of them. With 0 "
            f"only the summary is shown; default: {SHOWN}, {SHOWN_IN_HTML} with --html, all with "
            "--json.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object with the replies and the providers."),
    ] = False,
    json_lines: Annotated[
        bool,
        typer.Option("--jsonl", help="Print one line of JSON per reply, while the files are read."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained HTML page to this file instead.")
    ] = None,
) -> None:
    """Show stored replies, each with a sentence and a waterfall, and a summary.

    You can read files of any size, because the command does not hold them in memory.
    """
    if as_json + json_lines + (html is not None) > 1:
        raise UsageError("--json, --jsonl and --html exclude each other: use one of them")
    selection = Selection(
        failed=failed,
        provider=provider,
        service=service,
        since=None if since is None else parse_since(since, time.time()),
        trace=trace,
    )
    stream = ReplyStream(files or [_newest_store()], selection)
    with _progress(stream):
        replies: Iterable[Reply] = stream if last is None else _newest(stream, last)
        if json_lines:
            for reply in replies if limit is None else _newest(replies, limit):
                typer.echo(json.dumps(as_dict(reply)))
            return
        if limit is None and not as_json:
            limit = SHOWN if html is None else SHOWN_IN_HTML
        summary, newest = Summary(), Newest(limit)
        for reply in replies:
            summary.add(reply)
            newest.add(reply)
    shown = list(newest)
    if as_json:
        providers = [asdict(row) for row in summary.rows()]
        found = {"replies": [as_dict(reply) for reply in shown], "providers": providers}
        typer.echo(json.dumps(found))
    elif html is not None:
        write_html(html, shown, summary, unreadable_lines=stream.unreadable_lines)
        typer.echo(str(html))
    elif not summary.replies:
        typer.echo(f"No reply matches {selection}. {stream.found} were read.")
    else:
        from traced_retry.report.terminal import render  # noqa: PLC0415

        console = Console(highlight=False)
        render(console, shown, summary, unreadable_lines=stream.unreadable_lines)


def _newest_store() -> Path:
    from traced_retry.export.file_store import latest_store, store_directory  # noqa: PLC0415

    newest = latest_store()
    if newest is None:
        raise ReportError(
            f"no local store in {store_directory()}: run `traced-retry demo`, or name the file "
            "that your agent writes"
        )
    return newest


def _newest(replies: Iterable[Reply], number: int) -> Iterator[Reply]:
    newest = Newest(number)
    for reply in replies:
        newest.add(reply)
    return iter(newest)


@contextmanager
def _progress(stream: ReplyStream) -> Iterator[None]:
    """Show the progress on standard error while it is a terminal, and remove it at the end."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (
        TextColumn("reading"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[replies]} replies"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=stream.total_bytes, replies=0)
        stream.on_progress = lambda read, replies: progress.update(
            task, completed=read, replies=replies
        )
        yield
