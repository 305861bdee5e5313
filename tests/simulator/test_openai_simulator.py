# SPDX-License-Identifier: Apache-2.0
"""Test the OpenAI simulator with LiveKit's plugin, or with a bare socket for details.

Durations are on the loop's clock: the tests pass on the wall clock and on a virtual one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from livekit.agents import (
    Agent,
    AgentSession,
    APIConnectionError,
    APIConnectOptions,
    ErrorEvent,
    function_tool,
    llm,
)
from livekit.plugins import openai

from traced_retry.simulator import FAULTS, Fault, OpenAISimulator, Script, ScriptError
from traced_retry.simulator.openai import duration


@contextlib.asynccontextmanager
async def model_for(
    server: OpenAISimulator, max_retry: int = 3
) -> AsyncIterator[openai.realtime.RealtimeModel]:
    """Return LiveKit's model for the server, with its own HTTP session."""
    async with aiohttp.ClientSession() as http:
        yield openai.realtime.RealtimeModel(
            api_key="x",
            base_url=server.url,
            modalities=["text"],
            http_session=http,
            conn_options=APIConnectOptions(max_retry=max_retry, retry_interval=0.1, timeout=2),
        )


@contextlib.asynccontextmanager
async def agent_for(
    server: OpenAISimulator,
    *,
    max_retry: int = 3,
    tools: list[llm.Tool | llm.Toolset] | None = None,
) -> AsyncIterator[AgentSession[None]]:
    """Start an AgentSession without a room."""
    session: AgentSession[None]
    async with (
        model_for(server, max_retry) as model,
        AgentSession(llm=model) as session,
    ):
        await session.start(Agent(instructions="Be brief.", tools=tools or []))
        yield session


@contextlib.asynccontextmanager
async def realtime_for(
    server: OpenAISimulator,
) -> AsyncIterator[openai.realtime.RealtimeSession]:
    """Open the plugin's session alone, because an AgentSession would hide its errors."""
    async with model_for(server) as model:
        session = model.session()
        try:
            yield session
        finally:
            with contextlib.suppress(Exception):  # Some faults end the session for good.
                await session.aclose()


class Socket:
    """A client that sends and receives events of the protocol."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self.ws = ws

    async def send(self, kind: str, **fields: Any) -> None:
        await self.ws.send_json({"type": kind, "event_id": f"my_{kind}", **fields})

    async def next(self, kind: str) -> dict[str, Any]:
        """Return the next event of that type, and skip others."""
        while True:
            event: dict[str, Any] = await self.ws.receive_json()
            if event["type"] == kind:
                return event

    async def add(self, item_id: str, previous: str | None = None) -> dict[str, Any]:
        item = {"id": item_id, "type": "message", "role": "user", "content": []}
        place = {} if previous is None else {"previous_item_id": previous}
        await self.send("conversation.item.create", item=item, **place)
        return await self.next("conversation.item.added")


@contextlib.asynccontextmanager
async def socket_for(server: OpenAISimulator) -> AsyncIterator[Socket]:
    """Open a bare connection to the server."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(server.url + "/realtime?model=gpt-realtime") as ws,
    ):
        yield Socket(ws)


def texts(session: AgentSession[None]) -> list[str | None]:
    """Return the agent's texts in the chat history."""
    items = session.history.items
    return [i.text_content for i in items if i.type == "message" and i.role == "assistant"]


def errors_of(session: AgentSession[None] | openai.realtime.RealtimeSession) -> list[Any]:
    """Return a list that collects the session's error events from now on."""
    found: list[Any] = []

    def gather(event: Any) -> None:
        found.append(event.error if isinstance(event, ErrorEvent) else event)

    session.on("error", gather)
    return found


def now() -> float:
    """Return the seconds on the running loop's clock."""
    return asyncio.get_running_loop().time()


# The script


