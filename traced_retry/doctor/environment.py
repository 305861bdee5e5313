# SPDX-License-Identifier: Apache-2.0
"""Check the policy and the variables that configure telemetry."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from traced_retry.core import breaker, switch
from traced_retry.core.policy import ENV, PolicyError, RetryPolicy
from traced_retry.core.sanitize import is_url, redact_url
from traced_retry.core.variables import NAMES, misspelt
from traced_retry.doctor.check import Check


def policy() -> Iterator[Check]:
    """Check each variable of the policy alone, then all together."""
    alone = [_problem({name: os.environ.get(name, "")}) for name in ENV]
    # Only both variables together show whether base_delay is above max_delay.
    problems = [problem for problem in alone if problem and "base_delay" not in problem]
    if not problems and (problem := _problem(os.environ)):
        problems.append(problem)
    for problem in problems:
        yield Check("policy", "fail", problem, "correct the variable, or unset it")
    if not problems:
        said = [name for name in ENV if os.environ.get(name, "").strip()]
        yield Check("policy", "ok", f"from {', '.join(said)}" if said else "the defaults")
        setting = RetryPolicy.from_env().breaker
        if setting is not None and not breaker.is_usable(setting):
            yield Check(
                "breaker",
                "fail",
                "the circuit breaker's file cannot be used; replies are sent as without it",
                "set the path of a new file in a folder where only this user may write",
            )


def _problem(environ: Mapping[str, str]) -> str | None:
    try:
        RetryPolicy.from_env(environ)
    except PolicyError as error:
        return str(error)
    return None


def off_switch() -> Iterator[Check]:
    """Check the off switch, if it is set."""
    try:
        off = switch.check()
    except switch.SwitchError as error:
        yield Check("switch", "fail", str(error), "correct the variable, or unset it")
        return
    if off:
        yield Check(
            "switch",
            "warn",
            f"{switch.VARIABLE} is true: replies are neither retried nor traced",
            f"unset {switch.VARIABLE}",
        )


_READ = re.compile(
    r"OTEL_|TRACED_RETRY_|LIVEKIT_REALTIME_|LIVEKIT_TELEMETRY_|XDG_STATE_HOME$"
    r"|REQUESTS_CA_BUNDLE$|(HTTPS?|ALL)_PROXY$",
    re.IGNORECASE,
)
_PLAIN = re.compile(
    r"OTEL_(SERVICE_NAME|SDK_DISABLED|CONFIG_FILE|PROPAGATORS|(TRACES|METRICS|LOGS)_EXPORTER"
    r"|TRACES_SAMPLER(_ARG)?|(BSP|SPAN|ATTRIBUTE)_\w+|METRIC_EXPORT_\w+"
    r"|EXPORTER_OTLP_(\w+_)?(PROTOCOL|TIMEOUT|COMPRESSION|INSECURE)"
    r"|PYTHON_DISABLED_INSTRUMENTATIONS)|LIVEKIT_TELEMETRY_ALLOW_PII|XDG_STATE_HOME"
)
"""Variables without secrets. The values of other variables are hidden or shown in part."""
_FILES = re.compile(r"OTEL_EXPORTER_OTLP_\w*(CERTIFICATE|CLIENT_KEY)|REQUESTS_CA_BUNDLE")
_NAME = re.compile(r"[\w.-]{1,40}")


def variables() -> Iterator[Check]:
    """Show each set variable that is read, without secrets."""
    found = sorted(name for name in os.environ if _READ.match(name) and os.environ[name])
    wrong = dict(misspelt(os.environ))
    for name in found:
        if name in wrong:
            yield Check(name, "warn", "is not read", f"did you mean {wrong[name]}?")
        if name in wrong or (name.startswith("TRACED_RETRY_") and name not in NAMES):
            continue
        value = os.environ[name].strip()
        if _FILES.fullmatch(name) and not os.path.exists(value):  # noqa: PTH110 - Path raises on a PEM
            yield Check(name, "fail", "names no file that is there", "set it to the file's path")
        else:
            yield Check(name, "ok", _shown(name, value))
    if not found:
        yield Check("environment", "ok", "no OTEL_* or retry variable is set")


def _shown(name: str, value: str) -> str:
    """Return the value without secrets."""
    if name in NAMES or _PLAIN.fullmatch(name) or _FILES.fullmatch(name):
        return value
    if name.endswith("_ENDPOINT") or name.upper().endswith("_PROXY"):
        return redact_url(value) if is_url(value) else "(hidden: no http:// or https:// URL)"
    if name.endswith(("_HEADERS", "_RESOURCE_ATTRIBUTES")):
        pairs = [pair.partition("=") for pair in value.split(",")]
        names = [
            f"{key.strip()}=(hidden)"
            for key, _, what in pairs
            if _NAME.fullmatch(key.strip()) and what.strip("= ")
        ]
        return ", ".join(names) or "(hidden: no NAME=VALUE in it)"
    return "(hidden)"
