# SPDX-License-Identifier: Apache-2.0
"""Failures of code beside the reply: logged once, with the place and without the text."""

from __future__ import annotations

import asyncio
import logging

import pytest

from traced_retry.core.guard import log_once, log_suppressed, suppress_and_log


def fail(error):
    """Raise an error in this function."""
    raise error


class TestSuppressAndLog:
    def test_error_is_logged_once_with_class_and_innermost_place(self, caplog):
        """The record names the innermost line, and never the text of the exception."""
        for _ in range(2):
            with suppress_and_log("reading an event"):
                fail(KeyError("SECRET"))
        (record,) = caplog.records
        line = fail.__code__.co_firstlineno + 2

        assert logging.ERROR == record.levelno
        assert (
            f"reading an event raised KeyError at {__file__}:{line}; the reply goes on without it"
            == record.getMessage()
        )

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
    def test_other_exceptions_pass(self, error, caplog):
        """Only errors are suppressed, and not the end of a task or of the program."""
        with pytest.raises(error), suppress_and_log("reading an event"):
            fail(error())
        assert [] == caplog.records

    def test_error_without_traceback_has_no_place(self, caplog):
        """An exception that was never raised is logged, too."""
        log_suppressed("reading an event", KeyError())

        assert "reading an event raised KeyError at ?; the" in caplog.text


class TestLogOnce:
    def test_level_is_used(self, caplog):
        """The default is ERROR."""
        log_once("first")
        log_once("second", logging.WARNING)

        assert [logging.ERROR, logging.WARNING] == [r.levelno for r in caplog.records]
        assert ["traced_retry"] * 2 == [r.name for r in caplog.records]

    def test_filter_that_raises_changes_nothing(self):
        """A filter of the user may fail, and the reply goes on."""
        logger = logging.getLogger("traced_retry")
        logger.addFilter(fail_on := lambda _: fail(RuntimeError()))
        try:
            log_once("hello")
        finally:
            logger.removeFilter(fail_on)
