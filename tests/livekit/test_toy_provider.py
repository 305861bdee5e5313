# SPDX-License-Identifier: Apache-2.0
"""A new provider is one adapter, one simulator and one row: a whole one, as CONTRIBUTING tells.

ToyTalk takes a line ``reply ID`` and answers ``reply ID: words``. Its plugin forgets a request
after two seconds, and drops what comes for a request that it does not know.
"""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web
from livekit.agents import llm
from livekit.agents.utils import aio

import traced_retry
from traced_retry import RetryPolicy
from traced_retry.core.telemetry import Target
from traced_retry.livekit import registry
from traced_retry.livekit.adapter import Adapter
from traced_retry.livekit.request import PassthroughRequest
from traced_retry.simulator import Request, ScriptError, Simulator
from traced_retry.simulator.server import Connection

# --- the plugin, as a third party would publish it ----------------------------------------------


class ToyModel(llm.RealtimeModel):
    def __init__(self, url):
        no = dict.fromkeys(
            (
                "message_truncation",
                "turn_detection",
                "user_transcription",
                "auto_tool_reply_generation",
                "audio_output",
                "manual_function_calls",
            ),
            False,
        )
        super().__init__(capabilities=llm.RealtimeCapabilities(**no))
        self.url = url

    provider, model = "ToyTalk Inc", "toy-1"

    def session(self, *, turn_detection_disabled=False):
        return ToySession(self)

    async def aclose(self):
        pass


class ToySession(llm.RealtimeSession):
    def __init__(self, model):
        super().__init__(model)
        self._waiting = {}
        self._lines = aio.Chan()
        self._number = 0
        self._task = asyncio.ensure_future(self._run())

    async def _run(self):
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(self.realtime_model.url) as ws,
        ):
            writing = asyncio.ensure_future(self._write(ws))
            async for message in ws:
                asked, _, words = message.data.removeprefix("reply ").partition(": ")
                future = self._waiting.pop(asked, None)
                if future is not None and not future.done():
                    future.set_result(llm.GenerationCreatedEvent(words, None, user_initiated=True))
            writing.cancel()

    async def _write(self, ws):
        async for line in self._lines:
            await ws.send_str(line)

    def generate_reply(self, *, instructions=None, tool_choice=None, tools=None):
        self._number += 1
        asked = str(self._number)
        self._waiting[asked] = future = asyncio.get_running_loop().create_future()
        self._lines.send_nowait(f"reply {asked}")
        asyncio.get_running_loop().call_later(2, self._give_up, asked)
        return future

    def _give_up(self, asked):
        future = self._waiting.pop(asked, None)
        if future is not None and not future.done():
            future.set_exception(llm.RealtimeError("generate_reply timed out."))

    async def aclose(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    chat_ctx = tools = None

    async def update_instructions(self, instructions): ...
    async def update_chat_ctx(self, chat_ctx): ...
    async def update_tools(self, tools): ...
    def update_options(self, **kwargs): ...
    def push_audio(self, frame): ...
    def push_video(self, frame): ...
    def commit_audio(self): ...
    def clear_audio(self): ...
    def interrupt(self): ...
    def truncate(self, **kwargs): ...


# --- the adapter --------------------------------------------------------------------------------


class ToyAdapter(Adapter):
    """ToyTalk's replies carry the id of their request, so that sending again is safe."""

    required_attributes = ("_waiting",)

    def target(self):
        return Target("toytalk", self.session.realtime_model.model)

    def request(self, call):
        return ToyRequest(call)


class ToyRequest(PassthroughRequest):
    def next_action(self, why):
        return "send"


# --- the simulator ------------------------------------------------------------------------------


class ToySimulator(Simulator):
    path = "/talk"
    faults = frozenset({"ok", "silence", "late"})

    def connect(self, ws: web.WebSocketResponse, http: web.Request):
        return ToyConnection(ws, self)


class ToyConnection(Connection):
    def __init__(self, ws, server):
        super().__init__(ws)
        self.server = server

    async def greet(self): ...

    async def receive(self, data):
        fault, asked = self.server.next_fault, data.removeprefix("reply ")
        self.server.advance()
        number = len(self.server.requests) + 1
        self.server.requests.append(Request(asked, number, 0.0, fault))
        if fault.name != "silence":
            self.after(fault.seconds, lambda: self.ws.send_str(f"reply {asked}: reply {number}"))


# --- the row, and what comes of it --------------------------------------------------------------


@pytest.fixture
async def ask(recorder, monkeypatch):
    """Of a script, a session on ToyTalk that retries."""
    monkeypatch.setitem(registry.ADAPTERS, __name__, f"{__name__}:ToyAdapter")
    opened = []

    async def ask(script):
        server = ToySimulator(script)
        await server.start()
        model = ToyModel(server.url + ToySimulator.path)
        traced_retry.wrap(model, policy=RetryPolicy(deadline=8), **recorder.providers)
        session = model.session()
        opened.append((server, session))
        return session

    yield ask
    for server, session in opened:
        await session.aclose()
        await server.close()


@pytest.mark.parametrize(
    ("script", "words", "outcome", "attempts"),
    [
        ("ok", "reply 1", "succeeded", 1),
        ("late:1", "reply 1", "succeeded", 1),
        ("silence,ok", "reply 2", "recovered", 2),
        ("late:3,ok", "reply 2", "recovered", 2),
    ],
)
async def test_recovered_reply_is_heard_once(script, words, outcome, attempts, ask, recorder):
    """The loop, the spans and the counters work without a line about ToyTalk in them."""
    session = await ask(script)

    generation = await session.generate_reply()
    await asyncio.sleep(10)

    (reply,) = recorder.replies
    assert words == generation.message_stream
    assert ("toytalk", "toy-1", outcome, attempts) == (
        reply["gen_ai.provider.name"],
        reply["gen_ai.request.model"],
        reply["traced_retry.outcome"],
        reply["traced_retry.attempts"],
    )


async def test_lost_reply_fails_within_deadline(ask, recorder):
    """A lost reply fails within the deadline."""
    session = await ask("silence")

    with pytest.raises(llm.RealtimeError):
        await session.generate_reply()
    assert asyncio.get_running_loop().time() <= 8
    assert "exhausted" == recorder.replies[0]["traced_retry.outcome"]


def test_unknown_fault_is_refused():
    """The simulator's error lists the faults that it knows."""
    with pytest.raises(ScriptError, match="'quota' means nothing to ToySimulator"):
        ToySimulator("quota")
