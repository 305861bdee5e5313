# SPDX-License-Identifier: Apache-2.0
"""Set the SDK up under ``opentelemetry-instrument``, as :func:`traced_retry.enable` does.

``opentelemetry-instrument`` loads instrumentors, but sets an SDK up only if a distro is installed.
It calls this entry point before it loads the instrumentors, in every Python process below it. Most
of them are unrelated to LiveKit, so the set-up waits for the first job or realtime session.
"""

from __future__ import annotations

import os

from traced_retry.core import switch
from traced_retry.core.guard import logger
from traced_retry.errors import UsageError
from traced_retry.livekit.first_use import at_first_use


def pre_instrument() -> None:
    """Set the SDK up at the first use of LiveKit, if the SDK is not set up by then.

    Do nothing if ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`` names ``traced_retry`` or ``*``, or if
    ``TRACED_RETRY_DISABLED`` is true. Invalid settings are logged and not raised, because
    OpenTelemetry forbids to end a program for its telemetry. Replies are then retried all the same.
    """
    off = os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").replace(" ", "").split(",")
    if not (switch.is_off() or "traced_retry" in off or "*" in off):
        at_first_use(_configure)


def _configure() -> None:
    try:
        from traced_retry.export.enable import configure  # noqa: PLC0415 - needs extras
        from traced_retry.livekit import hook  # noqa: PLC0415
        from traced_retry.livekit.instrumentor import TracedRetryInstrumentor  # noqa: PLC0415
    except ModuleNotFoundError as error:
        logger.debug("spans are left to others, for there is no %s", error.name)
        return
    try:
        policy = configure()
    except UsageError as error:
        logger.error("spans go nowhere: %s", error)
        return
    if policy is None:
        return
    instrumentor = TracedRetryInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:  # without the file's policy
        instrumentor.uninstrument()
    if not hook.is_instrumented():  # by the program itself
        instrumentor.instrument(policy=policy)
