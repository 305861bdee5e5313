# SPDX-License-Identifier: Apache-2.0
"""Fatal failures of the realtime session: the agent's code gets each of them.

LiveKit closes the agent session and interrupts the pending speeches without an error. With the
plugin alone, ``SpeechHandle.exception()`` is None, and ``session.run()`` returns without an event,
after up to 5 s (:class:`TestPluginAlone`). Here each reply ends with an error, one span, one log
record and one call of ``on_exhausted``.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from livekit.agents import Agent, llm
from support.conversation import ended, now
from support.providers import GOOGLE, GPT_LIVE, OPENAI_COMPATIBLE, PHONIC, ULTRAVOX

from traced_retry.livekit.speech import pending_speeches
from traced_retry.simulator.phonic import redirected

REFUSED = ",".join(["unauthorized"] * 9)
NOBODY = "http://127.0.0.1:9"
"""Nobody listens there."""
LOST = ("not_recoverable", "not_recoverable")


def lead_to_nobody(case):
    """Return the provider with a server that cannot be reached."""
    if case is PHONIC:
        return replace(case, redirected=lambda _: redirected(NOBODY.replace("http", "ws")))
    if case is GOOGLE:
        options = {"base_url": NOBODY.replace("http", "https")}
        return replace(case, address=lambda s: {"http_options": {**s.http_options, **options}})
    return replace(case, address=lambda _: {"base_url": NOBODY})


def distrust(server):
    """Return Google's options without the simulator's certificate."""
    return {"http_options": {"base_url": server.http_options["base_url"]}}


REACHABLE = {
    **OPENAI_COMPATIBLE,
    "google": GOOGLE,
    "ultravox": ULTRAVOX,
    "phonic": PHONIC,
    "gpt-live": GPT_LIVE,
}
FATAL = {
    **{f"{name} 401": (case, REFUSED) for name, case in REACHABLE.items()},
    # Ultravox's plugin tries on, and its replies end with the deadline.
    **{
        f"{name} dead port": (lead_to_nobody(case), "ok")
        for name, case in REACHABLE.items()
        if case is not ULTRAVOX
    },
    "google certificate": (replace(GOOGLE, address=distrust), "ok"),
}
BEFORE_LIVEKIT_ASKS = ["openai dead port", "phonic dead port", "google certificate"]


@pytest.fixture
def fault(request):
    """Return a provider and a script by the name of a fatal failure."""
    return FATAL[request.param]


@pytest.fixture
def start_dying(start_conversation, fault):
    """Return a function that starts a conversation with that failure."""
    provider, script = fault

    async def start_dying(**kwargs):
        return await start_conversation(script, provider=provider, ready=False, **kwargs)

    return start_dying


def warnings(caplog):
    """Return the messages of our warnings."""
    return [r.getMessage() for r in caplog.records if (r.name, r.levelname) == OURS]


OURS = ("traced_retry", "WARNING")


@pytest.mark.parametrize("fault", FATAL, indirect=True)
class TestEachFault:
    async def test_handle_has_the_error(self, start_dying, recorder, caplog):
        """``SpeechHandle.exception()`` returns the error. The plugin alone: None."""
        failed = []
        talk = await start_dying(on_exhausted=failed.append)

        error = await talk.reply()
        await talk.settle()

        assert isinstance(error, llm.RealtimeError)
        assert [LOST] == ended(recorder) == [(f.outcome, f.stop_reason) for f in failed]
        assert 1 == len(warnings(caplog))
        assert "stopped by not_recoverable" in error.__notes__[0]
        assert 0 == recorder.open_spans

    async def test_run_raises_the_error(self, start_dying, recorder, caplog):
        """``session.run()`` raises once the session has died. The plugin alone: it returns []."""
        failed = []
        talk = await start_dying(on_exhausted=failed.append)
        died = [now()]  # It may have died already.
        talk.session.on("error", lambda event: event.error.recoverable or died.append(now()))

        with pytest.raises(llm.RealtimeError):
            await talk.session.run(user_input="SECRET words")

        assert now() - died[-1] < 0.2
        await talk.settle()
        assert [LOST] == ended(recorder) == [(f.outcome, f.stop_reason) for f in failed]
        assert 1 == len(warnings(caplog))
        assert 0 == recorder.open_spans

    async def test_queued_reply_has_its_own_error(self, start_dying, recorder, caplog):
        """A second reply, never requested, is reported as well. The plugin alone: None."""
        failed = []
        talk = await start_dying(on_exhausted=failed.append)

        first, second = talk.ask(), talk.ask()
        await asyncio.gather(first, second)
        await talk.settle()

        assert isinstance(first.exception(), llm.RealtimeError)
        assert isinstance(second.exception(), llm.RealtimeError)
        assert first.exception() is not second.exception()
        assert [LOST, LOST] == ended(recorder) == [(f.outcome, f.stop_reason) for f in failed]
        assert 2 == len(warnings(caplog))
        assert 0 == recorder.open_spans


@pytest.mark.parametrize("fault", BEFORE_LIVEKIT_ASKS, indirect=True)
class TestBeforeLiveKitAsks:
    async def test_nothing_was_sent(self, start_dying, recorder):
        """A reply that was never requested has a span without an attempt."""
        talk = await start_dying()

        with pytest.raises(llm.RealtimeError):
            await talk.session.run(user_input="SECRET words")
        await talk.settle()

        assert [0] == [r["traced_retry.attempts"] for r in recorder.replies]
        assert [] == recorder.attempts

    async def test_greeting_of_on_enter_is_reported(self, start_dying, recorder):
        """The session may die while ``AgentSession.start`` runs. The plugin alone: None."""
        handles = []

        class Greeter(Agent):
            async def on_enter(self):
                handles.append(self.session.generate_reply())

        talk = await start_dying(agent=Greeter(instructions="SECRET"))
        await handles[0]
        await talk.settle()

        assert isinstance(handles[0].exception(), llm.RealtimeError)
        assert [LOST] == ended(recorder)


@pytest.mark.parametrize("fault", ["openai dead port", "voicelive 401"], indirect=True)
async def test_interrupted_reply_is_not_reported(start_dying, recorder):
    """The agent's code does not want a reply that it has interrupted."""
    talk = await start_dying()

    first, second = talk.ask(), talk.ask()
    second.interrupt()
    await asyncio.gather(first, second)
    await talk.settle()

    assert second.exception() is None
    assert [LOST] == ended(recorder)


