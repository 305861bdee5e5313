# SPDX-License-Identifier: Apache-2.0
"""The base of the simulators: a local WebSocket server that keeps its position in a script."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from aiohttp import WSCloseCode, WSMsgType, web

from traced_retry.simulator.script import FAULTS, Fault, Script

if TYPE_CHECKING:
    from typing import Self

# Seconds, on the loop's clock, that a client has to answer a close frame.
CLOSE_TIMEOUT = 1.0

OnEvent = Callable[[Literal["received", "sent"], dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """A request for a reply that the server received, answered or not.

    Attributes:
        event_id: the client's id of the request, if it gave one.
        number: 1 for the first request that this server received, over all its connections.
        at: seconds on the running loop's clock.
        fault: the script's element that it took, or None if a response was active already.
        instructions: the instructions of this request, if it has any.
        metadata: echoed in the response.
        turn: whether it is a turn of the caller, which the server answers by itself.
    """

    event_id: str | None
    number: int
    at: float
    fault: Fault | None
    instructions: str | None = field(default=None, repr=False)
    metadata: dict[str, Any] | None = field(default=None, repr=False)
    turn: bool = False

    @property
    def answer(self) -> str:
        """The words of the response: ``reply 3``, or ``answer 3`` to a turn."""
        return f"{'answer' if self.turn else 'reply'} {self.number}"


class Simulator(ABC):
    """A WebSocket server on 127.0.0.1 that plays a script. Use it as an async context manager.

    All connections share the script. The server writes no log.

    Args:
        script: a parsed script, or its text.
        host: only 127.0.0.1 is allowed, because the server has no authentication.
        port: 0 picks a free one.
        on_event: called with "received" or "sent" and each JSON event; must not raise.

    Raises:
        ScriptError: if the script is invalid.
        ValueError: if the host is not 127.0.0.1.

    Attributes:
        requests: every request for a reply heard, in order.
        turns: every turn of the caller, in order.
        cancels: the response id, or None, of every cancellation heard.
        completed: the texts of the responses completed.
        connections: how many connections were accepted.
        refused: how many connection attempts were refused.
        lost: how many connections the script closed.
    """

    path: ClassVar[str]
    faults: ClassVar[frozenset[str]] = frozenset(FAULTS)
    """The faults that this provider's protocol knows."""

    def __init__(
        self,
        script: Script | str = "ok",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_event: OnEvent | None = None,
    ) -> None:
        if host != "127.0.0.1":
            raise ValueError(f"the simulator binds to 127.0.0.1 only, not to {host!r}")
        self.script = Script.parse(script) if isinstance(script, str) else script
        self.script.check(self.faults, type(self).__name__)
        self.requests: list[Request] = []
        self.turns: list[Request] = []
        self.cancels: list[str | None] = []
        self.completed: list[str] = []
        self.connections = 0
        self.refused = 0
        self.lost = 0
        self._host = host
        self._port = port
        self._on_event = on_event
        self._position = 0
        self._down_until = 0.0
        self._open: list[Connection] = []
        # What became of the newest connection attempt or loss; an accepted one clears both.
        self._lost_one = False
        self._refused_one = False
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._runner: web.AppRunner | None = None
        self.server_ssl: ssl.SSLContext | None = None
        """Set it before the start to speak TLS."""

    @abstractmethod
    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Create the provider's side of a new connection."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """Return ``http://127.0.0.1:PORT``. Raise RuntimeError unless the server is running."""
        if self._runner is None:
            raise RuntimeError("the simulator is not running")
        scheme = "http" if self.server_ssl is None else "https"
        return f"{scheme}://{self._host}:{self._runner.addresses[0][1]}"

    def add_routes(self, app: web.Application) -> None:  # noqa: B027 - most serve nothing else
        """Add the provider's other routes. Most providers have only the WebSocket."""

    async def start(self) -> None:
        """Start to listen.

        Raises:
            OSError: if the port is in use.
            RuntimeError: if the server is running already.
        """
        if self._runner is not None:
            raise RuntimeError("the simulator is running already")
        app = web.Application()
        app.router.add_get(self.path, self._accept)
        self.add_routes(app)
        app.on_shutdown.append(self._hang_up_all)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_TIMEOUT)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._host, self._port, ssl_context=self.server_ssl)
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner

    async def close(self) -> None:
        """Stop listening and close every connection. A second call has no effect."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        await runner.cleanup()
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(RuntimeError("the simulator was closed"))

    async def wait_for(self, condition: str | Callable[[], bool]) -> None:
        """Return as soon as the condition holds. It is checked at each event on the socket.

        Args:
            condition: a function without arguments, or one of these words, each a state that
                lasts until a client is connected again: "connection_lost" (the script closed a
                connection, and the client has seen it), "connection_refused" (the client also
                failed to come back). Or "connected": a connection is open.

        Raises:
            ValueError: if the word is not one of these.
            RuntimeError: if the server was closed first.
        """
        if isinstance(condition, str):
            condition = self._named(condition)
        if condition():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (condition, waiter)
        self._waiters.append(entry)
        try:
            await waiter
        finally:
            self._waiters.remove(entry)

    def _named(self, word: str) -> Callable[[], bool]:
        words: dict[str, Callable[[], bool]] = {
            "connected": lambda: bool(self._open),
            "connection_lost": lambda: self._lost_one,
            "connection_refused": lambda: self._refused_one,
        }
        if word not in words:
            raise ValueError(f"unknown condition {word!r}; known are {', '.join(words)}")
        return words[word]

    # For the provider's connections:

    @property
    def next_fault(self) -> Fault:
        """Return the element of the script for the next request."""
        return self.script.at(self._position)

    def advance(self) -> None:
        """Take the next element off the script."""
        self._position += 1

    async def caller_speaks(self, transcript: str | None = "hello") -> None:
        """Have the caller speak on the newest connection, and answer as the script says.

        Args:
            transcript: the caller's words as the server understood them. None if it sends none.

        Raises:
            RuntimeError: if no client is connected.
            NotImplementedError: if this simulator has no turns.
        """
        if not self._open:
            raise RuntimeError("no client is connected, so the caller cannot speak")
        await self._open[-1].hear_caller(transcript)

    def take_fault(self) -> Fault:
        """Take the element of the next request. One that refuses a connection stays for that."""
        fault = self.next_fault
        if fault.name != "unauthorized":
            self.advance()
        return fault

    def take_request(
        self,
        fault: Fault | None,
        *,
        event_id: str | None = None,
        instructions: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Request:
        """Record a request that gets ``fault``, or None if a response is active."""
        request = Request(
            event_id=event_id,
            number=len(self.requests) + 1,
            at=asyncio.get_running_loop().time(),
            fault=fault,
            instructions=instructions,
            metadata=metadata,
        )
        self.requests.append(request)
        self.wake()
        return request

    def take_turn(self) -> Request:
        """Return the caller's next turn, with its element of the script."""
        turn = Request(
            event_id=None,
            number=len(self.turns) + 1,
            at=asyncio.get_running_loop().time(),
            fault=self.script.turn_at(len(self.turns)),
            turn=True,
        )
        self.turns.append(turn)
        self.wake()
        return turn

    def go_down(self, seconds: float) -> None:
        """Refuse new connections with HTTP 503 for that long."""
        self._down_until = asyncio.get_running_loop().time() + seconds

    def record(self, direction: Literal["received", "sent"], event: dict[str, Any]) -> None:
        """Report an event to ``on_event``, then check the waiting conditions."""
        if self._on_event is not None:
            self._on_event(direction, event)
        self.wake()

    def wake(self) -> None:
        """Check every waiter's condition now, because it may hold only for an instant."""
        for condition, waiter in self._waiters:
            if waiter.done():
                continue
            try:
                if condition():
                    waiter.set_result(None)
            except Exception as error:  # noqa: BLE001 - handed to the one who waits
                waiter.set_exception(error)

    async def _accept(self, http: web.Request) -> web.StreamResponse:
        if asyncio.get_running_loop().time() < self._down_until:
            return self._refuse(503, "The server is down.", "server_error")
        if self.next_fault.name == "unauthorized":
            self.advance()
            return self._refuse(401, "Incorrect API key provided.", "invalid_api_key")
        # Compression would hand large messages to a thread.
        ws = web.WebSocketResponse(compress=False, timeout=CLOSE_TIMEOUT)
        await ws.prepare(http)
        connection = self.connect(ws, http)
        self._open.append(connection)
        self.connections += 1
        self._lost_one = self._refused_one = False
        self.wake()
        try:
            await connection.run()
        finally:
            self._open.remove(connection)
            if connection.lost:
                self.lost += 1
                self._lost_one = True
            self.wake()
        return ws

    def _refuse(self, status: int, message: str, code: str) -> web.Response:
        self.refused += 1
        self._refused_one = True
        self.wake()
        return web.json_response({"error": {"message": message, "code": code}}, status=status)

    async def _hang_up_all(self, _: web.Application) -> None:
        await asyncio.gather(*(c.hang_up(WSCloseCode.GOING_AWAY) for c in self._open))


