# SPDX-License-Identifier: Apache-2.0
"""``traced-retry exporters`` and ``traced-retry dashboards``: list, show and write files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from traced_retry import shipped_files
from traced_retry.shipped_files import ShippedFile

exporters = typer.Typer(
    help="Configuration for OpenTelemetry SDKs, Collectors and servers: list, show, copy.",
    no_args_is_help=True,
)
dashboards = typer.Typer(
    help="Dashboards for Grafana, rules for Prometheus, a runbook: list, show, write.",
    no_args_is_help=True,
)

_Directory = Annotated[Path, typer.Argument(help="Where to; it is made.")]
_Force = Annotated[bool, typer.Option("--force", help="Overwrite what you have edited.")]


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

    Those in presets/ are for traced_retry.enable(preset=NAME), or to be copied, edited and named
    in OTEL_CONFIG_FILE.
    """
    _list(shipped_files.exporters())


@exporters.command("show")
def show_exporter(
    name: Annotated[str, typer.Argument(help="As listed, such as presets/jaeger.yaml.")],
) -> None:
    """Print one file."""
    _show(shipped_files.exporters(), name)


@exporters.command("write")
def write_exporters(directory: _Directory, *, force: _Force = False) -> None:
    """Copy all files, to be edited and used from there."""
    _write(directory, shipped_files.exporters(), force=force)


@dashboards.command("list")
def list_dashboards() -> None:
    """List the files, each with its purpose."""
    _list(_dashboard_files())


@dashboards.command("show")
def show_dashboard(
    name: Annotated[str, typer.Argument(help="As listed, such as prometheus/alerts.yaml.")],
) -> None:
    """Print one file."""
    _show(_dashboard_files(), name)


@dashboards.command("write")
def write_dashboards(
    directory: _Directory,
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
    force: _Force = False,
) -> None:
    """Write all files, with thresholds of your own.

    A threshold that could never be crossed is refused. compose.yaml of `traced-retry exporters`
    reads the files from a folder `dashboards` beside it.
    """
    found = _dashboard_files(
        config,
        objective=objective,
        min_replies=min_replies,
        silence_seconds=silence,
        grafana_url=grafana_url,
        runbook_url=runbook_url,
    )
    _write(directory, found, force=force)


def _dashboard_files(
    config: Path | None = None, **changes: float | str | None
) -> list[ShippedFile]:
    # The import needs PyYAML, which only these commands use.
    from traced_retry.monitoring.files import files  # noqa: PLC0415

    return files(config, **changes)
