# SPDX-License-Identifier: Apache-2.0
"""The streams of one reply, fed by several generations until one of them is heard.

A generation may fail after the agent was given its ``GenerationCreatedEvent`` and before its first
word. The agent then reads from streams that must neither end nor be replaced. So they are relayed:
if a generation ends without output, each stream waits and continues with that of the next. After
the first output no other generation can follow, and a relay adds only one call.

Only documented parts of the event are used: two streams, and two more in each message.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from livekit.agents import llm, utils

T = TypeVar("T")


class _Generation:
    """One generation and its successor."""

    def __init__(self, event: llm.GenerationCreatedEvent) -> None:
        self.messages = aiter(event.message_stream)
        self.functions = event.function_stream
        self.following: asyncio.Future[_Generation | None] = (
            asyncio.get_running_loop().create_future()
        )
        """The next generation, or None once it is known that no other follows."""
        self.first: asyncio.Future[llm.MessageGeneration | None] | None = None
        """Its first message, if the agent already has a message that continues with it."""
        self.open: list[AsyncIterable[Any]] = [event.message_stream, event.function_stream]
        """The plugin's own streams that the agent reads."""

    @property
    def over(self) -> bool:
        """Whether another generation has taken its place."""
        return self.following.done() and self.following.result() is not None


class Streams:
    """The streams of ``event``, which is changed in place and passed to the agent."""

    def __init__(self, event: llm.GenerationCreatedEvent) -> None:
        self._event = event
        self._turn = turn = _Generation(event)
        self._exposed: llm.MessageGeneration | None = None
        """A message that the agent got before the first output."""
        event.message_stream = _Messages(turn, self._expose)
        event.function_stream = _Relay(turn, event.function_stream, _functions)

    def switch_to(self, event: llm.GenerationCreatedEvent) -> None:
        """Continue with the generation of ``event``, because the earlier one failed unheard."""
        turn = _Generation(event)
        if self._exposed is not None:
            turn.first = asyncio.ensure_future(self._attach(turn, self._exposed))
        self._event.response_id = event.response_id
        self._turn.following.set_result(turn)
        self._turn = turn

    def commit(self) -> None:
        """End the relays' waits: there is output, or the reply is over."""
        if not self._turn.following.done():
            self._turn.following.set_result(None)

    def close(self) -> None:
        """End the streams of a reply without output, even if the plugin keeps its own open.

        Otherwise the agent would wait forever for a generation without an end.
        """
        if self._turn.following.done():
            return
        self.commit()
        for stream in self._turn.open:
            if isinstance(stream, utils.aio.Chan):
                shut(stream)

    def _expose(self, turn: _Generation, message: llm.MessageGeneration) -> llm.MessageGeneration:
        """Let ``message`` of ``turn`` continue with a later generation if necessary."""
        if self._exposed is None and not turn.following.done():
            self._exposed = message
            turn.open += [message.text_stream, message.audio_stream]
            message.text_stream = _Relay(turn, message.text_stream, _text)
            message.audio_stream = _Relay(turn, message.audio_stream, _audio)
        return message

    @staticmethod
    async def _attach(
        turn: _Generation, lent: llm.MessageGeneration
    ) -> llm.MessageGeneration | None:
        message = await anext(turn.messages, None)
        if message is not None:
            turn.open += [message.text_stream, message.audio_stream]
            # Under this id the provider knows what is heard; the agent's history needs the same.
            lent.message_id = message.message_id
        return message


class _Relay(Generic[T]):
    """A stream that continues with that of the next generation."""

    def __init__(
        self,
        turn: _Generation,
        source: AsyncIterable[T],
        pick: Callable[[_Generation], Awaitable[AsyncIterable[T] | None]],
    ) -> None:
        self._turn = turn
        self._source: AsyncIterator[T] | None = aiter(source)
        self._pick = pick

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            if self._source is not None:
                with contextlib.suppress(StopAsyncIteration):
                    return await self._source.__anext__()
            turn = await asyncio.shield(self._turn.following)
            if turn is None:
                raise StopAsyncIteration
            source = await self._pick(turn)
            self._turn, self._source = turn, None if source is None else aiter(source)


class _Messages:
    """The messages of the generations, without those of one that was given up."""

    def __init__(
        self,
        turn: _Generation,
        lend: Callable[[_Generation, llm.MessageGeneration], llm.MessageGeneration],
    ) -> None:
        self._turn = turn
        self._expose = lend

    def __aiter__(self) -> AsyncIterator[llm.MessageGeneration]:
        return self

    async def __anext__(self) -> llm.MessageGeneration:
        while True:
            turn = self._turn
            if turn.first is not None:
                await asyncio.shield(turn.first)
            try:
                message = await turn.messages.__anext__()
            except StopAsyncIteration:
                following = await asyncio.shield(turn.following)
                if following is None:
                    raise
                self._turn = following
            else:
                if not turn.over:
                    return self._expose(turn, message)


async def _functions(turn: _Generation) -> AsyncIterable[llm.FunctionCall]:
    return turn.functions


async def _text(turn: _Generation) -> AsyncIterable[str] | None:
    message = await asyncio.shield(turn.first) if turn.first is not None else None
    return None if message is None else message.text_stream


async def _audio(turn: _Generation) -> AsyncIterable[Any] | None:
    message = await asyncio.shield(turn.first) if turn.first is not None else None
    return None if message is None else message.audio_stream


def shut(channel: utils.aio.Chan[Any]) -> None:
    """Close a channel of the plugin, and drop the words that the plugin sends later."""
    channel.close()
    channel.send_nowait = _nowhere  # type: ignore[method-assign]


def _nowhere(value: object) -> None:
    """Drop the plugin's later words."""
