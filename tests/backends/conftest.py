# SPDX-License-Identifier: Apache-2.0
"""The servers and the fleet, started once for all tests here."""

from __future__ import annotations

import pytest
from backends import servers
from backends.fleet import ENGINES, measure


@pytest.fixture(scope="session")
def fleet(tmp_path_factory):
    """Jobs of eight providers; what was asked and heard, and the servers that know of it."""
    for name in ("jaeger", "otelcol", "prometheus"):
        servers.command(name)
    programs = [name for name in ENGINES if servers.found_command(name)]
    with measure(tmp_path_factory.mktemp("fleet"), programs=programs) as fleet:
        yield fleet
