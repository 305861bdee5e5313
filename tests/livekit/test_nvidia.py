# SPDX-License-Identifier: Apache-2.0
"""NVIDIA PersonaPlex with the real plugin: it cannot be asked for a reply, and that passes."""

from __future__ import annotations

import asyncio

import pytest
from livekit.plugins.nvidia.experimental import realtime as nvidia

import traced_retry
from traced_retry import RetryPolicy
from traced_retry.simulator.nvidia import PersonaPlexSimulator


def personaplex(*, base_url, http_session, **_):
    """The real model; it takes neither a key nor connection options."""
    return nvidia.RealtimeModel(base_url=base_url, http_session=http_session)


@pytest.fixture(params=["wrap", "instrument"])
async def talk(request, start_conversation, recorder):
    """An agent on PersonaPlex, hooked either way."""
    if request.param == "instrument":
        traced_retry.instrument(policy=RetryPolicy(), **recorder.providers)
    bare = request.param == "instrument"
    yield await start_conversation(
        "ok", model=personaplex, simulator=PersonaPlexSimulator, bare=bare
    )
    traced_retry.uninstrument()


@pytest.fixture
async def bare(start_conversation):
    """An agent on PersonaPlex without us."""
    return await start_conversation(
        "ok", model=personaplex, simulator=PersonaPlexSimulator, bare=True
    )


class TestNotImplemented:
    async def test_not_implemented_error_passes_unchanged(self, talk, recorder):
        """The call raises the plugin's own exception, without a note or a second attempt."""
        with pytest.raises(NotImplementedError, match="PersonaPlex") as caught:
            talk.realtime.generate_reply(instructions="SECRET")

        assert not hasattr(caught.value, "__notes__")
        assert 1 == len(recorder.attempts)
        assert 0 == recorder.open_spans

    async def test_span_names_exception_and_provider(self, talk, recorder):
        """The span is not recoverable, with the exception's class and NVIDIA's name."""
        with pytest.raises(NotImplementedError):
            talk.realtime.generate_reply()

        (reply,), (attempt,) = recorder.replies, recorder.attempts
        expected = {
            "gen_ai.provider.name": "nvidia",
            "gen_ai.request.model": "personaplex-7b",
            "error.type": "NotImplementedError",
        }
        assert expected == {name: reply.get(name) for name in expected}
        assert expected == {name: attempt.get(name) for name in expected}
        assert ("not_recoverable", "not_recoverable", 1) == (
            reply["traced_retry.outcome"],
            reply["traced_retry.stop_reason"],
            reply["traced_retry.attempts"],
        )
        assert ("send", False, "stop") == (
            attempt["traced_retry.action"],
            attempt["traced_retry.recoverable"],
            attempt["traced_retry.decision"],
        )

    async def test_agent_handle_ends_at_once_with_the_error(self, talk, recorder):
        """LiveKit alone does not catch the exception, so its handle ends without an error."""
        began = asyncio.get_running_loop().time()

        error = await talk.reply()

        assert began == asyncio.get_running_loop().time()
        assert isinstance(error, NotImplementedError)
        assert [] == talk.heard
        assert ["not_recoverable"] == [r["traced_retry.outcome"] for r in recorder.replies]

    async def test_agent_without_us_sees_no_error(self, bare):
        """Without traced-retry the reply is lost without a sign."""
        error = await bare.reply()

        assert None is error
        assert [] == bare.heard


class TestItsOwnSpeech:
    async def test_speech_of_model_is_heard_and_not_counted(self, talk, recorder):
        """Speech that the model starts by itself is heard and is no reply of ours."""
        await talk.server.wait_for("connected")
        await asyncio.sleep(1)
        await talk.server.say("good morning")
        await asyncio.sleep(1)
        await talk.server.hang_up()
        await talk.settle()

        assert ["good morning"] == talk.heard
        assert [] == recorder.replies
