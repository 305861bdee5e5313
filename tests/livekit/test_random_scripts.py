# SPDX-License-Identifier: Apache-2.0
"""A thousand random conversations: whatever the server does, each reply keeps the promise.

The real plugin over real sockets, on the virtual clock. The ear is a listener on the plugin's own
session: it reads every generation, asked for or not, as the agent would speak it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
import pytest
from livekit.agents import APIConnectOptions, llm
from livekit.plugins import openai

import traced_retry
from traced_retry import semconv
from traced_retry.simulator import OpenAISimulator

FAULTS = (
    "ok",
    "ok",
    "error:server_error",
    "error:odd_type/odd_code",
    "error:invalid_value",
    "uncorrelated",
    "rate_limit",
    "rate_limit:{seconds}",
    "quota",
    "unauthorized",
    "silence",
    "late:{seconds}",
    "drop_before",
    "drop_during",
    "drop_queued:{seconds}",
    "active:{seconds}",
    "failed",
    "incomplete",
    "malformed",
    "slow:{seconds}",
)


@dataclass
class Told:
    """What one conversation came to."""

    script: str
    asked: int = 0
    requests: int = 0
    answers: list = field(default_factory=list)
    heard: list = field(default_factory=list)
    hung: int = 0


def make_up(seed):
    """A script, a policy, and what the caller does."""
    rng = random.Random(seed)
    elements = [
        rng.choice(FAULTS).format(seconds=round(rng.uniform(0.1, 14), 1))
        for _ in range(rng.randint(1, 5))
    ]
    policy = traced_retry.RetryPolicy(
        max_retries=rng.randint(0, 4),
        base_delay=rng.choice([0, 0.2, 1.0]),
        deadline=rng.choice([3.0, 8.0, 20.0]),
        attempt_timeout=rng.choice([None, None, 1.0, 3.0]),
    )
    barge_in = rng.choice([None, None, None, rng.uniform(0, 10)])
    close = rng.choice([None, None, None, None, rng.uniform(0, 10)])
    return ",".join(elements), policy, rng.randint(1, 3), barge_in, close


async def run_script(seed, recorder):
    """Hold one conversation; returns what it came to."""
    script, policy, replies, barge_in, close = make_up(seed)
    told = Told(script)
    async with OpenAISimulator(script) as server, aiohttp.ClientSession() as http:
        model = openai.realtime.RealtimeModel(
            api_key="x",
            base_url=server.url,
            modalities=["text"],
            http_session=http,
            conn_options=APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0),
        )
        traced_retry.wrap(model, policy=policy, **recorder.providers)
        session = model.session()
        send_event = session.send_event

        def count(event):
            kind = event["type"] if isinstance(event, dict) else event.type
            told.requests += kind == "response.create"
            send_event(event)

        session.send_event = count
        listeners = listen(session, told)
        for _ in range(replies):
            told.asked += 1
            began = asyncio.get_running_loop().time()
            reply = session.generate_reply()
            if barge_in is not None:
                asyncio.get_running_loop().call_later(barge_in, reply.cancel)
            if close is not None and told.asked == replies:
                asyncio.get_running_loop().call_later(close, aclose, session)
            await asyncio.wait({reply}, timeout=policy.deadline + 0.01)
            told.hung += not reply.done()
            took = asyncio.get_running_loop().time() - began
            assert took <= policy.deadline + 1e-6, (seed, script)
            told.answers.append(answer(reply))
            await asyncio.sleep(0.5)
        await asyncio.sleep(40)
        await asyncio.wait({aclose(session)})
        for task in listeners:
            task.cancel()
        await asyncio.gather(*listeners, return_exceptions=True)
    return told


def aclose(session):
    """Close it; the plugin raises there again what ended the session."""
    task = asyncio.ensure_future(session.aclose())
    task.add_done_callback(lambda t: t.cancelled() or t.exception())
    return task


def answer(reply):
    """The id of the response, or why there is none."""
    if reply.cancelled():
        return "cancelled"
    error = reply.exception()
    assert error is None or isinstance(error, llm.RealtimeError)
    return None if error else reply.result().response_id


def listen(session, told):
    """Read each generation's words as an agent would."""
    tasks = []

    async def read(generation):
        words = []
        async for message in generation.message_stream:
            words.extend([text async for text in message.text_stream])
        if words:
            told.heard.append(generation.response_id)

    def on_generation(generation):
        tasks.append(asyncio.ensure_future(read(generation)))

    session.on("generation_created", on_generation)
    return tasks


@pytest.mark.parametrize("batch", range(20))
async def test_random_script_keeps_promise(batch, recorder, caplog):
    """A reply is heard at most once and in time, never after its end, and the counts agree."""
    caplog.set_level("CRITICAL")
    seeds = range(batch * 50, batch * 50 + 50)
    told = await asyncio.gather(*(run_script(seed, recorder) for seed in seeds))

    for one in told:
        given = [a for a in one.answers if a not in (None, "cancelled")]
        assert 0 == one.hung, one
        assert set(one.heard) <= set(given), one
        assert len(one.heard) == len(set(one.heard)), one
    replies, attempts = recorder.replies, recorder.attempts
    asked = sum(one.asked for one in told)
    outcomes = Counter(r[semconv.OUTCOME] for r in replies)
    assert asked == len(replies) == sum(outcomes.values())
    assert set(outcomes) <= set(semconv.OUTCOMES)
    assert outcomes == recorder.counted(semconv.METRIC_REPLIES, semconv.OUTCOME)
    assert sum(one.requests for one in told) == len(attempts)
    assert len(attempts) == sum(recorder.counted(semconv.METRIC_ATTEMPTS, semconv.RESULT).values())
    assert len(attempts) == sum(r[semconv.ATTEMPTS] for r in replies)
    assert sum(len(one.heard) for one in told) >= outcomes["succeeded"] + outcomes["recovered"]
    assert {} == recorder.counted(semconv.METRIC_IN_FLIGHT)
    assert 0 == recorder.open_spans
    assert {asyncio.current_task()} == asyncio.all_tasks()
