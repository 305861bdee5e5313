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
SILENCE: Final = alerts.SILENCE
ATTEMPT_SECONDS: Final = "provider:traced_retry_attempt_duration_seconds_bucket:increase1m"
DELAY: Final = "provider:traced_retry_delay_seconds_bucket:increase1m"

FAILED: Final = f'{RESULT}="failed"'
THERE: Final = f'{ENVIRONMENT}=~"$environment"'
CHOSEN: Final = f'{PROVIDER}=~"$provider", {THERE}'
NO_REPLY: Final = "no replies"
NO_FAILURE: Final = "no failures"
AGENTS_ONLY: Final = "Known only where agents send their own metrics."
EITHER: Final = "$__rate_interval"
RANGE: Final = "$__range"


def rolled(series: str) -> str:
    """The series as it is for the time chosen: of each minute, or of ten."""
    return series.replace("increase1m", "increase$rollup")


def count(series: str, *matchers: str, by: str = "", over: str = EITHER) -> str:
    """How many in each interval, or in the whole time chosen."""
    selector = ", ".join((CHOSEN, *matchers))
    return f"sum by ({by}) (sum_over_time({rolled(series)}{{{selector}}}[{over}]))"


def per_minute(series: str, *matchers: str, by: str = "") -> str:
    """How many a minute."""
    return f"{count(series, *matchers, by=by)} * 60000 / $__rate_interval_ms"


def share(part: str, whole: str) -> str:
    """A ratio; 0 where the part was never seen, nothing where the whole is nothing."""
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def of_replies(outcome: str, by: str = "", over: str = EITHER) -> str:
    """The share of replies that ended so, of those that could be heard or fail."""
    settled = count(REPLIES, alerts.SETTLED, by=by, over=over)
    return share(
        count(REPLIES, f'{OUTCOME}=~"{outcome}"', alerts.SETTLED, by=by, over=over), settled
    )


def quantile(q: float, series: str, by: str = "", over: str = EITHER) -> str:
    """A quantile of a histogram's seconds."""
    labels = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({q}, {count(series, by=labels, over=over)})"


def sent_per_reply(by: str = "", over: str = EITHER) -> str:
    """Requests that went out for each reply asked."""
    sent = count(ATTEMPTS, f'{ACTION}!="listen"', by=by, over=over)
    return f"{sent} / ({count(REPLIES, by=by, over=over)} > 0)"


LOST: Final = "exhausted|not_recoverable"


def glance() -> tuple[Panel, ...]:
    """What is to be known within ten seconds."""

    def number(title: str, about: str, expr: str, unit: str, **more: object) -> Panel:
        settings = {"decimals": 1, "none": NO_REPLY, "width": 3, "height": 5, **more}
        return Panel(title, about, (Query(expr, instant=True),), unit, kind="stat", **settings)  # type: ignore[arg-type]

    firing = (
        f'count(max by (alertname, {PROVIDER}) (ALERTS{{alertname=~"TracedRetry.*", '
        f'alertstate="firing", {ENVIRONMENT}=~"$environment|"}})) or vector(0)'
    )
    return (
        number(
            "Alerts",
            "Alerts that fire now, of whichever provider, and those of no environment.",
            firing,
            "short",
            decimals=0,
            steps=((0, "green"), (1, "red")),
            none="0",
        ),
        number(
            "Replies",
            "Replies that agents asked for in the time chosen, however they ended.",
            count(REPLIES, over=RANGE),
            "short",
            decimals=0,
        ),
        number(
            "Heard at first try",
            "Of the replies that could be heard or fail: those that needed no retry. Replies that "
            "the caller interrupted, that a newer request replaced, or whose call ended first are "
            "left out.",
            of_replies("succeeded", over=RANGE),
            "percentunit",
        ),
        number(
            "Recovered by retry",
            "Of the same replies: those the caller heard only because they were asked again.",
            of_replies("recovered", over=RANGE),
            "percentunit",
        ),
        number(
            "Lost",
            "Of the same replies: those the caller never heard. The three add up to all.",
            of_replies(LOST, over=RANGE),
            "percentunit",
            decimals=2,
        ),
        number(
            "Burn rate",
            "How many times faster than the objective allows replies are exhausted, of the worst "
            "provider in the last hour. 1 is just what may be; at 14.4 somebody is paged.",
            f"max({hour_ratio()}) / scalar(1 - max({alerts.OBJECTIVE}))",
            "short",
            steps=((0, "green"), (1, "yellow"), (6, "red")),
        ),
        number(
            "Silence, p95",
            "Nineteen replies in twenty began, or failed, sooner than this after they were asked "
            "for: the silence callers heard.",
            quantile(0.95, SILENCE, over=RANGE),
            "s",
        ),
        number(
            "Requests per reply",
            "Requests sent for each reply asked. 1 without failures; what is above is load that "
            "retries add.",
            sent_per_reply(over=RANGE),
            "short",
            decimals=2,
        ),
    )


