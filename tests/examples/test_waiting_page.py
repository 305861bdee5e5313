# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/waiting.md and examples/filler.py run against a server that answers late."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
from pathlib import Path

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession
from livekit.plugins import openai
from support.conversation import Conversation
from support.speaker import Speaker
from support.voice import Voice

from traced_retry.simulator import OpenAISimulator

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "examples" / "sorry.ogg"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "waiting.md").read_text(), re.MULTILINE | re.DOTALL
)
TONE, FILE, SENTENCE, POLICY, FUNCTION = BLOCKS


class Indicator:
    """A user's display."""

    def __init__(self):
        self.texts = []
        self.hidden = 0

    def show(self, text):
        self.texts.append(text)

    def hide(self):
        self.hidden += 1


def example():
    """Return the module of the example, as a user has it."""
    spec = importlib.util.spec_from_file_location("filler", ROOT / "examples" / "filler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def call():
    """Return a function that waits for a reply which takes 6 s, and returns the conversation.

    ``session_of`` makes a session of the model.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def call(session_of):
            server = OpenAISimulator("late:6")
            server.sound = 1.0
            await stack.enter_async_context(server)
            model = openai.realtime.RealtimeModel(
                api_key="sk-SECRET",
                base_url=server.url,
                http_session=await stack.enter_async_context(aiohttp.ClientSession()),
            )
            session = await stack.enter_async_context(await session_of(model))
            speaker = session.output.audio = Speaker()
            await session.start(Agent(instructions="SECRET"))
            talk = Conversation(server, model, session)
            await talk.reply(instructions="SECRET")
            assert ["reply 1"] == talk.heard
            assert [] == speaker.mistakes
            assert 1.0 == seconds(speaker.replies)
            return speaker

        yield call


def seconds(spans):
    """Return the seconds of all spans."""
    return pytest.approx(sum(end - start for start, end in spans), abs=0.1)


def running(block, **names):
    """Return a function that runs a block of the page with ``model``."""

    async def session_of(model):
        exec(block, {"__name__": "block", "model": model, **names})
        return AgentSession(llm=model)

    return session_of


async def test_tone_is_repeated(call):
    """The tone is heard at 2 s and, after its pause of 2 s, at 4.3 s."""
    speaker = await call(running(TONE))

    assert 0.6 == seconds(speaker.fillers)
    assert 2.3 == pytest.approx(speaker.fillers[15][0] - speaker.fillers[0][0], abs=0.1)


async def test_file_is_repeated(call, tmp_path, monkeypatch):
    """The recording of 3.25 s is repeated without a pause until the reply begins."""
    shutil.copy(RECORDING, tmp_path / "typing.ogg")
    monkeypatch.chdir(tmp_path)
    speaker = await call(running(FILE))

    assert 4.0 == seconds(speaker.fillers)


async def test_sentence_is_said_once(call):
    """The sentence is synthesized and said once."""
    voice = Voice()

    async def session_of(model):
        names = {"__name__": "block"}
        exec(SENTENCE, names)
        return AgentSession(llm=await names["prepare"](model, voice))

    speaker = await call(session_of)

    assert ["One moment, please."] == voice.texts
    assert 1.0 == seconds(speaker.fillers)


async def test_policy_sets_time(call):
    """The tone is heard at 1.5 s, 3.8 s, and not again before the reply at 6 s."""
    speaker = await call(running(POLICY))

    assert 0.6 == seconds(speaker.fillers)
    assert 4.5 == pytest.approx(speaker.replies[0][0] - speaker.fillers[0][0], abs=0.1)


async def test_function_is_cancelled(call):
    """The indicator is shown from 2 s on, and hidden when the reply begins."""
    indicator = Indicator()
    speaker = await call(running(FUNCTION, indicator=indicator))

    assert (["openai takes longer than 2 s"], 1) == (indicator.texts, indicator.hidden)
    assert [] == speaker.fillers


async def test_example_plays_tone_recording_and_sentence(call):
    """Each of the three sessions of the example plays its sound."""
    filler, voice = example(), Voice()

    async def humming(model):
        return filler.humming(model)

    async def typing(model):
        return filler.typing(model, RECORDING)

    async def asking_for_patience(model):
        return await filler.asking_for_patience(model, voice)

    assert 0.6 == seconds((await call(humming)).fillers)
    assert (await call(typing)).fillers
    assert 1.0 == seconds((await call(asking_for_patience)).fillers)
