# SPDX-License-Identifier: Apache-2.0
"""Ten minutes of outage on a clock that jumps: requests sent, with the retry budget and without."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.outage import live_through

from traced_retry import RetryBudget


def main():
    print("ten minutes in which every request fails, then ten in which one in twenty does")
    print(f"{'replies':>8}  {'budget':<8}{'requests':>9}{'per reply':>11}  after the outage")
    broken = False
    for replies in (10_000, 1_000, 100):
        for budget in (RetryBudget(), None):
            told = live_through(budget, replies=replies)
            share = told.requests / told.replies
            saved = f"{told.recovered} of {told.blips} blips recovered"
            full = f", bucket full after {told.refilled:.0f} s" if told.refilled else ""
            name = "default" if budget else "off"
            print(f"{replies:>8,}  {name:<8}{told.requests:>9,}{share:>11.2f}  {saved}{full}")
            broken |= budget is not None and replies == 10_000 and share > 1.2
    print(f"promise: at most 1.2 requests per reply at 10,000: {'BROKEN' if broken else 'kept'}")
    sys.exit(broken)


if __name__ == "__main__":
    main()