def test_script_is_read_with_defaults() -> None:
    """Elements keep their order, a missing argument has its default, and blanks are ignored."""
    script = Script.parse("rate_limit:1.5, active ,late:3,tool:look_up,rate_limit")
    assert script.faults == (
        Fault("rate_limit", "1.5"),
        Fault("active", "1"),
        Fault("late", "3"),
        Fault("tool", "look_up"),
        Fault("rate_limit"),
    )
    assert [f.seconds for f in script.faults if f.name != "tool"] == [1.5, 1, 3, 0]
    assert str(script) == "rate_limit:1.5,active:1,late:3,tool:look_up,rate_limit"


def test_last_element_repeats() -> None:
    """The last element of a script repeats."""
    script = Script.parse("silence,ok")
    assert [script.at(n).name for n in range(4)] == ["silence", "ok", "ok", "ok"]


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("", "empty element"),
        ("ok,,ok", "empty element"),
        ("ok,explode", "unknown fault 'explode'"),
        ("ok:1", "bad element 'ok:1': expected ok"),
        ("late", "bad element 'late': expected late:SECONDS"),
        ("late:soon", "bad element 'late:soon'"),
        ("late:-1", "bad element 'late:-1'"),
        ("late:nan", "bad element 'late:nan'"),
        ("active:", "bad element 'active:': expected active[:SECONDS]"),
        ("error", "bad element 'error': expected error:CODE"),
        ("error:a b", "bad element 'error:a b'"),
    ],
)
def test_bad_script_names_element_and_known_faults(text: str, bad: str) -> None:
    """The message names the bad element and lists each known one."""
    with pytest.raises(ScriptError) as error:
        OpenAISimulator(text)
    assert bad in str(error.value)
    assert all(kind.usage(name) in str(error.value) for name, kind in FAULTS.items())


def test_other_hosts_are_refused() -> None:
    """The server listens on this machine alone."""
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 only"):
        OpenAISimulator("ok", host="0.0.0.0")


# Answers


async def test_ok() -> None:
    """The agent says the reply, and the repr of the recorded request lacks its instructions."""
    async with OpenAISimulator() as server, agent_for(server) as agent:
        await agent.generate_reply(instructions="hi")
        await agent.generate_reply(instructions="secret")
        assert texts(agent) == server.completed == ["reply 1", "reply 2"]
        first, second = server.requests
        assert (first.number, second.number) == (1, 2)
        assert first.fault == Fault("ok")
        assert first.event_id is not None
        assert first.metadata == {"client_event_id": first.event_id}
        assert second.instructions == "Be brief.\nsecret"
        assert "secret" not in repr(second)
        assert server.connections == 1


async def test_order_of_events() -> None:
    """The events of a text reply come in OpenAI's order, each with its own id."""
    events: list[dict[str, Any]] = []
    server = OpenAISimulator(
        on_event=lambda direction, event: events.append(event) if direction == "sent" else None
    )
    async with server, socket_for(server) as socket:
        await socket.send("response.create", response={"metadata": {"a": "b"}})
        done = (await socket.next("response.done"))["response"]
        assert [e["type"] for e in events] == [
            "session.created",
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.done",
        ]
        assert len({e["event_id"] for e in events}) == len(events)
        assert done["metadata"] == {"a": "b"}
        assert done["output"][0]["content"] == [{"type": "output_text", "text": "reply 1"}]
        assert done["usage"]["total_tokens"] == 12


async def test_sound() -> None:
    """A reply with sound has its words as a transcript, and as many seconds as the server says."""
    events: list[dict[str, Any]] = []
    server = OpenAISimulator(
        on_event=lambda direction, event: events.append(event) if direction == "sent" else None
    )
    server.sound = 0.5
    async with server, socket_for(server) as socket:
        await socket.send("response.create")
        done = (await socket.next("response.done"))["response"]
        sound = [e["delta"] for e in events if e["type"] == "response.output_audio.delta"]
        words = [e["delta"] for e in events if e["type"].endswith("audio_transcript.delta")]
        assert sum(len(base64.b64decode(part)) for part in sound) == 2 * 24_000 * 0.5
        assert "".join(words) == "reply 1"
        assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "reply 1"}]


