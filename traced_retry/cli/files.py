# SPDX-License-Identifier: Apache-2.0
"""``traced-retry exporters`` and ``traced-retry dashboards``: list, show, write, check files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from traced_retry import shipped_files
from traced_retry.core.sanitize import printable
from traced_retry.shipped_files import ShippedFile

exporters = typer.Typer(
    help="List, show or copy configuration files for OpenTelemetry SDKs, Collectors and servers.",
    no_args_is_help=True,
)
dashboards = typer.Typer(
    help="List, show or write dashboards for Grafana, rules for Prometheus, and a runbook.",
    no_args_is_help=True,
)

_Directory = Annotated[
    Path, typer.Argument(help="The folder to write to. It is created if necessary.")
]
_Force = Annotated[bool, typer.Option("--force", help="Overwrite files that you have edited.")]


def _list(files: Sequence[ShippedFile]) -> None:
    width = max(len(file.name) for file in files)
    for file in files:
        typer.echo(f"{file.name:<{width}}  {file.description}".rstrip())


def _show(files: Sequence[ShippedFile], name: str) -> None:
    typer.echo(shipped_files.find(files, name).content, nl=False)


def _write(directory: Path, files: Sequence[ShippedFile], *, force: bool) -> None:
    for path in shipped_files.write(directory, files, force=force):
        typer.echo(str(path))


@exporters.command("list")
def list_exporters() -> None:
    """List the files, each with its purpose.

    Use a file of presets/ with traced_retry.enable(preset=NAME). Or copy it, edit the copy, and
    set OTEL_CONFIG_FILE to its path.
    """
    _list(shipped_files.exporters())


@exporters.command("show")
def show_exporter(
    name: Annotated[
        str, typer.Argument(help="A name from the list, for example presets/jaeger.yaml.")
    ],
) -> None:
    """Print one file."""
    _show(shipped_files.exporters(), name)


@exporters.command("write")
def write_exporters(directory: _Directory, *, force: _Force = False) -> None:
    """Copy all files into a folder, so that you can edit and use them there."""
    _write(directory, shipped_files.exporters(), force=force)


@exporters.command("check")
def check_exporters(
    path: Annotated[
        Path,
        typer.Argument(help="The folder that you wrote and edited, or your alertmanager.yaml."),
    ],
) -> None:
    """Check that Alertmanager notifies you: fail while an example receiver is active.

    In a folder, also check that Prometheus has rules. The exit status is 0 if every check is ok,
    and 1 otherwise.
    """
    # The import needs PyYAML, which only these commands use.
    from traced_retry.doctor.exporters import run_checks  # noqa: PLC0415

    checks = list(run_checks(path))
    for check in checks:
        typer.echo(printable(f"{check.status:<4}  {check.check}: {check.message}", None))
        if check.fix:
            typer.echo(printable(f"      fix: {check.fix}", None))
    if any(check.status != "ok" for check in checks):
        raise typer.Exit(1)


@dashboards.command("list")
def list_dashboards() -> None:
    """List the files, each with its purpose."""
    _list(_dashboard_files())


@dashboards.command("show")
def show_dashboard(
    name: Annotated[
        str, typer.Argument(help="A name from the list, for example prometheus/alerts.yaml.")
    ],
) -> None:
    """Print one file."""
    _show(_dashboard_files(), name)


@dashboards.command("write")
def write_dashboards(
    directory: _Directory,
    *,
    preset: Annotated[
        str | None,
        typer.Option(help="An objective with its burn rates: 99 (the default) or 99.5."),
    ] = None,
    objective: Annotated[
        float | None,
        typer.Option(help="Percentage of replies that must not be lost; default: 99."),
    ] = None,
    min_replies: Annotated[
        int | None,
        typer.Option(help="Smallest number of replies for a percentile; default: 20."),
    ] = None,
    min_lost: Annotated[
        int | None,
        typer.Option(help="Smallest number of lost replies for a page; default: 10."),
    ] = None,
    silence: Annotated[
        float | None,
        typer.Option(
            help="Limit of the 95th percentile of the time to first output, in seconds; default: 3."
        ),
    ] = None,
    grafana_url: Annotated[
        str | None, typer.Option(help="URL of your Grafana, for the links in alerts.")
    ] = None,
    runbook_url: Annotated[
        str | None,
        typer.Option(help="URL of your copy of runbook.md; default: a dashboard in Grafana."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Your own config.yaml with every window and threshold."),
    ] = None,
    force: _Force = False,
) -> None:
    """Write all files into a folder, with your own thresholds.

    A threshold that no outage could cross is an error. The compose.yaml of `traced-retry
    exporters` reads the files from a folder `dashboards` beside it.
    """
    found = _dashboard_files(
        config,
        preset=preset,
        objective=objective,
        min_replies=min_replies,
        min_lost=min_lost,
        silence_seconds=silence,
        grafana_url=grafana_url,
        runbook_url=runbook_url,
    )
    _write(directory, found, force=force)


def _dashboard_files(
    config: Path | None = None, preset: str | None = None, **changes: float | str | None
) -> list[ShippedFile]:
    # The import needs PyYAML, which only these commands use.
    from traced_retry.monitoring.files import files  # noqa: PLC0415

    return files(config, preset=preset, **changes)
