# SPDX-License-Identifier: Apache-2.0
"""The alerts, and the ratios they compare, from the thresholds of :mod:`.config`.

This module is the source of ``dashboards/prometheus/alerts.yaml`` and of its other forms. The
alerts read the series of ``rollup.yaml``: for each provider, once a minute, the count of that
minute (averaged over five). Sums of these counts over a window weigh by traffic and tolerate gaps.

The indicator is the share of lost replies. Losses within one call are correlated, and metrics have
no label for a call. Therefore a page needs ``min_lost`` lost replies: more than one call loses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from traced_retry import semconv
from traced_retry.monitoring.config import BurnRate, Thresholds, seconds

ENVIRONMENT: Final = "deployment.environment.name"
"""A label of all recorded series. Agents that set none share one environment without a name."""

OVERVIEW: Final = "traced-retry-overview"
PROVIDER: Final = "traced-retry-provider"
RUNBOOK: Final = "traced-retry-runbook"
"""The dashboards' uids in Grafana, which links in alerts name."""


def label(name: str) -> str:
    """Return an attribute's name as Prometheus has it."""
    return name.replace(".", "_")


_PROVIDER: Final = label(semconv.PROVIDER)
_OUTCOME: Final = label(semconv.OUTCOME)
_STOP: Final = label(semconv.STOP_REASON)
_ENVIRONMENT: Final = label(ENVIRONMENT)
_BY: Final = f"{_PROVIDER}, {_ENVIRONMENT}"

REPLIES_RATE: Final = "provider:traced_retry_replies:rate5m"
REPLIES: Final = "provider:traced_retry_replies:increase1m"
ATTEMPTS: Final = "provider:traced_retry_attempts:increase1m"
FIRST_OUTPUT: Final = "provider:traced_retry_time_to_first_output_seconds_bucket:increase1m"
FAILURE_TIME: Final = "provider:traced_retry_time_to_failure_seconds_bucket:increase1m"
DROPPED: Final = "exporter:traced_retry_export_dropped:increase1m"
SERVICE_REPLIES: Final = "provider:traced_retry_service_replies:increase1m"
"""The replies by service, and by the labels of ``services`` in the configuration."""
SERVICE: Final = "service_name"
"""The label that has ``service.name``. Series that agents push have it as ``job``."""
BUDGET_WINDOW: Final = "30d"
"""The window of the error budget."""

SETTLED: Final = f'{_OUTCOME}!~"interrupted|superseded", {_STOP}!="session_closed"'
"""Selects the replies that could be heard or lost."""
LOST_OUTCOMES: Final = "exhausted|not_recoverable"
LOST: Final = f'{_OUTCOME}=~"{LOST_OUTCOMES}", {_STOP}!="session_closed"'
"""Selects the lost replies. The caller closed the session of the others."""
HEARD: Final = f'{_OUTCOME}=~"succeeded|recovered"'
"""Selects the replies that were heard."""


