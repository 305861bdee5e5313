# SPDX-License-Identifier: Apache-2.0
"""An Amazon Nova Sonic server that fails on a script: HTTP/2 over TLS, event streams both ways.

Facts (livekit-plugins-aws 1.8.9, ``experimental/realtime/realtime_model.py`` and ``events.py``;
frames: the ``application/vnd.amazon.eventstream`` format):

* A session is one HTTP/2 stream, and both halves stay open. The client's frames are signed. Each
  holds a whole inner frame with the payload ``{"bytes": BASE64}`` of one JSON event.
* A request for a reply is a text content with ``interactive`` set: ``contentStart``,
  ``textInput``, ``contentEnd``. It carries no id that a reply would echo, and no cancel exists.
* The plugin's endpoint is hard-coded; see :meth:`AWSSimulator.redirected`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import struct
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import trustme
from aiohttp import web

from traced_retry.simulator.script import Fault
from traced_retry.simulator.server import Connection, Simulator

Event = dict[str, Any]

EVENT_STREAM = "application/vnd.amazon.eventstream"
UNSTABLE = "System instability detected. Please retry your request."
"""The one text of a ``validationException`` after which the plugin opens a new stream."""
_STRING = 7
_FRAME_OVERHEAD = 16  # Prelude, its checksum, and the message's.
_FIXED_SIZE = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}  # Header types that are not bytes.
_SILENCE = base64.b64encode(bytes(960)).decode()  # 20 ms of 24 kHz mono.


# --- application/vnd.amazon.eventstream ------------------------------------------------------


def encode_frame(headers: dict[str, str], payload: bytes) -> bytes:
    """Return one frame: lengths, their checksum, headers (strings), payload, checksum of all."""
    packed = b"".join(
        struct.pack("!B", len(name))
        + name.encode()
        + struct.pack("!BH", _STRING, len(value.encode()))
        + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", len(packed) + len(payload) + _FRAME_OVERHEAD, len(packed))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + packed + payload
    return message + struct.pack("!I", zlib.crc32(message))


def decode_frame(data: bytes) -> tuple[dict[str, str], bytes, int] | None:
    """Return the string headers, payload and length of the frame at the start of ``data``.

    Return None if the frame is not complete yet.

    Raises:
        ValueError: if a checksum is wrong.
    """
    if len(data) < _FRAME_OVERHEAD:
        return None
    length, headers_length, checksum = struct.unpack("!III", data[:12])
    if checksum != zlib.crc32(data[:8]):
        raise ValueError("the checksum of a frame's prelude does not fit")
    if len(data) < length:
        return None
    if struct.unpack("!I", data[length - 4 : length])[0] != zlib.crc32(data[: length - 4]):
        raise ValueError("the checksum of a frame does not fit")
    payload_at = 12 + headers_length
    headers = _decode_headers(data[12:payload_at])
    return headers, data[payload_at : length - 4], length


def _decode_headers(data: bytes) -> dict[str, str]:
    headers, at = {}, 0
    while at < len(data):
        name = data[at + 1 : at + 1 + data[at]].decode()
        at += 1 + data[at]
        kind, at = data[at], at + 1
        if kind in _FIXED_SIZE:
            at += _FIXED_SIZE[kind]
            continue
        size = struct.unpack("!H", data[at : at + 2])[0]
        if kind == _STRING:
            headers[name] = data[at + 2 : at + 2 + size].decode()
        at += 2 + size
    return headers


def event_in(payload: bytes) -> Event:
    """Return the JSON event in the payload of an inner frame.

    Raises:
        ValueError: if the payload has no event.
    """
    try:
        event: Event = json.loads(base64.b64decode(json.loads(payload)["bytes"]))["event"]
    except (KeyError, TypeError) as error:
        raise ValueError("the payload of a frame has no event") from error
    return event


# --- the server -------------------------------------------------------------------------------


class AWSSimulator(Simulator):
    """A server that plays a script to Nova Sonic clients. A connection is one HTTP/2 stream.

    Each interactive text takes one element of the script. ``error:CODE`` ends the stream with
    that exception (``throttlingException``, ``modelTimeoutException``, ``validationException``,
    ``internalServerException``, ...; ``systemInstability`` is the ``validationException`` that
    the plugin recovers from), and so does ``rate_limit``. The next stream that is opened takes
    ``unauthorized``. A request that takes it on an open stream ends that stream.

    Attributes:
        history: role and text of each text that requests no reply, in order.
    """

    path = "/model/"
    faults: ClassVar[frozenset[str]] = frozenset(
        {
            "ok",
            "error",
            "rate_limit",
            "unauthorized",
            "silence",
            "late",
            "drop_before",
            "drop_during",
            "malformed",
            "tool",
            "slow",
        }
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history: list[tuple[str, str]] = []
        self._ca = trustme.CA()
        self._server: asyncio.Server | None = None
        self._clients: set[Client] = set()

    @property
    def url(self) -> str:
        """Return ``https://127.0.0.1:PORT``. Raise RuntimeError unless the server is running."""
        if self._server is None:
            raise RuntimeError("the simulator is not running")
        return f"https://{self._host}:{self._server.sockets[0].getsockname()[1]}"

    @property
    def ca(self) -> bytes:
        """Return the certificate authority's certificate (PEM) for this server."""
        return self._ca.cert_pem.bytes()

    def connect(self, ws: web.WebSocketResponse, http: web.Request) -> Connection:
        """Raise an error, because this server has no WebSockets."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start to listen.

        Raises:
            OSError: if the port is in use.
            RuntimeError: if the server is running already.
        """
        if self._server is not None:
            raise RuntimeError("the simulator is running already")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(self._host).configure_cert(context)
        context.set_alpn_protocols(["h2"])
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Client(self), self._host, self._port, ssl=context
        )

    async def close(self) -> None:
        """Stop listening and close every connection. A second call has no effect."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for client in list(self._clients):
            client.abort()
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(RuntimeError("the simulator was closed"))

    def redirected(self) -> contextlib.AbstractContextManager[None]:
        """Connect the real plugin to this server in the ``with`` block: see :func:`redirected`."""
        return redirected(self.url, self.ca)

    async def caller_speaks(self, transcript: str | None = "hello") -> None:
        """Have the caller speak on the newest stream, and answer as the script says.

        Raises:
            RuntimeError: if no stream is open.
        """
        streams = [stream for client in self._clients for stream in client.streams.values()]
        if not streams:
            raise RuntimeError("no stream is open, so the caller cannot speak")
        streams[-1].hear_caller(transcript)

    # For the clients:

    def new_stream(self, client: Client, stream_id: int, headers: dict[str, str]) -> Stream:
        """Return the server's side of a new stream."""
        return _Session(client, stream_id)

    def refused_stream(self) -> None:
        """Count a stream that was not opened."""
        self.refused += 1
        self._refused_one = True
        self.wake()

    def opened(self) -> None:
        """Count a stream."""
        self.connections += 1
        self._lost_one = self._refused_one = False
        self.wake()

    def closed(self, *, lost: bool) -> None:
        """Count a stream that the script closed."""
        if lost:
            self.lost += 1
            self._lost_one = True
        self.wake()

    def _named(self, word: str) -> Callable[[], bool]:
        if word == "connected":
            return lambda: any(client.streams for client in self._clients)
        return super()._named(word)


