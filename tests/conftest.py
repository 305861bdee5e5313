# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: the virtual clock, in-memory telemetry, and nothing left behind."""

from __future__ import annotations

import asyncio
import logging
import re
import signal

import pytest
from support.recorder import Recorder

from traced_retry.core import guard, switch
from traced_retry.testing.clock import VirtualClockLoop


def pytest_asyncio_loop_factories(config, item):
    """Run async tests on the virtual clock, unless they say ``real_time``."""
    if item.get_closest_marker("real_time"):
        return {"real": asyncio.new_event_loop}
    return {"virtual": VirtualClockLoop}


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs so. The programs that tests interrupt would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# LiveKit and the client of AWS leave tasks behind whose exception nobody reads, for example if the
# server refuses the connection while the session closes. asyncio logs that at the next garbage
# collection, which may be in another test that reads the log.
_LEFT_BEHIND = re.compile(
    r"Task (exception was never|was destroyed).*\n.* at \S*/(livekit|awscrt)/"
)
logging.getLogger("asyncio").addFilter(lambda record: not _LEFT_BEHIND.match(record.getMessage()))

LONGEST = [
    "test_fleet.py",
    "test_incidents.py",
    "test_exactness.py",
    "test_collector.py",
    "test_end_to_end.py",
    "test_jaeger.py",
    "test_load_balancer.py",
    "test_vmagent.py",
    "test_enable_jobs.py",
    "test_doctor.py",
    "test_presets.py",
    "test_cli.py",
    "test_mutated_events.py",
    "test_breaker.py",
    "test_plugin.py",
    "test_skips.py",
]
"""The files whose tests or fixtures take longest, most of them because they wait."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Keep tests that share a server, or another costly fixture, in one process of pytest-xdist.

    Tests of a folder share its session fixtures, tests of a file its module fixtures. All other
    tests go to whichever process is free. The longest start first, so that no process waits for
    another at the end.
    """
    for item in items:
        shared = [
            definition
            for name, definitions in item._fixtureinfo.name2fixturedefs.items()
            for definition in definitions
            if definition.scope in ("session", "module", "class") and definition.baseid
        ]
        if not shared:
            continue
        wide = any(definition.scope == "session" for definition in shared)
        group = item.path.parent if wide else item.path
        item.add_marker(pytest.mark.xdist_group(str(group)))
    yield  # other plugins shuffle
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def recorder():
    """In-memory providers, with the spans and metrics read back as plain data."""
    recorder = Recorder()
    yield recorder
    recorder.shutdown()


@pytest.fixture(autouse=True)
def fresh_guard():
    """What is logged once per process is logged once per test."""
    guard._logged.clear()
    switch.switch_on()
    yield
    guard._logged.clear()
    switch.switch_on()