@dataclass(frozen=True)
class Record:
    """A recording rule."""

    record: str
    expr: str
    labels: dict[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the rule as Prometheus reads it."""
        of: dict[str, Any] = {"record": self.record, "expr": self.expr}
        return {**of, "labels": self.labels} if self.labels else of


@dataclass(frozen=True)
class Alert:
    """An alerting rule."""

    alert: str
    expr: str
    severity: str
    summary: str
    description: str
    for_: str = "0s"
    labels: dict[str, str] = field(default_factory=dict)
    of_provider: bool = True
    """Whether the series have a provider, so that the link leads to its dashboard."""
    details: str = ""
    """The end of the description. Its templates ask Prometheus, which Grafana's cannot."""
    keep_firing_for: str = ""

    def document(self, thresholds: Thresholds) -> dict[str, Any]:
        """Return the rule as Prometheus reads it."""
        return {
            "alert": self.alert,
            "expr": self.expr,
            "for": self.for_,
            **({"keep_firing_for": self.keep_firing_for} if self.keep_firing_for else {}),
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description + self.details,
                "runbook_url": self._runbook(thresholds),
                "dashboard_url": self._dashboard(thresholds.grafana_url.rstrip("/")),
            },
        }

    def _runbook(self, thresholds: Thresholds) -> str:
        if thresholds.runbook_url:
            return f"{thresholds.runbook_url}#{self.alert.lower()}"
        panel = ALERTS.index(self.alert) + 1
        return f"{thresholds.grafana_url.rstrip('/')}/d/{RUNBOOK}?viewPanel={panel}"

    def _dashboard(self, grafana: str) -> str:
        named = f"{{{{ $labels.{_ENVIRONMENT} | urlquery }}}}"
        environment = f"{{{{ if $labels.{_ENVIRONMENT} }}}}%svar-environment={named}{{{{ end }}}}"
        if not self.of_provider:
            return f"{grafana}/d/{OVERVIEW}{environment % '?'}"
        provider = f"var-provider={{{{ $labels.{_PROVIDER} | urlquery }}}}"
        return f"{grafana}/d/{PROVIDER}?{provider}{environment % '&'}"


def ratio(window: str) -> str:
    """Return the name of the recorded ratio of lost replies in that window."""
    return f"provider:traced_retry_lost:ratio_rate{window}"


OBJECTIVE: Final = "traced_retry:objective:ratio"
THRESHOLD: Final = "traced_retry:lost_threshold:ratio"
SILENCE_OBJECTIVE: Final = "traced_retry:silence_objective:seconds"
STORM_LIMIT: Final = "traced_retry:amplification_limit:ratio"
"""The thresholds themselves, recorded, so that dashboards draw those in force."""

LOST_REPLIES: Final = "TracedRetryRepliesLost"
FEW_LOST: Final = "TracedRetryFewRepliesLost"
NOT_RECOVERABLE: Final = "TracedRetryNotRecoverable"
MANY: Final = "TracedRetryManyProviders"
STORM: Final = "TracedRetryStorm"
SLOW: Final = "TracedRetrySilence"
ABSENT: Final = "TracedRetryTelemetryAbsent"
DEGRADED: Final = "TracedRetryTelemetryDegraded"
SPANS_DROPPED: Final = "TracedRetrySpansDropped"
WATCHDOG: Final = "TracedRetryWatchdog"
ALERTS: Final = (
    LOST_REPLIES,
    FEW_LOST,
    NOT_RECOVERABLE,
    MANY,
    STORM,
    SLOW,
    ABSENT,
    DEGRADED,
    SPANS_DROPPED,
    WATCHDOG,
)
"""In the order of the runbook. The place of a section is the id of its panel in Grafana."""


def windows(thresholds: Thresholds) -> list[str]:
    """Return every window with a recorded ratio once, the shortest first."""
    found = {w for row in thresholds.burn_rates for w in (row.short, row.long)}
    return sorted({*found, thresholds.few_lost_window}, key=seconds)


def records(thresholds: Thresholds) -> list[Record]:
    """Return the recording rules: thresholds as series, and a ratio per window."""
    of = thresholds
    constants = [
        Record(OBJECTIVE, f"vector({of.objective / 100:.10g})"),
        *(
            Record(
                THRESHOLD,
                f"vector({row.factor * of.budget:.10g})",
                {"severity": row.severity, "long": row.long, "short": row.short},
            )
            for row in of.burn_rates
        ),
        Record(SILENCE_OBJECTIVE, f"vector({of.silence_seconds:g})"),
        Record(STORM_LIMIT, f"vector({of.storm_amplification:g})"),
    ]
    return [*constants, *(Record(ratio(window), _ratio(window)) for window in windows(of))]


