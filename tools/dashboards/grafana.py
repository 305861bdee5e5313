# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboards: the overview, one provider, and the runbook.

Counts come from the rolled-up series, which work for both ways of counting replies. If a panel
needs one of the two ways, its description says so. Thresholds are series as well
(``traced_retry.monitoring.alerts``), so that a dashboard draws the thresholds in force.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from panels import (
    Board,
    Markdown,
    Panel,
    Query,
    Row,
    Traces,
    as_json,
    choice,
    data_source,
    rollup,
)

from traced_retry import semconv
from traced_retry.monitoring import alerts
from traced_retry.monitoring.alerts import label
from traced_retry.monitoring.recording import GENERATE_REPLY

PROVIDER: Final = label(semconv.PROVIDER)
ENVIRONMENT: Final = label(alerts.ENVIRONMENT)
OUTCOME: Final = label(semconv.OUTCOME)
STOP: Final = label(semconv.STOP_REASON)
RESULT: Final = label(semconv.RESULT)
CODE: Final = label(semconv.ERROR_TYPE)
RECOVERABLE: Final = label(semconv.RECOVERABLE)
ACTION: Final = label(semconv.ACTION)
MODEL: Final = label(semconv.MODEL)

REPLIES: Final = alerts.REPLIES
ATTEMPTS: Final = alerts.ATTEMPTS
FIRST_OUTPUT: Final = alerts.FIRST_OUTPUT
FAILURE_TIME: Final = alerts.FAILURE_TIME
ATTEMPT_SECONDS: Final = "provider:traced_retry_attempt_duration_seconds_bucket:increase1m"
DELAY: Final = "provider:traced_retry_delay_seconds_bucket:increase1m"

FAILED: Final = f'{RESULT}="failed"'
THERE: Final = f'{ENVIRONMENT}=~"$environment"'
INITIATOR: Final = label(semconv.INITIATOR)
OF_PROVIDER: Final = f'{PROVIDER}=~"$provider", {THERE}'
CHOSEN: Final = f'{OF_PROVIDER}, {INITIATOR}=~"$initiator"'
NO_REPLY: Final = "no replies"
NO_FAILURE: Final = "no failures"
AGENTS_ONLY: Final = "Known only where agents send their own metrics."
EITHER: Final = "$__rate_interval"
RANGE: Final = "$__range"


def rolled(series: str) -> str:
    """Return the series with one sample a minute, or one in ten minutes for a long time."""
    return series.replace("increase1m", "increase$rollup")


def count(series: str, *matchers: str, by: str = "", over: str = EITHER) -> str:
    """Return the count in each interval, or in the whole selected time."""
    selector = ", ".join((CHOSEN, *matchers))
    return f"sum by ({by}) (sum_over_time({rolled(series)}{{{selector}}}[{over}]))"


def per_minute(series: str, *matchers: str, by: str = "") -> str:
    """Return the count per minute."""
    return f"{count(series, *matchers, by=by)} * 60000 / $__rate_interval_ms"


