# SPDX-License-Identifier: Apache-2.0
"""AWS's side of :mod:`record` and :mod:`replay`.

Nova Sonic's plugin signs its request and each event for the host that it connects to. So the
recorder signs them again with the plugin's SDK and the credentials of its own environment, and
passes them on in a stream of its own. The provider's frames are passed on unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote

import h2.events
from yarl import URL

from traced_retry.errors import UsageError
from traced_retry.simulator.aws import (
    HTTP2,
    AWSSimulator,
    Client,
    Event,
    Stream,
    decode_frame,
    event_in,
    http_headers,
)
from traced_retry.simulator.cassette import ABORTED, Entry
from traced_retry.simulator.record import Recorder
from traced_retry.simulator.replay import NO_FURTHER, Call, Playback, Replayer

_ENDED: Final = 1000
_ERROR_TYPE: Final = "x-amzn-errortype"
_DEFAULT_REGION: Final = "us-east-1"
_NOT_IN_HTTP2: Final = ("host", "connection", "transfer-encoding")


# --- the recorder -----------------------------------------------------------------------------


class AWSRecorder(Recorder, AWSSimulator):
    """The proxy for Nova Sonic.

    Raises:
        UsageError: if the plugin is missing, or the environment has no credentials.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.credentials = _credentials()

    def new_stream(self, client: Client, stream_id: int, headers: dict[str, str]) -> Stream:
        """Return the server's side of a new stream."""
        model = unquote(headers[":path"].removeprefix(self.path).partition("/")[0])
        return _Recorded(self, client, stream_id, model)

    async def connect_upstream(self) -> _Upstream:
        """Connect to the provider.

        Raises:
            OSError: if the provider cannot be reached.
        """
        url, context = URL(self.to), None
        if url.scheme == "https":
            context = self.trust or ssl.create_default_context()
            context.set_alpn_protocols(["h2"])
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(
            _Upstream, url.host or "", url.port or 0, ssl=context
        )
        return upstream


class _Recorded(Stream):
    """A stream of the client, and the one to the provider."""

    def __init__(self, recorder: AWSRecorder, client: Client, stream_id: int, model: str) -> None:
        super().__init__(client, stream_id)
        self.recorder = recorder
        self.model = model
        self.number = recorder.new_connection("POST")
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def start(self) -> None:
        self.run(self.pass_on())

    def hear(self, event: Event) -> None:
        self.entry("client", event=self.recorder.redact(event))
        self.events.put_nowait(event)

    def entry(self, sender: str, **what: Any) -> None:
        self.recorder.entry(self.number, sender, **what)

    async def pass_on(self) -> None:
        """Pass on the events of both sides until one of them ends."""
        signer = _Signer(self.recorder.to, self.recorder.credentials)
        try:
            request = await signer.sign_request(self.model)
            upstream = await self.recorder.connect_upstream()
        except (OSError, ValueError):
            self.fail_to_reach()
            return
        try:
            upstream.request(request)
            self.run(self.pass_requests(signer, upstream))
            await self.pass_answers(upstream)
        finally:
            upstream.transport.close()

    def fail_to_reach(self) -> None:
        """Count that the provider did not answer, and send HTTP 502."""
        self.recorder.unreachable += 1
        self.pass_refusal(HTTPStatus.BAD_GATEWAY, "", "")

    async def pass_requests(self, signer: _Signer, upstream: _Upstream) -> None:
        """Pass on the events of the client."""
        while True:
            upstream.send(upstream.stream_id, await signer.sign_event(await self.events.get()))

    async def pass_answers(self, upstream: _Upstream) -> None:
        """Pass on the answer of the provider, and its frames until it ends the stream."""
        headers = await upstream.headers()
        if not headers:
            self.fail_to_reach()
            return
        received = b""
        if (status := int(headers[":status"])) != HTTPStatus.OK:
            async for data in upstream.data():
                received += data
            message = ""
            with contextlib.suppress(ValueError, AttributeError):
                message = str(json.loads(received).get("message"))
            self.pass_refusal(status, headers.get(_ERROR_TYPE, "").partition(":")[0], message)
            return
        self.entry("server", http=status, headers={})
        self.accept()
        async for data in upstream.data():
            received += data
            while frame := decode_frame(received):
                frame_headers, payload, length = frame
                self.entry("server", **self.redacted(frame_headers, payload))
                self.client.send(self.id, received[:length])
                received = received[length:]
        self.entry("server", close=_ENDED if upstream.ended else ABORTED, reason="")
        if upstream.ended:
            self.end()
        else:
            self.drop()

    def pass_refusal(self, status: int, kind: str, message: str) -> None:
        """Pass on that the provider did not open the stream."""
        self.entry("server", http=status, headers={_ERROR_TYPE: kind})
        self.refuse(status, kind, message)

    def redacted(self, headers: dict[str, str], payload: bytes) -> Entry:
        """Return a frame without its content."""
        try:
            if kind := headers.get(":exception-type"):
                event = {"type": kind, "message": json.loads(payload).get("message", "")}
                return {"exception": True, "event": self.recorder.redact(event)}
            return {"event": self.recorder.redact(event_in(payload))}
        except (ValueError, AttributeError):
            return {"text": len(payload)}