def _counted(series: str, *matchers: str, window: str, by: str = _BY) -> str:
    """Return the query for the count in the window; all labels are summed up without ``by``."""
    selector = f"{{{', '.join(matchers)}}}" if matchers else ""
    total = f"sum by ({by})" if by else "sum"
    if series == REPLIES and seconds(window) == seconds("5m"):
        # The rolled-up counts are averages over five minutes, which takes as long again.
        return f"(300 * {total} ({REPLIES_RATE}{selector}))"
    return f"{total} (sum_over_time({series}{selector}[{window}]))"


def budget_ratio() -> Record:
    """Return the recording rule of the share of lost replies in the window of the budget."""
    return Record(ratio(BUDGET_WINDOW), _ratio(BUDGET_WINDOW, REPLIES.replace("1m", "10m")))


def _ratio(window: str, series: str = REPLIES) -> str:
    # A provider without a lost reply has the ratio 0. A provider without replies has none.
    settled = _counted(series, SETTLED, window=window)
    lost = _counted(series, LOST, window=window)
    return f"(\n  {lost}\n  or\n  0 * {settled}\n)\n/\n({settled} > 0)"


def alerts(thresholds: Thresholds) -> list[Alert]:
    """Return the alerts in the order of the runbook."""
    of = thresholds
    return [
        _outage(of),
        *(_burn(row, of) for row in of.burn_rates),
        _few_lost(of),
        _not_recoverable(of),
        _many(of),
        _storm(of),
        _silence(of),
        *_absent(of),
        *_degraded(of),
        _dropped(of),
        _watchdog(),
    ]


_WHERE: Final = f"{{{{ with $labels.{_ENVIRONMENT} }}}} in {{{{ . }}}}{{{{ end }}}}"
_WHO: Final = f"{{{{ $labels.{_PROVIDER} }}}}{_WHERE}"
_COUNT: Final = '{{ $value | printf "%.0f" }}'
_SHARE: Final = "{{ $value | humanizePercentage }}"
_SAME: Final = f"{_PROVIDER}=%q, {_ENVIRONMENT}=%q"
"""Matchers for the provider and environment of an alert, for the ``printf`` of its template."""


def _asked(query: str) -> str:
    """Return the pipeline of a template that asks for the alert's provider and environment."""
    return f"printf `{query}` $labels.{_PROVIDER} $labels.{_ENVIRONMENT} | query"


def _number(*matchers: str, window: str) -> str:
    """Return the template of a count of replies."""
    query = _counted(REPLIES, _SAME, *matchers, window=window, by="")
    return f'{{{{ with {_asked(query)} }}}}{{{{ . | first | value | printf "%.0f" }}}}{{{{ end }}}}'


def _code(window: str) -> str:
    """Return the template of the most frequent code of the failed attempts."""
    query = (
        f"topk(1, sum by ({label(semconv.ERROR_TYPE)}) (sum_over_time({ATTEMPTS}{{{_SAME}, "
        f'{label(semconv.RESULT)}="failed"}}[{window}])) > 0)'
    )
    return (
        f"{{{{ range {_asked(query)} }}}} Most frequent error code: "
        f"{{{{ .Labels.{label(semconv.ERROR_TYPE)} }}}}.{{{{ end }}}}"
    )


def _details(window: str) -> str:
    """Return the counts and the code behind a share of lost replies."""
    lost, settled = _number(LOST, window=window), _number(SETTLED, window=window)
    return f" Lost: {lost} of {settled} replies.{_code(window)}"


def _nearly(count: float) -> str:
    """Return a limit half a reply lower: a sum of floats may be 2.95 for three replies."""
    return f"{count - 0.5:g}"


def _lost_enough(of: Thresholds, window: str) -> str:
    return f"{_counted(REPLIES, LOST, window=window)} > {_nearly(of.min_lost)}"