def share(part: str, whole: str) -> str:
    """Return a ratio. It is 0 without a part, and has no value without a whole."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def of_replies(outcome: str, by: str = "", over: str = EITHER) -> str:
    """Return the share of replies with that outcome, of those that could be heard or lost."""
    settled = count(REPLIES, alerts.SETTLED, by=by, over=over)
    return share(
        count(REPLIES, f'{OUTCOME}=~"{outcome}"', alerts.SETTLED, by=by, over=over), settled
    )


def quantile(q: float, series: str, by: str = "", over: str = EITHER) -> str:
    """Return a quantile of a histogram of seconds."""
    labels = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({q}, {count(series, by=labels, over=over)})"


def sent_per_reply(by: str = "", over: str = EITHER) -> str:
    """Return the requests sent per reply."""
    sent = count(ATTEMPTS, f'{ACTION}!="listen"', by=by, over=over)
    return f"{sent} / ({count(REPLIES, by=by, over=over)} > 0)"


LOST: Final = alerts.LOST_OUTCOMES


def glance() -> tuple[Panel, ...]:
    """Return the tiles of the first row."""

    def number(title: str, about: str, expr: str, unit: str, **more: object) -> Panel:
        settings = {"decimals": 1, "none": NO_REPLY, "width": 3, "height": 5, **more}
        return Panel(title, about, (Query(expr, instant=True),), unit, kind="stat", **settings)  # type: ignore[arg-type]

    firing = (
        f'count(max by (alertname, {PROVIDER}) (ALERTS{{alertname=~"TracedRetry.*", '
        f'severity=~"critical|warning", alertstate="firing", {ENVIRONMENT}=~"$environment|"}}))'
        " or vector(0)"
    )
    return (
        number(
            "Alerts",
            "Alerts that fire now, for all providers. Alerts without an environment are included.",
            firing,
            "short",
            decimals=0,
            steps=((0, "green"), (1, "red")),
            none="0",
        ),
        number(
            "Replies",
            "Number of replies in the selected time, with every outcome.",
            count(REPLIES, over=RANGE),
            "short",
            decimals=0,
        ),
        number(
            "Succeeded at first attempt",
            "Share of replies that needed no retry. Replies that were interrupted or superseded, "
            "or whose session was closed, do not count.",
            of_replies("succeeded", over=RANGE),
            "percentunit",
        ),
        number(
            "Recovered by retry",
            "Share of the same replies that the caller heard because of a retry.",
            of_replies("recovered", over=RANGE),
            "percentunit",
        ),
        number(
            "Lost",
            "Share of the same replies that the caller did not hear, or only in part. This share "
            "and the two before it add up to 100 %.",
            of_replies(LOST, over=RANGE),
            "percentunit",
            decimals=2,
        ),
        number(
            "Burn rate",
            "Lost replies of the worst provider in the last hour, as a multiple of the rate that "
            "the objective allows. Above 1 the error budget shrinks faster than planned.",
            f"max({hour_ratio()}) / scalar(1 - max({alerts.OBJECTIVE}))",
            "short",
            steps=((0, "green"), (1, "yellow"), (6, "red")),
        ),
        number(
            "Time to first output, p95",
            "Time within which 95 % of the heard replies started. Lost replies do not count.",
            quantile(0.95, FIRST_OUTPUT, over=RANGE),
            "s",
        ),
        number(
            "Requests per reply",
            "Requests sent per reply. Without failures it is 1. Retries add the rest.",
            sent_per_reply(over=RANGE),
            "short",
            decimals=2,
        ),
    )


def hour_ratio() -> str:
    """Return the share of lost replies in the last hour, per provider."""
    return of_replies(LOST, by=PROVIDER, over="1h")


def lost() -> Panel:
    """Return the ratio that pages, with its limits."""
    return Panel(
        "Lost in the last hour",
        "Share of lost replies in the hour before each moment. Above the line named page the "
        "hour's alert fires, if the last five minutes are above it as well.",
        (
            Query(hour_ratio(), f"{{{{{PROVIDER}}}}}"),
            Query(f'max({alerts.THRESHOLD}{{severity="critical"}})', "page", dashed="red"),
            Query(f'min({alerts.THRESHOLD}{{severity="warning"}})', "ticket", dashed="yellow"),
        ),
        "percentunit",
        NO_REPLY,
        link=True,
    )


def budget_left() -> Panel:
    """Return the error budget that is left, and how fast it shrinks."""
    return Panel(
        "Error budget left",
        "Share of the error budget of the last 30 days that is not used up. At 0 as many replies "
        "were lost in 30 days as the objective allows. Below -100 % it is drawn as -100 %.",
        (
            Query(
                f"clamp_min(1 - max by ({PROVIDER}) "
                f"({alerts.ratio(alerts.BUDGET_WINDOW)}{{{OF_PROVIDER}}}) "
                f"/ scalar(1 - max({alerts.OBJECTIVE})), -1)",
                f"{{{{{PROVIDER}}}}}",
            ),
        ),
        "percentunit",
        "no replies in the last 30 days",
        link=True,
    )


def lost_by(name: str, title: str, about: str) -> Panel:
    """Return the lost replies by a label of the service."""
    series = f"{rolled(alerts.SERVICE_REPLIES)}{{{OF_PROVIDER}, {alerts.LOST}}}"
    return Panel(
        title,
        f"Replies a minute that were lost, by {about}.",
        (
            Query(
                f"sum by ({name}) (sum_over_time({series}[{EITHER}])) "
                "* 60000 / $__rate_interval_ms",
                f"{{{{{name}}}}}",
            ),
        ),
        "cpm",
        "none lost, or too many services",
        stacked=True,
    )


def codes(by: str, legend: str, title: str, about: str, *matchers: str, width: int = 8) -> Panel:
    """Return the failed attempts, stacked."""
    return Panel(
        title,
        about,
        (Query(per_minute(ATTEMPTS, FAILED, *matchers, by=by), legend),),
        "cpm",
        NO_FAILURE,
        stacked=True,
        width=width,
    )


def stop_reasons(width: int = 8) -> Panel:
    """Return the replies without an answer, by stop reason."""
    return Panel(
        "Replies by stop reason",
        "Replies a minute that were not heard, by the reason why no further attempt was made: "
        "attempts, time or budget used up, the circuit breaker open, a retry was unsafe, the "
        "provider refused, or the caller or the provider ended the reply.",
        (Query(per_minute(REPLIES, f'{STOP}!=""', by=STOP), f"{{{{{STOP}}}}}"),),
        "cpm",
        "every reply was heard",
        stacked=True,
        width=width,
    )


def outcomes(**more: object) -> Panel:
    """Return the replies by outcome."""
    settings = {"stacked": True, "none": NO_REPLY, **more}
    return Panel(
        settings.pop("title", "Replies by outcome"),  # type: ignore[arg-type]
        "Replies a minute by outcome. Green succeeded, yellow recovered after a retry, red was "
        "lost. Blue was interrupted by the caller, purple was superseded.",
        (Query(per_minute(REPLIES, by=OUTCOME), f"{{{{{OUTCOME}}}}}"),),
        "cpm",
        **settings,  # type: ignore[arg-type]
    )


def quantiles(title: str, about: str, series: str, none: str, *more: Query) -> Panel:
    """Return three quantiles of a histogram."""
    lines = tuple(Query(quantile(q, series), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99))
    return Panel(title, about, (*lines, *more), "s", none)


def heat(title: str, about: str, series: str, none: str) -> Panel:
    """Return a histogram over time."""
    return Panel(
        title,
        about,
        (Query(count(series, by="le"), "{{le}}", heat=True),),
        "s",
        none,
        kind="heatmap",
    )


def times() -> tuple[Panel, ...]:
    """Return the panels of all durations."""
    objective = Query(f"max({alerts.SILENCE_OBJECTIVE})", "objective, p95", dashed="red")
    attempt, waited = (
        "provider:traced_retry_attempt_duration_seconds_sum:increase1m",
        "provider:traced_retry_reply_duration_seconds_sum:increase1m",
    )
    replies = f"({count(REPLIES)} > 0)"
    return (
        quantiles(
            "Time to first output",
            "Time from the request to the first word, sound or tool call, over the replies that "
            "were heard. Lost replies have a time to failure instead.",
            FIRST_OUTPUT,
            NO_REPLY,
            objective,
        ),
        quantiles(
            "Time to failure",
            "Time from the request to the report that the reply is lost. A high value means that "
            "callers waited long for a failure.",
            FAILURE_TIME,
            "none lost",
        ),
        quantiles(
            "Attempt duration",
            "Time from the start of an attempt to its end, with every result.",
            ATTEMPT_SECONDS,
            NO_REPLY,
        ),
        quantiles(
            "Backoff delay",
            f"Time waited between two attempts. {AGENTS_ONLY}",
            DELAY,
            "no retry waited, or agents send no metrics",
        ),
        heat(
            "Time to first output (distribution)",
            "Number of replies by time to first output.",
            FIRST_OUTPUT,
            NO_REPLY,
        ),
        heat(
            "Attempt duration (distribution)",
            "Number of attempts by duration. A stripe at the plugin's own time-out (5 or 10 s) "
            "means that the provider does not answer.",
            ATTEMPT_SECONDS,
            NO_REPLY,
        ),
        heat(
            "Backoff delay (distribution)",
            f"Number of waits between two attempts by duration. {AGENTS_ONLY}",
            DELAY,
            "no retry waited, or agents send no metrics",
        ),
        Panel(
            "Mean reply duration by part",
            "Mean time until a reply started or failed, split into the time of its attempts and "
            "the time between them.",
            (
                Query(f"{count(attempt)} / {replies}", "attempts"),
                Query(f"clamp_min({count(waited)} - {count(attempt)}, 0) / {replies}", "waiting"),
            ),
            "s",
            NO_REPLY,
            stacked=True,
        ),
        exemplars(),
    )


def exemplars() -> Panel:
    """Return the panel that leads from a number to a trace."""
    unclean = f'{CHOSEN}, {OUTCOME}=~"recovered|{LOST}", {STOP}!="session_closed"'
    spans = f'traces_span_metrics_calls_total{{span_name="{semconv.SPAN_REPLY}", {unclean}}}'
    own = f"{label(semconv.METRIC_REPLIES)}_total{{{unclean}, {GENERATE_REPLY}}}"
    drawn = per_minute(
        REPLIES, f'{OUTCOME}=~"recovered|{LOST}"', f'{STOP}!="session_closed"', by=OUTCOME
    )
    return Panel(
        "Recovered and lost replies, with traces",
        "Replies a minute that recovered or were lost. Each dot is one of them and links to its "
        "trace. Dots need Prometheus's exemplar storage and an exporter that passes exemplars on.",
        (
            Query(
                drawn,
                f"{{{{{OUTCOME}}}}}",
            ),
            # Prometheus looks for exemplars by a query's selectors. Computing the result would cost
            # seconds if each call has its own series. At the time 0 there is no sample to read.
            Query(
                f"sum by ({OUTCOME}) ({spans} @ 0 or {own} @ 0)",
                f"{{{{{OUTCOME}}}}}",
                exemplar=True,
            ),
        ),
        "cpm",
        "every reply succeeded at the first attempt",
        width=16,
    )


def health() -> tuple[Panel, ...]:
    """Return the panels about the telemetry itself."""
    exporter, reason = label(semconv.EXPORTER), label(semconv.DROP_REASON)
    return (
        Panel(
            "Processes reporting",
            f"Processes that sent metrics in the last five minutes. {AGENTS_ONLY} A worker that is "
            "scraped is one process, with any number of calls.",
            (Query(f"sum(traced_retry:processes:count{{{THERE}}})", "processes"),),
            "short",
            "agents send no metrics of their own",
            width=6,
        ),
        Panel(
            "Spans dropped",
            "Spans a minute that were not delivered, by exporter and reason. Above 0 traces have "
            f"gaps, and counts from spans are too low. {AGENTS_ONLY}",
            (
                Query(
                    f"sum by ({exporter}, {reason}) "
                    f"(sum_over_time({rolled(alerts.DROPPED)}{{{THERE}}}[{EITHER}])) "
                    "* 60000 / $__rate_interval_ms",
                    f"{{{{{exporter}}}}}: {{{{{reason}}}}}",
                ),
            ),
            "cpm",
            "none dropped, or agents send no metrics",
            stacked=True,
            width=6,
        ),
        Panel(
            "Retry budget left",
            "Lowest number of retries left in any process, per provider. At 0 replies fail without "
            f"a retry. {AGENTS_ONLY}",
            (
                Query(
                    f"min by ({PROVIDER}) "
                    f"(provider:traced_retry_budget_remaining:min{{{OF_PROVIDER}}})",
                    f"{{{{{PROVIDER}}}}}",
                ),
            ),
            "short",
            "no budget reported",
            width=6,
        ),
        Panel(
            "In-flight replies",
            f"Replies that have not ended. A value that only rises indicates leaked replies. "
            f"{AGENTS_ONLY}",
            (
                Query(
                    f"sum by ({PROVIDER}) (provider:traced_retry_in_flight:sum{{{CHOSEN}}})",
                    f"{{{{{PROVIDER}}}}}",
                ),
            ),
            "short",
            "agents send no metrics of their own",
            width=6,
        ),
        Panel(
            "Late replies",
            "Replies a minute that arrived after their failure was reported. The caller may have "
            f"heard two replies. The value should be 0. {AGENTS_ONLY}",
            (
                Query(
                    per_minute("provider:traced_retry_late_replies:increase1m", by=PROVIDER),
                    f"{{{{{PROVIDER}}}}}",
                ),
            ),
            "cpm",
            "none, or agents send no metrics",
            width=12,
            height=6,
        ),
        Panel(
            "Scrape targets up",
            "Targets that Prometheus can scrape, per job. At 0 the panels above show old values.",
            (Query("sum by (job) (up)", "{{job}}"),),
            "short",
            "no scrape targets: agents push",
            width=12,
            height=6,
        ),
    )


def matrix() -> Panel:
    """Return the failed attempts of each provider by code."""
    return Panel(
        "Failed attempts: providers and codes",
        "Number of failed attempts in the selected time. An unknown code is _OTHER here and exact "
        "on the trace.",
        (
            Query(
                f"{count(ATTEMPTS, FAILED, by=f'{PROVIDER}, {CODE}', over=RANGE)} > 0",
                instant=True,
            ),
        ),
        "short",
        NO_FAILURE,
        kind="table",
        width=16,
        decimals=0,
        transformations=(
            (
                "groupingToMatrix",
                {"columnField": CODE, "rowField": PROVIDER, "valueField": "Value"},
            ),
        ),
    )


_PROVIDERS: Final = f"label_values({REPLIES}{{{THERE}}}, {PROVIDER})"
_ENVIRONMENTS: Final = choice(
    "environment", "Environment", f"label_values({REPLIES}, {ENVIRONMENT})"
)
_INITIATORS: Final = choice(
    "initiator", "Started by", f"label_values({REPLIES}{{{THERE}}}, {INITIATOR})"
)


def overview() -> Board:
    """Return the dashboard of all providers."""
    return Board(
        alerts.OVERVIEW,
        "Realtime replies: overview",
        "Lost replies, errors, time to first output and the success of retries, per provider.",
        (
            data_source("prometheus", "Prometheus"),
            rollup(),
            _ENVIRONMENTS,
            choice("provider", "Provider", _PROVIDERS),
            _INITIATORS,
        ),
        (
            Row(
                "At a glance",
                (
                    *glance(),
                    lost(),
                    budget_left(),
                    lost_by(alerts.SERVICE, "Lost by service", "the name of the agent's service"),
                ),
            ),
            Row(
                "Replies",
                (outcomes(title="$provider", repeat="provider", width=6, height=7),),
                folded=True,
            ),
            Row(
                "Per provider and version",
                (
                    lost_by(
                        "service_version",
                        "Lost by version",
                        "the version of the agent's service. A blue line marks its first replies",
                    ),
                    Panel(
                        "Retries per reply",
                        "Attempts after the first one, per reply.",
                        (
                            Query(
                                f"clamp_min({count(ATTEMPTS, by=PROVIDER)} / "
                                f"({count(REPLIES, by=PROVIDER)} > 0) - 1, 0)",
                                f"{{{{{PROVIDER}}}}}",
                            ),
                        ),
                        "short",
                        NO_REPLY,
                        link=True,
                    ),
                    Panel(
                        "Retry success rate",
                        "Share of retried replies that the caller heard. Near 0 retries only add "
                        "waiting time.",
                        (
                            Query(
                                share(
                                    count(REPLIES, f'{OUTCOME}="recovered"', by=PROVIDER),
                                    count(
                                        REPLIES, f'{OUTCOME}=~"recovered|exhausted"', by=PROVIDER
                                    ),
                                ),
                                f"{{{{{PROVIDER}}}}}",
                            ),
                        ),
                        "percentunit",
                        "nothing had to be retried",
                        link=True,
                    ),
                    Panel(
                        "Replies by initiator",
                        "Replies a minute, by who started them: the agent's code, or the provider "
                        "because the caller spoke or a tool returned.",
                        (Query(per_minute(REPLIES, by=INITIATOR), f"{{{{{INITIATOR}}}}}"),),
                        "cpm",
                        NO_REPLY,
                        stacked=True,
                    ),
                    Panel(
                        "Lost replies by initiator",
                        "Replies a minute that were lost, by who started them.",
                        (
                            Query(
                                per_minute(REPLIES, alerts.LOST, by=INITIATOR),
                                f"{{{{{INITIATOR}}}}}",
                            ),
                        ),
                        "cpm",
                        "none lost",
                        stacked=True,
                    ),
                ),
                folded=True,
            ),
            Row(
                "Causes",
                (
                    codes(
                        CODE,
                        f"{{{{{CODE}}}}}",
                        "Failed attempts by code",
                        "Attempts a minute that failed, by the provider's code, or by the kind of "
                        "failure if the provider sent no code.",
                    ),
                    codes(
                        RECOVERABLE,
                        f"recoverable: {{{{{RECOVERABLE}}}}}",
                        "Failed attempts by recoverability",
                        "The same attempts. If recoverable is false, a retry cannot help: a key, a "
                        "quota or an invalid request.",
                    ),
                    stop_reasons(),
                    matrix(),
                    Panel(
                        "Requests per reply, by provider",
                        "Requests sent per reply. Above the line a ticket opens.",
                        (
                            Query(sent_per_reply(by=PROVIDER), f"{{{{{PROVIDER}}}}}"),
                            Query(f"max({alerts.STORM_LIMIT})", "ticket", dashed="yellow"),
                        ),
                        "short",
                        NO_REPLY,
                        link=True,
                    ),
                ),
                folded=True,
            ),
            Row("Durations", times(), folded=True),
            Row("Telemetry health", health(), folded=True),
        ),
    )


def jaeger(title: str, outcome: str, about: str) -> Traces:
    """Return a search in Jaeger."""
    return Traces(
        title,
        f"{about} A trace shows the attempts with their codes and delays. Grafana searches by the "
        "HTTP API that Jaeger removes after 2.20.",
        "none in the selected time, or Jaeger has no traces of this service",
        jaeger={
            "service": "$service",
            "operation": semconv.SPAN_REPLY,
            "tags": f"{semconv.PROVIDER}=$provider {semconv.OUTCOME}={outcome}",
            "limit": 20,
        },
        width=12,
    )


def provider() -> Board:
    """Return the dashboard of one provider."""
    spans = f'span_name="{semconv.SPAN_REPLY}", {PROVIDER}="$provider", {THERE}'
    shown = f'{spans}, {INITIATOR}=~"$initiator"'
    window = (
        f'label_replace({{__name__=~"{alerts.ratio(".+")}", {OF_PROVIDER}}}, "window", "$1", '
        '"__name__", ".*ratio_rate(.+)")'
    )
    return Board(
        alerts.PROVIDER,
        "Realtime replies: one provider",
        "Outcomes, models, error codes and the traces of lost replies of one provider.",
        (
            data_source("prometheus", "Prometheus"),
            data_source("jaeger", "Jaeger"),
            data_source("tempo", "Tempo"),
            rollup(),
            _ENVIRONMENTS,
            choice("provider", "Provider", _PROVIDERS, several=False),
            _INITIATORS,
            choice(
                "model",
                "Model",
                f"label_values(traces_span_metrics_calls_total{{{spans}}}, {MODEL})",
            ),
            choice(
                "code",
                "Code",
                f'label_values({ATTEMPTS}{{{PROVIDER}="$provider", {THERE}, {FAILED}}}, {CODE})',
            ),
            choice(
                "service",
                "Service",
                f"label_values(traces_span_metrics_calls_total{{{spans}}}, service_name)",
                several=False,
            ),
        ),
        (
            Row("At a glance", glance()),
            Row(
                "Outcomes",
                (
                    outcomes(),
                    lost(),
                    Panel(
                        "Burn rate by window",
                        "Lost replies as a multiple of the rate that the objective allows, in each "
                        "window of the alerts. Above 1 the error budget shrinks too fast.",
                        (
                            Query(
                                f"max by (window) ({window}) / scalar(1 - max({alerts.OBJECTIVE}))",
                                "{{window}}",
                            ),
                        ),
                        "short",
                        NO_REPLY,
                    ),
                    Panel(
                        "Lost by model",
                        "Replies a minute that were lost, by model. Known only if replies are "
                        "counted from spans.",
                        (
                            Query(
                                f"60 * sum by ({MODEL}) (rate(traces_span_metrics_calls_total{{"
                                f'{shown}, {MODEL}=~"$model", {alerts.LOST}}}[{EITHER}]))',
                                f"{{{{{MODEL}}}}}",
                                step="",
                            ),
                        ),
                        "cpm",
                        "none lost, or not counted from spans",
                        stacked=True,
                        width=12,
                    ),
                    Panel(
                        "Replies by model",
                        "Replies a minute by model, with every outcome. Known only if replies are "
                        "counted from spans.",
                        (
                            Query(
                                f"60 * sum by ({MODEL}) (rate(traces_span_metrics_calls_total{{"
                                f'{shown}, {MODEL}=~"$model"}}[{EITHER}]))',
                                f"{{{{{MODEL}}}}}",
                                step="",
                            ),
                        ),
                        "cpm",
                        "no replies, or not counted from spans",
                        stacked=True,
                        width=12,
                    ),
                ),
            ),
            Row(
                "Causes",
                (
                    codes(
                        CODE,
                        f"{{{{{CODE}}}}}",
                        "Failed attempts by code",
                        "Attempts a minute that failed with the selected codes.",
                        f'{CODE}=~"$code"',
                    ),
                    codes(
                        ACTION,
                        f"{{{{{ACTION}}}}}",
                        "Failed attempts by action",
                        "The same attempts by action: a request was sent, the attempt listened for "
                        "an earlier request, or it started a new session.",
                        f'{CODE}=~"$code"',
                    ),
                    stop_reasons(),
                    Panel(
                        "Failed attempts by code and recoverability",
                        "Number of failed attempts in the selected time. If recoverable is false, "
                        "a retry cannot help.",
                        (
                            Query(
                                "sort_desc("
                                + count(
                                    ATTEMPTS,
                                    FAILED,
                                    f'{CODE}=~"$code"',
                                    by=f"{CODE}, {RECOVERABLE}",
                                    over=RANGE,
                                )
                                + " > 0)",
                                instant=True,
                            ),
                        ),
                        "short",
                        NO_FAILURE,
                        kind="table",
                        width=24,
                        height=6,
                        decimals=0,
                        transformations=(
                            (
                                "organize",
                                {
                                    "excludeByName": {"Time": True},
                                    "renameByName": {
                                        CODE: "code",
                                        RECOVERABLE: "recoverable",
                                        "Value": "failed attempts",
                                    },
                                },
                            ),
                        ),
                    ),
                ),
            ),
            Row("Durations", times()),
            Row(
                "Lost replies in Jaeger",
                (
                    jaeger(
                        "Exhausted replies",
                        "exhausted",
                        "The newest 20 traces with a reply that failed after all retries.",
                    ),
                    jaeger(
                        "Refused replies",
                        "not_recoverable",
                        "The newest 20 traces with a reply that no retry could fix.",
                    ),
                ),
                folded=True,
            ),
            Row(
                "Lost replies in Tempo",
                (
                    Traces(
                        "Lost replies",
                        "The newest 20 traces with a lost reply.",
                        "none lost in the selected time",
                        traceql=f'{{name="{semconv.SPAN_REPLY}" && '
                        f'span.{semconv.PROVIDER}="$provider" && '
                        f'span.{semconv.OUTCOME}=~"{LOST}"}}',
                    ),
                ),
                folded=True,
            ),
        ),
    )


def runbook(source: Path) -> Board:
    """Return the sections of ``runbook.md`` as a dashboard, for users who only have Grafana."""
    whole = source.read_text(encoding="utf-8")
    sections = re.split(r"^## ", whole, flags=re.MULTILINE)[1:]
    panels = []
    for section in sections:
        title, _, content = section.partition("\n")
        about = f"What to do when {title} fires."
        panels.append(Markdown(title.strip(), about, content.strip(), height=12))
    return Board(
        alerts.RUNBOOK,
        "Realtime replies: runbook",
        "What to do, alert by alert.",
        (),
        (Row("", tuple(panels)),),
    )


def files(runbook_source: Path) -> dict[str, str]:
    """Return every dashboard: {path below ``dashboards``: JSON}."""
    boards = {"overview": overview(), "provider": provider(), "runbook": runbook(runbook_source)}
    return {f"grafana/{name}.json": as_json(board) for name, board in boards.items()}
