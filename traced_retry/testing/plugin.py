# SPDX-License-Identifier: Apache-2.0
"""Fixtures and a marker for pytest, which loads this module by its entry point.

Other modules are imported only if a test uses a fixture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from traced_retry.simulator import Simulator
    from traced_retry.testing.spans import RetrySpans

MARKER = "virtual_clock"


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}: runs an async test of pytest-asyncio on a clock that jumps instead of waiting",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(item: pytest.Item) -> Any:
    """Run a marked test on the virtual clock (pytest-asyncio 1.4 or newer)."""
    if item.get_closest_marker(MARKER) is None:
        return None
    from traced_retry.testing.clock import VirtualClockLoop  # noqa: PLC0415

    return {"virtual": VirtualClockLoop}


@pytest.fixture(autouse=True)
def _fresh_retry_budget() -> None:
    """Fill the retry budgets before each test, because all tests share one process.

    Otherwise the eleventh retry of a test run is refused.
    """
    budget = sys.modules.get("traced_retry.core.budget")
    if budget is not None:
        budget.refill()


@pytest.fixture
def realtime_server() -> Callable[..., Simulator]:
    """Return :func:`traced_retry.testing.realtime_server`.

    For example ``async with realtime_server("rate_limit:3,ok") as server``.
    """
    from traced_retry.testing import realtime_server  # noqa: PLC0415

    return realtime_server


@pytest.fixture
def retry_spans() -> Iterator[RetrySpans]:
    """Return the replies traced in the test, as :class:`traced_retry.testing.RetrySpans`."""
    from traced_retry.testing import RetrySpans  # noqa: PLC0415

    spans = RetrySpans()
    spans.start()
    yield spans
    spans.stop()