async def test_tool() -> None:
    """The agent's function runs, and its result leads to the next request."""
    calls = []

    @function_tool
    async def look_up() -> str:
        """Looks something up."""
        calls.append(1)
        return "found"

    async with (
        OpenAISimulator("tool:look_up,ok") as server,
        agent_for(server, tools=[look_up]) as agent,
    ):
        handle = agent.generate_reply(instructions="hi")
        await handle
        kinds = [item.type for item in handle.chat_items]
        assert kinds == ["function_call", "function_call_output", "message"]
        assert calls == [1]
        assert texts(agent) == server.completed == ["reply 2"]


async def test_late() -> None:
    """The response.created event comes after the given time."""
    async with OpenAISimulator("late:0.3") as server, agent_for(server) as agent:
        await agent.generate_reply(instructions="hi")
        assert now() - server.requests[0].at >= 0.3
        assert texts(agent) == ["reply 1"]


async def test_late_waits_for_active_response() -> None:
    """A late answer that is due during another response begins after it."""
    async with OpenAISimulator("late:0.1,slow:0.4") as server, socket_for(server) as socket:
        await socket.send("response.create")
        await socket.send("response.create")
        assert (await socket.next("response.output_text.done"))["text"] == "reply 2"
        assert (await socket.next("response.output_text.done"))["text"] == "reply 1"


async def test_slow_is_interrupted() -> None:
    """An interruption cancels the response halfway, and the next one is heard."""
    async with OpenAISimulator("slow:5,ok") as server, agent_for(server) as agent:
        handle = agent.generate_reply(instructions="hi")
        await server.wait_for(lambda: len(server.requests) == 1)
        await asyncio.sleep(0.1)
        await handle.interrupt()
        await server.wait_for(lambda: len(server.cancels) == 1)
        await agent.generate_reply(instructions="hi")
        assert server.cancels == [None]
        assert server.completed == ["reply 2"]


async def test_slow_ends() -> None:
    """A slow reply without an interruption completes after the given time."""
    async with OpenAISimulator("slow:0.3") as server, agent_for(server) as agent:
        await agent.generate_reply(instructions="hi")
        assert now() - server.requests[0].at >= 0.3
        assert texts(agent) == ["reply 1"]


# Rejections


@pytest.mark.parametrize(
    ("script", "kind", "code", "message"),
    [
        ("error:bad_thing", "invalid_request_error", "bad_thing", ""),
        ("error:server_error", "server_error", None, ""),
        ("rate_limit", "invalid_request_error", "rate_limit_exceeded", "Requested 1."),
        ("rate_limit:1.5", "invalid_request_error", "rate_limit_exceeded", "again in 1.5s."),
    ],
)
async def test_rejection(script: str, kind: str, code: str | None, message: str) -> None:
    """The request's future fails with the code, and the next request is answered."""
    async with OpenAISimulator(f"{script},ok") as server, realtime_for(server) as session:
        errors = errors_of(session)
        with pytest.raises(llm.RealtimeError) as error:
            await session.generate_reply()
        assert error.value.code == code
        assert str(error.value).endswith(message)
        assert errors[0].error.body.type == kind
        assert errors[0].recoverable
        await session.generate_reply()
        await server.wait_for(lambda: server.completed == ["reply 2"])


def test_durations_are_written_as_openai_does() -> None:
    """Messages have milliseconds, seconds, minutes and hours, as OpenAI's do."""
    seconds = (0, 0.2, 1, 1.5, 86.4, 360, 411480)
    written = ["0s", "200ms", "1s", "1.5s", "1m26.4s", "6m0s", "114h18m0s"]
    assert [duration(s) for s in seconds] == written


