# SPDX-License-Identifier: Apache-2.0
"""``traced-retry simulate``: a provider on 127.0.0.1 that fails on a script."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from traced_retry.errors import UsageError, install_command

if TYPE_CHECKING:
    from traced_retry.simulator import Simulator


def _known_providers() -> str:
    try:
        from traced_retry.simulator import PROVIDERS  # noqa: PLC0415
    except ModuleNotFoundError:
        return "openai, and others"
    return ", ".join(PROVIDERS)


def simulate_epilog() -> str:
    """Return the end of the command's help: the elements of a script."""
    try:
        from traced_retry.simulator.script import describe_faults  # noqa: PLC0415
    except ModuleNotFoundError:
        faults = f"The list needs aiohttp: {install_command('simulator')}"
    else:
        faults = describe_faults()
    head = "\b\nElements of a script, separated by commas. The last one repeats forever:\n"
    tail = (
        "\n\nIf you put turn: in front of an element, it answers the caller, who then speaks "
        'every --turn-every seconds: "turn:ok,turn:failed".'
    )
    return head + faults + tail


def simulate(
    provider: Annotated[
        str, typer.Argument(help=f"The provider to simulate: {_known_providers()}.")
    ],
    *,
    script: Annotated[
        str, typer.Option(help='The fault of each request, for example "rate_limit,late:3,ok".')
    ] = "ok",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1. With 0 a free one is used.")
    ] = 0,
    faults: Annotated[
        bool, typer.Option("--faults", help="List the faults of this protocol.")
    ] = False,
    turn_every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two turns of the caller.")
    ] = 5.0,
    ca: Annotated[
        Path | None,
        typer.Option(
            help="File for the certificate authority of google and aws; default: a file in the "
            "system's temporary folder."
        ),
    ] = None,
) -> None:
    """Serve a provider's protocol on 127.0.0.1 and fail on a script, for your own agent's tests.

    The command prints the lines of Python that create a model of LiveKit's plugin for this server.
    """
    from traced_retry.simulator import PROVIDERS, describe_faults, simulator  # noqa: PLC0415

    if provider not in PROVIDERS:
        raise typer.BadParameter(
            f"unknown provider {provider!r}: expected {', '.join(PROVIDERS)}", param_hint="PROVIDER"
        )
    kind = simulator(provider)
    if faults:
        known: Collection[str] = kind.faults
        typer.echo(describe_faults(known))
        return
    server = kind(script, port=port)
    try:
        asyncio.run(_serve(provider, server, ca, turn_every if "turn:" in script else None))
    except (KeyboardInterrupt, asyncio.CancelledError):
        done, asked = len(server.completed), len(server.requests)
        typer.echo(f"{asked} requests, {done} answered in full, {len(server.cancels)} cancelled")
    except OSError as error:
        raise typer.BadParameter(
            f"cannot listen on 127.0.0.1:{port} ({error.strerror}): use --port 0 for a free port"
        ) from None


def _has_requests(server: Simulator, number: int) -> bool:
    return len(server.requests) >= number


async def _speak(server: Simulator, every: float) -> None:
    """Have the caller speak as long as a client is connected."""
    while True:
        await server.wait_for("connected")
        await asyncio.sleep(every)
        with contextlib.suppress(RuntimeError, ConnectionError):  # The client has left.
            await server.caller_speaks()
            typer.echo(f"turn {len(server.turns)}: {server.turns[-1].fault}")


async def _serve(
    provider: str, server: Simulator, ca: Path | None, turn_every: float | None
) -> None:
    from traced_retry.simulator.reach import WITH_TLS, constructor  # noqa: PLC0415

    # The handler of asyncio.run does not wake the loop if Ctrl-C comes just before the loop waits.
    # Windows has this handler alone.
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    async with server:
        if provider in WITH_TLS:
            port = server.url.rpartition(":")[2]
            ca = ca or Path(tempfile.gettempdir()) / f"traced-retry-{provider}-{port}.pem"
            _write(ca, server.ca)  # type: ignore[attr-defined]
        typer.echo(f"{provider} on {server.url}, script {server.script}; Ctrl-C ends it")
        typer.echo(constructor(provider, server, ca))
        typer.echo("")
        async with asyncio.TaskGroup() as group:
            if turn_every is not None:
                group.create_task(_speak(server, turn_every))
            for number in itertools.count(1):
                heard = partial(_has_requests, server, number)
                await server.wait_for(heard)
                request = server.requests[number - 1]
                typer.echo(
                    f"request {request.number}: {request.fault or 'rejected, one is active'}"
                )


def _write(path: Path, certificate: bytes) -> None:
    try:
        path.write_bytes(certificate)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): name another file with --ca"
        ) from None
