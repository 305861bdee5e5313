# SPDX-License-Identifier: Apache-2.0
"""A proxy on 127.0.0.1 that records a session with a provider: see :mod:`cassette`.

It passes on each frame unchanged. The agent's headers and query, which hold its key, go to the
provider and are not recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import WSMsgType, web
from yarl import URL

from traced_retry.errors import UsageError
from traced_retry.simulator import simulator
from traced_retry.simulator.cassette import ABORTED, VERSION, Entry, Redactor, redact_message
from traced_retry.simulator.server import CLOSE_TIMEOUT, Simulator

_PER_CONNECTION: Final = ("host", "connection", "upgrade", "content-length", "accept-encoding")
_CALL: Final = "call"
"""The query parameter that numbers Ultravox's calls."""


def recorder(
    provider: str,
    to: str,
    write: Callable[[Entry], object],
    *,
    port: int = 0,
    trust: ssl.SSLContext | None = None,
) -> Recorder:
    """Return a proxy that records sessions. Use it as an async context manager.

    Args:
        provider: one of :data:`traced_retry.simulator.PROVIDERS`.
        to: the provider's base URL, in the form of the plugin's own setting.
        write: called with each line of the cassette.
        port: 0 picks a free one.
        trust: the certificate authorities for ``to``. Default: those of the system.

    Raises:
        UsageError: if ``to`` is not a URL. For AWS also if its plugin is missing, or the
            environment has no credentials.
    """
    if not URL(to).host:
        raise UsageError(f"{to!r} is not a URL: expected for example https://api.openai.com/v1")
    found: Recorder = server_class(Recorder, provider)(port=port)
    found.provider, found.write, found.trust = provider, write, trust
    found.to = to.rstrip("/")
    return found


def server_class(base: Any, provider: str) -> Any:
    """Return ``base``, a recorder or a replayer, with the address of the provider's simulator."""
    if provider == "aws":
        from traced_retry.simulator.aws_cassette import SERVERS  # noqa: PLC0415 - needs h2

        return SERVERS[base]
    kind = simulator(provider)
    return type(f"{base.__name__}{kind.__name__}", (base, kind), {})


