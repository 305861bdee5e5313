# SPDX-License-Identifier: Apache-2.0
"""``traced-retry dashboards``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from traced_retry import shipped_files

dashboards = typer.Typer(
    help="Dashboards for Grafana, rules for Prometheus, a runbook: list, show, write.",
    no_args_is_help=True,
)


@dashboards.command("list")
def list_dashboards() -> None:
    """List the files, each with what it is for."""
    from traced_retry.monitoring.files import files  # noqa: PLC0415

    found = files()
    width = max(len(file.name) for file in found)
    for file in found:
        typer.echo(f"{file.name:<{width}}  {file.description}".rstrip())


@dashboards.command("show")
def show_dashboard(
    name: Annotated[str, typer.Argument(help="As listed, such as prometheus/alerts.yaml.")],
) -> None:
    """Print one file."""
    from traced_retry.monitoring.files import files  # noqa: PLC0415

    typer.echo(shipped_files.find(files(), name).content, nl=False)


@dashboards.command("write")
def write_dashboards(
    directory: Annotated[Path, typer.Argument(help="Where to; it is made.")],
    *,
    objective: Annotated[
        float | None,
        typer.Option(help="Percent of replies not to be exhausted; shipped: 99."),
    ] = None,
    min_replies: Annotated[
        int | None, typer.Option(help="Replies below which a ratio pages nobody; shipped: 20.")
    ] = None,
    silence: Annotated[
        float | None,
        typer.Option(help="Seconds that 95 % of replies are to begin within; shipped: 3."),
    ] = None,
    grafana_url: Annotated[
        str | None, typer.Option(help="Where your Grafana is, for the links in alerts.")
    ] = None,
    runbook_url: Annotated[
        str | None,
        typer.Option(help="Where your copy of runbook.md is; default: a dashboard in Grafana."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config.yaml of your own, with every window and threshold."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what you have edited.")] = False,
) -> None:
    """Write all files, with thresholds of your own.

    A threshold that could never be crossed is refused. compose.yaml of `traced-retry exporters`
    reads the files from a folder `dashboards` beside it.
    """
    from traced_retry.monitoring.files import files  # noqa: PLC0415

    found = files(
        config,
        objective=objective,
        min_replies=min_replies,
        silence_seconds=silence,
        grafana_url=grafana_url,
        runbook_url=runbook_url,
    )
    for path in shipped_files.write(directory, found, force=force):
        typer.echo(str(path))
