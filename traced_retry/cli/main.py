# SPDX-License-Identifier: Apache-2.0
"""``traced-retry demo | simulate | record | script | report | doctor | exporters | dashboards``."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

from traced_retry.core.sanitize import printable, redact_url
from traced_retry.errors import UsageError, missing_extra

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:  # the extra cli installs both
    raise SystemExit(str(missing_extra("the command traced-retry", error))) from None

from traced_retry import __version__
from traced_retry.cli.files import dashboards, exporters
from traced_retry.cli.record import record
from traced_retry.cli.report import report
from traced_retry.cli.script import script
from traced_retry.cli.simulate import simulate, simulate_epilog

app = typer.Typer(
    help="Retry LiveKit realtime replies and trace every attempt: each reply is heard exactly "
    "once, or its failure is reported at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TO_JAEGER = """\
To send the spans to a Jaeger on this machine, set these variables before your agent or this demo:
  export OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318
  export OTEL_SERVICE_NAME=my-agent"""

app.add_typer(exporters, name="exporters")
app.add_typer(dashboards, name="dashboards")


def main() -> None:
    """Run the command line. A usage error is a message on stderr and exit status 2."""
    try:
        app()
    except UsageError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        problem = str(missing_extra("this command", error))
    else:
        return
    lines = [printable(line, None) for line in problem.split("\n")]
    print("traced-retry: " + "\n".join(lines), file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"traced-retry {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the report.")
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option(help="File for the spans; default: a new one under your state directory."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show LiveKit's own log as well.")
    ] = False,
) -> None:
    """Run a dozen conversations with a server that fails, and show the outcome of each.

    A real LiveKit AgentSession with the real OpenAI plugin talks to a server on 127.0.0.1. You
    need no key, no network and no LiveKit server. The demo takes about 15 seconds.
    """
    from traced_retry.cli.demo import SCENARIOS, Scenario, ScenarioResult, run_demo  # noqa: PLC0415
    from traced_retry.export.file_store import new_store  # noqa: PLC0415
    from traced_retry.export.setup import endpoint  # noqa: PLC0415
    from traced_retry.report.terminal import render  # noqa: PLC0415

    if not verbose:
        # The plugin logs each failure of the script. The report shows them better.
        logging.disable(logging.CRITICAL)
    path = store or new_store("demo")
    console = Console(highlight=False)
    progress = Console(stderr=True, highlight=False)
    started = 0

    def on_start(scenario: Scenario) -> None:
        nonlocal started
        started += 1
        number = f"{started:>3}/{len(SCENARIOS)}"
        progress.print(f"{number}  {scenario.script:<24} {scenario.description}")

    def on_result(result: ScenarioResult) -> None:
        heard = {0: "not heard", 1: "heard once"}.get(result.replies_heard, "HEARD TWICE")
        progress.print(f"        {result.reply.outcome}, {heard}, {result.reply.seconds:.2f} s")

    try:
        results, seconds = run_demo(path, *(() if as_json else (on_start, on_result)))
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. The spans recorded so far are in\n  {path}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        replies = [result.as_dict() for result in results]
        typer.echo(
            json.dumps({"store": str(path), "seconds": round(seconds, 1), "replies": replies})
        )
        return
    console.print()
    render(console, [result.reply for result in results])
    console.print()
    console.print(
        f"{len(results)} replies in {seconds:.0f} s. Their spans are in\n  {path}", soft_wrap=True
    )
    console.print(f"Read them again:\n  traced-retry report {path}", soft_wrap=True)
    if (sent_to := endpoint()) is not None:
        console.print(f"The spans were also sent to {redact_url(sent_to)}.", soft_wrap=True)
    else:
        console.print(TO_JAEGER, soft_wrap=True)


app.command()(report)


app.command(epilog=simulate_epilog())(simulate)
app.command()(record)
app.command()(script)


@app.command()
def doctor(
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: ok, and the checks.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="The preset that your agent passes to enable().")
    ] = None,
    jaeger: Annotated[
        str | None,
        typer.Option(help="Jaeger's query URL; default: port 16686 of the endpoint's host."),
    ] = None,
) -> None:
    """Check where spans would go, whether a test span arrives, and which plugins are retried.

    Run it on your agent's machine with the same environment variables. The exit status is 0
    if every check is ok, and 1 otherwise.
    """
    from dataclasses import asdict  # noqa: PLC0415

    from traced_retry.doctor import run_checks  # noqa: PLC0415

    # The checks explain the failures that exporters and SDK would log.
    logging.disable(logging.CRITICAL)
    checks = []
    for check in run_checks(preset, jaeger):
        checks.append(check)
        if not as_json:
            typer.echo(printable(f"{check.status:<4}  {check.check}: {check.message}", None))
            if check.fix:
                typer.echo(printable(f"      fix: {check.fix}", None))
    well = all(check.status == "ok" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": well, "checks": [asdict(check) for check in checks]}))
    sys.stdout.flush()
    # This skips the SDK's exit handlers, which wait up to 30 s for a server that is down.
    os._exit(0 if well else 1)
