# SPDX-License-Identifier: Apache-2.0
"""What a review by adversaries found: each of these failed once."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest
from livekit.agents import llm
from livekit.plugins import openai
from support.conversation import codes, ended, now
from support.providers import openai_model, xai_model
from support.steered import SteeredServer

from traced_retry.core import failure
from traced_retry.core.loop import Reply
from traced_retry.livekit.adapter import Adapter, plain_provider
from traced_retry.livekit.openai import OpenAIAdapter


def steered(_):
    """A server that answers when told."""
    return SteeredServer()


async def until(condition):
    """Wait for at most five seconds of the virtual clock."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError


def deaf_to_cancels(connection):
    """A response that is cancelled goes on, as one does whose end is lost."""

    async def ignore(event):
        connection.server.cancels.append(event.get("response_id"))

    connection.handlers["response.cancel"] = ignore


class TestActiveForEver:
    """A response of which no end is told must not hold up every later retry of the session."""

    async def rejected_then_answered(self, talk):
        """Ask, reject, and answer whatever is asked after that."""
        handle = talk.ask()
        await until(lambda: talk.server.waiting)
        await talk.server.connection.reject_one(0, "server_error")
        talk.server.willing = 1
        await handle

    async def test_renewed_connection_does_not_block_retries(self, start_conversation, recorder):
        """The plugin renews it at max_session_duration, while a discarded response is active."""

        def recycled(**kwargs):
            return openai_model(max_session_duration=8.0, **kwargs)

        talk = await start_conversation("-", model=recycled, simulator=steered)
        await asyncio.sleep(6)
        handle = talk.ask()
        await until(lambda: talk.server.waiting)
        old = talk.server.connection
        deaf_to_cancels(old)
        handle.interrupt()
        await handle
        await old.begin_to_answer(0, message=False)
        await until(lambda: talk.server.cancels[-1:] not in ([], [None]))
        await until(lambda: talk.server.connection not in (old, None))
        await self.rejected_then_answered(talk)

        assert ("recovered", None) == ended(recorder)[-1]
        assert 1 == len(talk.heard)

    async def test_response_that_xai_leaves_open_does_not_block_retries(
        self, start_conversation, recorder
    ):
        """Grok starts another response without an end of the first, which its plugin knows."""
        talk = await start_conversation("-", model=xai_model, simulator=steered)
        handle = talk.ask()
        await until(lambda: talk.server.waiting)
        here = talk.server.connection
        deaf_to_cancels(here)
        await here.begin_to_answer(0, message=False)
        await asyncio.sleep(0.5)
        handle.interrupt()
        await handle
        await here.begin_its_own()
        await here.complete()
        await asyncio.sleep(1)
        await self.rejected_then_answered(talk)

        assert ("recovered", None) == ended(recorder)[-1]

    async def test_reply_whose_response_is_left_open_fails_at_once(
        self, start_conversation, recorder
    ):
        """The reply fails at once, as its plugin does, and not at the deadline."""
        talk = await start_conversation("-", model=xai_model, simulator=steered)
        handle = talk.ask(allow_interruptions=False)
        await until(lambda: talk.server.waiting)
        here = talk.server.connection
        await here.begin_to_answer(0, message=False)
        await asyncio.sleep(0.5)
        began = now()
        await here.begin_its_own()
        await here.complete()
        await handle

        assert now() - began < 1
        assert [("interrupted", "interrupted")] == ended(recorder)

    async def test_request_lost_by_renewal_is_no_timeout(self, start_conversation, recorder):
        """The plugin drops a waiting request when it renews its connection."""

        def recycled(**kwargs):
            return openai_model(max_session_duration=8.0, **kwargs)

        talk = await start_conversation("silence,ok", model=recycled, hedge_after=None)
        await asyncio.sleep(1)

        assert None is await talk.reply()
        assert ["connection_lost", None] == codes(recorder)


class Deferring(openai.realtime.RealtimeSession):
    """A user's subclass that does something before it asks: its request's id is not seen."""

    def generate_reply(self, **kwargs):
        outer = asyncio.get_running_loop().create_future()
        self._asking = asyncio.ensure_future(self._ask(outer, kwargs))
        return outer

    async def _ask(self, outer, kwargs):
        await asyncio.sleep(0.01)
        try:
            result = await super().generate_reply(**kwargs)
        except llm.RealtimeError as error:
            outer.done() or outer.set_exception(error)
        else:
            outer.done() or outer.set_result(result)


