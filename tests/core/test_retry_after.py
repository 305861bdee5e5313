# SPDX-License-Identifier: Apache-2.0
"""A provider that asked to be left alone is, by all replies of the session."""

from __future__ import annotations

import asyncio

import pytest
from support.scripted import ProviderError, Scripted

from traced_retry import RetryPolicy
from traced_retry.core.cooldown import SessionCooldown
from traced_retry.core.failure import failure
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest
from traced_retry.core.telemetry import Target, Telemetry


def limited(seconds):
    """What a rate limit raises."""
    return ProviderError("rate_limit_exceeded", retry_after=seconds)


@pytest.fixture
def session(recorder):
    """Return a function that makes a reply. All its replies share one cooldown."""
    telemetry, shared = Telemetry(**recorder.providers), SessionCooldown()

    def session(script, **policy):
        return Reply(
            CallRequest(script.future),
            RetryPolicy(**{"base_delay": 1.0, **policy}),
            telemetry.reply(Target("openai")),
            jitter=lambda bound: bound,
            cooldown=shared,
        )

    return session


@pytest.mark.parametrize("seconds", [6.0, 0.25, 19.9])
async def test_next_reply_waits_for_retry_after(seconds, session, recorder):
    """The next reply sends its first request after the wait, which its span records."""
    with pytest.raises(ProviderError):
        await session(Scripted(limited(seconds)), max_retries=0).start()
    script = Scripted("hello")

    assert "hello" == await session(script).start()
    assert [seconds] == script.times
    assert seconds == recorder.attempts[1]["traced_retry.delay"]
    assert seconds == recorder.replies[1]["traced_retry.delay.total"]
    assert "succeeded" == recorder.replies[1]["traced_retry.outcome"]


def test_shorter_wait_does_not_end_longer_one():
    """A failure that asks for less, or for no wait, leaves the earlier time as it is."""
    cooldown = SessionCooldown()
    for seconds in (6.0, 1.0, None):
        why = failure(limited(seconds), "rate_limit", retry_after=seconds)
        cooldown.update(why, 100.0)

    assert 106.0 == cooldown.until
    assert 6.0 == cooldown.failure.retry_after


@pytest.mark.parametrize("seconds", [20, 60, 411_480, 10**300])
async def test_retry_after_beyond_deadline_does_not_hold_next_reply_back(
    seconds, session, recorder
):
    """A wait that a reply cannot afford does not silence it: it is sent once, at once."""
    with pytest.raises(ProviderError):
        await session(Scripted(limited(seconds))).start()
    script = Scripted("hello")

    assert "hello" == await session(script).start()
    assert [0.0] == script.times
    assert ["exhausted", "succeeded"] == [r["traced_retry.outcome"] for r in recorder.replies]


async def test_absurd_retry_after_holds_replies_back_for_a_minute(session):
    """A provider's wait of days counts as 60 s, for a reply that may wait that long."""
    with pytest.raises(ProviderError):
        await session(Scripted(limited(411_480)), max_retries=0).start()
    script = Scripted("hello")

    assert "hello" == await session(script, deadline=300.0).start()
    assert [60.0] == script.times


async def test_retry_in_progress_waits_for_retry_after(session):
    """A retry waits for the provider's time even if its own delay is over."""
    script = Scripted(ProviderError("server_error"), "hello")
    waiting = session(script).start()
    await asyncio.sleep(0.5)
    with pytest.raises(ProviderError):
        await session(Scripted(limited(4)), max_retries=0).start()

    assert "hello" == await waiting
    assert [0.0, 4.5] == script.times


async def test_rate_limit_without_retry_does_not_delay_next_reply(session):
    """With retry_rate_limits=False the next reply is sent at once."""
    with pytest.raises(ProviderError):
        await session(Scripted(limited(6)), retry_rate_limits=False).start()
    script = Scripted("hello")

    assert "hello" == await session(script, retry_rate_limits=False).start()
    assert [0.0] == script.times


async def test_interruption_during_retry_after_sends_nothing(session, recorder):
    """An interruption while the provider is left alone ends the reply unsent."""
    with pytest.raises(ProviderError):
        await session(Scripted(limited(6)), max_retries=0).start()
    script = Scripted("hello")
    waiting = session(script).start()
    await asyncio.sleep(2)
    waiting.cancel()
    await asyncio.sleep(30)

    assert 0 == script.calls
    assert ("interrupted", 0) == (
        recorder.replies[1]["traced_retry.outcome"],
        recorder.replies[1]["traced_retry.attempts"],
    )
    assert 0 == recorder.open_spans


async def test_session_close_during_retry_after_fails_reply(session, recorder):
    """The agent gets an error, and nothing is sent."""
    with pytest.raises(ProviderError):
        await session(Scripted(limited(6)), max_retries=0).start()
    script = Scripted("hello")
    reply = session(script)
    waiting = reply.start()
    reply.report_failure(failure(ProviderError("gone"), "session_closed"), "session_closed")

    with pytest.raises(ProviderError) as caught:
        await waiting
    assert "gone" == caught.value.code
    assert 0 == script.calls
    assert "session_closed" == recorder.replies[1]["traced_retry.stop_reason"]
