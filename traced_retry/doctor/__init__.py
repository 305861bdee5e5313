# SPDX-License-Identifier: Apache-2.0
"""Run the checks of ``traced-retry doctor``: targets of spans, their delivery, active adapters.

The set-up is that of :func:`traced_retry.enable`. One test span goes to each exporter directly,
past sampler and queue, so that a sampler that would drop it does not hide a dead endpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from traced_retry.core.sanitize import is_url
from traced_retry.doctor import environment, pipeline, plugins
from traced_retry.doctor.check import Check
from traced_retry.errors import UsageError

__all__ = ["Check", "DoctorError", "run_checks"]

WITHIN: Final = 9.0
"""Longest duration of all checks in seconds. One of 10 s is left for the process's start."""


class DoctorError(UsageError):
    """An invalid argument of the doctor."""


def run_checks(
    preset: str | None = None, jaeger: str | None = None, within: float = WITHIN
) -> Iterator[Check]:
    """Check this process as :func:`traced_retry.enable` would find it.

    If no tracer provider is set, set the SDK up as ``enable`` would. Do not call it inside an
    event loop, because it waits for servers.

    Args:
        preset: as for ``enable``.
        jaeger: URL of a Jaeger's query API. Default: port 16686 of the endpoint's host, if a
            Jaeger answers there.
        within: the longest duration of all checks in seconds, including imports.

    Raises:
        DoctorError: if ``jaeger`` is not a URL.
    """
    if jaeger is not None and not is_url(jaeger):
        raise DoctorError("--jaeger is no http:// or https:// URL, such as http://127.0.0.1:16686")
    until = time.monotonic() + within
    yield from environment.off_switch()
    yield from environment.policy()
    yield from environment.variables()
    yield from plugins.checks()
    yield from pipeline.checks(preset, jaeger, until)
