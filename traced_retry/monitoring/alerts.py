# SPDX-License-Identifier: Apache-2.0
"""The alerts, and the ratios they compare, from the thresholds of :mod:`.config`.

This module is the source of ``dashboards/prometheus/alerts.yaml`` and of its other forms. The
alerts read the series of ``rollup.yaml``: for each provider, once a minute, the count of that
minute (averaged over five). Sums of these counts over a window weigh by traffic and tolerate gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from traced_retry import semconv
from traced_retry.monitoring.config import BurnRate, Thresholds, seconds

ENVIRONMENT: Final = "deployment.environment.name"
"""Kept throughout; where a deployment names none, all is of one environment without a name."""

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
SILENCE: Final = "provider:traced_retry_reply_duration_seconds_bucket:increase1m"
DROPPED: Final = "exporter:traced_retry_export_dropped:increase1m"

NOT_CALLED_OFF: Final = f'{_OUTCOME}!~"interrupted|superseded"'
"""Selects the replies, or their durations, that neither caller nor provider called off."""
SETTLED: Final = f'{NOT_CALLED_OFF}, {_STOP}!="session_closed"'
"""Selects the replies that could be heard or fail: of these, too, whose call did not end first."""


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
    """Whether its series have a provider: its dashboard is that provider's then."""

    def document(self, thresholds: Thresholds) -> dict[str, Any]:
        """Return the rule as Prometheus reads it."""
        return {
            "alert": self.alert,
            "expr": self.expr,
            "for": self.for_,
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
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
    """Return the name of the recorded ratio of exhausted replies in that window."""
    return f"provider:traced_retry_exhausted:ratio_rate{window}"


OBJECTIVE: Final = "traced_retry:objective:ratio"
THRESHOLD: Final = "traced_retry:exhausted_threshold:ratio"
SILENCE_OBJECTIVE: Final = "traced_retry:silence_objective:seconds"
STORM_LIMIT: Final = "traced_retry:amplification_limit:ratio"
"""The thresholds themselves, recorded, so that dashboards draw those in force."""

BURN: Final = "TracedRetryExhaustionBurn"
EXHAUSTED: Final = "TracedRetryRepliesExhausted"
NOT_RECOVERABLE: Final = "TracedRetryNotRecoverable"
MANY: Final = "TracedRetryManyProviders"
STORM: Final = "TracedRetryStorm"
SLOW: Final = "TracedRetrySilence"
ABSENT: Final = "TracedRetryTelemetryAbsent"
SPANS_DROPPED: Final = "TracedRetrySpansDropped"
ALERTS: Final = (
    BURN,
    EXHAUSTED,
    NOT_RECOVERABLE,
    MANY,
    STORM,
    SLOW,
    ABSENT,
    SPANS_DROPPED,
)
"""In the order of the runbook; a section's place is its panel's id in Grafana."""


def windows(thresholds: Thresholds) -> list[str]:
    """Return every window of the burn-rate alerts once, the shortest first."""
    found = {w for row in thresholds.burn_rates for w in (row.short, row.long)}
    return sorted(found, key=seconds)


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
    """How many there were in the window, per provider."""
    selector = f"{{{', '.join(matchers)}}}" if matchers else ""
    if series == REPLIES and seconds(window) == seconds("5m"):
        # At once: what is averaged over five minutes takes as long to be seen whole.
        return f"(300 * sum by ({by}) ({REPLIES_RATE}{selector}))"
    return f"sum by ({by}) (sum_over_time({series}{selector}[{window}]))"


def _ratio(window: str) -> str:
    # A provider that never exhausted has no such series: 0, and not absence. Without any reply
    # there is no ratio.
    settled = _counted(REPLIES, SETTLED, window=window)
    exhausted = _counted(REPLIES, f'{_OUTCOME}="exhausted"', window=window)
    return f"(\n  {exhausted}\n  or\n  0 * {settled}\n)\n/\n({settled} > 0)"


def alerts(thresholds: Thresholds) -> list[Alert]:
    """Return the alerts in the order of the runbook."""
    of = thresholds
    return [
        *(_burn(row, of) for row in of.burn_rates),
        _exhausted(of),
        _not_recoverable(of),
        _many(of),
        _storm(of),
        _silence(of),
        *_absent(of),
        _dropped(),
    ]


_WHO: Final = f"{{{{ $labels.{_PROVIDER} }}}}"


def _burn(row: BurnRate, of: Thresholds) -> Alert:
    threshold = f"{row.factor:g} * {of.budget:.10g}"
    days = 30 / row.factor
    gone = f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours"  # noqa: PLR2004
    return Alert(
        BURN,
        f"{ratio(row.long)} > {threshold}\nand\n{ratio(row.short)} > {threshold}\n"
        f"and\n{_counted(REPLIES, SETTLED, window=row.long)} >= {of.min_replies}",
        row.severity,
        "Callers hear nothing: too many replies are exhausted.",
        f"{{{{ $value | humanizePercentage }}}} of the replies asked of {_WHO} in the last "
        f"{row.long} were lost after every retry, and it goes on in the last {row.short}; "
        f"{of.budget * 100:.4g} % of them may be. At this rate, or a faster one, thirty "
        f"days' error budget is gone in {gone}.",
        row.for_,
        {"long": row.long, "short": row.short},
    )


def _nearly(count: int) -> str:
    """Counts are put together from rates, which extrapolate: 2.9 replies are three."""
    return f"{count - 0.5:g}"


def _exhausted(of: Thresholds) -> Alert:
    counted = _counted(REPLIES, f'{_OUTCOME}="exhausted"', window=of.exhausted_window)
    return Alert(
        EXHAUSTED,
        f"{counted} > {_nearly(of.exhausted_replies)}\n"
        f"and\n{_counted(REPLIES, SETTLED, window=of.exhausted_window)} < {of.min_replies}",
        "warning",
        "Replies were lost after every retry; there are too few for a ratio.",
        f'{{{{ $value | printf "%.0f" }}}} replies asked of {_WHO} were exhausted in the last '
        f"{of.exhausted_window}: callers heard nothing.",
    )


def codes(window: str) -> str:
    """The codes of one provider's failures that no retry mends, as a template of Prometheus."""
    query = (
        f"sort_desc(sum by ({label(semconv.ERROR_TYPE)}) (sum_over_time({ATTEMPTS}{{"
        f'{_PROVIDER}=\\"%s\\", {_ENVIRONMENT}=\\"%s\\", '
        f'{label(semconv.RECOVERABLE)}=\\"false\\"}}[{window}])) > 0)'
    )
    which = f"$labels.{_PROVIDER} $labels.{_ENVIRONMENT}"
    return (
        f'{{{{ range query (printf "{query}" {which}) }}}}'
        f" {{{{ .Labels.{label(semconv.ERROR_TYPE)} }}}}{{{{ end }}}}"
    )


def _not_recoverable(of: Thresholds) -> Alert:
    window = of.not_recoverable_window
    refused = _counted(REPLIES, f'{_STOP}="not_recoverable"', window=window)
    return Alert(
        NOT_RECOVERABLE,
        f"{refused} > {_nearly(of.not_recoverable_replies)}\n"
        f"and\n{refused} / {_counted(REPLIES, SETTLED, window=window)}"
        f" >= {of.not_recoverable_share:g}",
        "critical",
        "A provider refuses replies for good: no retry helps.",
        f'{{{{ $value | printf "%.0f" }}}} replies asked of {_WHO} in the last {window} were '
        f"refused as not recoverable. Codes, the most frequent first:{codes(window)}.",
        of.not_recoverable_for,
    )


def _many(of: Thresholds) -> Alert:
    # Pending ones count as well: this is to be there before they page.
    failing = f'ALERTS{{alertname=~"{BURN}|{NOT_RECOVERABLE}", severity="critical"}}'
    return Alert(
        MANY,
        f"count by ({_ENVIRONMENT}) (count by ({_BY}) ({failing}))"
        f" >= {of.many_providers_providers}",
        "critical",
        "Several providers fail at once.",
        "{{ $value }} providers lose replies at the same time: look for what they share (network, "
        "DNS, a proxy, a deployment of the agents) before any one of them.",
        of.many_providers_for,
        of_provider=False,
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
        f"and\n{_counted(REPLIES, window=of.storm_window)} >= {of.min_replies}",
        "warning",
        "Retries multiply the requests sent to a provider.",
        f'{{{{ $value | printf "%.2f" }}}} requests per reply go to {_WHO}; without failures it '
        "is one.",
        of.storm_for,
    )


def _silence(of: Thresholds) -> Alert:
    buckets = _counted(SILENCE, window=of.silence_window, by=f"le, {_BY}")
    return Alert(
        SLOW,
        f"histogram_quantile({of.silence_quantile:g}, {buckets}) > {of.silence_seconds:g}\n"
        f"and\n{_counted(REPLIES, SETTLED, window=of.silence_window)} >= {of.min_replies}",
        "warning",
        "Callers wait too long for a reply.",
        f"One reply of {_WHO} in {round(1 / (1 - of.silence_quantile)):d} begins only after "
        f'{{{{ $value | printf "%.1f" }}}} s of silence or more; the objective is '
        f"{of.silence_seconds:g} s.",
        of.silence_for,
    )


def _absent(of: Thresholds) -> Iterator[Alert]:
    yield Alert(
        ABSENT,
        f'max by (job) (1 - up{{job="{of.spans_job}"}}) > 0',
        "critical",
        "Nobody counts replies: their failure would page no one.",
        "Prometheus cannot scrape {{ $labels.job }}, where replies are counted from spans.",
        of.telemetry_for,
        {"cause": "counts_down"},
        of_provider=False,
    )
    yield Alert(
        ABSENT,
        "sum(lk_agents_active_job_count) > 0\n"
        f"unless on ()\nsum(sum_over_time({REPLIES}[{of.telemetry_for}])) > 0",
        "critical",
        "Nobody counts replies: their failure would page no one.",
        "{{ $value }} agent jobs run, and not one reply of theirs was counted.",
        of.telemetry_for,
        {"cause": "agents_silent"},
        of_provider=False,
    )


def _dropped() -> Alert:
    exporter, reason = label(semconv.EXPORTER), label(semconv.DROP_REASON)
    return Alert(
        SPANS_DROPPED,
        f"sum by ({exporter}, {reason}, {_ENVIRONMENT}) (sum_over_time({DROPPED}[10m])) > 0.5",
        "warning",
        "Spans were dropped: traces have gaps, and counts from spans are too low.",
        '{{ $value | printf "%.0f" }} spans were dropped in the last 10m by the exporter '
        f"{{{{ $labels.{exporter} }}}}, because: {{{{ $labels.{reason} }}}}.",
        of_provider=False,
    )


def inhibit_rules() -> list[dict[str, Any]]:
    """Return Alertmanager's rules that silence an alert while another one reports its cause."""
    return [
        {
            "source_matchers": [f'alertname="{MANY}"'],
            "target_matchers": [
                f'alertname=~"{BURN}|{EXHAUSTED}|{NOT_RECOVERABLE}|{STORM}|{SLOW}"'
            ],
            "equal": [_ENVIRONMENT],
        },
        {
            "source_matchers": ['alertname=~"TracedRetry.*"', 'severity="critical"'],
            "target_matchers": ['alertname=~"TracedRetry.*"', 'severity="warning"'],
            "equal": [_PROVIDER, _ENVIRONMENT],
        },
    ]