@contextlib.contextmanager
def redirected(url: str, ca: bytes) -> Iterator[None]:
    """Connect the real plugin to the simulator at ``url`` in the ``with`` block.

    The plugin gets made-up credentials. The function replaces module attributes of the plugin, so
    use it for one simulator at a time. A session keeps its transport: it stays redirected
    afterwards.

    Args:
        url: the simulator's.
        ca: the simulator's certificate authority, as PEM.

    Raises:
        RuntimeError: if the plugin is missing, or lacks an attribute to replace.
    """
    try:
        from livekit.plugins.aws.experimental.realtime import (  # noqa: PLC0415 - optional
            realtime_model as plugin,
        )
    except ImportError as error:
        raise RuntimeError(
            "the AWS simulator needs Python 3.12 and livekit-plugins-aws[realtime]"
        ) from error
    stand_ins: dict[str, Callable[[Any], Any]] = {
        "_BedrockRuntimeConfig": lambda real: _Config(real, url),
        "AWSCRTHTTPClient": partial(_trusting, ca=ca),
        "_get_credentials_resolver": lambda _: _Credentials,
    }
    if missing := [name for name in stand_ins if not hasattr(plugin, name)]:
        raise RuntimeError(
            f"livekit-plugins-aws has no {', '.join(missing)} any more, so it cannot be "
            "pointed at the simulator; look for a newer traced-retry"
        )
    real = {name: getattr(plugin, name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(plugin, name, stand_in(real[name]))
    try:
        yield
    finally:
        for name, value in real.items():
            setattr(plugin, name, value)


def http_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers of HTTP/2 as text."""
    return {name.decode(): value.decode() for name, value in headers}


class HTTP2(asyncio.Protocol):
    """One side of an HTTP/2 connection."""

    transport: asyncio.Transport

    def __init__(self, *, client_side: bool) -> None:
        config = h2.config.H2Configuration(client_side=client_side)
        self.h2 = h2.connection.H2Connection(config)
        self._unsent: dict[int, bytes] = {}
        self._ending: set[int] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the settings."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.h2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Handle the HTTP/2 events in the data. An invalid one ends the connection."""
        try:
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    self._acknowledge(event)
                elif isinstance(event, h2.events.WindowUpdated):
                    self._push()
                self.handle(event)
        except h2.exceptions.ProtocolError:
            self.abort()
            return
        self.flush()

    def handle(self, event: h2.events.Event) -> None:
        """Handle an HTTP/2 event."""

    def _acknowledge(self, event: h2.events.DataReceived) -> None:
        # Send a window update at once, not when half the window is used. It carries the TCP
        # acknowledgement, which the other side's next small packet waits for (40 ms).
        if event.flow_controlled_length:
            self.h2.increment_flow_control_window(event.flow_controlled_length)
            self.h2.increment_flow_control_window(event.flow_controlled_length, event.stream_id)

    def send(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send data on a stream as soon as the windows of the other side allow it."""
        self._unsent[stream_id] = self._unsent.get(stream_id, b"") + data
        if end:
            self._ending.add(stream_id)
        self._push()

    def _push(self) -> None:
        for stream_id in list(self._unsent):
            try:
                self._send_allowed(stream_id)
            except h2.exceptions.ProtocolError:  # The other side has reset the stream.
                self._unsent[stream_id] = b""
            if not self._unsent[stream_id]:
                del self._unsent[stream_id]
        self.flush()

    def _send_allowed(self, stream_id: int) -> None:
        while (data := self._unsent[stream_id]) and (
            window := self.h2.local_flow_control_window(stream_id)
        ) > 0:
            size = min(window, self.h2.max_outbound_frame_size)
            self.h2.send_data(stream_id, data[:size])
            self._unsent[stream_id] = data[size:]
        if stream_id in self._ending and not self._unsent[stream_id]:
            self.h2.end_stream(stream_id)

    def flush(self) -> None:
        """Write the HTTP/2 frames that are ready."""
        if not self.transport.is_closing() and (data := self.h2.data_to_send()):
            self.transport.write(data)

    def abort(self) -> None:
        """Close the connection, and every stream with it."""
        self.transport.abort()


class Client(HTTP2):
    """The server's side of a client's connection."""

    def __init__(self, server: AWSSimulator) -> None:
        super().__init__(client_side=False)
        self.server = server
        self.streams: dict[int, Stream] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the settings."""
        self.server._clients.add(self)
        super().connection_made(transport)

    def handle(self, event: h2.events.Event) -> None:
        """Pass an HTTP/2 event on to its stream."""
        if isinstance(event, h2.events.RequestReceived):
            new = self.server.new_stream(self, event.stream_id, http_headers(event.headers))
            self.streams[event.stream_id] = new
            new.start()
        elif isinstance(event, h2.events.DataReceived):
            if stream := self.streams.get(event.stream_id):
                stream.feed(event.data)
        elif isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)) and (
            stream := self.streams.get(event.stream_id)
        ):
            stream.end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget all streams."""
        self.server._clients.discard(self)
        for stream in list(self.streams.values()):
            stream.forget()


class Stream(ABC):
    """The server's side of one HTTP/2 stream."""

    def __init__(self, client: Client, stream_id: int) -> None:
        self.client = client
        self.server = client.server
        self.id = stream_id
        self.lost = False
        self._received = b""
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    def start(self) -> None:
        """Answer the headers of the request. The request never ends by itself."""

    @abstractmethod
    def hear(self, event: Event) -> None:
        """Handle an event of the client."""

    def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, and answer it."""
        raise NotImplementedError(f"{type(self).__name__} has no turns of the caller")

    def feed(self, data: bytes) -> None:
        """Handle the signed events of the client."""
        self._received += data
        while frame := decode_frame(self._received):
            _, payload, length = frame
            self._received = self._received[length:]
            if payload and (signed := decode_frame(payload)):
                event = event_in(signed[1])
                self.server.record("received", event)
                self.hear(event)

    def accept(self) -> None:
        """Answer the request with a stream of events."""
        headers = [(":status", "200"), ("content-type", EVENT_STREAM)]
        self.client.h2.send_headers(self.id, headers)
        self.client.flush()
        self.server.opened()

    def refuse(self, status: int, kind: str, message: str) -> None:
        """Answer the request with an error of this kind."""
        self.stop()
        headers = [
            (":status", str(status)),
            ("content-type", "application/json"),
            ("x-amzn-errortype", kind),
        ]
        self.client.h2.send_headers(self.id, headers)
        self.client.send(self.id, json.dumps({"message": message}).encode(), end=True)
        self.server.refused_stream()

    def send_event(self, event: Event) -> None:
        """Send a JSON event."""
        inner = base64.b64encode(json.dumps({"event": event}).encode()).decode()
        payload = json.dumps({"bytes": inner}).encode()
        self.send_frame({":message-type": "event", ":event-type": "chunk"}, payload)

    def send_exception(self, kind: str, message: str) -> None:
        """Send an exception of the provider's, such as ``throttlingException``."""
        headers = {":message-type": "exception", ":exception-type": kind}
        self.send_frame(headers, json.dumps({"message": message}).encode())

    def send_frame(self, headers: dict[str, str], payload: bytes) -> None:
        """Send a frame with this payload."""
        frame = encode_frame({**headers, ":content-type": "application/json"}, payload)
        self.client.send(self.id, frame)

    def drop(self) -> None:
        """Close the connection after all earlier events were sent."""
        self.lost = True
        self.client.transport.close()

    def end(self) -> None:
        """End our half of the stream, as the provider does."""
        if self.id in self.client.streams:
            self.forget()
            self.client.send(self.id, b"", end=True)

    def forget(self) -> None:
        """Stop, and count the stream if it is lost."""
        self.stop()
        self.server.closed(lost=self.lost)

    def stop(self) -> None:
        """Remove the stream and cancel its delayed events."""
        self.client.streams.pop(self.id, None)
        for task in self._tasks:
            task.cancel()

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Do work after ``seconds``, unless the stream ends before."""

        async def run() -> None:
            await asyncio.sleep(seconds)
            work()

        self.run(run())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task that ends with the stream."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Session(Stream):
    """A stream that answers as the script says."""

    def __init__(self, client: Client, stream_id: int) -> None:
        super().__init__(client, stream_id)
        self._contents: dict[str, Event] = {}

    def start(self) -> None:
        if self.server.next_fault.name == "unauthorized":
            self.server.advance()
            self.refuse(403, "AccessDeniedException", "refused by the script")
        else:
            self.accept()

    # --- events of the client ------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        if start := event.get("contentStart"):
            self._contents[start["contentName"]] = {**start, "text": ""}
        elif text := event.get("textInput") or event.get("toolResult"):
            self._contents[text["contentName"]]["text"] += str(text["content"])
        elif "contentEnd" in event:
            content = self._contents.pop(event["contentEnd"]["contentName"], {"type": "AUDIO"})
            if content["type"] == "TOOL":
                self.reply(f"reply {len(self.server.requests)}")
            elif content["type"] == "TEXT" and content.get("interactive"):
                self.hear_request(content["text"])
            elif content["type"] == "TEXT":
                self.server.history.append((content["role"], content["text"]))
        elif "sessionEnd" in event:
            self.end()

    def hear_request(self, text: str) -> None:
        """Take the script's next element for a request."""
        fault = self.server.take_fault()
        self.answer(self.server.take_request(fault, instructions=text).answer, fault)

    def hear_caller(self, transcript: str | None) -> None:
        """Hear a turn of the caller, and answer it."""
        stage = {"additionalModelFields": json.dumps({"generationStage": "FINAL"})}
        content = self.start_content("TEXT", "USER", **stage)
        self.send("textOutput", **content, role="USER", content=transcript or "")
        self.send("contentEnd", **content, type="TEXT", stopReason="PARTIAL_TURN")
        turn = self.server.take_turn()
        assert turn.fault is not None
        self.answer(turn.answer, turn.fault)

    def answer(self, text: str, fault: Fault) -> None:  # noqa: C901 - a table
        """Play the element. Only "silence" has no effect."""
        match fault.name:
            case "ok":
                self.reply(text)
            case "late":
                self.after(fault.seconds, partial(self.reply, text))
            case "slow":
                self.begin(text)
                self.after(fault.seconds, partial(self.finish, text))
            case "tool":
                self.call_tool(fault.argument)
            case "error" if fault.argument == "systemInstability":
                self.fail("validationException", UNSTABLE)
            case "error":
                self.fail(fault.argument, "The script says so.")
            case "rate_limit":
                self.fail("throttlingException", "Too many requests, please wait.")
            case "malformed":
                self.send_frame({":message-type": "event", ":event-type": "chunk"}, b"{not JSON")
            case "drop_before":
                self.drop()
            case "drop_during":
                self.begin(text)
                self.drop()
            case "unauthorized":
                self.lost = True
                self.end()

    # --- answers -------------------------------------------------------------------------------

    def reply(self, text: str) -> None:
        """Say ``text`` and end the turn."""
        self.begin(text)
        self.finish(text)

    def begin(self, text: str) -> None:
        """Start a completion with its text, which Nova Sonic sends before the sound."""
        stage = {"additionalModelFields": json.dumps({"generationStage": "SPECULATIVE"})}
        self.send("completionStart")
        content = self.start_content("TEXT", "ASSISTANT", **stage)
        self.send("textOutput", **content, role="ASSISTANT", content=text)
        self.send("contentEnd", **content, type="TEXT", stopReason="PARTIAL_TURN")

    def finish(self, text: str) -> None:
        """Send the sound of the started completion, and the end of the turn."""
        content = self.start_content("AUDIO", "ASSISTANT")
        self.send("audioOutput", **content, content=_SILENCE)
        self.send("contentEnd", **content, type="AUDIO", stopReason="END_TURN")
        self.send("completionEnd", stopReason="END_TURN")
        self.server.completed.append(text)
        self.server.wake()

    def call_tool(self, name: str) -> None:
        """Call a function with the arguments "{}". Its result is answered with a reply."""
        self.send("completionStart")
        content = self.start_content("TOOL", "TOOL")
        tool = {"toolName": name, "toolUseId": str(uuid.uuid4()), "content": "{}"}
        self.send("toolUse", **content, role="TOOL", **tool)
        self.send("contentEnd", **content, type="TOOL", stopReason="TOOL_USE")

    def start_content(self, kind: str, role: str, **fields: str) -> dict[str, str]:
        content = {"contentId": str(uuid.uuid4())}
        self.send("contentStart", **content, type=kind, role=role, **fields)
        return content

    def send(self, kind: str, **fields: Any) -> None:
        self.send_event({kind: fields})
        self.server.record("sent", {kind: fields})

    def fail(self, exception: str, message: str) -> None:
        """End the stream with an exception of the provider's."""
        self.send_exception(exception, message)
        self.lost = True
        self.end()


# --- replacements for the plugin --------------------------------------------------------------


class _Config:
    """The SDK's configuration class with another endpoint.

    Old SDKs call the class, new ones resolve it.
    """

    def __init__(self, real: Any, url: str) -> None:
        self._real = real
        self._url = url

    def resolve(self, **settings: Any) -> Awaitable[Any]:
        resolved: Awaitable[Any] = self._real.resolve(**{**settings, "endpoint_uri": self._url})
        return resolved

    def __call__(self, **settings: Any) -> Any:
        return self._real(**{**settings, "endpoint_uri": self._url})


def _trusting(real: Any, ca: bytes) -> Any:
    """Return the SDK's transport as a class that trusts only the simulator's certificate."""
    from awscrt import io  # noqa: PLC0415 - the plugin brings it

    class Transport(real):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            options = io.TlsContextOptions()
            options.override_default_trust_store(ca)
            self._tls_ctx = io.ClientTlsContext(options)

        def __deepcopy__(self, memo: Any) -> Transport:
            return self  # The SDK copies its configuration, and would get a plain transport.

    return Transport


class _Credentials:
    """A replacement for the plugin's lookup of credentials, which might find real ones."""

    async def get_identity(self, **_: Any) -> Any:
        from smithy_aws_core.identity import AWSCredentialsIdentity  # noqa: PLC0415 - optional

        made_up = "simulator"
        return AWSCredentialsIdentity(access_key_id=made_up, secret_access_key=made_up)

    def get_credential_expiry_time(self) -> float | None:
        return None