async def test_uncorrelated() -> None:
    """The plugin gets an error without the id of a request, so the request stays open."""
    async with OpenAISimulator("uncorrelated") as server, realtime_for(server) as session:
        errors = errors_of(session)
        future = session.generate_reply()
        await server.wait_for(lambda: len(server.requests) == 1)
        await asyncio.sleep(0.1)
        assert errors[0].error.body.type == "server_error"
        assert errors[0].error.body.event_id is None
        assert not future.done()
        future.cancel()


async def test_silence() -> None:
    """The request is received, and no event follows."""
    async with OpenAISimulator("silence,ok") as server, realtime_for(server) as session:
        future = session.generate_reply()
        await server.wait_for(lambda: len(server.requests) == 1)
        await asyncio.sleep(0.1)
        assert not future.done()
        await session.generate_reply()
        await server.wait_for(lambda: server.completed == ["reply 2"])
        future.cancel()


async def test_active() -> None:
    """A response of the server is active for the given time, and takes no element."""
    async with OpenAISimulator("active:0.3,ok") as server, realtime_for(server) as session:
        created: list[llm.GenerationCreatedEvent] = []
        session.on("generation_created", created.append)
        for _ in range(2):
            with pytest.raises(llm.RealtimeError) as error:
                await session.generate_reply()
            assert error.value.code == "conversation_already_has_active_response"
        await asyncio.sleep(0.4)
        await session.generate_reply()
        assert [e.user_initiated for e in created] == [False, True]
        assert [str(r.fault) for r in server.requests] == ["active:0.3", "None", "ok"]


@pytest.mark.parametrize("script", ["failed", "failed:rate_limit_exceeded", "incomplete"])
async def test_response_that_comes_to_nothing(script: str) -> None:
    """The reply begins, and ends without a word."""
    async with OpenAISimulator(f"{script},ok") as server, agent_for(server) as agent:
        errors = errors_of(agent)
        await agent.generate_reply(instructions="hi")
        await agent.generate_reply(instructions="hi")
        codes = [e.error.body.code for e in errors]
        assert codes == [f.argument for f in server.script.faults if f.name == "failed"]
        assert texts(agent) == server.completed == ["reply 2"]


# Connections


async def test_quota() -> None:
    """The plugin takes the error as final and does not reconnect."""
    async with OpenAISimulator("quota") as server, realtime_for(server) as session:
        errors = errors_of(session)
        with pytest.raises(llm.RealtimeError) as error:
            await session.generate_reply()
        assert error.value.code == "insufficient_quota"
        await asyncio.sleep(0.3)
        assert [e.recoverable for e in errors] == [False]
        assert (server.connections, server.lost) == (1, 1)


async def test_malformed() -> None:
    """A frame that is not JSON ends the plugin's session."""
    async with OpenAISimulator("malformed") as server, realtime_for(server) as session:
        errors = errors_of(session)
        with pytest.raises(llm.RealtimeError, match="realtime session closed"):
            await session.generate_reply()
        assert [e.recoverable for e in errors] == [False]


async def test_unauthorized_once() -> None:
    """The first connection is refused and the next one accepted. No request takes the element."""
    async with OpenAISimulator("unauthorized,ok") as server, agent_for(server) as agent:
        await server.wait_for("connection_refused")
        await server.wait_for("connected")
        await agent.generate_reply(instructions="hi")
        assert (server.refused, server.connections) == (1, 1)
        assert texts(agent) == ["reply 1"]


async def test_unauthorized_for_ever() -> None:
    """Each connection is refused until the plugin gives up."""
    async with OpenAISimulator("unauthorized") as server, aiohttp.ClientSession() as http:
        async with http.get(server.url + "/realtime") as answer:
            assert answer.status == 401
        # What ended the plugin's session comes out again as the agent closes.
        with contextlib.suppress(APIConnectionError):
            async with agent_for(server, max_retry=1) as agent:
                errors = errors_of(agent)
                await server.wait_for(lambda: server.refused == 3)
                await asyncio.sleep(0.2)
        assert [e.recoverable for e in errors] == [True, False]
        assert (server.refused, server.connections) == (3, 0)


