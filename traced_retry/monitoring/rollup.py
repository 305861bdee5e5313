# SPDX-License-Identifier: Apache-2.0
"""The rolled-up series: one sample a minute, which alerts and dashboards read."""

from __future__ import annotations

from textwrap import indent
from typing import Any, Final

from traced_retry import semconv
from traced_retry.monitoring import alerts, recording
from traced_retry.monitoring.alerts import label
from traced_retry.monitoring.config import STEP, Thresholds

_TARGET: Final = f"{label(semconv.PROVIDER)}, {label(alerts.ENVIRONMENT)}"
_BY: Final = f"{_TARGET}, {label(semconv.INITIATOR)}"


def _own(series: str, by: str) -> str:
    return _minute(f"sum by ({by}) (\n{indent(recording.per_second(series), '  ')}\n)")


def _either(span: str, name: str) -> str:
    """Return the sum of seconds, counted from spans or else by the agents."""
    return _minute(
        recording.either(
            f'traces_span_metrics_duration_seconds_sum{{span_name="{span}"}}',
            recording.own(name, "seconds_sum"),
            semconv.INITIATOR,
        )
    )


def _minute(rate: str) -> str:
    """Return the count of the last minute, from a rate over five minutes that is read four times.

    One reading is correct only on average. A sample is part of the rates of 285 of 300 seconds
    (the scrape interval is missing), so one reading a minute sees it four or five times. The range
    is 59s999ms because Prometheus before 3.0 includes both ends of a range: 1m could hold five.
    """
    lines = f"(\n{indent(rate, '  ')}\n)" if "\n" in rate else rate
    return f"15 * sum_over_time({lines}[59s999ms:15s])"


def _reply_seconds(matcher: str) -> str:
    return _minute(
        f"sum by (le, {_BY}) (\n"
        f"  provider:traced_retry_reply_duration_seconds_bucket:rate5m{{{matcher}}}\n)"
    )


def rollup(thresholds: Thresholds) -> dict[str, Any]:
    """Return the series that alerts and dashboards read over hours and days."""
    provider, outcome = map(label, (semconv.PROVIDER, semconv.OUTCOME))
    environment = label(alerts.ENVIRONMENT)
    exporter = f"{label(semconv.EXPORTER)}, {label(semconv.DROP_REASON)}, {environment}"
    named: dict[str, str] = {
        alerts.REPLIES: _minute(alerts.REPLIES_RATE),
        alerts.ATTEMPTS: _minute("provider:traced_retry_attempts:rate5m"),
        # Lost replies have a time to failure. An immediate refusal must not improve the percentile.
        alerts.FIRST_OUTPUT: _reply_seconds(alerts.HEARD),
        alerts.FAILURE_TIME: _reply_seconds(f'{outcome}=~"{alerts.LOST_OUTCOMES}"'),
        "provider:traced_retry_attempt_duration_seconds_bucket:increase1m": _minute(
            f"sum by (le, {_BY}) (\n"
            "  provider:traced_retry_attempt_duration_seconds_bucket:rate5m\n)"
        ),
        "provider:traced_retry_reply_duration_seconds_sum:increase1m": (
            _either(semconv.SPAN_REPLY, semconv.METRIC_REPLY_DURATION)
        ),
        "provider:traced_retry_attempt_duration_seconds_sum:increase1m": (
            _either(semconv.SPAN_ATTEMPT, semconv.METRIC_ATTEMPT_DURATION)
        ),
        "provider:traced_retry_delay_seconds_bucket:increase1m": (
            _own(recording.own(semconv.METRIC_DELAY, "seconds_bucket"), f"le, {_BY}")
        ),
        "provider:traced_retry_late_replies:increase1m": (
            _own(recording.own(semconv.METRIC_LATE_REPLIES, "total"), _BY)
        ),
        alerts.DROPPED: _own(f"{label(semconv.METRIC_EXPORT_DROPPED)}_total", exporter),
        "provider:traced_retry_in_flight:sum": (
            f"sum by ({_BY}) ({label(semconv.METRIC_IN_FLIGHT)}{{{recording.GENERATE_REPLY}}})"
        ),
        "provider:traced_retry_budget_remaining:min": (
            f"min by ({_TARGET}) ({label(semconv.METRIC_BUDGET_REMAINING)})"
        ),
        "traced_retry:processes:count": (
            f"count by ({environment}) (count by (job, instance, {environment}) "
            f'({label(semconv.METRIC_REPLIES)}_total{{{provider}!="", {outcome}!=""}}))'
        ),
    }
    documents = [alerts.Record(name, expr).document() for name, expr in named.items()]
    group = {
        "name": "traced_retry_rollup",
        "interval": f"{STEP}s",
        "rules": documents,
    }
    coarse = [_coarse(name) for name in named if name.endswith(":increase1m")]
    services = alerts.Record(
        alerts.SERVICE_REPLIES, _minute(recording.service_replies(thresholds.services_labels))
    )
    return {
        "groups": [
            group,
            {
                "name": "traced_retry_rollup_10m",
                "interval": "10m",
                "rules": [*coarse, alerts.budget_ratio().document()],
            },
            # Groups of their own, because a group's limit holds for each of its rules.
            {
                "name": "traced_retry_services",
                "interval": f"{STEP}s",
                "limit": thresholds.services_max_series,
                "rules": [services.document()],
            },
            {
                "name": "traced_retry_services_10m",
                "interval": "10m",
                "rules": [_coarse(services.record)],
            },
        ]
    }


def _coarse(name: str) -> dict[str, Any]:
    """Return the rule of the count of ten minutes."""
    return alerts.Record(
        name.replace("increase1m", "increase10m"), f"sum_over_time({name}[9m59s999ms])"
    ).document()
