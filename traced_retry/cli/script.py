# SPDX-License-Identifier: Apache-2.0
"""``traced-retry script``: the stored spans of an incident as a fault script."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from traced_retry.report import Reply, ReplyStream, ReportError, Selection
from traced_retry.report.read import order


def script(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="OTLP-JSON files, folders with such files, or - for the standard input."
        ),
    ],
    *,
    trace: Annotated[
        str | None,
        typer.Option(
            help="The trace id of the call. Its first digits are enough; default: the newest call "
            "with a reply that was retried or failed."
        ),
    ] = None,
) -> None:
    """Print a script with which a simulator repeats the provider's faults in one call."""
    from traced_retry.testing.incident import incident_script, simulator_name  # noqa: PLC0415

    selection = Selection(trace=trace)
    replies = _incident(sorted(ReplyStream(files, selection), key=order))
    if not replies:
        wanted = f"trace {trace}" if trace else "reply that was retried or failed"
        raise ReportError(f"no {wanted} in the spans")
    found = incident_script(replies)
    provider = simulator_name(replies)
    typer.echo(str(found))
    typer.echo(f"Run it with: traced-retry simulate {provider} --script '{found}'", err=True)


def _incident(replies: list[Reply]) -> list[Reply]:
    """Return the replies of the newest call with a retried or failed reply."""
    troubled = [r for r in replies if r.retries or r.group == "failed"] or replies[-1:]
    return [r for r in replies if troubled and r.trace_id == troubled[-1].trace_id]