async def test_unauthorized_on_open_connection() -> None:
    """A request with this element ends the connection, and the next connection is refused."""
    async with OpenAISimulator("ok,unauthorized,ok") as server, realtime_for(server) as session:
        await session.generate_reply()
        with pytest.raises(llm.RealtimeError, match="reconnection"):
            await session.generate_reply()
        await session.generate_reply()
        assert [str(r.fault) for r in server.requests] == ["ok", "unauthorized", "ok"]
        assert (server.refused, server.connections) == (1, 2)


async def test_drop_before() -> None:
    """The socket closes at the request, and the plugin reconnects without sending it again."""
    async with OpenAISimulator("drop_before,ok") as server, realtime_for(server) as session:
        with pytest.raises(llm.RealtimeError, match="reconnection"):
            await session.generate_reply()
        await session.generate_reply()
        await server.wait_for(lambda: server.completed == ["reply 2"])
        assert (server.connections, server.lost) == (2, 1)


async def test_drop_during() -> None:
    """The socket closes during the answer, and the plugin passes on the part as the reply."""
    async with OpenAISimulator("drop_during,ok") as server, agent_for(server) as agent:
        await agent.generate_reply(instructions="hi")
        assert texts(agent) == ["reply"]
        assert server.completed == []
        await agent.generate_reply(instructions="hi")
        assert texts(agent) == ["reply", "reply 2"]


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("word", ["connection_lost", "connection_refused"])
async def test_drop_queued(before: int, word: str) -> None:
    """A request during the disconnect is sent later, and takes the next element."""
    script = "ok," * before + "drop_queued:0.3,ok"
    async with OpenAISimulator(script) as server, agent_for(server) as agent:
        for _ in range(before):
            await agent.generate_reply(instructions="hi")
        await server.wait_for(word)
        handle = agent.generate_reply(instructions="hi")
        await asyncio.sleep(0.05)
        assert len(server.requests) == before
        await server.wait_for(lambda: len(server.completed) == before + 1)
        await handle
        # The plugin gave up the future as it reconnected, before it sent the request.
        assert "reconnection" in str(handle.exception())
        assert server.requests[-1].fault == Fault("ok")
        assert (server.connections, server.lost) == (2, 1)
        assert server.refused >= 1


async def test_drop_queued_waits_for_late_answer() -> None:
    """The drop comes when the answer before it is complete."""
    async with OpenAISimulator("late:0.2,drop_queued:0,ok") as server, agent_for(server) as agent:
        await agent.generate_reply(instructions="hi")
        await server.wait_for("connection_lost")
        assert texts(agent) == server.completed == ["reply 1"]


async def test_drop_queued_takes_request_that_comes_too_early() -> None:
    """A request sent before the drop is lost with the socket."""
    async with OpenAISimulator("late:5,drop_queued:0,ok") as server, socket_for(server) as socket:
        await socket.send("response.create")
        await socket.send("response.create")
        await server.wait_for("connection_lost")
        assert len(server.requests) == 1


# The conversation and cancellation


async def test_items_are_placed_and_deleted() -> None:
    """Each confirmation names the item before, and an impossible change is an error."""
    async with OpenAISimulator() as server, socket_for(server) as socket:
        assert (await socket.add("a"))["previous_item_id"] is None
        assert (await socket.add("c"))["previous_item_id"] == "a"
        assert (await socket.add("b", "a"))["previous_item_id"] == "a"
        assert (await socket.add("top", "root"))["previous_item_id"] is None
        await socket.send("conversation.item.delete", item_id="c")
        assert (await socket.next("conversation.item.deleted"))["item_id"] == "c"
        assert (await socket.add("d"))["previous_item_id"] == "b"
        await socket.send("conversation.item.delete", item_id="c")
        error = (await socket.next("error"))["error"]
        assert error["code"] == "item_delete_invalid_item_id"
        assert error["event_id"] == "my_conversation.item.delete"
        await socket.send("conversation.item.create", item={"id": "a"})
        assert (await socket.next("error"))["error"]["code"] == "item_create_duplicate_item_id"


