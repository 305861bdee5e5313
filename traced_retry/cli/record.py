# SPDX-License-Identifier: Apache-2.0
"""``traced-retry record``: a proxy that writes a cassette of a session with a provider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from traced_retry.cli.simulate import (
    AuthorityOption,
    PortOption,
    known_providers,
    serve,
    simulator_of,
)
from traced_retry.core.sanitize import redact_url
from traced_retry.errors import UsageError


def record(
    provider: Annotated[str, typer.Argument(help=f"Whose protocol it is: {known_providers()}.")],
    file: Annotated[Path, typer.Argument(help="The cassette to write. It must not exist yet.")],
    *,
    to: Annotated[
        str,
        typer.Option(metavar="URL", help="The provider's base URL, or that of a simulator."),
    ],
    port: PortOption = 0,
    ca: AuthorityOption = None,
) -> None:
    """Stand between your agent and a provider, and record their events.

    The cassette has no keys, words, sound and arguments: it has the types of events, their ids as
    numbers, lengths and times. Play it with `traced-retry simulate PROVIDER --replay FILE`.
    """
    simulator_of(provider)
    from traced_retry.simulator.record import recorder  # noqa: PLC0415

    lines = 0

    def write(entry: object) -> None:
        nonlocal lines
        lines += 1
        cassette.write(json.dumps(entry, separators=(",", ":")) + "\n")

    server = recorder(provider, to, write, port=port)
    try:
        file.touch(0o600, exist_ok=False)
        cassette = file.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        problem = f"{file} cannot be written ({error.strerror})"
        raise UsageError(f"{problem}: name another file") from None
    with cassette:
        serve(provider, server, ca, f"records {redact_url(to)} to {file}")
    typer.echo(f"{server.connections} connections, {lines} lines in {file}")
    if server.unreachable:
        raise UsageError(
            f"{redact_url(to)} could not be reached {server.unreachable} times: check --to"
        )