def _outage(of: Thresholds) -> Alert:
    window = of.outage_window
    lost, settled = (_counted(REPLIES, each, window=window) for each in (LOST, SETTLED))
    return Alert(
        LOST_REPLIES,
        f"{lost} / {settled} > {of.outage_share:g}\nand\n{_lost_enough(of, window)}",
        "critical",
        "Many realtime replies are lost.",
        f"{_WHO} lost {_SHARE} of its replies in the last {window} (limit: "
        f"{of.outage_share * 100:.4g} %).",
        of.outage_for,
        {"long": window, "short": window},
        details=_details(window),
        keep_firing_for=of.keep_firing_for,
    )


def _burn(row: BurnRate, of: Thresholds) -> Alert:
    threshold = f"{row.factor:g} * {of.budget:.10g}"
    days = 30 / row.factor
    gone = f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours"  # noqa: PLR2004
    return Alert(
        LOST_REPLIES,
        f"{ratio(row.long)} > {threshold}\nand\n{ratio(row.short)} > {threshold}\n"
        f"and\n{_lost_enough(of, row.long)}",
        row.severity,
        "Realtime replies burn too much error budget."
        if row.severity == "critical"
        else "Realtime replies burn their error budget slowly.",
        f"{_WHO} lost {_SHARE} of its replies in the last {row.long} (objective: at most "
        f"{of.budget * 100:.4g} %). At this rate the 30-day error budget is used up in {gone}.",
        row.for_,
        {"long": row.long, "short": row.short},
        details=_details(row.long),
        keep_firing_for=of.keep_firing_for,
    )


def _few_lost(of: Thresholds) -> Alert:
    window = of.few_lost_window
    lost = _counted(REPLIES, LOST, window=window)
    return Alert(
        FEW_LOST,
        f"{lost} > {_nearly(of.few_lost_replies)}\n"
        f"and\n{lost} < {_nearly(of.min_lost)}\n"
        f"and\n{ratio(window)} > {of.few_lost_share:g}",
        "warning",
        "A few realtime replies were lost.",
        f"{_WHO} lost {_COUNT} replies in the last {window}. That may be one call: "
        f"a page needs {of.min_lost} lost replies.",
        of.few_lost_for,
        details=_code(window),
        keep_firing_for=of.keep_firing_for,
    )


def _not_recoverable(of: Thresholds) -> Alert:
    window = of.not_recoverable_window
    refused = _counted(REPLIES, f'{_STOP}="not_recoverable"', window=window)
    return Alert(
        NOT_RECOVERABLE,
        f"{refused} > {_nearly(of.min_lost)}\n"
        f"and\n{refused} / {_counted(REPLIES, SETTLED, window=window)}"
        f" >= {of.not_recoverable_share:g}",
        "critical",
        "A provider refuses realtime replies.",
        f"{_WHO} refused {_COUNT} replies in the last {window}. A retry cannot fix the cause.",
        of.not_recoverable_for,
        details=_code(window),
        keep_firing_for=of.keep_cause_firing_for,
    )


def _many(of: Thresholds) -> Alert:
    # Pending alerts count as well, because this alert must fire before they do.
    failing = f'ALERTS{{alertname=~"{LOST_REPLIES}|{NOT_RECOVERABLE}", severity="critical"}}'
    return Alert(
        MANY,
        f"count by ({_ENVIRONMENT}) (count by ({_BY}) ({failing}))"
        f" >= {of.many_providers_providers}",
        "critical",
        "Several providers lose realtime replies.",
        f"{_COUNT} providers{_WHERE} lose replies at the same time. Look first for a cause that "
        "they share: network, DNS, a proxy, a deployment of the agents.",
        of.many_providers_for,
        of_provider=False,
        keep_firing_for=of.keep_cause_firing_for,
    )


def amplification(window: str, *matchers: str) -> str:
    """Return requests sent per reply in that window, per provider; `listen` sends no request."""
    sent = f'{label(semconv.ACTION)}!="listen"'
    return (
        f"{_counted(ATTEMPTS, sent, *matchers, window=window)}\n/\n"
        f"({_counted(REPLIES, *matchers, window=window)} > 0)"
    )


