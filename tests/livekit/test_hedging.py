# SPDX-License-Identifier: Apache-2.0
"""A second request while the first one is open, with the real plugin and a real AgentSession."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from support.conversation import actions, codes, configured, ended, now

from traced_retry import RetryBudget, semconv
from traced_retry.simulator import OpenAISimulator


class TestHedge:
    @pytest.mark.parametrize(
        ("script", "seconds"),
        [
            ("silence,ok", 3.2),
            ("late:3", 3.1),
            ("late:12", 12.2),
            ("late:17", 17.2),
            ("stalled,ok", 9.0),
        ],
    )
    async def test_reply_is_heard_once_and_soon(
        self, script, seconds, start_conversation, recorder
    ):
        """One default policy suits a lost request, a slow server and a stalled response."""
        talk = await start_conversation(script)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert None is error
        assert took <= seconds
        assert 1 == len(talk.heard)
        assert [("recovered", None)] == ended(recorder)
        assert 0 == recorder.open_spans

    async def test_silent_server_gets_hedge_too(self, start_conversation, recorder):
        """A server that has sent no event yet, not even about the session, may answer the hedge."""

        class Silent(OpenAISimulator):
            def connect(self, ws, http):
                connection = super().connect(ws, http)
                connection.handlers["session.update"] = connection.ignore
                connection.greet = lambda: asyncio.sleep(0)
                return connection

        talk = await start_conversation("silence,ok", simulator=Silent, ready=False)

        error, took = await talk.timed_reply()

        assert (None, ["reply 2"]) == (error, talk.heard)
        assert took <= 3.2
        assert ["send", "hedge"] == actions(recorder)

    async def test_late_answer_to_first_request_is_adopted(self, start_conversation, recorder):
        """The first answer is the reply, and the second request is cancelled by its id."""
        talk = await start_conversation("late:3,silence")

        error, took = await talk.timed_reply()
        await talk.settle()

        assert (None, ["reply 1"]) == (error, talk.heard)
        assert 3.0 <= took < 3.1
        assert ["send", "hedge"] == actions(recorder)
        assert ["timeout", None] == codes(recorder)
        assert 1 == recorder.attempts[1][semconv.ANSWERED_ATTEMPT]
        assert recorder.attempts[1][semconv.RESPONSE_ID] == recorder.replies[0][semconv.RESPONSE_ID]

    async def test_late_answer_after_failed_response_is_adopted(self, start_conversation, recorder):
        """A response that failed before does not close the next request too early."""
        talk = await start_conversation("failed,late:4,silence")

        assert None is await talk.reply()
        await talk.settle()

        assert "reply 2" in talk.heard
        assert ["send", "send", "hedge"] == actions(recorder)
        assert [("recovered", None)] == ended(recorder)

    async def test_answer_to_hedge_names_no_other_attempt(self, start_conversation, recorder):
        """Only an attempt that got the answer of another one says so."""
        talk = await start_conversation("silence,ok")

        await talk.reply()

        assert ["reply 2"] == talk.heard
        assert semconv.ANSWERED_ATTEMPT not in recorder.attempts[1]

    async def test_short_attempt_timeout_keeps_requests_open(self, start_conversation, recorder):
        """If each answer takes longer than an attempt, the first answer is still heard."""
        talk = await start_conversation("late:3", attempt_timeout=2.0)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert (None, 1) == (error, len(talk.heard))
        assert took < 3.2

    async def test_answer_between_two_attempts_is_adopted(self, start_conversation, recorder):
        """An answer that comes during a wait ends the wait."""
        talk = await start_conversation("late:6,rate_limit:9,silence")

        error, took = await talk.timed_reply()
        await talk.settle()

        assert (None, ["reply 1"]) == (error, talk.heard)
        assert 6.0 <= took < 6.2
        assert ["send", "hedge", "listen"] == actions(recorder)
        assert 2 == len(talk.server.requests)

    async def test_active_response_confirms_first_request(self, start_conversation, recorder):
        """A server that rejects the hedge because a response is active is listened to."""
        rejected = "error:conversation_already_has_active_response"
        talk = await start_conversation(f"late:6,{rejected},silence")

        error, took = await talk.timed_reply()
        await talk.settle()

        assert (None, ["reply 1"]) == (error, talk.heard)
        assert 6.0 <= took < 6.2
        assert ["send", "hedge", "listen"] == actions(recorder)
        assert 2 == len(talk.server.requests)

    async def test_rejected_first_request_is_sent_again(self, start_conversation, recorder):
        """If both requests are rejected, the next one is sent without further delay."""
        talk = await start_conversation("silence,silence,ok", attempt_timeout=4.0)

        error, took = await talk.timed_reply()
        await talk.settle()

        assert (None, ["reply 3"]) == (error, talk.heard)
        assert took < 7.0

    async def test_interrupted_hedge_leaves_nothing_to_hear(self, start_conversation, recorder):
        """An interruption cancels both requests."""
        talk = await start_conversation("late:4,late:4,ok")
        speech = talk.ask()
        await asyncio.sleep(3.0)
        speech.interrupt()
        await speech
        await talk.settle()

        assert [] == talk.heard
        assert [("interrupted", "interrupted")] == ended(recorder)

    async def test_no_budget_no_hedge(self, start_conversation, recorder):
        """Without budget the first request stays open and is heard."""
        budget = RetryBudget(1, per_reply=0, per_second=0)
        budget.spend("openai", now)
        talk = await start_conversation("late:4", budget=budget)

        error, took = await talk.timed_reply()

        assert (None, ["reply 1"]) == (error, talk.heard)
        assert 4.0 <= took < 4.1
        assert ["send"] == actions(recorder)

    @pytest.mark.parametrize("policy", [{"hedge_after": None}, {"max_retries": 0}])
    async def test_hedging_can_be_turned_off(self, policy, start_conversation, recorder):
        """Without hedging, or without retries, one request is sent."""
        talk = await start_conversation("late:4", **policy)

        assert None is await talk.reply()
        assert ["reply 1"] == talk.heard
        assert ["send"] == actions(recorder)

    @pytest.mark.parametrize("provider", ["xai"], indirect=True)
    async def test_xai_is_not_hedged(self, start_conversation, recorder):
        """A server that may run two responses at once gets one request at a time."""
        talk = await start_conversation("late:4")

        assert None is await talk.reply()
        assert ["send"] == actions(recorder)
        assert 1 == len(talk.server.requests)

    async def test_fatal_timeout_is_not_hedged(self, start_conversation, recorder):
        """If the user calls a time-out final, a slow reply is still heard."""
        talk = await start_conversation(
            "late:4", classify=lambda why: replace(why, recoverable=False)
        )

        assert None is await talk.reply()
        assert ["reply 1"] == talk.heard

    async def test_sound_replies_cost_no_further_request(self, start_conversation):
        """If the model begins within one second, each reply is requested once."""
        talk = await start_conversation("late:0.95")

        for _ in range(50):
            assert None is await talk.reply()
        assert 50 == len(talk.server.requests)


class TestFastRetry:
    async def test_server_error_delays_reply_by_less_than_150_ms(self, start_conversation):
        """Of 200 replies that meet a server error, 95 % are heard within 0.15 s."""
        talk = await start_conversation(",".join(["error:server_error", "ok"] * 200), budget=None)

        seconds = sorted([(await talk.timed_reply())[1] for _ in range(200)])
        assert 200 == len(talk.heard)
        assert seconds[190] <= 0.15


class TestServerWithoutIds:
    async def test_second_answer_is_not_heard(self, start_conversation, recorder):
        """A slow server that does not echo ids answers both requests, and one answer is heard."""
        talk = await start_conversation("unlabelled:4")
        speech = talk.ask()
        await asyncio.sleep(30)
        await talk.settle()

        assert 2 == len(talk.server.requests)
        assert 1 == len(talk.heard)
        assert speech.done()
        (cancelled,) = talk.server.cancels
        assert cancelled not in (None, talk.generations[0].response_id)


class TestFirstWord:
    async def test_slow_model_gets_the_rest_of_the_time(self, start_conversation, recorder):
        """A model that needs more than the time-out for each response is heard in the end."""
        talk = await start_conversation("stalled:9", deadline=30.0)

        error, took = await talk.timed_reply()

        assert (None, 1) == (error, len(talk.heard))
        assert took < 17.5

    async def test_last_attempt_is_not_cut(self, start_conversation, recorder):
        """Without a further attempt the response may take until the deadline."""
        talk = await start_conversation("stalled:9", max_retries=0)

        error, took = await talk.timed_reply()

        assert (None, 1) == (error, len(talk.heard))
        assert 9.0 <= took < 9.2

    async def test_stalled_answer_to_caller_is_requested_again(self, start_conversation, recorder):
        """A response that the server started is replaced, too."""
        talk = await start_conversation("turn:stalled,ok")
        await configured(talk)
        await talk.server.caller_speaks("hello")
        await asyncio.sleep(9)
        await talk.settle()

        assert 1 == len(talk.heard)
        assert [("recovered", None)] == ended(recorder, "provider")
