# SPDX-License-Identifier: Apache-2.0
"""A machine without servers: tests that need one are skipped, and leave no resource open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import servers

TESTS = Path(__file__).parents[1]
NEED_SERVERS = [
    "backends/test_collector.py",
    "backends/test_exactness.py",
    "backends/test_jaeger.py",
    "backends/test_load_balancer.py",
    "backends/test_vmagent.py",
    "dashboards/test_end_to_end.py",
    "dashboards/test_fleet.py",
]


def without_servers(*files, **environ):
    """Run tests as a machine without servers, each warning an error."""
    paths = [str(TESTS / name) for name in files]
    return subprocess.run(
        [
            *(sys.executable, "-W", "always::ResourceWarning", "-m", "pytest", "-q"),
            *("-p", "no:randomly", "-p", "no:cacheprovider", "-W", "always::ResourceWarning"),
            *paths,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=TESTS.parent,
        env={**os.environ, "TRACED_RETRY_BACKENDS": "none", **environ},
    )


def test_skipped_fixtures_leave_nothing_open():
    """Every fixture and server is skipped; Python reports no open file and no open socket."""
    done = without_servers(*NEED_SERVERS, TRACED_RETRY_REQUIRE_BACKENDS="")
    last = done.stdout.splitlines()[-1]

    assert 0 == done.returncode, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" in last
    assert "failed" not in last
    assert "error" not in last
    assert "unclosed" not in done.stdout + done.stderr


def test_required_servers_are_no_skip():
    """With TRACED_RETRY_REQUIRE_BACKENDS a missing server fails the tests that need it."""
    done = without_servers(NEED_SERVERS[0], TRACED_RETRY_REQUIRE_BACKENDS="1")

    assert 1 == done.returncode
    assert "there is no jaeger here; get it with:" in done.stdout


@pytest.mark.parametrize("name", sorted(servers.HOW))
def test_skip_comes_before_any_resource(name, tmp_path, monkeypatch):
    """A server that is missing has opened no log file when the test is skipped."""
    monkeypatch.setattr(servers, "BACKENDS", "none")
    monkeypatch.delenv("TRACED_RETRY_REQUIRE_BACKENDS", raising=False)

    with pytest.raises(pytest.skip.Exception, match=f"there is no {name} here"):
        servers.Process(name, [], "http://127.0.0.1:9", tmp_path).__enter__()
    assert [] == list(tmp_path.iterdir())
