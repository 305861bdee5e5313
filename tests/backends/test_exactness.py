# SPDX-License-Identifier: Apache-2.0
"""Many short-lived processes, some killed: Prometheus has every reply, on either path."""

from __future__ import annotations

import sys

import pytest
from backends.fleet import ENDED, EXPORT, KILLED, truth
from backends.reading import PATHS, counted, increase, own
from backends.servers import ROOT

LATE = 0.5
"""Seconds that a busy machine may add to the interval between two exports."""


@pytest.mark.parametrize("path", PATHS)
def test_processes_that_ended_are_counted_exactly(fleet, path):
    """Per provider and outcome, Prometheus's increase is what the simulators counted."""
    expected = truth(fleet.ended)

    actual = PATHS[path](fleet.prometheus, ENDED)

    assert dict(expected) == pytest.approx(actual, abs=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_killed_processes_miss_no_more_than_one_export_interval(fleet, path):
    """What a SIGKILL loses is less than what was asked for since the last export."""
    actual = PATHS[path](fleet.prometheus, KILLED)

    assert_between(truth(fleet.killed, EXPORT + LATE), actual, truth(fleet.killed))


def assert_between(least, actual, most):
    """Each count lies between the two."""
    outside = {
        pair: (least[pair], actual.get(pair, 0), most[pair])
        for pair in most
        if not least[pair] <= actual.get(pair, 0) <= most[pair]
    }
    assert {} == outside


def test_plain_increase_of_a_short_lived_process_is_wrong(fleet):
    """Why path (b) has a rule of its own: `increase` goes on past the end of a process."""
    plain = counted(fleet.prometheus, increase(own(ENDED)))

    wrong = {pair for pair, count in truth(fleet.ended).items() if plain.get(pair) != count}
    assert wrong


def test_the_table_in_the_docs(fleet, capsys):
    """It is printed, and docs/exactness.md holds it as it is."""
    expected = truth(fleet.ended)
    actual = [read(fleet.prometheus, ENDED) for read in PATHS.values()]
    table = (
        "| provider | outcome | simulators | from spans | from metrics |\n|---|---|---|---|---|\n"
    )
    for pair in sorted(expected):
        counts = [expected[pair], *(f"{counts.get(pair, 0):g}" for counts in actual)]
        table += f"| {' | '.join(map(str, (*pair, *counts)))} |\n"
    killed = [read(fleet.prometheus, KILLED) for read in PATHS.values()]
    least, most = truth(fleet.killed, EXPORT + LATE), truth(fleet.killed)
    lines = [
        f"killed: {pair[0]}: {most[pair]} heard, {least[pair]} of them longer than an interval "
        f"before; from spans {killed[0].get(pair, 0):g}, from metrics {killed[1].get(pair, 0):g}"
        for pair in sorted(most)
    ]
    plain = sum(counted(fleet.prometheus, increase(own(ENDED))).values())
    lines.append(f"plain increase() of metrics: {plain:.1f} for {sum(expected.values())}")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", table, *lines, ""]))

    # Line by line: below Python 3.12 there is no AWS.
    assert set(table.splitlines()) <= set((ROOT / "docs/exactness.md").read_text().splitlines())
