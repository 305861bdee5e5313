# SPDX-License-Identifier: Apache-2.0
"""Many short-lived processes, some killed: Prometheus has every reply, on either path.

The provider starts half of the replies. Prometheus 2 and 3 count the same processes, which are of
two services in two environments.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from backends.fleet import ENDED, ENGINES, EXPORT, KILLED, truth
from backends.reading import PATHS, counted, increase, own, spans
from backends.servers import ROOT, command
from dashboards.expected import replies

LATE = 0.5
"""Seconds that a busy machine may add to the interval between two exports."""


@pytest.fixture(params=ENGINES)
def prometheus(request, fleet):
    """Each version of Prometheus that counted the fleet."""
    command(request.param)
    return fleet.engines[request.param]


@pytest.mark.parametrize("path", PATHS)
def test_processes_that_ended_are_counted_exactly(fleet, prometheus, path):
    """Per provider and outcome, Prometheus's increase is what the simulators counted."""
    expected = truth(fleet.ended)

    actual = PATHS[path](prometheus, ENDED)

    assert dict(expected) == pytest.approx(actual, abs=1e-9)


def test_services_environments_and_initiators_are_counted_exactly(fleet, prometheus):
    """On either path, each service and environment has its replies, half of them the provider's."""
    known = Counter()
    for played in fleet.ended:
        of = played.job.environment
        environment = of["OTEL_RESOURCE_ATTRIBUTES"].partition("=")[2]
        for reply in replies(played):
            known[of["OTEL_SERVICE_NAME"], environment, reply.initiator] += 1
    labels = ("deployment_environment_name", "traced_retry_initiator")
    for series, service in ((spans(ENDED), "service_name"), (own(ENDED), "job")):
        names = (service, *labels)
        query = f"sum by ({', '.join(names)}) (last_over_time({series}[10m]))"
        found = [(dict(of), value) for of, value in prometheus.query(query).items()]
        assert known == {tuple(of[name] for name in names): value for of, value in found}

    assert 8 == len(known)
    started = sum(count for (*_, initiator), count in known.items() if initiator == "provider")
    assert sum(known.values()) == 2 * started


@pytest.mark.parametrize("path", PATHS)
def test_killed_processes_miss_no_more_than_one_export_interval(fleet, prometheus, path):
    """What a SIGKILL loses is less than what was asked for since the last export."""
    actual = PATHS[path](prometheus, KILLED)

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