class Connection(ABC):
    """A client of a simulator. Its delayed work runs in tasks that end with it."""

    def __init__(self, ws: web.WebSocketResponse) -> None:
        self.ws = ws
        self.lost = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        self._settled.set()

    @abstractmethod
    async def greet(self) -> None:
        """Send the provider's first events."""

    @abstractmethod
    async def receive(self, data: str) -> None:
        """Handle one text message."""

    async def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, and answer it."""
        raise NotImplementedError(f"{type(self).__name__} has no turns of the caller")

    async def run(self) -> None:
        """Serve the client until one of the two hangs up."""
        try:
            await self.greet()
            async for message in self.ws:
                if message.type is WSMsgType.TEXT:
                    await self.receive(message.data)
        except ConnectionError:
            pass  # The client left while it was being answered.
        finally:
            # A task may be the one hanging up: let it finish before it is cancelled.
            await self._settled.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def hang_up(self, code: int, *, by_script: bool = False, reason: str = "") -> None:
        """Send a close frame, and wait at most CLOSE_TIMEOUT for the client's."""
        self.lost = self.lost or by_script
        self._settled.clear()
        try:
            await self.ws.close(code=code, message=reason.encode())
        finally:
            self._settled.set()

    def after(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """Do work after ``seconds``, unless the connection ends before."""

        async def run() -> None:
            await asyncio.sleep(seconds)
            with contextlib.suppress(ConnectionError):
                await work()

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
