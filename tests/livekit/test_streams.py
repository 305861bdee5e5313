# SPDX-License-Identifier: Apache-2.0
"""The relayed streams of one reply: the same things in the same order, at the same turn."""

from __future__ import annotations

import asyncio

import pytest
from livekit.agents import llm, utils

from traced_retry.livekit.streams import Streams


class Generation:
    """What a plugin makes: an event, and the channels behind it."""

    def __init__(self, response_id="resp_1"):
        self.messages = utils.aio.Chan()
        self.functions = utils.aio.Chan()
        self.texts = []
        self.event = llm.GenerationCreatedEvent(
            message_stream=self.messages,
            function_stream=self.functions,
            user_initiated=True,
            response_id=response_id,
        )

    def begin_message(self, message_id="item_1"):
        text, audio = utils.aio.Chan(), utils.aio.Chan()
        modalities = asyncio.get_running_loop().create_future()
        modalities.set_result(["text"])
        self.texts += [text, audio]
        self.messages.send_nowait(
            llm.MessageGeneration(
                message_id=message_id,
                text_stream=text,
                audio_stream=audio,
                modalities=modalities,
            )
        )
        return text

    def end(self):
        for stream in (*self.texts, self.functions, self.messages):
            stream.close()


class Agent:
    """Reads what it is given, all streams at once."""

    def __init__(self, event):
        self.words, self.calls, self.ids, self.ended = [], [], [], 0
        self.sounds, self.silent = [], 0
        self._tasks = [
            asyncio.ensure_future(self._read(event.message_stream, self._message)),
            asyncio.ensure_future(self._read(event.function_stream, self.calls.append)),
        ]

    def _message(self, message):
        self.ids.append(message)
        self._tasks.append(
            asyncio.ensure_future(self._read(message.text_stream, self.words.append))
        )
        self._tasks.append(asyncio.ensure_future(self._listen(message.audio_stream)))

    async def _read(self, stream, note):
        async for item in stream:
            note(item)
        self.ended += 1

    async def _listen(self, stream):
        async for frame in stream:
            self.sounds.append(frame)
        self.silent += 1

    async def close(self):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def turns(number=10):
    """Let the event loop turn."""
    for _ in range(number):
        await asyncio.sleep(0)


async def _turns_to_the_first_word(*, relayed):
    generation = Generation()
    streams = Streams(generation.event) if relayed else None
    agent = Agent(generation.event)
    text = generation.begin_message()
    await turns()
    if streams is not None:
        streams.commit()
    text.send_nowait("hello")
    count = 0
    while not agent.words:
        await turns(1)
        count += 1
    await agent.close()
    return count


@pytest.fixture
async def given():
    """A generation, its streams, and the agent that reads them."""
    generation = Generation()
    streams = Streams(generation.event)
    agent = Agent(generation.event)
    yield generation, streams, agent
    await agent.close()


async def cut_message(generation, streams):
    """End a generation with a message in progress, and return the next one."""
    generation.begin_message()
    await turns()
    generation.end()
    second = Generation()
    streams.switch_to(second.event)
    return second


class TestWhenAllIsWell:
    async def test_first_word_is_relayed_in_same_turn(self):
        """The relay costs no turn of the event loop."""
        assert await _turns_to_the_first_word(relayed=False) == (
            await _turns_to_the_first_word(relayed=True)
        )

    async def test_streams_end_with_those_of_plugin(self, given):
        """Message, call and word pass, and each stream ends when its own does."""
        generation, streams, agent = given
        text = generation.begin_message()
        await turns()
        streams.commit()
        text.send_nowait("hello")
        text.close()
        generation.functions.send_nowait("call")
        await turns()
        assert 1 == agent.ended
        generation.end()
        await turns()

        assert (["hello"], ["call"], 3) == (agent.words, agent.calls, agent.ended)

    async def test_message_after_output_is_not_wrapped(self):
        """After the first output the agent gets the plugin's own message."""
        generation = Generation()
        streams = Streams(generation.event)
        streams.commit()
        text = generation.begin_message()

        assert text is (await anext(generation.event.message_stream)).text_stream