def _storm(of: Thresholds) -> Alert:
    return Alert(
        STORM,
        f"{amplification(of.storm_window)} > {of.storm_amplification:g}\n"
        f"and\n{_counted(REPLIES, window=of.storm_window)} > {_nearly(of.min_replies)}",
        "warning",
        "Retries multiply the requests to a provider.",
        f'{_WHO} got {{{{ $value | printf "%.2f" }}}} requests per reply in the last '
        f"{of.storm_window} (limit: {of.storm_amplification:g}).",
        of.storm_for,
        details=_code(of.storm_window),
        keep_firing_for=of.keep_firing_for,
    )


def _silence(of: Thresholds) -> Alert:
    window = of.silence_window
    buckets = _counted(FIRST_OUTPUT, window=window, by=f"le, {_BY}")
    heard = _counted(REPLIES, HEARD, window=window)
    return Alert(
        SLOW,
        f"histogram_quantile({of.silence_quantile:g}, {buckets}) > {of.silence_seconds:g}\n"
        f"and\n{heard} > {_nearly(of.min_replies)}",
        "warning",
        "Realtime replies start too late.",
        f"{of.silence_quantile * 100:g}th percentile of the time to first output of {_WHO} is "
        f'{{{{ $value | printf "%.1f" }}}} s in the last {window} (objective: '
        f"{of.silence_seconds:g} s).",
        of.silence_for,
        keep_firing_for=of.keep_firing_for,
    )


def _telemetry(
    name: str, of: Thresholds, cause: str, expr: str, description: str, **more: Any
) -> Alert:
    page = name == ABSENT
    return Alert(
        name,
        expr,
        "critical" if page else "warning",
        "Reply metrics are missing." if page else "A part of the telemetry is lost.",
        description,
        labels={"cause": cause},
        of_provider=False,
        keep_firing_for=of.keep_firing_for,
        **{"for_": of.telemetry_for if page else of.telemetry_ticket_for, **more},
    )


def _absent(of: Thresholds) -> Iterator[Alert]:
    window = of.telemetry_ticket_for
    if of.spans_job:
        up = f"up{{job=~{json.dumps(of.spans_job)}}}"
        yield _telemetry(
            ABSENT,
            of,
            "counts_down",
            f"absent({up} == 1)",
            f"No target of job {of.spans_job} is up, so no replies are counted from spans.",
        )
    replies = f"sum_over_time({REPLIES}[{window}])"
    jobs = "lk_agents_active_job_count"
    yield _telemetry(
        ABSENT,
        of,
        "agents_silent",
        # A worker that is scraped without an environment is compared with all replies.
        f'(\n  sum by ({_ENVIRONMENT}) ({jobs}{{{_ENVIRONMENT}!=""}}) > 0\n'
        f"  unless on ({_ENVIRONMENT})\n  sum by ({_ENVIRONMENT}) ({replies}) > 0\n)\n"
        f'or\n(\n  sum by ({_ENVIRONMENT}) ({jobs}{{{_ENVIRONMENT}=""}}) > 0\n'
        f"  unless on ()\n  sum({replies}) > 0\n)",
        f"{_COUNT} agent jobs run{_WHERE}, and no reply of theirs was counted in the last "
        f"{window}.",
    )