class _Upstream(HTTP2):
    """A connection to the provider, with one stream."""

    stream_id = 1

    def __init__(self) -> None:
        super().__init__(client_side=True)
        self.ended = False
        """Whether the provider has ended the stream, and not lost it."""
        self._news: asyncio.Queue[h2.events.Event | None] = asyncio.Queue()

    def request(self, request: Any) -> None:
        """Send the headers of a request of the SDK."""
        url = request.destination
        headers = [
            (":method", request.method),
            (":scheme", url.scheme),
            (":authority", url.netloc),
            (":path", url.path),
            ("accept", "*/*"),
        ]
        named = ((field.name.lower(), field.as_string()) for field in request.fields)
        headers += [(name, value) for name, value in named if name not in _NOT_IN_HTTP2]
        self.h2.send_headers(self.stream_id, headers)
        self.flush()

    def handle(self, event: h2.events.Event) -> None:
        """Keep the events of the stream."""
        if getattr(event, "stream_id", 0):
            self._news.put_nowait(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the stream."""
        self._news.put_nowait(None)

    async def headers(self) -> dict[str, str]:
        """Return the headers of the answer, or none if the stream is lost."""
        while event := await self._news.get():
            if isinstance(event, h2.events.ResponseReceived):
                return http_headers(event.headers)
            if isinstance(event, h2.events.StreamReset):
                break
        return {}

    async def data(self) -> AsyncIterator[bytes]:
        """Yield the data until the stream ends."""
        while event := await self._news.get():
            if isinstance(event, h2.events.DataReceived):
                yield event.data
            elif isinstance(event, h2.events.StreamEnded):
                self.ended = True
                return
            elif isinstance(event, h2.events.StreamReset):
                return


class _Signer:
    """The SDK, which encodes and signs a request and its events. It sends neither.

    It is the SDK's HTTP client, and keeps the request.
    """

    SUPPORTS_DUPLEX_STREAMING = True
    TIMEOUT_EXCEPTIONS = ()

    def __init__(self, to: str, credentials: Any) -> None:
        self._to = to
        self._credentials = credentials
        self._request: Any = None
        self._events: Any = None

    def __deepcopy__(self, memo: Any) -> _Signer:
        return self  # The SDK copies its configuration.

    async def send(self, request: Any, **_: Any) -> Any:
        """Keep the request. The SDK calls this."""
        from smithy_http import Fields  # noqa: PLC0415 - optional
        from smithy_http.aio import HTTPResponse  # noqa: PLC0415 - optional

        self._request = request
        return HTTPResponse(status=HTTPStatus.OK, fields=Fields())

    async def sign_request(self, model: str) -> Any:
        """Return a signed request for a stream with this model.

        Raises:
            ValueError: if the credentials are no longer valid.
        """
        from aws_sdk_bedrock_runtime.client import AsyncBedrockRuntimeClient  # noqa: PLC0415
        from aws_sdk_bedrock_runtime.config import AsyncBedrockRuntimeConfig  # noqa: PLC0415
        from aws_sdk_bedrock_runtime.models import (  # noqa: PLC0415
            InvokeModelWithBidirectionalStreamOperationInput,
        )

        await self._credentials.get_identity()  # The SDK would wait forever after an error.
        config = await AsyncBedrockRuntimeConfig.resolve(
            endpoint_uri=self._to,
            region=region_in(self._to),
            aws_credentials_identity_resolver=self._credentials,
            transport=self,
        )
        client = AsyncBedrockRuntimeClient(config=config)
        stream = await client.invoke_model_with_bidirectional_stream(
            InvokeModelWithBidirectionalStreamOperationInput(model_id=model)
        )
        await stream.await_output()
        self._events = stream.input_stream
        return self._request

    async def sign_event(self, event: Event) -> bytes:
        """Return the frame of a signed event."""
        from aws_sdk_bedrock_runtime.models import (  # noqa: PLC0415
            BidirectionalInputPayloadPart,
            InvokeModelWithBidirectionalStreamInputChunk,
        )

        part = BidirectionalInputPayloadPart(bytes_=json.dumps({"event": event}).encode())
        await self._events.send(InvokeModelWithBidirectionalStreamInputChunk(value=part))
        frame: bytes = await anext(self._request.body)
        return frame


def region_in(url: str) -> str:
    """Return the region in an address of AWS, or that of the plugin if the address has none."""
    found = re.search(r"bedrock-runtime[\w-]*\.([\w-]+)\.", url)
    return found[1] if found else _DEFAULT_REGION


def _credentials() -> Any:
    """Return the plugin's lookup of credentials, which has found some."""
    try:
        from aws_sdk_bedrock_runtime.client import AsyncBedrockRuntimeClient  # noqa: F401, PLC0415
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415
        from livekit.plugins.aws.experimental.realtime.realtime_model import (  # noqa: PLC0415
            Boto3CredentialsResolver,
        )
    except ImportError:
        raise UsageError(
            "to record aws needs Python 3.12 and the plugin with a recent SDK: "
            "pip install --upgrade 'livekit-plugins-aws[realtime]' aws-sdk-bedrock-runtime"
        ) from None
    with contextlib.suppress(BotoCoreError):
        resolver = Boto3CredentialsResolver()
        found = resolver.session.get_credentials()
        if found is not None and found.get_frozen_credentials().access_key:
            return resolver
    raise UsageError(
        "no valid AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE"
    )


# --- the replay -------------------------------------------------------------------------------


class AWSReplayer(Replayer, AWSSimulator):
    """The server that plays a cassette of Nova Sonic."""

    def new_stream(self, client: Client, stream_id: int, headers: dict[str, str]) -> Stream:
        """Return the server's side of a new stream."""
        call = self.next_call("POST") or Call("POST", 0.0)
        return _Replayed(self, client, stream_id, call)


class _Replayed(Stream):
    """A stream of the client, and the recorded one that it meets."""

    def __init__(self, player: AWSReplayer, client: Client, stream_id: int, call: Call) -> None:
        super().__init__(client, stream_id)
        self.call = call
        self.playback = Playback(player, call)
        self.fill = player.fill

    def start(self) -> None:
        self.run(self.play())

    def hear(self, event: Event) -> None:
        self.playback.hear(event)

    async def play(self) -> None:
        """Answer the request, and send each line when its time has come."""
        if self.call.answer is None:
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableException", NO_FURTHER)
            return
        await asyncio.sleep(self.call.answer["at"] - self.call.at)
        status, headers = self.call.answer["http"], self.call.answer["headers"]
        if status != HTTPStatus.OK:
            self.refuse(status, headers[_ERROR_TYPE], "The cassette says so.")
            return
        self.accept()
        async for entry in self.playback.lines():
            self.send(entry)

    def send(self, entry: Entry) -> None:
        if "close" in entry:
            if entry["close"] == ABORTED:
                self.drop()
            else:
                self.end()
        elif "text" in entry:
            chunk = {":message-type": "event", ":event-type": "chunk"}
            self.send_frame(chunk, b"A" * entry["text"])
        elif "exception" in entry:
            self.send_exception(entry["event"]["type"], entry["event"]["message"])
        else:
            self.send_event(self.fill(entry["event"]))


SERVERS: Final[dict[Any, Any]] = {Recorder: AWSRecorder, Replayer: AWSReplayer}
"""The servers for AWS, by the class that other providers share."""
