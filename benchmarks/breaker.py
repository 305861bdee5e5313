# SPDX-License-Identifier: Apache-2.0
"""Calls to a provider that fails some or all requests: no breaker, the usual rule, and ours."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support import brownout
from support.brownout import live_through
from support.callers import Callers

from traced_retry.core import breaker
from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.script import Script

OURS = breaker.FAILURES, breaker.SPAN
USUAL = 5, 0.0
REPLIES = 6_000
"""About as many replies per cell."""
PROCESSES, SECONDS = 50, 40
"""Job processes with OpenAI's real plugin, and the length of each of their brown-outs."""


def rule(name):
    """Set the rule of the breaker, and return the file for it, or None without a breaker."""
    if name == "none":
        return None
    breaker.FAILURES, breaker.SPAN = USUAL if name == "usual" else OURS
    return Path(tempfile.mkdtemp()) / "breaker"


def play(name, calls, failing, **more):
    """Play the calls under a rule. A retry budget would hide the effect of the rule."""
    path = rule(name)
    try:
        return live_through(path, calls=calls, failing=failing, budget=lambda: None, **more)
    finally:
        if path is not None:
            path.unlink()
            path.parent.rmdir()


async def share_of_processes(failing, path):
    """Return the shares of the replies of real job processes that are heard and refused."""
    rng = random.Random(1)
    script = ",".join(
        "error:server_error" if rng.random() < failing else "ok" for _ in range(20_000)
    )
    async with (
        OpenAISimulator(Script.parse(script)) as server,
        Callers(PROCESSES, server.url, path, pause=0.3) as callers,
    ):
        await callers.until(lambda: len({each.process for each in callers.replies}) == PROCESSES)
        callers.replies.clear()
        await asyncio.sleep(SECONDS)
        replies = list(callers.replies)
    heard = sum(each.stop_reason is None for each in replies)
    refused = sum(each.stop_reason == "circuit_open" for each in replies)
    return len(replies), heard / len(replies), refused / len(replies)


def main():
    broken = False
    print(
        f"usual rule: {USUAL[0]} failures in a row. ours: {OURS[0]} in a row over {OURS[1]:.0f} s."
    )
    print("Both: from two processes, one probe in 4 s. Up to 4 attempts per reply.\n")
    print("brown-out: share of the replies heard, and of those refused by our rule")
    print(f"{'calls':>6}{'failing':>9}{'none':>8}{'usual':>8}{'ours':>8}{'refused':>9}")
    for calls in (1, 2, 5, 50):
        for failing in (0.3, 0.5, 0.7, 0.8):
            seconds = REPLIES * 9 / calls
            told = {
                name: play(name, calls, failing, seconds=seconds)
                for name in ("none", "usual", "ours")
            }
            shares = "".join(f"{each.share:>8.1%}" for each in told.values())
            refused = told["ours"].refused / told["ours"].replies
            print(f"{calls:>6}{failing:>9.0%}{shares}{refused:>9.2%}")
            broken |= failing <= 0.7 and refused > 0.02
    print("\ntotal outage of 120 s, ours; silent: the share of failures that are time-outs of 5 s")
    print(f"{'calls':>6}{'silent':>9}{'opens after':>13}{'refused':>9}{'median silence':>16}")
    for calls in (1, 2, 5, 50):
        for silent in (0.0, 0.5, 1.0):
            told = play("ours", calls, 1.0, seconds=120, silent=silent)
            opened = "never" if told.opened is None else f"{told.opened:.1f} s"
            refused = told.refused / told.replies
            median = sorted(told.silence)[len(told.silence) // 2]
            print(f"{calls:>6}{silent:>9.0%}{opened:>13}{refused:>9.0%}{median:>14.1f} s")
            broken |= calls == 50 and not (told.opened and told.opened <= 12)
    brownout.TIME_OUT = 10.0  # that of a plugin whose requests are not hedged
    told = play("ours", 50, 1.0, seconds=120, silent=1.0)
    print(f"50 calls, all failures are time-outs of 10 s: opens after {told.opened:.1f} s")

    print(
        f"\n{PROCESSES} job processes with OpenAI's real plugin and the default budget, "
        f"{SECONDS} s each"
    )
    print(f"{'failing':>9}{'replies':>9}{'heard without':>15}{'heard with':>12}{'refused':>9}")
    logging.disable(logging.CRITICAL)
    for failing in (0.3, 0.5, 0.7):
        _, without, _ = asyncio.run(share_of_processes(failing, None))
        with tempfile.TemporaryDirectory() as folder:
            count, heard, refused = asyncio.run(
                share_of_processes(failing, Path(folder) / "breaker")
            )
        print(f"{failing:>9.0%}{count:>9}{without:>15.1%}{heard:>12.1%}{refused:>9.2%}", flush=True)
        broken |= refused > 0.02
    print(
        "promise: at most 2 % refused up to 70 %, and 50 calls open within 12 s: "
        f"{'BROKEN' if broken else 'kept'}"
    )
    sys.exit(broken)


if __name__ == "__main__":
    main()
