# SPDX-License-Identifier: Apache-2.0
"""Responses that begin and fail: each word of the script on the wire, under every accent."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest

from traced_retry.simulator import FAULTS, OpenAISimulator
from traced_retry.simulator.azure import VoiceLiveSimulator
from traced_retry.simulator.google import GoogleSimulator
from traced_retry.simulator.openai import PAUSE
from traced_retry.simulator.openai_compatible import (
    BETA,
    AzureOpenAIBetaSimulator,
    AzureOpenAISimulator,
    XAISimulator,
)
from traced_retry.simulator.phonic import PhonicSimulator
from traced_retry.simulator.script import ScriptError
from traced_retry.simulator.server import Simulator
from traced_retry.simulator.ultravox import UltravoxSimulator

SIMULATORS = {
    # name: the simulator, and other names for its events
    "openai": (OpenAISimulator, {}),
    "xai": (XAISimulator, {}),
    "azure openai": (AzureOpenAISimulator, {}),
    "azure openai beta": (AzureOpenAIBetaSimulator, BETA),
    "voicelive": (VoiceLiveSimulator, BETA),
}

ITEM = ["response.output_item.added", "conversation.item.added"]
MESSAGE = [*ITEM, "response.content_part.added"]
WORDS = [*MESSAGE, "response.output_text.delta"]
CALL = [
    *ITEM,
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
SERVER_ERROR = {"type": "server_error", "code": "server_error"}
RATE_LIMIT = {"type": "invalid_request_error", "code": "rate_limit_exceeded"}
FAILING = {
    # script: events between response.created and response.done, seconds between these two,
    # the error that the latter carries, the type and status of its output
    "failed": ([], 0.0, SERVER_ERROR, []),
    "failed:rate_limit_exceeded": ([], 0.0, RATE_LIMIT, []),
    "failed_later": ([], PAUSE, SERVER_ERROR, []),
    "failed_later:rate_limit_exceeded": ([], PAUSE, RATE_LIMIT, []),
    "failed_message": (MESSAGE, PAUSE, SERVER_ERROR, [("message", "incomplete")]),
    "failed_during": (WORDS, PAUSE, SERVER_ERROR, [("message", "incomplete")]),
    "failed_during:odd": (
        WORDS,
        PAUSE,
        {"type": "invalid_request_error", "code": "odd"},
        [("message", "incomplete")],
    ),
    "failed_tool:look_up": (CALL, PAUSE, SERVER_ERROR, [("function_call", "incomplete")]),
}
NEW = {script.partition(":")[0] for script in FAILING} | {"stalled"}


class Client:
    """A bare socket: it asks, and shows what it hears."""

    def __init__(self, ws):
        self.ws = ws

    async def ask(self, **response):
        """One request for a reply."""
        await self.ws.send_json(
            {"type": "response.create", "event_id": "ours", "response": response}
        )

    async def hear(self, kind):
        """The events up to one of that type, it included."""
        events = []
        while not events or events[-1]["type"] != kind:
            events.append(await self.ws.receive_json(timeout=60))
        return events

    async def silence(self, seconds):
        """Hear nothing for so long."""
        with pytest.raises(asyncio.TimeoutError):
            await self.ws.receive(timeout=seconds)


@pytest.fixture(params=SIMULATORS)
def dialect(request):
    """A simulator's class, and its other names for events."""
    return SIMULATORS[request.param]


@pytest.fixture
async def connect(dialect):
    """Of a script makes a server and a client of it that was greeted."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(script):
            server = await stack.enter_async_context(dialect[0](script))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            url = Simulator.url.fget(server) + server.path
            client = Client(await stack.enter_async_context(http.ws_connect(url)))
            await client.hear("session.created")
            return server, client

        yield connect


def now():
    """Seconds on the virtual clock."""
    return asyncio.get_running_loop().time()


class TestOnTheWire:
    @pytest.mark.parametrize("script", FAILING)
    async def test_it_fails(self, script, dialect, connect):
        """It begins, fails with its code when it is due, and leaves the way free for the next."""
        between, seconds, error, output = FAILING[script]
        server, client = await connect(f"{script},ok")
        await client.ask(metadata={"client_event_id": "ours"})
        (created,) = await client.hear("response.created")
        began = now()
        *events, done = await client.hear("response.done")

        assert [dialect[1].get(kind, kind) for kind in between] == [e["type"] for e in events]
        assert pytest.approx(seconds) == now() - began
        response = done["response"]
        assert created["response"]["id"] == response["id"]
        assert {"client_event_id": "ours"} == response["metadata"]
        assert {"type": "failed", "error": error} == response["status_details"]
        assert output == [(item["type"], item["status"]) for item in response["output"]]

        await client.ask()
        *_, done = await client.hear("response.done")
        assert "completed" == done["response"]["status"]
        assert ["reply 2"] == server.completed

    async def test_the_function_of_failed_tool(self, connect):
        """It is called by the name that the script gives, with no arguments."""
        _, client = await connect("failed_tool:look_up")
        await client.ask()
        events = await client.hear("response.output_item.done")

        item = events[-1]["item"]
        assert ("look_up", "{}") == (item["name"], item["arguments"])

    @pytest.mark.parametrize("script", ["failed_later", "failed_message", "failed_during"])
    async def test_one_that_is_cancelled_does_not_fail(self, script, connect):
        """It ends once, as cancelled."""
        server, client = await connect(script)
        await client.ask()
        *_, created = await client.hear("response.created")
        response_id = created["response"]["id"]
        await client.ws.send_json({"type": "response.cancel", "response_id": response_id})
        *_, done = await client.hear("response.done")

        assert "cancelled" == done["response"]["status"]
        assert [response_id] == server.cancels
        await client.silence(10 * PAUSE)

    async def test_stalled(self, connect):
        """It begins, says nothing, is in the way of the next, and ends when it is cancelled."""
        _, client = await connect("stalled,ok")
        await client.ask()
        (created,) = await client.hear("response.created")
        response_id = created["response"]["id"]
        await client.silence(300)

        await client.ask()
        (rejected,) = await client.hear("error")
        assert "conversation_already_has_active_response" == rejected["error"]["code"]
        await client.ws.send_json({"type": "response.cancel", "response_id": response_id})
        (done,) = await client.hear("response.done")
        assert (response_id, "cancelled") == (done["response"]["id"], done["response"]["status"])

        await client.ask()
        *_, done = await client.hear("response.done")
        assert "completed" == done["response"]["status"]


class TestTheScript:
    def test_each_word_is_tested(self):
        """A new word of this kind needs a row here."""
        words = {name for name in FAULTS if name.startswith("failed") or name == "stalled"}
        assert words == NEW

    @pytest.mark.parametrize(
        ("simulator", "word"),
        [
            (simulator, word)
            for simulator in (GoogleSimulator, UltravoxSimulator, PhonicSimulator)
            for word in sorted(NEW - {"failed_tool"} - simulator.faults)
        ],
    )
    def test_elsewhere_they_mean_nothing(self, word, simulator):
        """Who has no response to fail says so, and does not play something else."""
        with pytest.raises(ScriptError, match=f"'{word}' means nothing to {simulator.__name__}"):
            simulator(word)

    def test_a_tool_needs_its_name(self):
        """The message says how it is written."""
        with pytest.raises(ScriptError, match="expected failed_tool:NAME"):
            OpenAISimulator("failed_tool")
