# SPDX-License-Identifier: Apache-2.0
"""The numbers per provider."""

from __future__ import annotations

import pytest
from support.scripted import SUPERSEDED, ProviderError

from traced_retry.report import ProviderSummary, read, summarize
from traced_retry.report.summary import percentile, table

SERVER_ERROR = ProviderError("server_error")


def test_by_provider(varied):
    """Groups that sum to the replies; silence only of those that were retried."""
    azure, openai = summarize(varied.read())

    assert (
        ProviderSummary(
            provider="azure.ai.openai",
            replies=1,
            first_try=0,
            recovered=0,
            failed=1,
            cut_short=0,
            unknown=0,
            retries=1,
            silence_added_p50=5.0,
            silence_added_p95=5.0,
        )
        == azure
    )
    assert (
        ProviderSummary(
            provider="openai",
            replies=4,
            first_try=1,
            recovered=1,
            failed=0,
            cut_short=1,
            unknown=1,
            retries=1,
            silence_added_p50=1.5,
            silence_added_p95=1.5,
        )
        == openai
    )


async def test_of_real_replies(store):
    """Every outcome of the loop is counted once."""
    for steps in (["hi"], [SERVER_ERROR, "hi"], [(1, SUPERSEDED)], [KeyError("x")]):
        await store.run(*steps)
    await store.run(SERVER_ERROR, max_retries=2)
    await store.run((9, "hi"), cancel_at=1)

    (row,) = summarize(read(store.path))

    assert (6, 1, 1, 2, 2, 0, 3) == (
        row.replies,
        row.first_try,
        row.recovered,
        row.failed,
        row.cut_short,
        row.unknown,
        row.retries,
    )


def test_none():
    """No replies, no rows."""
    assert [] == summarize([])


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([7.0], 95, 7.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 51, 3.0),
        (list(range(1, 101)), 95, 95),
        (list(range(1, 21)), 95, 19),
        ([1.0, 2.0], 0, 1.0),
        ([1.0, 2.0], 100, 2.0),
    ],
)
def test_percentile(values, percent, expected):
    """Nearest rank: always a value that was there."""
    assert expected == percentile(values, percent)


def test_table(varied, store):
    """Unknown is a column only where it counts; a dash is no number."""
    head, azure, openai = table(summarize(varied.read()))

    assert "provider,replies,first try,recovered,failed,cut short,unknown,retries" == ",".join(
        head[:-2]
    )
    assert ["azure.ai.openai", "1", "0", "0", "1", "0", "0", "1", "5.00", "5.00"] == azure
    assert ["openai", "4", "1", "1", "0", "1", "1", "1", "1.50", "1.50"] == openai
    head, row = table(summarize(varied.read()[:1]))
    assert "unknown" not in head
    assert ["openai", "1", "1", "0", "0", "0", "0", "-", "-"] == row
