# SPDX-License-Identifier: Apache-2.0
"""Test the recipes of ``examples/`` for failed replies with the faults they are made for.

The tests use a real AgentSession, real plugins and servers that fail. After each fault the caller
hears exactly one answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from pathlib import Path

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession, APIConnectOptions, function_tool
from livekit.agents.voice.io import AudioOutput, AudioOutputCapabilities
from livekit.plugins import openai
from support.conversation import Conversation, ended, now

import traced_retry
from traced_retry import RetryPolicy
from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.azure import VoiceLiveSimulator

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """Load the module of ``examples/`` as a user does."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


canned_sentence = example("canned_sentence")
switch_model = example("switch_model")

SENTENCE = canned_sentence.SENTENCE
SECONDS = 3.25  # of the recording


class Ear(AudioOutput):
    """A speaker that takes as long as the sound lasts."""

    def __init__(self):
        super().__init__(label="ear", capabilities=AudioOutputCapabilities(pause=False))
        self.played = []
        """Seconds of each piece that was played to its end."""
        self.cut = 0
        self._seconds = 0.0
        self._playing = []

    async def capture_frame(self, frame):
        await super().capture_frame(frame)
        self._seconds += frame.duration

    def flush(self):
        super().flush()
        if self._seconds:
            seconds, self._seconds = self._seconds, 0.0
            loop = asyncio.get_running_loop()
            self._playing.append(loop.call_later(seconds, self._finish, seconds))

    def clear_buffer(self):
        for timer in self._playing:
            timer.cancel()
            self.cut += 1
            self.on_playback_finished(playback_position=0.0, interrupted=True)
        self._playing.clear()

    def _finish(self, seconds):
        self._playing.clear()
        self.played.append(round(seconds, 2))
        self.on_playback_finished(playback_position=seconds, interrupted=False)


class Helper(Agent):
    """An agent with a tool. It is "thinking" while the reply to the result is pending."""

    def __init__(self):
        super().__init__(instructions="SECRET")

    @function_tool
    async def look_up(self) -> str:
        """Look it up."""
        return "found"


def make_openai(url, http):
    """Return a text-only OpenAI model."""
    return openai.realtime.RealtimeModel(
        api_key="sk-SECRET",
        base_url=url,
        http_session=http,
        modalities=["text"],
        conn_options=APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0),
    )


def make_voicelive(url, http):
    """Return a text-only VoiceLive model."""
    azure = pytest.importorskip("livekit.plugins.azure.realtime", reason="not in this version")
    return azure.RealtimeModel(
        api_key="sk-SECRET",
        endpoint=url,
        modalities=["text"],
        conn_options=APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0),
    )


MAKE = {
    "openai": (OpenAISimulator, make_openai),
    "azure_voicelive": (VoiceLiveSimulator, make_voicelive),
}


@pytest.fixture
async def stack():
    """Return a stack that is closed after the test."""
    async with contextlib.AsyncExitStack() as stack:
        yield stack


async def served(stack, script, name="openai"):
    """Return a server that plays ``script``, and a model for it."""
    simulator, make = MAKE[name]
    server = await stack.enter_async_context(simulator(script))
    return server, make(server.url, await stack.enter_async_context(aiohttp.ClientSession()))


@pytest.fixture
def apologising(stack, recorder):
    """Return a function that starts a conversation of the first recipe, with ``talk.ear``."""

    async def apologising(script, **policy):
        server, model = await served(stack, script)
        policy = RetryPolicy(**{"max_retries": 1, "base_delay": 0.1, "deadline": 3.0, **policy})
        session = canned_sentence.apologising(model, policy=policy, **recorder.providers)
        await stack.enter_async_context(session)
        ear = session.output.audio = Ear()
        await session.start(Helper())
        talk = Conversation(server, model, session)
        talk.ear = ear
        return talk

    return apologising


LOST = {
    # script: outcome, stop reason, where three seconds are all the time there is.
    "silence": ("exhausted", "deadline"),
    "late:5": ("exhausted", "deadline"),
    "rate_limit": ("exhausted", "max_attempts"),
    "error:invalid_value": ("not_recoverable", "not_recoverable"),
    "failed": ("exhausted", "max_attempts"),
    "failed_later": ("exhausted", "max_attempts"),
    "stalled": ("exhausted", "deadline"),
    "drop_before": ("exhausted", "max_attempts"),
}
FATAL = {
    # The plugin gives the session up, and LiveKit would close the agent's at once.
    "quota": ("not_recoverable", "not_recoverable"),
    "unauthorized": ("not_recoverable", "not_recoverable"),
}


