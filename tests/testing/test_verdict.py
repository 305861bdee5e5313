# SPDX-License-Identifier: Apache-2.0
"""The verdict names the planted error of each agent and no other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

import pytest

from traced_retry.testing import check_agent
from traced_retry.testing.verdict import Error

# A file, so that the packaging tests can run both files in an environment of their own.
_spec = importlib.util.spec_from_file_location("agents", Path(__file__).with_name("agents.py"))
agents = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(agents)


def test_each_error_has_an_agent():
    """A new error needs an agent."""
    assert set(get_args(Error)) == set(agents.AGENTS)


@pytest.mark.parametrize("error", agents.AGENTS)
def test_planted_error_is_named_and_no_other(error):
    """The findings name the error, with the script that shows it."""
    start, ask = agents.AGENTS[error]
    verdict = check_agent(start, ask=ask)

    assert {error} == verdict.errors, str(verdict)
    assert error in str(verdict)


def test_correct_agent_has_an_empty_verdict():
    """The verdict of an agent that retries is false, with the tool's case included."""
    verdict = check_agent(agents.start)

    assert not verdict, str(verdict)
    assert "no errors" == str(verdict)


def test_plugin_alone_does_not_report_a_response_that_fails_before_its_first_word():
    """The agent's code gets no error and the caller hears no reply, also after a turn of hers."""
    verdict = check_agent(agents.start_bare)

    assert [
        ("failure_not_reported", "failed_message,ok"),
        ("failure_not_reported", "turn:failed_message"),
    ] == [(finding.error, finding.script) for finding in verdict]
