# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of dashboards and alerts: where things are, and the shipped thresholds."""

from __future__ import annotations

import pytest
from dashboards.reading import DASHBOARDS

from traced_retry.monitoring import config


@pytest.fixture(scope="module")
def shipped():
    """The thresholds of dashboards/config.yaml."""
    return config.read(DASHBOARDS / "config.yaml")
