# SPDX-License-Identifier: Apache-2.0
"""Random conversations with real plugins: ``python tools/soak.py --replies 3000``.

Each conversation is a session of a provider's real plugin over a real socket to its simulator, on
the virtual clock of the tests. The weights of the faults reach recovery often. The result is
printed per provider. The exit status is 1 after a duplicate, a hang, an open span or a leaked task.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import random
import re
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
warnings.simplefilter("ignore")

import aiohttp  # noqa: E402
from livekit.agents import llm  # noqa: E402
from support.providers import CONN_OPTIONS, KEY, PROVIDERS  # noqa: E402
from support.recorder import Recorder  # noqa: E402

import traced_retry  # noqa: E402
from traced_retry import semconv  # noqa: E402
from traced_retry.testing.clock import VirtualClockLoop  # noqa: E402

WEIGHTS = {
    # One fault per request. A recovery needs a fault that passes, followed by an answer.
    "ok": 60,
    "late:{seconds}": 8,
    "slow:{seconds}": 3,
    "silence": 4,
    "error:server_error": 5,
    "error:503": 5,
    "uncorrelated": 3,
    "rate_limit": 3,
    "rate_limit:{seconds}": 2,
    "active:{seconds}": 3,
    "failed_later": 5,
    "failed_message": 3,
    "failed_during": 1,
    "empty": 2,
    "drop_before": 2,
    "drop_during": 1,
    "drop_queued:{seconds}": 1,
    "incomplete": 1,
    "stalled": 1,
    "error:invalid_value": 1,
    # These end the session.
    "malformed": 0.2,
    "quota": 0.2,
}
ANSWER = re.compile(r"reply (\d+)")
NAMED_ONLY = {"error:503": {"google"}, "error:server_error": set(PROVIDERS) - {"google"}}
"""Faults with a code that only some protocols know."""
REPLIES = 40
"""Replies per conversation, unless its session ends earlier."""
CONVERSATIONS = 150
"""Conversations of a batch, which run at once."""
SETTLE = 30.0
"""Seconds after the last reply, in which a late one is heard."""


@dataclass
class Tally:
    """The sums over all conversations."""

    outcomes: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    answers: int = 0
    """Whole answers that were heard."""
    duplicates: int = 0
    late: int = 0
    hangs: int = 0
    open_spans: int = 0
    leaked_tasks: int = 0
    memory: list[tuple[int, float]] = field(default_factory=list)
    """Replies so far and resident memory in KiB, after each batch."""

    def add(self, other: Tally) -> None:
        """Add the sums of one batch."""
        self.outcomes += other.outcomes
        for name in (
            "asked",
            "answers",
            "duplicates",
            "late",
            "hangs",
            "open_spans",
            "leaked_tasks",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def problems(self) -> int:
        """The number of events that must not happen."""
        return self.duplicates + self.hangs + self.open_spans + self.leaked_tasks

    @property
    def growth(self) -> float:
        """Growth of memory in KiB per 10,000 replies, over the second half of the run."""
        half = self.memory[len(self.memory) // 2 :]
        if len(half) < 2:
            return 0.0
        (n0, m0), (n1, m1) = half[0], half[-1]
        return (m1 - m0) / max(1, n1 - n0) * 10_000


def script_for(provider: str, rng: random.Random) -> str:
    """Return a script with one fault per request, as far as the protocol knows them."""
    known = PROVIDERS[provider].simulator.faults
    weights = {
        fault: weight
        for fault, weight in WEIGHTS.items()
        if fault.partition(":")[0] in known and provider in NAMED_ONLY.get(fault, {provider})
    }
    faults = rng.choices(list(weights), list(weights.values()), k=2 * REPLIES)
    return ",".join(f.format(seconds=round(rng.uniform(0.1, 13), 1)) for f in [*faults, "ok"])


async def converse(provider: str, rng: random.Random, recorder: Recorder, tally: Tally) -> None:
    """Hold one conversation."""
    case = PROVIDERS[provider]
    policy = traced_retry.RetryPolicy(budget=None)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(case.simulator(script_for(provider, rng)))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        stack.enter_context(case.redirected(server))
        model = case.model(
            api_key=KEY, http_session=http, conn_options=CONN_OPTIONS, **case.address(server)
        )
        traced_retry.wrap(model, policy=policy, **recorder.providers)
        session = model.session()
        closed = asyncio.Event()
        session.on("error", lambda event: event.recoverable or closed.set())
        heard: list[str] = []
        readers: list[asyncio.Task[None]] = []
        session.on(
            "generation_created",
            lambda event: readers.append(asyncio.ensure_future(read(event, heard))),
        )
        for _ in range(REPLIES):
            if closed.is_set():
                break
            tally.asked += 1
            reply = session.generate_reply()
            if rng.random() < 0.03:
                asyncio.get_running_loop().call_later(rng.uniform(0, 10), reply.cancel)
            await asyncio.wait({reply}, timeout=policy.deadline + 0.01)
            tally.hangs += not reply.done()
            _ = reply.done() and not reply.cancelled() and reply.exception()
            await asyncio.sleep(rng.uniform(0, 1))
        await asyncio.sleep(SETTLE)
        closing = asyncio.ensure_future(session.aclose())
        await asyncio.wait({closing}, timeout=SETTLE)
        _ = closing.done() and not closing.cancelled() and closing.exception()
        await asyncio.wait(readers, timeout=1.0) if readers else None
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        # Each whole answer carries the number of its request.
        answers = Counter(number for text in heard for number in ANSWER.findall(text))
        tally.duplicates += sum(n - 1 for n in answers.values())
        tally.answers += len(answers)


async def read(generation: llm.GenerationCreatedEvent, heard: list[str]) -> None:
    """Read the words of a generation as an agent does."""
    async for message in generation.message_stream:
        text = "".join([text async for text in message.text_stream])
        if text:
            heard.append(text)


async def batch(provider: str, seed: int) -> Tally:
    """Hold some conversations at once."""
    rng = random.Random(seed)
    recorder, tally = Recorder(), Tally()
    await asyncio.gather(
        *(
            converse(provider, random.Random(rng.random()), recorder, tally)
            for _ in range(CONVERSATIONS)
        )
    )
    await asyncio.sleep(SETTLE)
    tally.outcomes.update(r[semconv.OUTCOME] for r in recorder.replies)
    tally.late = int(sum(recorder.points(semconv.METRIC_LATE_REPLIES).values()))
    tally.open_spans = recorder.open_spans
    tally.leaked_tasks = len(asyncio.all_tasks() - {asyncio.current_task()})
    recorder.shutdown()
    return tally


def run(provider: str, replies: int, seconds: float, seed: int) -> Tally:
    """Run batches until there were enough replies or the time is up."""
    logging.disable(logging.CRITICAL)
    total, began = Tally(), time.monotonic()
    while total.asked < replies and time.monotonic() - began < seconds:
        random.seed(seed)
        loop = VirtualClockLoop()
        loop.patience = 0.05 if provider == "aws" else 0.0  # Its client works in own threads.
        asyncio.set_event_loop(loop)
        try:
            total.add(loop.run_until_complete(batch(provider, seed)))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
        seed += 1
        gc.collect()
        total.memory.append((total.asked, resident()))
        rate = total.asked / (time.monotonic() - began)
        print(f"{provider:<16}{total.asked:>8} replies, {rate:.0f}/s", file=sys.stderr, flush=True)
    return total


def resident() -> float:
    """Return the resident memory of this process in KiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1])
    return 0.0