class Recorder(Simulator):
    """The proxy. It has the address and certificate of the provider's simulator.

    Attributes:
        unreachable: how many connections to the provider failed without an answer.
    """

    provider: str
    to: str
    write: Callable[[Entry], object]
    trust: ssl.SSLContext | None
    unreachable = 0

    async def start(self) -> None:
        """Start to listen, and write the first line."""
        await super().start()
        self._numbers = 0
        self._calls: list[str] = []
        self.redact = Redactor()
        self._began = asyncio.get_running_loop().time()
        self.write({"cassette": VERSION, "provider": self.provider})

    def add_routes(self, app: web.Application) -> None:
        """Accept each path, because the provider decides about it."""
        app.router.add_route("*", "/{path:.*}", self._accept)

    def new_connection(self, method: str) -> int:
        """Return the number of a new connection, and write its first line."""
        self._numbers += 1
        self.entry(self._numbers, "client", http=method)
        return self._numbers

    async def _accept(self, http: web.Request) -> web.StreamResponse:
        number = self.new_connection(http.method)
        headers = {
            name: value
            for name, value in http.headers.items()
            if name.lower() not in _PER_CONNECTION and not name.lower().startswith("sec-websocket-")
        }
        websocket = http.headers.get("Upgrade", "").lower() == "websocket"
        try:
            async with aiohttp.ClientSession() as session:
                if websocket:
                    return await self._pass_frames(number, http, session, headers)
                return await self._pass_request(number, http, session, headers)
        except aiohttp.WSServerHandshakeError as error:
            wait = error.headers.get("Retry-After", "") if error.headers else ""
            retry_after = {"Retry-After": wait} if wait.isdigit() else {}
            self.entry(number, "server", http=error.status, headers=retry_after)
            return web.Response(status=error.status, headers=retry_after)
        except aiohttp.ClientConnectorError:
            self.unreachable += 1
            self.entry(number, "server", http=502, headers={})
            return web.Response(status=502)

    async def _pass_request(
        self, number: int, http: web.Request, session: aiohttp.ClientSession, headers: Any
    ) -> web.Response:
        body = await http.read()
        target = self._target(http, "http")
        async with session.request(
            http.method, target, headers=headers, data=body, ssl=self.trust or True
        ) as answer:
            content = await answer.read()
        event: Any = None
        with contextlib.suppress(ValueError):
            event = json.loads(content)
        self.entry(number, "server", http=answer.status, event=self.redact(event))
        if isinstance(event, dict) and isinstance(event.get("joinUrl"), str):
            self._calls.append(event["joinUrl"])
            event["joinUrl"] = join_url(self, len(self._calls))
            content = json.dumps(event).encode()
        kind = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
        return web.Response(status=answer.status, body=content, headers=kind)

    async def _pass_frames(
        self, number: int, http: web.Request, session: aiohttp.ClientSession, headers: Any
    ) -> web.StreamResponse:
        async with session.ws_connect(
            self._target(http, "ws"),
            headers=headers,
            protocols=re.findall(r"[^,\s]+", http.headers.get("Sec-WebSocket-Protocol", "")),
            ssl=self.trust or True,
            max_msg_size=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT),
        ) as upstream:
            chosen = [upstream.protocol] if upstream.protocol else []
            client = web.WebSocketResponse(
                compress=False, timeout=CLOSE_TIMEOUT, protocols=chosen, max_msg_size=0
            )
            await client.prepare(http)
            self.entry(number, "server", http=101, headers={})
            self.connections += 1
            requests = asyncio.create_task(self._pump(number, "client", client, upstream))
            answers = asyncio.create_task(self._pump(number, "server", upstream, client))
            try:
                await asyncio.wait({requests, answers}, return_when=asyncio.FIRST_COMPLETED)
                if answers.done():
                    code, reason = await answers
                    self.entry(number, "server", close=code, reason=redact_message(reason))
                    if code == ABORTED and http.transport is not None:
                        http.transport.abort()
                    else:
                        await client.close(code=code, message=reason.encode())
            finally:
                requests.cancel()
                answers.cancel()
                await asyncio.gather(requests, answers, return_exceptions=True)
            return client

    async def _pump(self, number: int, sender: str, source: Any, target: Any) -> tuple[int, str]:
        """Pass on the frames of one side until it ends; return the code and reason of its end."""
        while True:
            frame = await source.receive()
            if frame.type is WSMsgType.TEXT:
                self._frame(number, sender, frame.data)
                with contextlib.suppress(ConnectionError):
                    await target.send_str(frame.data)
            elif frame.type is WSMsgType.BINARY:
                self._frame(number, sender, frame.data)
                with contextlib.suppress(ConnectionError):
                    await target.send_bytes(frame.data)
            else:
                code = ABORTED if source.close_code is None else source.close_code
                return code or aiohttp.WSCloseCode.OK, frame.extra or ""

    def _frame(self, number: int, sender: str, data: str | bytes) -> None:
        entry: Entry = {} if isinstance(data, str) else {"binary": True}
        try:
            event = json.loads(data)
        except ValueError:
            entry = {"text" if isinstance(data, str) else "binary": len(data)}
            if self.provider == "nvidia" and isinstance(data, bytes):
                entry["first"] = data[0]
        else:
            entry["event"] = self.redact(event) if isinstance(event, dict) else None
        self.entry(number, sender, **entry)

    def entry(self, number: int, sender: str, **what: Any) -> None:
        """Write a line about this connection."""
        at = round(asyncio.get_running_loop().time() - self._began, 6)
        self.write({"at": at, "connection": number, "from": sender, **what})
        self.wake()

    def _target(self, http: web.Request, scheme: str) -> URL:
        """Return the provider's address for a request, with its query."""
        if call := http.query.get(_CALL):
            return URL(self._calls[int(call) - 1], encoded=True)
        url = self.to + http.raw_path.removeprefix(urlsplit(self.url).path)
        secure = urlsplit(url).scheme in ("https", "wss")
        rest = url.partition("://")[2]
        return URL(f"{scheme}{'s' if secure else ''}://{rest}", encoded=True)


def join_url(server: Simulator, call: int) -> str:
    """Return the address where an Ultravox client joins a call."""
    url = urlsplit(server.url)
    return f"ws://{url.netloc}{server.path}?{_CALL}={call}"