def _degraded(of: Thresholds) -> Iterator[Alert]:
    if of.spans_job:
        up = f"up{{job=~{json.dumps(of.spans_job)}}}"
        yield _telemetry(
            DEGRADED,
            of,
            "some_counts_down",
            f"count by (job) ({up} == 0)\nand on (job)\ncount by (job) ({up} == 1)",
            f"{_COUNT} targets of job {{{{ $labels.job }}}} are down. The others are up. Replies "
            "that pass through the targets that are down are not counted.",
        )
    window = of.telemetry_ticket_for
    replies = f"sum by ({_ENVIRONMENT}) (sum_over_time({REPLIES}%s))"
    yield _telemetry(
        DEGRADED,
        of,
        "traffic_stopped",
        f"{replies % f'[1h] offset {window}'} > {_nearly(10 * of.min_replies)}\n"
        f"unless on ({_ENVIRONMENT})\n{replies % f'[{window}]'} > 0.5",
        f"No reply was counted{_WHERE} in the last {window}, after {_COUNT} in the hour before. "
        "Either the traffic ended, or the agents send no telemetry.",
        for_=of.telemetry_for,
    )
    for cause, names, what in (
        ("refused", ("receiver_refused",), "refused"),
        ("send_failed", ("exporter_send_failed", "exporter_enqueue_failed"), "could not send"),
    ):
        yield _telemetry(
            DEGRADED,
            of,
            cause,
            "\nor\n".join(
                f"sum by (job) (increase(otelcol_{name}_{items}[10m])) > 0.5"
                for name in names
                for items in ("spans", "metric_points")
            ),
            f"The Collector of job {{{{ $labels.job }}}} {what} {_COUNT} spans or data points in "
            "the last 10m.",
            for_="0s",
        )
    yield _telemetry(
        DEGRADED,
        of,
        "queue_full",
        "max by (job, exporter) (otelcol_exporter_queue_size / otelcol_exporter_queue_capacity)"
        " > 0.8",
        f"The queue of exporter {{{{ $labels.exporter }}}} of job {{{{ $labels.job }}}} is "
        f"{_SHARE} full. A full queue drops spans or data points.",
        for_=of.telemetry_for,
    )


def _dropped(of: Thresholds) -> Alert:
    exporter, reason = label(semconv.EXPORTER), label(semconv.DROP_REASON)
    window = of.spans_dropped_window
    every = f"sum by ({_ENVIRONMENT}) (sum_over_time(%s[{window}]))"
    dropped = every % DROPPED
    counted = "\n  + ".join(f"({every % each} or 0 * {dropped})" for each in (REPLIES, ATTEMPTS))
    return Alert(
        SPANS_DROPPED,
        f"sum by ({exporter}, {reason}, {_ENVIRONMENT}) (sum_over_time({DROPPED}[{window}]))\n"
        f"/ on ({_ENVIRONMENT}) group_left ()\n(\n  {dropped}\n  + {counted}\n)"
        f" > {of.spans_dropped_share:g}",
        "warning",
        "Spans are dropped.",
        f"Exporter {{{{ $labels.{exporter} }}}}{_WHERE} dropped {_SHARE} of the spans of the last "
        f"{window} ({{{{ $labels.{reason} }}}}). Traces have gaps, and counts from spans are too "
        "low.",
        of_provider=False,
        keep_firing_for=of.keep_firing_for,
    )


def _watchdog() -> Alert:
    return Alert(
        WATCHDOG,
        "vector(1)",
        "none",
        "Alerting works.",
        "This alert always fires. Route it to a service that notifies you if it stops.",
        of_provider=False,
    )


def inhibit_rules() -> list[dict[str, Any]]:
    """Return Alertmanager's rules that silence an alert while another one reports its cause."""
    return [
        {
            "source_matchers": [f'alertname="{MANY}"'],
            "target_matchers": [
                f'alertname=~"{LOST_REPLIES}|{FEW_LOST}|{NOT_RECOVERABLE}|{STORM}|{SLOW}"'
            ],
            "equal": [_ENVIRONMENT],
        },
        {
            # The page with the 30m window stays: it would start only after the refusals end.
            "source_matchers": [f'alertname="{NOT_RECOVERABLE}"'],
            "target_matchers": [f'alertname="{LOST_REPLIES}"', 'short="5m"'],
            "equal": [_PROVIDER, _ENVIRONMENT],
        },
        {
            "source_matchers": ['alertname=~"TracedRetry.*"', 'severity="critical"'],
            "target_matchers": ['alertname=~"TracedRetry.*"', 'severity="warning"'],
            "equal": [_PROVIDER, _ENVIRONMENT],
        },
    ]
