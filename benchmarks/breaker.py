# SPDX-License-Identifier: Apache-2.0
"""Calls to a provider that fails some or all requests: no breaker, the usual rule, and ours."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.brownout import live_through

from traced_retry.core import breaker

OURS = breaker.FAILURES, breaker.SPAN
USUAL = 5, 0.0
REPLIES = 6_000
"""About as many replies per cell."""


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
    print(
        "promise: at most 2 % refused up to 70 %, and 50 calls open within 12 s: "
        f"{'BROKEN' if broken else 'kept'}"
    )
    sys.exit(broken)


if __name__ == "__main__":
    main()
