# SPDX-License-Identifier: Apache-2.0
"""AWS's side of :mod:`record` and :mod:`replay`.

Nova Sonic's plugin signs its request and each event for the host that it connects to. So the
recorder opens its own stream with the plugin's SDK, which signs them again with the credentials of
the recorder's environment. The frames of the provider are passed on unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from traced_retry.errors import UsageError
from traced_retry.simulator.aws import (
    AWSSimulator,
    Client,
    Event,
    Stream,
    decode_frame,
    event_in,
    trusting,
)
from traced_retry.simulator.cassette import ABORTED, Entry
from traced_retry.simulator.record import Recorder
from traced_retry.simulator.replay import NO_FURTHER, Call, Playback, Replayer

_ENDED = 1000
_ERROR_TYPE = "x-amzn-errortype"


class AWSRecorder(Recorder, AWSSimulator):
    """The proxy for Nova Sonic.

    Raises:
        UsageError: if the plugin is missing, or the environment has no credentials.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.credentials = _credentials()
        self.passing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop listening and close every connection, also those to the provider."""
        await super().close()
        await asyncio.gather(*self.passing)

    def new_stream(self, client: Client, stream_id: int, path: str) -> Stream:
        """Return the server's side of a new stream."""
        return _Recorded(self, client, stream_id, path)

    async def upstream(self, path: str) -> tuple[Any, Any]:
        """Return a new stream to the provider, and its HTTP client."""
        from aws_sdk_bedrock_runtime.client import AsyncBedrockRuntimeClient  # noqa: PLC0415
        from aws_sdk_bedrock_runtime.config import AsyncBedrockRuntimeConfig  # noqa: PLC0415
        from aws_sdk_bedrock_runtime.models import (  # noqa: PLC0415
            InvokeModelWithBidirectionalStreamOperationInput,
        )

        region = re.search(r"bedrock-runtime[\w-]*\.([\w-]+)\.", self.to)
        http = _http_client(self.trust or ssl.create_default_context())
        config = await AsyncBedrockRuntimeConfig.resolve(
            endpoint_uri=self.to,
            region=region[1] if region else "us-east-1",
            aws_credentials_identity_resolver=self.credentials,
            transport=http,
        )
        model = unquote(path.split("/")[2])
        stream = await AsyncBedrockRuntimeClient(
            config=config
        ).invoke_model_with_bidirectional_stream(
            InvokeModelWithBidirectionalStreamOperationInput(model_id=model)
        )
        return stream, http