PLUGIN_ALONE = ["openai 401", "openai dead port", "ultravox 401", "google certificate"]


@pytest.mark.parametrize("fault", PLUGIN_ALONE, indirect=True)
class TestPluginAlone:
    async def test_handle_has_no_error(self, start_dying):
        """The handle is done and interrupted, and has no exception."""
        talk = await start_dying(bare=True)
        handle = talk.ask()
        await handle

        assert (None, True) == (handle.exception(), handle.interrupted)

    async def test_run_returns_without_an_event(self, start_dying):
        """``session.run()`` returns normally."""
        talk = await start_dying(bare=True)

        assert [] == (await talk.session.run(user_input="hello")).events


class TestContract:
    """What this relies on, in the installed livekit-agents. See CONTRIBUTING."""

    async def test_queued_reply_is_found(self, start_conversation):
        """A reply is pending from ``generate_reply()`` until LiveKit requests it."""
        talk = await start_conversation("late:5,ok")
        first = await talk.ask_agent()
        second = talk.ask()
        said = talk.session.say("a text for the TTS", audio=silence())
        activity = talk.session._activity

        assert [second] == pending_speeches(activity)
        await asyncio.gather(first, second)
        assert [] == pending_speeches(activity)
        assert said not in pending_speeches(activity)


async def silence():
    """Yield no audio."""
    for frame in ():
        yield frame