class DeferringModel(openai.realtime.RealtimeModel):
    def session(self, **kwargs):
        return Deferring(self, **kwargs)


def deferring(**kwargs):
    """A model of such sessions."""
    return DeferringModel(modalities=["text"], **kwargs)


class TestSubclass:
    async def test_reply_of_subclass_is_heard(self, start_conversation, recorder):
        """The streams of the reply were closed before its first item came."""
        talk = await start_conversation("-", model=deferring, simulator=steered)
        handle = talk.ask()
        await until(lambda: talk.server.waiting)
        here = talk.server.connection
        await here.begin_to_answer(0, message=False)
        await asyncio.sleep(0.5)
        await here.complete()
        await handle
        await talk.settle()

        assert 1 == len(talk.heard)
        assert [("succeeded", None)] == ended(recorder)

    async def test_reply_of_subclass_without_id_is_not_resent(self, start_conversation, recorder):
        """A request without a known id cannot be discarded."""
        talk = await start_conversation("late:3,ok", model=deferring, attempt_timeout=2.0)

        await talk.reply()

        assert 1 == len(talk.server.requests)
        assert [("exhausted", "unsafe_to_resend")] == ended(recorder)


class TestNotes:
    @pytest.mark.parametrize("script", ["quota", "rate_limit:60"])
    async def test_note_belongs_to_one_reply(self, script, start_conversation):
        """A session that is closed or waits has one failure for all its replies."""
        talk = await start_conversation(script)
        errors = []
        for _ in range(3):
            with pytest.raises(llm.RealtimeError) as caught:
                await talk.realtime.generate_reply()
            errors.append(caught.value)

        assert 3 == len(set(map(id, errors)))
        assert [1, 1, 1] == [len(error.__notes__) for error in errors]


class TestTheUsersOwnLimit:
    async def test_reply_cut_by_max_tokens_succeeds(self, start_conversation, recorder):
        """Without us a reply cut by max_response_output_tokens has no exception either."""
        talk = await start_conversation("-", simulator=steered)
        handle = talk.ask()
        await until(lambda: talk.server.waiting)
        here = talk.server.connection
        await here.begin_to_answer(0, message=True)
        await here.say()
        await here.finish(here.active, "incomplete", reason="max_output_tokens")
        await handle
        await talk.settle()

        assert None is handle.exception()
        assert [("succeeded", None)] == ended(recorder)


class TestNothingEscapes:
    async def test_raising_log_filter_leaves_no_span_open(
        self, start_conversation, recorder, caplog
    ):
        """Every reply ends and closes its span, though a filter of the log raises."""

        def broken(record):
            raise RuntimeError

        caplog.set_level(logging.INFO, logger="traced_retry")
        logger = logging.getLogger("traced_retry")
        logger.addFilter(broken)
        try:
            talk = await start_conversation("rate_limit,ok,error:invalid_value")
            await talk.reply()
            error = await talk.reply()
        finally:
            logger.removeFilter(broken)

        assert "invalid_value" == error.code
        assert ["recovered", "not_recoverable"] == [outcome for outcome, _ in ended(recorder)]
        assert 0 == recorder.open_spans

    def test_explain_survives_raising_property(self):
        """``explain`` never raises, though a property of the exception does."""

        class Odd(Exception):  # noqa: N818
            @property
            def retry_after(self):
                raise ValueError

        assert None is failure.explain(Odd()).retry_after


class TestMemory:
    async def test_ended_reply_is_released(self, start_conversation):
        """An AgentSession keeps all its speeches, which kept our replies and their streams."""

        def replies():
            gc.collect()
            return [thing for thing in gc.get_objects() if type(thing) is Reply]

        before = replies()  # of other tests, whose event loops are gone
        talk = await start_conversation("ok")
        for _ in range(5):
            await talk.reply()
        await talk.settle()

        assert [] == [reply for reply in replies() if reply not in before]


class TestAddress:
    def test_server_address_holds_no_password(self):
        """A proxy's URL may hold a password, and the plugin's ``provider`` then does."""
        url = "https://sk-SECRET@proxy.example.com:8443/v1"
        model = openai.realtime.RealtimeModel(api_key="sk-SECRET", base_url=url)
        session = Deferring.__new__(Deferring)
        session._realtime_model = model
        adapter = OpenAIAdapter.__new__(OpenAIAdapter)
        Adapter.__init__(adapter, session, None)
        target = adapter.target()

        assert ("proxy.example.com", 8443) == (target.server_address, target.server_port)
        assert "proxy.example.com" == plain_provider(url.removesuffix("/v1"))
