# SPDX-License-Identifier: Apache-2.0
"""Five ways to handle failing replies, side by side: lost replies, duplicates and silence.

Each reply has a session of its own with the real plugin, over a real socket to a simulator, on the
virtual clock of the tests. The faults of all replies come from one seeded mix, so that each way
meets the same ones. The time is the caller's silence until the first word, or until the agent knows
that there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import statistics
import sys
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
warnings.simplefilter("ignore")

import aiohttp  # noqa: E402
import backoff  # noqa: E402
import tenacity  # noqa: E402
from livekit.agents import APIConnectOptions, llm  # noqa: E402
from support.providers import KEY, PROVIDERS  # noqa: E402

import traced_retry  # noqa: E402
from traced_retry.testing.clock import VirtualClockLoop  # noqa: E402

MIX = {
    # script: weight, in replies of 1,000. The last element of a script repeats.
    "late:0.6": 850,  # A sound reply. The model begins within one second.
    "silence,late:0.6": 40,  # A lost request: the most frequent complaint about realtime models.
    "error:server_error,late:0.6": 30,  # The documented transient error of OpenAI.
    "failed_later,late:0.6": 15,  # The same, after the response was created.
    "late:3": 20,  # A slow moment of the provider.
    "late:12": 10,  # A reasoning model or an overloaded server.
    "stalled,late:0.6": 10,  # A response that is created and never speaks.
    "drop_before,late:0.6": 15,  # A lost connection. Mobile networks and load balancers cause it.
    "rate_limit,late:0.6": 10,  # A busy account.
}
WITHIN = 60.0
"""Seconds after which the caller has given up."""
AT_ONCE = 100
"""Sessions that run at once."""
NO_RETRIES = APIConnectOptions(max_retry=3, retry_interval=1.0, timeout=5.0)

Ask = Callable[[Any], Awaitable[Any]]


@dataclass
class Result:
    """The replies of one way of handling failures."""

    silence: list[float] = field(default_factory=list)
    lost: int = 0
    duplicates: int = 0
    requests: int = 0


async def alone(session: Any) -> None:
    """Ask once, as LiveKit does."""
    await session.generate_reply()


@backoff.on_exception(backoff.expo, llm.RealtimeError, max_tries=4, factor=1.0, max_value=10.0)
async def blind(session: Any) -> None:
    """Ask again after each error, as the upstream proposal does."""
    await session.generate_reply()


@tenacity.retry(
    stop=tenacity.stop_after_attempt(4) | tenacity.stop_after_delay(20),
    wait=tenacity.wait_random_exponential(max=10),
    retry=tenacity.retry_if_exception_type(llm.RealtimeError),
    reraise=True,
)
async def by_hand(session: Any) -> None:
    """Ask again in a loop that an experienced developer would write, with a shorter time-out."""
    reply = session.generate_reply()
    done, _ = await asyncio.wait({reply}, timeout=5.0)
    if not done:
        reply.cancel()
        raise llm.RealtimeError("no answer within 5 s")
    await reply


BEFORE = {"base_delay": 1.0, "hedge_after": None, "first_word_timeout": None}
WAYS: dict[str, tuple[Ask, dict[str, Any] | None]] = {
    "the plugin alone": (alone, None),
    "blind retries": (blind, None),
    "a tenacity loop": (by_hand, None),
    "traced-retry, no hedge": (alone, BEFORE),
    "traced-retry": (alone, {}),
}


async def converse(provider: str, script: str, way: str, result: Result) -> None:
    """Ask for one reply, and note when its first word came and how many replies were heard."""
    case, (ask, policy) = PROVIDERS[provider], WAYS[way]
    loop = asyncio.get_running_loop()
    words: list[float] = []
    ends: list[float] = []
    readers: list[asyncio.Task[None]] = []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(case.simulator(script))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        stack.enter_context(case.redirected(server))
        model = case.model(
            api_key=KEY, http_session=http, conn_options=NO_RETRIES, **case.address(server)
        )
        if policy is not None:
            traced_retry.wrap(model, policy=traced_retry.RetryPolicy(budget=None, **policy))
        session = model.session()
        session.on(
            "generation_created",
            lambda event: readers.append(asyncio.ensure_future(read(event, words, ends))),
        )
        await server.wait_for("connected")
        began = loop.time()
        try:
            await asyncio.wait_for(ask(session), WITHIN)
        except (llm.RealtimeError, TimeoutError, asyncio.CancelledError):
            ends.append(loop.time())
        await asyncio.sleep(WITHIN)
        heard = [at - began for at in words]
        result.duplicates += max(0, len(heard) - 1)
        result.lost += not heard
        knew = max(ends, default=began + WITHIN) - began
        result.silence.append(min(heard, default=min(knew, WITHIN)))
        result.requests += len(server.requests)
        closing = asyncio.ensure_future(session.aclose())
        await asyncio.wait({closing}, timeout=10)
        for task in (*readers, closing):
            task.cancel()
        await asyncio.gather(*readers, closing, return_exceptions=True)


async def read(
    generation: llm.GenerationCreatedEvent, words: list[float], ends: list[float]
) -> None:
    """Note the time of the first word that an agent would speak, and of the end."""
    async for message in generation.message_stream:
        async for _ in message.text_stream:
            words.append(asyncio.get_running_loop().time())
            break
    ends.append(asyncio.get_running_loop().time())


async def play(provider: str, way: str, replies: int, seed: int) -> Result:
    """Play the mix."""
    known, result, rng = PROVIDERS[provider].simulator.faults, Result(), random.Random(seed)
    mix = {
        script: weight
        for script, weight in MIX.items()
        if {element.partition(":")[0] for element in script.split(",")} <= set(known)
    }
    scripts = rng.choices(list(mix), list(mix.values()), k=replies)
    for first in range(0, replies, AT_ONCE):
        batch = scripts[first : first + AT_ONCE]
        await asyncio.gather(*(converse(provider, script, way, result) for script in batch))
        print(f"{provider}, {way}: {first + len(batch)} replies", file=sys.stderr, flush=True)
    return result


def measure(provider: str, way: str, replies: int, seed: int) -> Result:
    """Play the mix on a virtual clock."""
    random.seed(seed)
    loop = VirtualClockLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(play(provider, way, replies, seed))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def main() -> None:
    """Print one table per provider, and check the promises."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=1_000, help="per way (default: 1000)")
    parser.add_argument("--providers", default="openai,google", help="separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the mix (default: 0)")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    broken = False
    for provider in arguments.providers.split(","):
        print(f"{provider}: {arguments.replies:,} replies, of which one in seven meets a fault")
        print(f"{'':<24}{'lost':>6}{'twice':>7}{'p50':>8}{'p95':>8}{'p99':>8}  requests per reply")
        results = {}
        for way in WAYS:
            results[way] = result = measure(provider, way, arguments.replies, arguments.seed)
            cuts = statistics.quantiles(result.silence, n=100)
            p50, p95, p99 = (f"{cuts[n]:.2f} s" for n in (49, 94, 98))
            print(
                f"{way:<24}{result.lost:>6}{result.duplicates:>7}{p50:>8}{p95:>8}{p99:>8}"
                f"  {result.requests / arguments.replies:.3f}",
                flush=True,
            )
        ours, before = results["traced-retry"], results["traced-retry, no hedge"]
        # A way that lets replies be heard twice is no alternative, however few it loses.
        single = [each for each in results.values() if each.duplicates == 0]
        kept = ours in single and ours.lost == min(each.lost for each in single)
        promise = "none twice, fewest lost"
        if provider == "openai":
            promise += ", half the p95"
            slow, fast = (statistics.quantiles(r.silence, n=20)[18] for r in (before, ours))
            kept &= fast <= slow / 2
        print(f"promise: {promise}: {'kept' if kept else 'BROKEN'}\n")
        broken |= not kept
    sys.exit(broken)


if __name__ == "__main__":
    main()