def report(provider: str, tally: Tally) -> None:
    """Print one provider's result."""
    share = {name: f"{n / max(1, tally.asked):.1%}" for name, n in tally.outcomes.most_common()}
    print(f"{provider}: {tally.asked:,} replies")
    print(f"  {'outcomes':<34}{', '.join(f'{k} {v}' for k, v in share.items())}")
    for name in ("answers", "duplicates", "hangs", "open_spans", "leaked_tasks", "late"):
        print(f"  {name.replace('_', ' '):<34}{getattr(tally, name)}")
    print(f"  {'memory growth per 10,000 replies':<34}{tally.growth:.0f} KiB")


def main() -> int:
    """Run the soak test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=3_000, help="in total (default: 3000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--providers", default="openai,google,ultravox", help="separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the random conversations")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    arguments = parser.parse_args()
    names: list[str] = [name for name in arguments.providers.split(",") if name]
    if unknown := set(names) - set(PROVIDERS):
        parser.error(f"--providers: {', '.join(unknown)} is none of {', '.join(PROVIDERS)}")
    each = -(-arguments.replies // len(names))
    settings: list[Any] = [(name, each, arguments.seconds, arguments.seed) for name in names]
    with ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool:
        tallies = list(pool.map(run, *zip(*settings, strict=True)))
    total = Tally()
    for name, tally in zip(names, tallies, strict=True):
        report(name, tally)
        total.add(tally)
    recovered = total.outcomes["recovered"] / max(1, total.asked)
    print(f"{total.asked:,} replies, {recovered:.1%} recovered, {total.problems} problems")
    return 1 if total.problems else 0


if __name__ == "__main__":
    sys.exit(main())