class TestCannedSentence:
    @pytest.mark.parametrize("script", LOST)
    async def test_heard_instead(self, script, apologising, recorder):
        """The sentence is heard once and in full, and the next reply is heard."""
        talk = await apologising(f"{script},ok", max_retries=0)

        await talk.reply()
        await talk.settle()
        assert [SENTENCE] == talk.heard
        assert [SECONDS] == talk.ear.played
        assert [LOST[script]] == ended(recorder)

        await talk.reply()
        await talk.settle()
        assert 2 == len(talk.heard)
        assert [SECONDS] == talk.ear.played
        assert ("succeeded", None) == ended(recorder)[1]

    @pytest.mark.parametrize("script", FATAL)
    async def test_heard_before_the_session_closes(self, script, apologising, recorder):
        """The sentence is heard in full, although the model's session is over."""
        talk = await apologising(script, deadline=10.0)

        await talk.reply()
        await talk.settle()

        assert [SENTENCE] == talk.heard
        assert [SECONDS] == talk.ear.played
        assert 0 == talk.ear.cut
        assert [FATAL[script]] == ended(recorder)
        with pytest.raises(RuntimeError, match="AgentSession"):
            talk.ask()  # it is closed

    async def test_a_server_that_dies(self, apologising, recorder):
        """The sentence is heard in full after the server has died."""
        talk = await apologising("silence", deadline=10.0)
        handle = talk.ask()
        await talk.server.wait_for(lambda: talk.server.requests)
        await talk.server.close()
        await handle
        await talk.settle()

        assert [SENTENCE] == talk.heard
        assert [SECONDS] == talk.ear.played
        with pytest.raises(RuntimeError, match="AgentSession"):
            talk.ask()

    async def test_after_its_beginning(self, apologising, recorder):
        """A reply that broke off in the middle is followed by the sentence."""
        talk = await apologising("drop_during,ok")

        await talk.reply()
        await talk.settle()

        assert ["reply", SENTENCE] == talk.heard
        assert [("not_recoverable", "output_started")] == ended(recorder)

    async def test_not_where_the_session_was_closed(self, apologising, recorder, caplog):
        """After the close no sentence is said and no error is logged."""
        talk = await apologising("silence", deadline=10.0)
        talk.realtime.generate_reply()
        await talk.server.wait_for(lambda: talk.server.requests)
        await talk.session.aclose()
        await talk.settle()

        assert [("not_recoverable", "session_closed")] == ended(recorder)
        assert [] == talk.heard
        assert [] == talk.ear.played
        assert [] == [r for r in caplog.records if r.name == "traced_retry" and r.levelno > 30]


@pytest.fixture(params=["openai", "azure_voicelive"])
def elsewhere(request, stack, recorder):
    """Return a function that starts a conversation of the second recipe with two scripts.

    The server of the second model is ``talk.second``.
    """

    async def elsewhere(script, second="ok", **policy):
        names = sorted(MAKE, key=lambda name: name != request.param)
        server, model = await served(stack, script, names[0])
        talk_second, fallback = await served(stack, second, names[1])
        policy = RetryPolicy(**{"max_retries": 1, "base_delay": 0.1, "deadline": 3.0, **policy})
        session = switch_model.answering_elsewhere(
            [model, fallback], policy=policy, **recorder.providers
        )
        await stack.enter_async_context(session)
        await session.start(Helper())
        talk = Conversation(server, model, session)
        talk.second = talk_second
        return talk

    return elsewhere