async def test_history_reaches_the_server() -> None:
    """Each item of the chat context is confirmed, so the plugin's update does not time out."""
    async with OpenAISimulator() as server, realtime_for(server) as session:
        history = llm.ChatContext.empty()
        history.add_message(role="user", content="one")
        history.add_message(role="assistant", content="two")
        await session.update_chat_ctx(history)
        await session.update_chat_ctx(llm.ChatContext(history.items[1:]))
        assert [i.id for i in session.chat_ctx.items] == [history.items[1].id]


async def test_cancel() -> None:
    """A cancel works with and without an id. Without a response it is an error."""
    async with OpenAISimulator("slow:5") as server, socket_for(server) as socket:
        await socket.send("response.cancel")
        error = (await socket.next("error"))["error"]
        assert error["code"] == "response_cancel_not_active"
        assert error["message"].startswith("Cancellation failed")
        for named in (True, False):
            await socket.send("response.create")
            response = (await socket.next("response.created"))["response"]
            fields = {"response_id": response["id"]} if named else {}
            await socket.send("response.cancel", **fields)
            done = (await socket.next("response.done"))["response"]
            assert (done["id"], done["status"]) == (response["id"], "cancelled")
            assert done["output"][0]["status"] == "incomplete"
            assert server.cancels[-1] == fields.get("response_id")
        assert server.completed == []


# The server


async def test_connections_do_not_share_a_response() -> None:
    """Thirty sessions at once have separate responses and one common script."""
    async with OpenAISimulator("slow:0.2") as server, model_for(server) as model:
        sessions = [model.session() for _ in range(30)]
        await asyncio.gather(*(s.generate_reply() for s in sessions))
        await server.wait_for(lambda: len(server.completed) == 30)
        assert sorted(r.number for r in server.requests) == list(range(1, 31))
        assert server.connections == 30
        await asyncio.gather(*(s.aclose() for s in sessions))


async def test_unreadable_events_are_rejected() -> None:
    """An event that is not JSON, not an object or of no known type is an error."""
    async with OpenAISimulator() as server, socket_for(server) as socket:
        for text in ("{", "[]", '{"type": "explode"}'):
            await socket.ws.send_str(text)
            error = (await socket.next("error"))["error"]
            assert error["type"] == "invalid_request_error"


async def test_wait_for() -> None:
    """An unknown word, a condition that raises, and a closed server are errors."""
    server = OpenAISimulator()
    async with server, socket_for(server) as socket:
        with pytest.raises(ValueError, match="connection_lost"):
            await server.wait_for("explosion")
        broken = asyncio.ensure_future(server.wait_for(lambda: 1 / len(server.requests) > 2))
        await asyncio.sleep(0)
        await socket.send("session.update")
        with pytest.raises(ZeroDivisionError):
            await broken
        never = asyncio.ensure_future(server.wait_for(lambda: False))
        await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed"):
        await never


async def test_close_with_client_connected() -> None:
    """Closing ends connections and delayed work at once, and a second close has no effect."""
    before = asyncio.all_tasks()
    server = OpenAISimulator("late:60")
    await server.start()
    with pytest.raises(RuntimeError, match="already"):
        await server.start()
    async with socket_for(server) as socket:
        await socket.next("session.created")
        await socket.send("response.create")
        await server.wait_for(lambda: len(server.requests) == 1)
        closing = asyncio.ensure_future(server.close())
        message = await socket.ws.receive()
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1001)
        await closing
    await server.close()
    assert asyncio.all_tasks() == before
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.url


async def test_port_that_is_taken() -> None:
    """A port in use is an OSError, and no socket is left open."""
    async with OpenAISimulator() as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(OSError, match="in use"):
            await OpenAISimulator(port=port).start()
