# SPDX-License-Identifier: Apache-2.0
"""Each alert by promtool: it fires, does not, resolves; little traffic, none, never a failure.

What goes in are the counters that spanmetrics or the agents make, so the recording rules are part
of what is tested. One sample and one evaluation a minute.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from backends.servers import command
from dashboards.reading import RULES

GRAFANA = "http://127.0.0.1:3000"
P = "openai"
GROUPS = [
    "traced_retry_recording",
    "traced_retry_rollup",
    "traced_retry_rollup_10m",
    "traced_retry_ratios",
    "traced_retry_alerts",
]
"""Each reads what those before it record. promtool would take them in any order."""


def calls(outcome, values, stop=None, provider=P, **labels):
    """Replies counted from spans."""
    return _series(
        "traces_span_metrics_calls_total",
        values,
        span_name="generate_reply",
        gen_ai_provider_name=provider,
        traced_retry_outcome=outcome,
        traced_retry_stop_reason=stop,
        **labels,
    )


def own_calls(outcome, values, instance):
    """Replies counted by an agent's process, pushed: no `up` of it."""
    return _series(
        "traced_retry_replies_total",
        values,
        job="agent",
        instance=instance,
        gen_ai_provider_name=P,
        traced_retry_outcome=outcome,
    )


def attempts(action, values, **labels):
    """Attempts counted from spans."""
    return _series(
        "traces_span_metrics_calls_total",
        values,
        span_name="generate_reply.attempt",
        gen_ai_provider_name=P,
        traced_retry_action=action,
        **labels,
    )


def silence(counts, outcome="succeeded"):
    """A histogram of replies' durations, {le: counts}, from spans."""
    return [
        _series(
            "traces_span_metrics_duration_seconds_bucket",
            values,
            span_name="generate_reply",
            gen_ai_provider_name=P,
            traced_retry_outcome=outcome,
            le=le,
        )
        for le, values in counts.items()
    ]


def _series(metric, values, **labels):
    inner = ", ".join(f'{name}="{value}"' for name, value in labels.items() if value is not None)
    return {"series": f"{metric}{{{inner}}}", "values": values}


