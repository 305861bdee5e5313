# SPDX-License-Identifier: Apache-2.0
"""Set the SDK up under ``opentelemetry-instrument``, as :func:`traced_retry.enable` does.

``opentelemetry-instrument`` loads instrumentors, but sets an SDK up only if a distro is installed.
It calls this entry point before it loads the instrumentors, in every Python process below it.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import util

from traced_retry.core import switch
from traced_retry.core.guard import logger
from traced_retry.errors import UsageError


def pre_instrument() -> None:
    """Set the SDK up if no other SDK is set up.

    Do nothing if ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`` names ``traced_retry`` or ``*``, or if
    ``TRACED_RETRY_DISABLED`` is true. Invalid settings are logged and not raised, because
    OpenTelemetry forbids to end a program for its telemetry. Replies are then retried all the same.
    """
    off = os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").replace(" ", "").split(",")
    command = " ".join(sys.orig_argv)
    unwanted = switch.is_off() or "traced_retry" in off or "*" in off
    if unwanted or "multiprocessing.resource_tracker" in command:
        return
    if "multiprocessing.forkserver" in command:
        # Wait for the fork: a job does not inherit a thread, and must not share an open file.
        util.register_after_fork(pre_instrument, lambda _: _configure())
    else:
        _configure()


def _configure() -> None:
    try:
        from traced_retry.export.enable import configure  # noqa: PLC0415 - needs extras
        from traced_retry.livekit.instrumentor import TracedRetryInstrumentor  # noqa: PLC0415
    except ModuleNotFoundError as error:
        # Do not fail: this process may be unrelated to LiveKit.
        logger.debug("spans are left to others, for there is no %s", error.name)
        return
    try:
        policy = configure()
    except UsageError as error:
        logger.error("spans go nowhere: %s", error)
        return
    if policy is not None:
        instrumentor = TracedRetryInstrumentor()
        if (
            instrumentor.is_instrumented_by_opentelemetry
        ):  # the fork server did so without the file's policy
            instrumentor.uninstrument()
        instrumentor.instrument(policy=policy)