def hour_ratio() -> str:
    """The share of exhausted replies in the last hour, per provider."""
    return of_replies("exhausted", by=PROVIDER, over="1h")


def exhaustion() -> Panel:
    """The ratio that pages, and where it does."""
    return Panel(
        "Exhausted in the last hour",
        "Share of replies lost after every retry, in the hour before each moment. Above the upper "
        "line, and still so in the last minutes, somebody is paged.",
        (
            Query(hour_ratio(), f"{{{{{PROVIDER}}}}}"),
            Query(f'max({alerts.THRESHOLD}{{severity="critical"}})', "pages", dashed="red"),
            Query(f'min({alerts.THRESHOLD}{{severity="warning"}})', "ticket", dashed="yellow"),
        ),
        "percentunit",
        NO_REPLY,
        link=True,
    )


def codes(by: str, legend: str, title: str, about: str, *matchers: str, width: int = 8) -> Panel:
    """Failed attempts, stacked."""
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
    """Why replies ended unheard."""
    return Panel(
        "Why no further attempt was made",
        "Replies that were not heard, by what ended them: out of attempts, of time or of budget, "
        "not safe to ask again, refused, or called off by the caller or the provider.",
        (Query(per_minute(REPLIES, f'{STOP}!=""', by=STOP), f"{{{{{STOP}}}}}"),),
        "cpm",
        "every reply was heard",
        stacked=True,
        width=width,
    )


def outcomes(**more: object) -> Panel:
    """Replies by how they ended."""
    settings = {"stacked": True, "none": NO_REPLY, **more}
    return Panel(
        settings.pop("title", "Replies by outcome"),  # type: ignore[arg-type]
        "Replies a minute by how they ended. Green was heard at once, yellow after a retry, red "
        "never; blue and purple were called off by the caller or the provider.",
        (Query(per_minute(REPLIES, by=OUTCOME), f"{{{{{OUTCOME}}}}}"),),
        "cpm",
        **settings,  # type: ignore[arg-type]
    )


def quantiles(title: str, about: str, series: str, none: str, *more: Query) -> Panel:
    """Three quantiles of a histogram."""
    lines = tuple(Query(quantile(q, series), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99))
    return Panel(title, about, (*lines, *more), "s", none)


def heat(title: str, about: str, series: str, none: str) -> Panel:
    """A histogram over time."""
    return Panel(
        title,
        about,
        (Query(count(series, by="le"), "{{le}}", heat=True),),
        "s",
        none,
        kind="heatmap",
    )


def times() -> tuple[Panel, ...]:
    """How long everything took."""
    objective = Query(f"max({alerts.SILENCE_OBJECTIVE})", "objective, p95", dashed="red")
    attempt, waited = (
        "provider:traced_retry_attempt_duration_seconds_sum:increase1m",
        "provider:traced_retry_reply_duration_seconds_sum:increase1m",
    )
    replies = f"({count(REPLIES)} > 0)"
    return (
        quantiles(
            "Silence before a reply",
            "From asking to the first sign of the reply, or to its failure. What was called off is "
            "left out.",
            SILENCE,
            NO_REPLY,
            objective,
        ),
        quantiles(
            "One attempt",
            "From an attempt's start to its end, whichever end that was.",
            ATTEMPT_SECONDS,
            NO_REPLY,
        ),
        quantiles(
            "Wait before a retry",
            f"What was really waited between two attempts. {AGENTS_ONLY}",
            DELAY,
            "no retry waited, or agents send no metrics",
        ),
        heat("Silence, all replies", "How many replies began after how long.", SILENCE, NO_REPLY),
        heat(
            "One attempt, all of them",
            "How many attempts took how long. A stripe at the plugin's own time-out (5 or 10 s) is "
            "a provider that does not answer.",
            ATTEMPT_SECONDS,
            NO_REPLY,
        ),
        heat(
            "Waits, all of them",
            f"How many waits between two attempts took how long. {AGENTS_ONLY}",
            DELAY,
            "no retry waited, or agents send no metrics",
        ),
        Panel(
            "Where the silence comes from",
            "The mean silence of a reply, split: the time in which an attempt was under way, and "
            "the time waited between attempts.",
            (
                Query(f"{count(attempt)} / {replies}", "attempts"),
                Query(f"clamp_min({count(waited)} - {count(attempt)}, 0) / {replies}", "waiting"),
            ),
            "s",
            NO_REPLY,
            stacked=True,
            width=12,
        ),
        exemplars(),
    )


