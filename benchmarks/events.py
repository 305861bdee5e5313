# SPDX-License-Identifier: Apache-2.0
"""What traced-retry costs per event of the server, beside LiveKit's plugin alone: ``make bench``.

A server in a process of its own sends one reply as a stream of audio deltas of 20 ms, over a real
WebSocket to the real ``livekit-plugins-openai``. A reader takes the audio, as LiveKit does. The
figure is the CPU time of the client, without and with traced-retry in turn. A call receives 50
deltas a second while the model speaks.

    python benchmarks/events.py [--deltas 4000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
from aiohttp import web
from livekit.plugins import openai

import traced_retry

SOUND = base64.b64encode(bytes(960)).decode()
"""20 ms of PCM16 at 24 kHz."""
PER_SECOND = 50
IDS = {"response_id": "resp_1", "item_id": "item_1", "output_index": 0, "content_index": 0}
OTHER = {"type": "rate_limits.updated", "event_id": "event_1", "rate_limits": []}
"""An event that neither the plugin nor the adapter acts on."""


def events(deltas: int, kind: str) -> list[dict[str, Any]]:
    """Return the events of one reply, which the server starts by itself."""
    response = {"object": "realtime.response", "id": "resp_1", "output": [], "metadata": None}
    item = {"id": "item_1", "type": "message", "role": "assistant", "content": []}
    delta = {"type": "response.output_audio.delta", **IDS, "delta": SOUND}
    stream = [delta, *[delta if kind == "audio" else OTHER] * deltas]
    part = {"type": "audio", "transcript": ""}
    return [
        {"type": "response.created", "response": {**response, "status": "in_progress"}},
        {"type": "response.output_item.added", **IDS, "item": item},
        {"type": "response.content_part.added", **IDS, "part": part},
        *stream,
        {"type": "response.output_item.done", **IDS, "item": item},
        {"type": "response.done", "response": {**response, "status": "completed"}},
    ]


def serve(deltas: int, kind: str, pipe: Connection) -> None:
    """Send the reply to each client that connects."""

    async def accept(http: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False)
        await ws.prepare(http)
        await ws.receive()  # The client configures its session first.
        for event in events(deltas, kind):
            await ws.send_str(json.dumps({"event_id": "event_1", **event}))
        async for _ in ws:
            pass
        return ws

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/v1/realtime", accept)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.to_thread(pipe.recv)

    asyncio.run(run())


async def hear(port: int, *, wrapped: bool) -> float:
    """Return the CPU seconds of one reply."""
    async with aiohttp.ClientSession() as http:
        model = openai.realtime.RealtimeModel(
            api_key="none", base_url=f"http://127.0.0.1:{port}/v1", http_session=http
        )
        if wrapped:
            traced_retry.wrap(model)
        began = time.process_time()
        session = model.session()
        created: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        session.on("generation_created", created.set_result)
        async for message in (await created).message_stream:
            async for _ in message.audio_stream:
                pass
        seconds = time.process_time() - began
        await session.aclose()
        return seconds


def measure(kind: str, deltas: int, rounds: int) -> tuple[float, float]:
    """Return the microseconds per event of the plugin alone, and those added by traced-retry."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(deltas, kind, theirs))
    server.start()
    try:
        port = ours.recv()
        alone, added = [], []
        asyncio.run(hear(port, wrapped=True))  # Imports and caches.
        for _ in range(rounds):
            bare = asyncio.run(hear(port, wrapped=False))
            alone.append(bare / deltas * 1e6)
            added.append((asyncio.run(hear(port, wrapped=True)) - bare) / deltas * 1e6)
    finally:
        ours.send(None)
        server.join()
    return statistics.median(alone), statistics.median(added)


def main() -> None:
    """Print both figures, and the share of a core in a call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deltas", type=int, default=4000, help="events per reply")
    parser.add_argument("--rounds", type=int, default=5, help="replies without and with us, each")
    arguments = parser.parse_args()
    print(f"{'event':<16}{'plugin alone':>16}{'traced-retry adds':>20}{'of a core at 50/s':>20}")
    for kind, name in (("audio", "audio delta"), ("other", "any other event")):
        alone, added = measure(kind, arguments.deltas, arguments.rounds)
        share = added * PER_SECOND / 1e6
        print(f"{name:<16}{alone:>13.1f} us{added:>17.1f} us{share:>19.4%}")


if __name__ == "__main__":
    main()
