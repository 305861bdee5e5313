# SPDX-License-Identifier: Apache-2.0
"""``opentelemetry-instrument python agent.py`` gives what :func:`traced_retry.enable` gives.

It loads instrumentors, but sets an SDK up only where a distro is installed. This entry point is
called before the instrumentors are loaded, in every Python process below it.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import util

from traced_retry.core.guard import logger
from traced_retry.errors import UsageError


def pre_instrument() -> None:
    """Set the SDK up where none is, unless ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`` has us.

    What cannot be is logged: by OpenTelemetry's rule a program is not ended for its telemetry, and
    replies are retried all the same.
    """
    off = os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").replace(" ", "").split(",")
    command = " ".join(sys.orig_argv)
    if "traced_retry" in off or "*" in off or "multiprocessing.resource_tracker" in command:
        return
    if "multiprocessing.forkserver" in command:
        # A thread or a file of the fork server would not be the job's that is forked from it.
        util.register_after_fork(pre_instrument, lambda _: _configure())
    else:
        _configure()


def _configure() -> None:
    try:
        from traced_retry.export.enable import configure  # noqa: PLC0415 - needs extras
        from traced_retry.livekit.instrumentor import TracedRetryInstrumentor  # noqa: PLC0415
    except ModuleNotFoundError as error:
        # Not for us to fail: this process may have nothing to do with LiveKit.
        logger.debug("spans are left to others, for there is no %s", error.name)
        return
    try:
        policy = configure()
    except UsageError as error:
        logger.error("spans go nowhere: %s", error)
        return
    if policy is not None:
        instrumentor = TracedRetryInstrumentor()
        if instrumentor.is_instrumented_by_opentelemetry:  # in the fork server, without the file
            instrumentor.uninstrument()
        instrumentor.instrument(policy=policy)