def exemplars() -> Panel:
    """The way from a number to a trace."""
    unclean = f'{CHOSEN}, {OUTCOME}=~"recovered|{LOST}", {STOP}!="session_closed"'
    spans = f'traces_span_metrics_calls_total{{span_name="{semconv.SPAN_REPLY}", {unclean}}}'
    own = f"{label(semconv.METRIC_REPLIES)}_total{{{unclean}, {GENERATE_REPLY}}}"
    drawn = per_minute(
        REPLIES, f'{OUTCOME}=~"recovered|{LOST}"', f'{STOP}!="session_closed"', by=OUTCOME
    )
    return Panel(
        "Replies that were not a clean success, each dot a trace",
        "Replies a minute that recovered or were lost. A dot is one of them: click it for its "
        "trace. Dots need Prometheus's exemplar storage and an exporter that passes exemplars on.",
        (
            Query(
                drawn,
                f"{{{{{OUTCOME}}}}}",
            ),
            # Prometheus looks for exemplars by a query's selectors. Its result would cost seconds
            # where every call has series of its own; of the year 1970 there is none, and for free.
            Query(
                f"sum by ({OUTCOME}) ({spans} @ 0 or {own} @ 0)",
                f"{{{{{OUTCOME}}}}}",
                exemplar=True,
            ),
        ),
        "cpm",
        "every reply was a clean success",
        width=12,
    )


def health() -> tuple[Panel, ...]:
    """Whether all of the above can be believed."""
    exporter, reason = label(semconv.EXPORTER), label(semconv.DROP_REASON)
    return (
        Panel(
            "Processes reporting",
            f"Processes whose own metrics arrived in the last five minutes. {AGENTS_ONLY} A worker "
            "that is scraped is one process, however many calls it serves.",
            (Query(f"sum(traced_retry:processes:count{{{THERE}}})", "processes"),),
            "short",
            "agents send no metrics of their own",
            width=6,
        ),
        Panel(
            "Spans dropped",
            "Spans that were never delivered, by exporter and reason. Above 0 traces have gaps and "
            f"counts from spans are too low. {AGENTS_ONLY}",
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
            "Retries that the poorest process may still send to each provider. At 0 replies fail "
            f"without a retry. {AGENTS_ONLY}",
            (
                Query(
                    f"min by ({PROVIDER}) (provider:traced_retry_budget_remaining:min{{{CHOSEN}}})",
                    f"{{{{{PROVIDER}}}}}",
                ),
            ),
            "short",
            "no budget reported",
            width=6,
        ),
        Panel(
            "Replies under way",
            f"Replies asked for that have not ended. What only rises is stuck. {AGENTS_ONLY}",
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
            "Heard after their failure was told",
            "Replies that came although the agent had given them up: the caller may have heard "
            f"two. It should be 0. {AGENTS_ONLY}",
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
            "Counts can be read",
            "Whether Prometheus can scrape the counts and the Collector: at 0 all above is old.",
            (Query("min by (job) (up)", "{{job}}"),),
            "short",
            "nothing is scraped: agents push",
            width=12,
            height=6,
        ),
    )


