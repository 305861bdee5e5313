# SPDX-License-Identifier: Apache-2.0
"""``traced-retry simulate``: a provider on 127.0.0.1 that fails on a script."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import tempfile
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from traced_retry.errors import UsageError, install_command

if TYPE_CHECKING:
    from traced_retry.simulator import Simulator


_TURNS: Final = "Put turn: in front of an element to answer the caller with it"


def known_providers() -> str:
    """Return the names of the providers, for help."""
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
    tail = f'\n\n{_TURNS}, who then speaks every --turn-every seconds: "turn:ok,turn:failed".'
    return head + faults + tail


PortOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1. With 0 a free one is used.")
]
AuthorityOption = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        help="File for the certificate authority of google and aws; default: one in the "
        "system's folder for temporary files.",
    ),
]


def simulate(
    provider: Annotated[str, typer.Argument(help=f"Whose protocol to speak: {known_providers()}.")],
    *,
    script: Annotated[
        str | None,
        typer.Option(help='The fault of each request, for example "rate_limit,late:3,ok".'),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Play this cassette of `traced-retry record` instead of a script."),
    ] = None,
    port: PortOption = 0,
    faults: Annotated[
        bool, typer.Option("--faults", help="List the faults of this protocol.")
    ] = False,
    turn_every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two turns of the caller.")
    ] = 5.0,
    ca: AuthorityOption = None,
) -> None:
    """Serve a provider's protocol on 127.0.0.1 and fail on a script, for your own agent's tests.

    The command prints the lines of Python that create a model of LiveKit's plugin for this server.
    """
    kind = simulator_of(provider)
    if faults:
        _list_faults(provider, kind)
        return
    if replay is None:
        server = kind(script or "ok", port=port)
        work = _play(server, turn_every if "turn:" in (script or "") else None)
        serve(provider, server, ca, f"script {server.script}", work)
        counts = {
            "connections": server.connections,
            "requests": len(server.requests),
            "turns": len(server.turns),
            "answered in full": len(server.completed),
            "cancelled": len(server.cancels),
        }
        typer.echo(", ".join(f"{number} {name}" for name, number in counts.items()))
        return
    if script is not None:
        raise UsageError("--script and --replay exclude each other: give one of them")
    from traced_retry.simulator.replay import replayer  # noqa: PLC0415

    player = replayer(provider, replay, port=port)
    serve(provider, player, ca, f"cassette {replay}")
    typer.echo(f"{player.played} of {player.events} recorded events were sent")


def simulator_of(provider: str) -> type[Simulator]:
    """Return the simulator class of the provider that the user named."""
    from traced_retry.simulator import PROVIDERS, simulator  # noqa: PLC0415

    if provider not in PROVIDERS:
        raise typer.BadParameter(
            f"{provider!r} is not simulated; known: {', '.join(PROVIDERS)}", param_hint="PROVIDER"
        )
    return simulator(provider)


def _list_faults(provider: str, kind: type[Simulator]) -> None:
    from traced_retry.simulator import describe_faults  # noqa: PLC0415

    typer.echo(describe_faults(kind.faults))
    if provider != "nvidia":  # Its model speaks whenever it wants to.
        typer.echo(f"{_TURNS}, such as turn:ok.")


def serve(
    provider: str,
    server: Simulator,
    ca: Path | None,
    purpose: str,
    work: Coroutine[Any, Any, None] | None = None,
) -> None:
    """Print the server's address and the lines of Python that reach it. Run it until Ctrl-C."""
    try:
        asyncio.run(_serve(provider, server, ca, purpose, work))
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    except OSError as error:
        raise typer.BadParameter(
            f"the port cannot be listened on ({error.strerror}); --port 0 picks a free one"
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


async def _play(server: Simulator, turn_every: float | None) -> None:
    """Print each request and, if the script has turns, each turn."""
    async with asyncio.TaskGroup() as group:
        if turn_every is not None:
            group.create_task(_speak(server, turn_every))
        for number in itertools.count(1):
            await server.wait_for(partial(_has_requests, server, number))
            request = server.requests[number - 1]
            typer.echo(f"request {request.number}: {request.fault or 'rejected, one is active'}")


async def _serve(
    provider: str,
    server: Simulator,
    ca: Path | None,
    purpose: str,
    work: Coroutine[Any, Any, None] | None,
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
        typer.echo(f"{provider} on {server.url}, {purpose}; Ctrl-C ends it")
        typer.echo(constructor(provider, server, ca))
        typer.echo("")
        await (work or asyncio.Event().wait())


def _write(path: Path, certificate: bytes) -> None:
    try:
        path.write_bytes(certificate)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): name another file with --ca"
        ) from None