class _Recorded(Stream):
    """A stream of the client, and the one to the provider."""

    def __init__(self, recorder: AWSRecorder, client: Client, stream_id: int, path: str) -> None:
        super().__init__(client, stream_id)
        self.recorder = recorder
        self.path = path
        self.number = recorder.new_connection("POST")
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.opened = False

    def start(self) -> None:
        task = asyncio.create_task(self.pass_on())
        self.recorder.passing.add(task)
        task.add_done_callback(self.recorder.passing.discard)

    def hear(self, event: Event) -> None:
        self.recorder.entry(self.number, "client", event=self.recorder.redact(event))
        self.events.put_nowait(event)

    def forget(self) -> None:
        super().forget()
        self.events.put_nowait(None)

    async def pass_on(self) -> None:
        """Pass on the events of both sides until one of them ends."""
        stream, http = await self.recorder.upstream(self.path)
        requests = asyncio.create_task(self.pass_requests(stream.input_stream))
        answers = asyncio.create_task(self.pass_answers(stream, http))
        await asyncio.wait({requests, answers}, return_when=asyncio.FIRST_COMPLETED)
        requests.cancel()
        # The end of the connection also ends the answers. Before their start it does not, and
        # after their start awscrt cannot bear that they are cancelled.
        await http.close()
        if not self.opened:
            answers.cancel()
        await asyncio.gather(requests, answers, return_exceptions=True)

    async def pass_requests(self, target: Any) -> None:
        """Pass on the events of the client until it leaves."""
        from aws_sdk_bedrock_runtime.models import (  # noqa: PLC0415
            BidirectionalInputPayloadPart,
            InvokeModelWithBidirectionalStreamInputChunk,
        )

        with contextlib.suppress(OSError):  # The provider has ended the stream.
            while event := await self.events.get():
                part = BidirectionalInputPayloadPart(bytes_=json.dumps({"event": event}).encode())
                await target.send(InvokeModelWithBidirectionalStreamInputChunk(value=part))
        await target.close()

    async def pass_answers(self, stream: Any, http: Any) -> None:
        """Pass on the answer of the provider, and its frames until it ends the stream."""
        from smithy_core.exceptions import SmithyError  # noqa: PLC0415

        try:
            await stream.await_output()
        except SmithyError as error:
            await self.pass_refusal(http.answer, str(getattr(error, "message", "")))
            return
        self.opened = True
        self.recorder.entry(self.number, "server", http=HTTPStatus.OK, headers={})
        self.accept()
        received = b""
        while chunk := await http.answer.get_next_response_chunk():
            received += chunk
            while frame := decode_frame(received):
                headers, payload, length = frame
                self.recorder.entry(self.number, "server", **self.redacted(headers, payload))
                self.client.send(self.id, received[:length])
                received = received[length:]
        if self.id not in self.client.streams:
            return  # The client left first.
        completion = http.answer.completion_future
        if completion.done() and completion.exception():
            self.recorder.entry(self.number, "server", close=ABORTED, reason="")
            self.drop()
        else:
            self.recorder.entry(self.number, "server", close=_ENDED, reason="")
            self.end()

    async def pass_refusal(self, answer: Any, message: str) -> None:
        """Pass on that the provider did not open the stream. Without an answer send HTTP 502."""
        status, headers = int(HTTPStatus.BAD_GATEWAY), {}
        if answer is None:
            self.recorder.unreachable += 1
        else:
            status = await answer.get_response_status_code()
            headers = {n.lower(): value for n, value in await answer.get_response_headers()}
        found = re.match(r"\w*", headers.get(_ERROR_TYPE, ""))
        kind = found[0] if found else ""
        self.recorder.entry(self.number, "server", http=status, headers={_ERROR_TYPE: kind})
        if self.id in self.client.streams:
            self.refuse(status, kind, message)

    def redacted(self, headers: dict[str, str], payload: bytes) -> Entry:
        """Return a frame without its content."""
        try:
            if kind := headers.get(":exception-type"):
                event = {"type": kind, "message": json.loads(payload).get("message", "")}
                return {"exception": True, "event": self.recorder.redact(event)}
            return {"event": self.recorder.redact(event_in(payload))}
        except ValueError:
            return {"text": len(payload)}


class AWSReplayer(Replayer, AWSSimulator):
    """The server that plays a cassette of Nova Sonic."""

    def new_stream(self, client: Client, stream_id: int, path: str) -> Stream:
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
    found = None
    with contextlib.suppress(BotoCoreError):
        resolver = Boto3CredentialsResolver()
        found = resolver.session.get_credentials()
    if found is None:
        raise UsageError(
            "no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE"
        )
    return resolver


def _http_client(trust: ssl.SSLContext) -> Any:
    """Return the SDK's HTTP client with the certificate authorities of ``trust``.

    Its ``answer`` is the HTTP/2 stream of its request, as soon as it is connected.
    """
    from smithy_http.aio.crt import AWSCRTHTTPClient  # noqa: PLC0415

    authorities = map(ssl.DER_cert_to_PEM_cert, trust.get_ca_certs(binary_form=True))

    class Transport(trusting(AWSCRTHTTPClient, "".join(authorities).encode())):  # type: ignore[misc]
        answer: Any = None

        async def _await_response(self, stream: Any) -> Any:
            self.answer = stream
            return await super()._await_response(stream)

    return Transport()