@pytest.fixture
def promtool(tmp_path):
    """Runs one promtool test; fails with what promtool says."""

    def run(series, *, alerts=(), expressions=()):
        test = {
            "rule_files": [str(path) for path in RULES],
            "evaluation_interval": "1m",
            "group_eval_order": GROUPS,
            "tests": [
                {
                    "interval": "1m",
                    "input_series": list(series),
                    "alert_rule_test": [
                        {"eval_time": at, "alertname": name, "exp_alerts": list(expected)}
                        for at, name, expected in alerts
                    ],
                    "promql_expr_test": [
                        {"expr": expr, "eval_time": at, "exp_samples": list(expected)}
                        for at, expr, expected in expressions
                    ],
                }
            ],
        }
        path = tmp_path / "test.yaml"
        path.write_text(json.dumps(test))
        done = subprocess.run(
            [command("promtool"), "test", "rules", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == done.returncode, done.stdout + done.stderr

    return run


def links(section, provider=P):
    """The two links of an alert: to its section of the runbook, and to its dashboard."""
    variables = f"traced-retry-provider?var-provider={provider}"
    return {
        "runbook_url": f"{GRAFANA}/d/traced-retry-runbook?viewPanel={section}",
        "dashboard_url": f"{GRAFANA}/d/{variables if provider else 'traced-retry-overview'}",
    }


def burn(severity, long, short, description, **labels):
    """The burn-rate alert as promtool expects it."""
    return {
        "exp_labels": {
            "severity": severity,
            "long": long,
            "short": short,
            "gen_ai_provider_name": P,
            **labels,
        },
        "exp_annotations": {
            "summary": "Callers hear nothing: too many replies are exhausted.",
            "description": description,
            **links(1),
        },
    }


def lost(share, long, short, gone):
    """The burn-rate alert's description."""
    return (
        f"{share} of the replies asked of openai in the last {long} were lost after every retry, "
        f"and it goes on in the last {short}; 1 % of them may be. At this rate, or a faster one, "
        f"thirty days' error budget is gone in {gone}."
    )


FAST = burn("critical", "1h", "5m", lost("40%", "1h", "5m", "2 days"))
SLOW = burn("critical", "6h", "30m", lost("40%", "6h", "30m", "5 days"))


class TestBurn:
    NAME = "TracedRetryExhaustionBurn"
    OURS = f'alertname="{NAME}"'

    def test_burn_pages_by_short_then_by_both_windows(self, promtool):
        """Four in ten are lost: after two minutes by the short pair, after fifteen by both."""
        promtool(
            [calls("succeeded", "0+6x60"), calls("exhausted", "0+4x60", "deadline")],
            alerts=[
                ("2m", self.NAME, []),
                ("8m", self.NAME, [FAST]),
                ("30m", self.NAME, [FAST, SLOW]),
            ],
        )

    def test_burn_resolves_after_loss_ends(self, promtool):
        """Twenty minutes of loss: ten minutes later the fast page is over, after an hour both."""
        promtool(
            [calls("succeeded", "0+60x200"), calls("exhausted", "0+40x20 800+0x180", "deadline")],
            alerts=[("20m", self.NAME, [FAST, SLOW])],
            expressions=[
                ("31m", self._firing("1h"), []),
                ("31m", self._firing("6h"), [{"labels": '{long="6h"}', "value": 1}]),
                ("61m", self._firing("6h"), []),
            ],
        )

    def _firing(self, long):
        return (
            f'count by (long) (ALERTS{{alertstate="firing", severity="critical", long="{long}"}})'
        )

    @pytest.mark.parametrize(("lost", "fires"), [(2, False), (4, True)])
    def test_slow_burn_is_a_ticket(self, promtool, lost, fires):
        """Four lost of a hundred are a ticket after an hour; two, only after three."""
        promtool(
            [calls("succeeded", f"0+{100 - lost}x160"), calls("exhausted", f"0+{lost}x160")],
            expressions=[
                (
                    "2h",
                    f'count by (severity, long) (ALERTS{{alertstate="firing", {self.OURS}}})',
                    [{"labels": '{severity="warning", long="1d"}', "value": 1}] if fires else [],
                )
            ],
        )

    def test_loss_within_objective_fires_nothing(self, promtool):
        """One in two hundred is lost: half of what may be. Never an alert."""
        promtool(
            [calls("succeeded", "0+199x300"), calls("exhausted", "0+1x300")],
            alerts=[("30m", self.NAME, []), ("290m", self.NAME, [])],
        )

    def test_little_traffic_fires_nothing(self, promtool):
        """Three of three lost in an hour: no ratio that says anything, so no page."""
        promtool(
            [calls("succeeded", "0x90"), calls("exhausted", "0 0 1 1 1 2 2 2 3x80")],
            alerts=[(at, self.NAME, []) for at in ("6m", "10m", "30m")],
        )

    def test_no_traffic_fires_nothing(self, promtool):
        """Nothing asked: no ratio, no alert, and no NaN."""
        promtool(
            [calls("succeeded", "50x90"), calls("exhausted", "50x90")],
            alerts=[("60m", self.NAME, [])],
            expressions=[("60m", "provider:traced_retry_exhausted:ratio_rate1h", [])],
        )

    def test_provider_without_failure_has_ratio_zero(self, promtool):
        """Its ratio is 0, not absent."""
        series = "provider:traced_retry_exhausted:ratio_rate1h"
        promtool(
            [calls("succeeded", "0+5x60")],
            alerts=[("50m", self.NAME, [])],
            expressions=[
                ("50m", series, [{"labels": f'{series}{{gen_ai_provider_name="{P}"}}', "value": 0}])
            ],
        )

    def test_interrupted_replies_do_not_dilute_ratio(self, promtool):
        """Callers who hear nothing speak: their interruptions are not successes."""
        series = "provider:traced_retry_exhausted:ratio_rate1h"
        promtool(
            [
                calls("succeeded", "0+6x60"),
                calls("exhausted", "0+4x60"),
                calls("interrupted", "0+90x60"),
            ],
            expressions=[
                (
                    "40m",
                    f"round({series}, 0.001)",
                    [{"labels": f'{{gen_ai_provider_name="{P}"}}', "value": 0.4}],
                )
            ],
        )

    def test_counts_of_short_lived_agents_fire_too(self, promtool):
        """The same from processes that count for themselves and live for ten minutes each."""
        series = []
        for number in range(6):
            before, after = "_x" + str(10 * number), " _x60"
            lead = f"{before} " if number else ""
            series += [
                own_calls("succeeded", f"{lead}0+6x9{after}", f"p{number}"),
                own_calls("exhausted", f"{lead}0+4x9{after}", f"p{number}"),
            ]
        promtool(series, alerts=[("30m", self.NAME, [FAST, SLOW])])

    def test_alert_names_environment_that_fails(self, promtool):
        """Of a provider's environments it names the one that fails, and so does its link."""
        of = {"deployment_environment_name": "eu prod"}
        link = links(1)["dashboard_url"] + "&var-environment=eu+prod"
        alert = {
            "exp_labels": {**FAST["exp_labels"], **of},
            "exp_annotations": {**FAST["exp_annotations"], "dashboard_url": link},
        }
        promtool(
            [
                calls("succeeded", "0+6x60", **of),
                calls("exhausted", "0+4x60", "deadline", **of),
                calls("succeeded", "0+90x60", deployment_environment_name="test"),
                calls("succeeded", "0+90x60"),
            ],
            alerts=[("8m", self.NAME, [alert])],
        )


class TestRepliesExhausted:
    NAME = "TracedRetryRepliesExhausted"

    def _alert(self, count):
        return {
            "exp_labels": {"severity": "warning", "gen_ai_provider_name": P},
            "exp_annotations": {
                "summary": "Replies were lost after every retry; there are too few for a ratio.",
                "description": f"{count} replies asked of openai were exhausted in the last 1h: "
                "callers heard nothing.",
                **links(2),
            },
        }

    def test_fires_where_traffic_is_little_and_resolves(self, promtool):
        """Three of three lost: a ticket although no ratio says anything; over after they are."""
        promtool(
            [calls("exhausted", "0 0 1 1 1 2 2 2 3x80", "deadline")],
            alerts=[("12m", self.NAME, [self._alert(3)]), ("75m", self.NAME, [])],
        )

    def test_two_failures_fire_nothing(self, promtool):
        """Below the threshold nothing is said."""
        promtool(
            [calls("exhausted", "0 0 1 1 1 2x80", "deadline")],
            alerts=[(f"{m}m", self.NAME, []) for m in (5, 10, 12)],
        )

    def test_three_failures_in_much_traffic_fire_nothing(self, promtool):
        """Three lost among a hundred replies in an hour: the ratio's business, not this one's."""
        promtool(
            [calls("exhausted", "0 0 1 1 1 2 2 2 3x80"), calls("succeeded", "0+10x90")],
            alerts=[(f"{m}m", self.NAME, []) for m in (5, 10, 15, 30)],
        )

    def test_stop_reasons_are_added_up(self, promtool):
        """Whatever ended them, three are three."""
        promtool(
            [
                calls("exhausted", "0 0 1x80", "deadline"),
                calls("exhausted", "0 0 1x80", "budget"),
                calls("exhausted", "0 0 1x80", "max_attempts"),
            ],
            alerts=[("9m", self.NAME, [self._alert(3)])],
        )

    def test_no_traffic_fires_nothing(self, promtool):
        """Nothing asked, nothing said."""
        promtool([calls("exhausted", "7x60")], alerts=[("30m", self.NAME, [])])


class TestNotRecoverable:
    NAME = "TracedRetryNotRecoverable"
    REFUSED = ("not_recoverable", "not_recoverable")

    def _alert(self, count, codes):
        return {
            "exp_labels": {"severity": "critical", "gen_ai_provider_name": P},
            "exp_annotations": {
                "summary": "A provider refuses replies for good: no retry helps.",
                "description": f"{count} replies asked of openai in the last 5m were refused as "
                f"not recoverable. Codes, the most frequent first: {codes}.",
                **links(3),
            },
        }

    def _refuse(self, values, code="invalid_api_key", **labels):
        outcome, stop = self.REFUSED
        return [
            calls(outcome, values, stop, **labels),
            attempts(
                "send",
                values,
                traced_retry_result="failed",
                error_type=code,
                traced_retry_recoverable="false",
                **labels,
            ),
        ]

    def test_fires_at_once_and_resolves(self, promtool):
        """A key has expired: a page within two minutes of the third; over when the key is new."""
        promtool(
            [*self._refuse("0 2 5 5x60"), calls("succeeded", "0 0 0 0+10x60")],
            alerts=[
                ("1m", self.NAME, []),
                ("3m", self.NAME, [self._alert(5, "invalid_api_key")]),
                ("12m", self.NAME, []),
            ],
        )

    def test_alert_names_most_frequent_codes_first(self, promtool):
        """The most frequent first."""
        other = attempts(
            "send",
            "0+1x60",
            traced_retry_result="failed",
            error_type="insufficient_quota",
            traced_retry_recoverable="false",
        )
        promtool(
            [*self._refuse("0+4x60"), other],
            alerts=[("20m", self.NAME, [self._alert(20, "invalid_api_key insufficient_quota")])],
        )

    def test_alert_names_codes_of_its_environment_only(self, promtool):
        """And not those of another one."""
        alert = self._alert(20, "invalid_api_key")
        alert["exp_labels"]["deployment_environment_name"] = "eu"
        alert["exp_annotations"]["dashboard_url"] += "&var-environment=eu"
        elsewhere = attempts(
            "send",
            "0+4x60",
            traced_retry_result="failed",
            error_type="insufficient_quota",
            traced_retry_recoverable="false",
            deployment_environment_name="us",
        )
        promtool(
            [*self._refuse("0+4x60", deployment_environment_name="eu"), elsewhere],
            alerts=[("20m", self.NAME, [alert])],
        )

    def test_small_share_fires_nothing(self, promtool):
        """One bad request among twenty pages nobody."""
        promtool(
            [*self._refuse("0+1x60"), calls("succeeded", "0+19x60")],
            alerts=[("30m", self.NAME, [])],
        )

    def test_two_refusals_fire_nothing(self, promtool):
        """Two refused are no page, even if they are all."""
        promtool(self._refuse("0 1 2x60"), alerts=[(f"{m}m", self.NAME, []) for m in (2, 4, 8)])

    def test_closed_session_is_no_refusal(self, promtool):
        """Replies whose session was closed have the same outcome, and another reason."""
        promtool(
            [calls("not_recoverable", "0+5x60", "session_closed")],
            alerts=[("30m", self.NAME, [])],
        )

    def test_no_traffic_fires_nothing(self, promtool):
        """Nothing asked, nothing said."""
        promtool(self._refuse("9x60"), alerts=[("30m", self.NAME, [])])


class TestManyProviders:
    NAME = "TracedRetryManyProviders"

    def _outage(self, providers, **labels):
        return [
            series
            for provider in providers
            for series in (
                calls("succeeded", "0+6x30 180+6x60", provider=provider, **labels),
                calls("exhausted", "0+4x30 120+0x60", provider=provider, **labels),
            )
        ]

    def test_fires_before_each_alone_and_resolves(self, promtool):
        """Ten at once: it is there no later than their pages, which it inhibits."""
        alert = {
            "exp_labels": {"severity": "critical"},
            "exp_annotations": {
                "summary": "Several providers fail at once.",
                "description": "10 providers lose replies at the same time: look for what they "
                "share (network, DNS, a proxy, a deployment of the agents) before any one of them.",
                **links(4, None),
            },
        }
        alone = (
            'count(ALERTS{alertstate="firing", severity="critical"}) '
            f'unless on () ALERTS{{alertstate="firing", alertname="{self.NAME}"}}'
        )
        promtool(
            self._outage(f"p{n}" for n in range(10)),
            alerts=[("20m", self.NAME, [alert]), ("89m", self.NAME, [])],
            expressions=[
                ("20m", f"count_over_time(({alone})[20m:1m])", []),
                (
                    "20m",
                    'count(ALERTS{alertstate="firing", long="1h"})',
                    [{"labels": "{}", "value": 10}],
                ),
            ],
        )

    def test_providers_are_counted_per_environment(self, promtool):
        """Three in one environment are many; one in each of two others are not."""
        where = {"abc": "eu", "d": "us", "e": "asia"}
        outage = [
            series
            for providers, environment in where.items()
            for series in self._outage(providers, deployment_environment_name=environment)
        ]
        alert = {
            "exp_labels": {"severity": "critical", "deployment_environment_name": "eu"},
            "exp_annotations": {
                "summary": "Several providers fail at once.",
                "description": "3 providers lose replies at the same time: look for what they "
                "share (network, DNS, a proxy, a deployment of the agents) before any one of them.",
                **links(4, None),
            },
        }
        alert["exp_annotations"]["dashboard_url"] += "?var-environment=eu"
        promtool(outage, alerts=[("20m", self.NAME, [alert])])

    def test_two_providers_fire_nothing(self, promtool):
        """Each of them pages for itself."""
        promtool(
            self._outage(["a", "b"]),
            alerts=[("20m", self.NAME, [])],
            expressions=[
                (
                    "20m",
                    'count(ALERTS{alertstate="firing", long="1h"})',
                    [{"labels": "{}", "value": 2}],
                )
            ],
        )

    def test_no_traffic_fires_nothing(self, promtool):
        """Ten that ask nothing are no outage."""
        promtool(
            [calls("exhausted", "9x60", provider=f"p{n}") for n in range(10)],
            alerts=[("30m", self.NAME, [])],
        )


class TestStorm:
    NAME = "TracedRetryStorm"

    def test_fires_and_resolves(self, promtool):
        """Two requests per reply, for longer than five minutes; then one again."""
        alert = {
            "exp_labels": {"severity": "warning", "gen_ai_provider_name": P},
            "exp_annotations": {
                "summary": "Retries multiply the requests sent to a provider.",
                "description": "2.00 requests per reply go to openai; without failures it is one.",
                **links(5),
            },
        }
        promtool(
            [
                calls("recovered", "0+10x80"),
                attempts("send", "0+10x80", traced_retry_result="succeeded"),
                attempts("send", "0+10x30 300x50", traced_retry_result="failed"),
            ],
            alerts=[("4m", self.NAME, []), ("25m", self.NAME, [alert]), ("60m", self.NAME, [])],
        )

    def test_listening_is_no_storm(self, promtool):
        """Three windows of listening are not three requests."""
        promtool(
            [
                calls("recovered", "0+10x60"),
                attempts("send", "0+10x60"),
                attempts("listen", "0+30x60"),
            ],
            alerts=[("30m", self.NAME, [])],
        )

    def test_little_or_no_traffic_fires_nothing(self, promtool):
        """One reply asked twice is no storm; nothing is none either."""
        promtool(
            [calls("recovered", "0 0 0 1x60"), attempts("send", "0 0 0 3x60")],
            alerts=[("6m", self.NAME, []), ("12m", self.NAME, []), ("50m", self.NAME, [])],
        )


class TestSilence:
    NAME = "TracedRetrySilence"

    def test_fires_and_resolves(self, promtool):
        """One reply in ten takes seven seconds, for longer than ten minutes; then none."""
        alert = {
            "exp_labels": {"severity": "warning", "gen_ai_provider_name": P},
            "exp_annotations": {
                "summary": "Callers wait too long for a reply.",
                "description": "One reply of openai in 20 begins only after 6.2 s of silence or "
                "more; the objective is 3 s.",
                **links(6),
            },
        }
        promtool(
            [
                calls("succeeded", "0+10x90"),
                *silence(
                    {
                        "1": "0+9x40 360+10x50",
                        "3": "0+9x40 360+10x50",
                        "5": "0+9x40 360+10x50",
                        "7.5": "0+10x90",
                        "+Inf": "0+10x90",
                    }
                ),
            ],
            alerts=[("9m", self.NAME, []), ("35m", self.NAME, [alert]), ("70m", self.NAME, [])],
        )

    def test_silence_within_objective_fires_nothing(self, promtool):
        """One in thirty is not the 95th percentile."""
        promtool(
            [
                calls("succeeded", "0+30x60"),
                *silence({"3": "0+29x60", "7.5": "0+30x60", "+Inf": "0+30x60"}),
            ],
            alerts=[("40m", self.NAME, [])],
        )

    def test_interrupted_reply_is_not_slow(self, promtool):
        """A reply that the caller interrupted after seven seconds is no slow reply."""
        promtool(
            [
                calls("succeeded", "0+10x60"),
                calls("interrupted", "0+10x60"),
                *silence({"3": "0+10x60", "7.5": "0+10x60", "+Inf": "0+10x60"}),
                *silence({"3": "0x60", "7.5": "0+10x60", "+Inf": "0+10x60"}, "interrupted"),
            ],
            alerts=[("40m", self.NAME, [])],
        )

    def test_little_or_no_traffic_fires_nothing(self, promtool):
        """One slow reply is no percentile; none is none."""
        promtool(
            [
                calls("succeeded", "0 0 1x60"),
                *silence({"3": "0x60", "7.5": "0 0 1x60", "+Inf": "0 0 1x60"}),
            ],
            alerts=[("5m", self.NAME, []), ("20m", self.NAME, []), ("50m", self.NAME, [])],
        )


class TestTelemetryAbsent:
    NAME = "TracedRetryTelemetryAbsent"

    def _alert(self, cause, description, **labels):
        return {
            "exp_labels": {"severity": "critical", "cause": cause, **labels},
            "exp_annotations": {
                "summary": "Nobody counts replies: their failure would page no one.",
                "description": description,
                **links(7, None),
            },
        }

    def test_failed_scrape_fires_until_it_works(self, promtool):
        """The connector is down for a quarter of an hour; then it is back."""
        alert = self._alert(
            "counts_down",
            "Prometheus cannot scrape traced-retry-spans, where replies are counted from spans.",
            job="traced-retry-spans",
        )
        promtool(
            [_series("up", "1x5 0x30 1x30", job="traced-retry-spans", instance="a")],
            alerts=[("10m", self.NAME, []), ("30m", self.NAME, [alert]), ("50m", self.NAME, [])],
        )

    def test_agents_without_new_counts_fire(self, promtool):
        """Four jobs run; the counts are there and stand still. Then replies come in."""
        alert = self._alert(
            "agents_silent", "4 agent jobs run, and not one reply of theirs was counted."
        )
        promtool(
            [
                _series("lk_agents_active_job_count", "4x120", job="workers"),
                calls("succeeded", "9x60 9+4x60"),
            ],
            alerts=[("14m", self.NAME, []), ("40m", self.NAME, [alert]), ("90m", self.NAME, [])],
        )

    def test_agents_without_series_fire(self, promtool):
        """Likewise where the series are not even there."""
        alert = self._alert(
            "agents_silent", "4 agent jobs run, and not one reply of theirs was counted."
        )
        promtool(
            [_series("lk_agents_active_job_count", "4x120", job="workers")],
            alerts=[("40m", self.NAME, [alert])],
        )

    def test_no_agents_fire_nothing(self, promtool):
        """No job runs: that nothing is counted is as it should be."""
        promtool(
            [
                _series("lk_agents_active_job_count", "0x120", job="workers"),
                calls("succeeded", "9x120"),
                _series("up", "1x120", job="traced-retry-spans", instance="a"),
            ],
            alerts=[("90m", self.NAME, [])],
        )


class TestSpansDropped:
    NAME = "TracedRetrySpansDropped"

    def test_fires_and_resolves(self, promtool):
        """Seven spans of one process found the queue full; ten minutes later it is over."""
        alert = {
            "exp_labels": {
                "severity": "warning",
                "traced_retry_exporter": "otlp",
                "traced_retry_drop_reason": "queue_full",
            },
            "exp_annotations": {
                "summary": "Spans were dropped: traces have gaps, and counts from spans are too "
                "low.",
                "description": "7 spans were dropped in the last 10m by the exporter otlp, "
                "because: queue_full.",
                **links(8, None),
            },
        }
        promtool(
            [
                _series(
                    "traced_retry_export_dropped_total",
                    "0 0 7x60",
                    job="agent",
                    instance="a",
                    traced_retry_exporter="otlp",
                    traced_retry_drop_reason="queue_full",
                )
            ],
            alerts=[("10m", self.NAME, [alert]), ("30m", self.NAME, [])],
        )

    def test_no_dropped_spans_fire_nothing(self, promtool):
        """Zero is zero."""
        promtool(
            [_series("traced_retry_export_dropped_total", "0x60", job="agent", instance="a")],
            alerts=[("30m", self.NAME, [])],
        )


def test_both_rollups_have_same_sum(promtool):
    """An hour of six replies a minute, of each minute and of each ten: 360 either way."""
    hour = {  # Prometheus 2.42 takes both ends of a range; promtool has each rule each minute
        "provider:traced_retry_replies:increase1m": "59m",
        "provider:traced_retry_replies:increase10m": "59m:10m",
    }
    labels = f'{{gen_ai_provider_name="{P}", traced_retry_outcome="succeeded"}}'
    promtool(
        [calls("succeeded", "0+6x180")],
        expressions=[
            ("150m", f"sum_over_time({name}[{of}])", [{"labels": labels, "value": 360}])
            for name, of in hour.items()
        ],
    )


def test_rules_are_well_formed():
    """Promtool finds every rule file in order, lint included."""
    done = subprocess.run(
        [command("promtool"), "check", "rules", "--lint=all", *map(str, RULES)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