class TestAnother:
    async def test_second_generation_continues_empty_first(self, given):
        """The first generation ended empty, and the agent noticed nothing."""
        generation, streams, agent = given
        await turns()
        generation.end()
        await turns()
        assert 0 == agent.ended
        second = Generation("resp_2")
        streams.switch_to(second.event)
        text = second.begin_message("item_2")
        await turns()
        streams.commit()
        text.send_nowait("hello")
        second.functions.send_nowait("call")
        second.end()
        await turns()

        assert (["hello"], ["call"], 3) == (agent.words, agent.calls, agent.ended)
        assert ["item_2"] == [message.message_id for message in agent.ids]
        assert "resp_2" == generation.event.response_id

    async def test_open_message_continues_under_new_id(self, given):
        """It continues under the id of the message that is heard, and a second one stays apart."""
        generation, streams, agent = given
        generation.begin_message("item_1")
        await turns()
        generation.end()
        second = Generation()
        streams.switch_to(second.event)
        await turns()
        first, other = second.begin_message("item_2"), second.begin_message("item_3")
        await turns()
        streams.commit()
        first.send_nowait("hello")
        first.close()
        other.send_nowait("world")
        second.end()
        await turns()

        assert ["hello", "world"] == agent.words
        assert ["item_2", "item_3"] == [message.message_id for message in agent.ids]
        assert 4 == agent.ended

    async def test_open_message_ends_empty_if_next_only_calls_tool(self, given):
        """The next generation only calls a tool, so the message ends empty."""
        generation, streams, agent = given
        second = await cut_message(generation, streams)
        await turns()
        streams.commit()
        second.functions.send_nowait("call")
        second.end()
        await turns()

        assert ([], ["call"], 3) == (agent.words, agent.calls, agent.ended)

    async def test_message_not_taken_yet_is_replaced(self):
        """A slow agent gets the message of the current generation."""
        generation = Generation()
        streams = Streams(generation.event)
        generation.begin_message("item_1")
        generation.end()
        second = Generation()
        streams.switch_to(second.event)
        second.begin_message("item_2")

        assert "item_2" == (await anext(generation.event.message_stream)).message_id

    async def test_several_failed_generations_continue_in_one(self, given):
        """Three generations fail, each with an open message, and the fourth speaks."""
        generation, streams, agent = given
        for number in range(1, 4):
            generation.begin_message(f"item_{number}")
            await turns()
            generation.end()
            generation = Generation()
            streams.switch_to(generation.event)
        text = generation.begin_message("item_4")
        await turns()
        streams.commit()
        text.send_nowait("hello")
        generation.end()
        await turns()

        assert (["hello"], 3) == (agent.words, agent.ended)
        assert ["item_4"] == [message.message_id for message in agent.ids]


class TestAudio:
    async def test_sound_is_relayed(self, given):
        """Sounds pass beside the words, and their stream ends with the plugin's."""
        generation, streams, agent = given
        generation.begin_message()
        await turns()
        streams.commit()
        sound = generation.texts[-1]
        sound.send_nowait("frame 1")
        await turns(1)
        assert (["frame 1"], 0) == (agent.sounds, agent.silent)
        sound.send_nowait("frame 2")
        sound.close()
        await turns()

        assert (["frame 1", "frame 2"], 1) == (agent.sounds, agent.silent)

    async def test_open_message_continues_with_sound_of_next_generation(self, given):
        """A generation that fails before its first sound is continued by the next one's sounds."""
        generation, streams, agent = given
        generation.begin_message("item_1")
        await turns()
        generation.end()
        second = Generation("resp_2")
        streams.switch_to(second.event)
        await turns()
        text, sound = second.begin_message("item_2"), second.texts[-1]
        await turns()
        streams.commit()
        sound.send_nowait("frame 1")
        text.send_nowait("hello")
        sound.send_nowait("frame 2")
        await turns()
        assert (["frame 1", "frame 2"], ["hello"]) == (agent.sounds, agent.words)
        assert 0 == agent.silent
        second.end()
        await turns()

        assert (1, 3) == (agent.silent, agent.ended)
        assert ["item_2"] == [message.message_id for message in agent.ids]

    async def test_sound_stream_ends_if_next_only_calls_tool(self, given):
        """An open message without sound ends, so the agent does not wait for it."""
        generation, streams, agent = given
        second = await cut_message(generation, streams)
        streams.commit()
        second.end()
        await turns()

        assert ([], 1) == (agent.sounds, agent.silent)

    async def test_closed_streams_end_sound_and_drop_later_frames(self, given):
        """A plugin that never ends its own stream neither blocks the agent nor is heard."""
        generation, streams, agent = given
        generation.begin_message()
        await turns()
        streams.close()
        generation.texts[-1].send_nowait("late")
        await turns()

        assert ([], 1) == (agent.sounds, agent.silent)


class TestNoOther:
    @pytest.mark.parametrize("begun", [True, False])
    @pytest.mark.parametrize("ended", [True, False])
    async def test_streams_end_if_no_generation_follows(self, given, begun, ended):
        """The streams end, even if the plugin never ends its own."""
        generation, streams, agent = given
        if begun:
            generation.begin_message()
        await turns()
        if ended:
            generation.end()
        streams.close()
        await turns()

        assert 2 + begun == agent.ended

    async def test_output_after_end_is_dropped(self, given):
        """The plugin continues to speak without an error, and nothing is heard."""
        generation, streams, agent = given
        text = generation.begin_message()
        await turns()
        streams.close()
        text.send_nowait("late")
        generation.begin_message()
        generation.functions.send_nowait("call")
        generation.end()
        await turns()

        assert ([], []) == (agent.words, agent.calls)

    async def test_output_continues_after_first_words(self, given):
        """The reply ended with its first words, and the plugin ends the rest."""
        generation, streams, agent = given
        text = generation.begin_message()
        await turns()
        streams.commit()
        streams.close()
        text.send_nowait("hello")
        await turns()

        assert (["hello"], 0) == (agent.words, agent.ended)