def matrix() -> Panel:
    """Providers by codes."""
    return Panel(
        "Failed attempts: providers and codes",
        "How often each provider failed with each code, in the time chosen. A code that we do not "
        "know is _OTHER here and exact on the trace.",
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


def overview() -> Board:
    """All providers."""
    return Board(
        alerts.OVERVIEW,
        "Realtime replies: overview",
        "Which provider fails, with what error, how much silence callers hear, and whether "
        "retrying helps.",
        (
            data_source("prometheus", "Prometheus"),
            rollup(),
            _ENVIRONMENTS,
            choice("provider", "Provider", _PROVIDERS),
        ),
        (
            Row("At a glance", glance()),
            Row("Replies", (outcomes(title="$provider", repeat="provider", width=6, height=7),)),
            Row(
                "Per provider",
                (
                    exhaustion(),
                    Panel(
                        "Retries per reply",
                        "Attempts after the first, for each reply asked: how much is retried.",
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
                        "Is retrying helping?",
                        "Of the replies whose first attempt failed and that were worth a retry: "
                        "the share that was heard in the end. Near 0 retries only add silence.",
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
                ),
            ),
            Row(
                "Why",
                (
                    codes(
                        CODE,
                        f"{{{{{CODE}}}}}",
                        "Failed attempts by code",
                        "Attempts a minute that failed, by the provider's code, or the kind of "
                        "failure where it gave none.",
                    ),
                    codes(
                        RECOVERABLE,
                        f"recoverable: {{{{{RECOVERABLE}}}}}",
                        "Could a retry mend it?",
                        "The same attempts: true could pass when asked again, false never will (a "
                        "key, a quota, a bad request).",
                    ),
                    stop_reasons(),
                    matrix(),
                    Panel(
                        "Requests per reply, by provider",
                        "Requests sent for each reply asked. Above the line a ticket is opened.",
                        (
                            Query(sent_per_reply(by=PROVIDER), f"{{{{{PROVIDER}}}}}"),
                            Query(f"max({alerts.STORM_LIMIT})", "ticket", dashed="yellow"),
                        ),
                        "short",
                        NO_REPLY,
                        link=True,
                    ),
                ),
            ),
            Row("Time", times()),
            Row("Can this be believed?", health()),
        ),
    )


def jaeger(title: str, outcome: str, about: str) -> Traces:
    """A search in Jaeger."""
    return Traces(
        title,
        f"{about} Open one for its attempts, their codes and waits. Grafana searches Jaeger by the "
        "HTTP API that Jaeger drops after 2.20.",
        "none in the time chosen, or Jaeger has no traces of this service",
        jaeger={
            "service": "$service",
            "operation": semconv.SPAN_REPLY,
            "tags": f"{semconv.PROVIDER}=$provider {semconv.OUTCOME}={outcome}",
            "limit": 20,
        },
        width=12,
    )


def provider() -> Board:
    """One provider."""
    spans = f'span_name="{semconv.SPAN_REPLY}", {PROVIDER}="$provider", {THERE}'
    window = (
        f'label_replace({{__name__=~"{alerts.ratio(".+")}", {CHOSEN}}}, "window", "$1", '
        '"__name__", ".*ratio_rate(.+)")'
    )
    return Board(
        alerts.PROVIDER,
        "Realtime replies: one provider",
        "One provider: its outcomes, models and codes, and the traces of the replies it lost.",
        (
            data_source("prometheus", "Prometheus"),
            data_source("jaeger", "Jaeger"),
            data_source("tempo", "Tempo"),
            rollup(),
            _ENVIRONMENTS,
            choice("provider", "Provider", _PROVIDERS, several=False),
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
                    exhaustion(),
                    Panel(
                        "Burn rate by window",
                        "How many times faster than the objective allows replies are exhausted, in "
                        "each window that the alerts look at. 1 is just what may be.",
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
                        "Lost, by model",
                        "Replies a minute that were lost, by model. Known only where replies are "
                        "counted from spans.",
                        (
                            Query(
                                f"60 * sum by ({MODEL}) (rate(traces_span_metrics_calls_total{{"
                                f'{spans}, {MODEL}=~"$model", {OUTCOME}=~"{LOST}"}}[{EITHER}]))',
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
                        "Replies, by model",
                        "Replies a minute, by model, however they ended. Known only where replies "
                        "are counted from spans.",
                        (
                            Query(
                                f"60 * sum by ({MODEL}) (rate(traces_span_metrics_calls_total{{"
                                f'{spans}, {MODEL}=~"$model"}}[{EITHER}]))',
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
                "Why",
                (
                    codes(
                        CODE,
                        f"{{{{{CODE}}}}}",
                        "Failed attempts by code",
                        "Attempts a minute that failed with the codes chosen above.",
                        f'{CODE}=~"$code"',
                    ),
                    codes(
                        ACTION,
                        f"{{{{{ACTION}}}}}",
                        "Failed attempts by action",
                        "The same attempts by what was done: a request sent, listened on for the "
                        "one already sent, or a session started afresh.",
                        f'{CODE}=~"$code"',
                    ),
                    stop_reasons(),
                    Panel(
                        "Codes",
                        "Failed attempts of the time chosen, by code, and whether a retry could "
                        "mend it.",
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
            Row("Time", times()),
            Row(
                "Lost replies in Jaeger",
                (
                    jaeger(
                        "Exhausted",
                        "exhausted",
                        "The newest twenty traces with a reply that was lost after every retry.",
                    ),
                    jaeger(
                        "Refused",
                        "not_recoverable",
                        "The newest twenty traces with a reply that no retry could mend.",
                    ),
                ),
                folded=True,
            ),
            Row(
                "Lost replies in Tempo",
                (
                    Traces(
                        "Lost replies",
                        "The newest twenty traces with a reply that was lost.",
                        "none lost in the time chosen",
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