class TestSwitchModel:
    @pytest.mark.parametrize("script", [*LOST, *FATAL])
    async def test_answered_by_the_next(self, script, elsewhere, recorder):
        """After each fault of the first model, one reply of the second is heard."""
        talk = await elsewhere(script, deadline=10.0 if script in FATAL else 3.0)

        await talk.reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert ["reply 1"] == talk.second.completed
        assert 1 == talk.second.connections
        assert [] == talk.server.completed
        assert ("succeeded", None) == ended(recorder)[-1]
        assert 2 == len(ended(recorder))
        assert 0 == recorder.open_spans

    async def test_a_server_that_dies(self, elsewhere, recorder):
        """One reply is heard, although the adapter switches by itself as well."""
        talk = await elsewhere("silence", deadline=10.0)
        handle = talk.ask()
        await talk.server.wait_for(lambda: talk.server.requests)
        await talk.server.close()
        await handle
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert 1 == len(talk.second.requests)

    @pytest.mark.parametrize("script", ["silence", "rate_limit", "failed", "quota"])
    async def test_a_tools_reply(self, script, elsewhere, recorder):
        """One reply is heard, although the adapter would also request it while "thinking"."""
        talk = await elsewhere(f"tool:look_up,{script}")

        talk.ask()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert 1 == len(talk.second.requests)

    async def test_a_tools_reply_at_a_server_that_dies(self, elsewhere, recorder):
        """One of adapter and recipe requests the reply to a tool's result."""
        talk = await elsewhere("tool:look_up,silence", deadline=10.0)
        talk.ask()
        await talk.server.wait_for(lambda: len(talk.server.requests) == 2)
        await talk.server.close()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert 1 == len(talk.second.requests)

    @pytest.mark.parametrize("script", ["silence", "rate_limit", "error:invalid_value", "failed"])
    async def test_both_fail(self, script, elsewhere, recorder):
        """The second model gets one request, and the recipe does not switch back."""
        talk = await elsewhere(script, script)

        await talk.reply()
        await talk.settle(60)

        assert [] == talk.heard
        assert 2 == len(ended(recorder))
        assert {outcome for outcome, _ in ended(recorder)} <= {"exhausted", "not_recoverable"}

    async def test_after_its_beginning(self, elsewhere, recorder):
        """A reply that was heard in part is not heard again."""
        talk = await elsewhere("drop_during,ok")

        await talk.reply()
        await talk.settle()

        assert ["reply"] == talk.heard
        assert [] == talk.second.requests

    @pytest.mark.parametrize("script", ["quota", "rate_limit"])
    async def test_the_same_model_at_another_address(self, script, stack, recorder):
        """The second model differs from the first only in its address."""
        first, model = await served(stack, script)
        second, fallback = await served(stack, "ok")
        policy = RetryPolicy(max_retries=0)
        session = switch_model.answering_elsewhere(
            [model, fallback], policy=policy, **recorder.providers
        )
        await stack.enter_async_context(session)
        await session.start(Helper())
        talk = Conversation(first, model, session)

        await talk.reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard == second.completed
        assert 1 == len(second.requests)

    async def test_it_stays_there(self, elsewhere, recorder):
        """The second model answers the next reply."""
        talk = await elsewhere("rate_limit")

        await talk.reply()
        await talk.settle()
        await talk.reply()
        await talk.settle()

        assert ["reply 1", "reply 2"] == talk.heard
        assert ["reply 1", "reply 2"] == talk.second.completed


def raises(_):
    """Raise an error with a text that must not be logged."""
    raise RuntimeError("SECRET")


async def raises_later(_):
    """Raise the same error after a while."""
    await asyncio.sleep(1)
    raise RuntimeError("SECRET")


async def hangs(_):
    """Never return."""
    await asyncio.Event().wait()


class TestACallbackThatFails:
    @pytest.mark.parametrize("callback", [raises, raises_later, hangs])
    @pytest.mark.parametrize("script", ["rate_limit", "failed", "drop_before"])
    async def test_blocks_nothing(self, callback, script, stack, recorder, caplog):
        """The next reply is heard, the session closes in time, and one record is logged."""
        server, model = await served(stack, f"{script},ok")
        policy = RetryPolicy(max_retries=0)
        wrapped = traced_retry.wrap(
            model, policy=policy, on_exhausted=callback, **recorder.providers
        )
        session = AgentSession(llm=wrapped)
        await session.start(Agent(instructions="SECRET"))
        talk = Conversation(server, model, session)

        await talk.reply()
        assert None is await talk.reply()
        await talk.settle(5)
        began = now()
        await session.aclose()

        assert now() - began <= 0.1
        assert ["reply 2"] == talk.heard
        errors = [r for r in caplog.records if r.name == "traced_retry" and r.levelname == "ERROR"]
        assert (0 if callback is hangs else 1) == len(errors)
        assert [] == [r for r in errors if "SECRET" in r.getMessage()]
