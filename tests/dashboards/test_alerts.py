# SPDX-License-Identifier: Apache-2.0
"""Each alert on Prometheus 2, Prometheus 3 and VictoriaMetrics: it fires and resolves.

The input is the counters that spanmetrics or the agents make, so the recording rules are tested as
well. There is one sample and one evaluation a minute, unless a test needs more. All rules are
evaluated equally often, also those that have an interval of their own.
"""

from __future__ import annotations

import subprocess

import pytest
from backends.servers import command
from dashboards.reading import ENGINES, GROUPS, RULES, dashboards, panels, run_rule_test

GRAFANA = "http://127.0.0.1:3000"
P = "openai"


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


@pytest.fixture(params=ENGINES)
def promtool(request, tmp_path):
    """Return a function that runs one rule test and fails with the message of the engine."""

    def run(series, *, alerts=(), expressions=(), interval="1m", evaluation="1m"):
        test = {
            "rule_files": [str(path) for path in RULES],
            "evaluation_interval": evaluation,
            "group_eval_order": GROUPS,
            "tests": [
                {
                    "interval": interval,
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
        done = run_rule_test(tmp_path, test, request.param)
        assert 0 == done.returncode, done.stdout + done.stderr

    run.engine = request.param
    return run


def links(section, provider=P):
    """The two links of an alert: to its section of the runbook, and to its dashboard."""
    variables = f"traced-retry-provider?var-provider={provider}"
    return {
        "runbook_url": f"{GRAFANA}/d/traced-retry-runbook?viewPanel={section}",
        "dashboard_url": f"{GRAFANA}/d/{variables if provider else 'traced-retry-overview'}",
    }


def firing(name, **labels):
    """Return the query that counts the firing alerts of that name by severity and window."""
    matchers = {"alertname": name, "alertstate": "firing", **labels}
    selector = ", ".join(f'{label}="{value}"' for label, value in matchers.items())
    return f"count by (severity, long) (ALERTS{{{selector}}})"


def alerts_of(*severities_and_windows):
    """Return the result that promtool expects of :func:`firing`: one alert of each pair."""
    return [
        {"labels": f'{{severity="{severity}", long="{long}"}}', "value": 1}
        for severity, long in severities_and_windows
    ]


OUTAGE, HOUR, SIX_HOURS = ("critical", "5m"), ("critical", "1h"), ("critical", "6h")


class TestServices:
    SERIES = "provider:traced_retry_service_replies:increase1m"
    LOST = (
        "round(sum by (service_name, service_version) "
        f'(sum_over_time({SERIES}{{traced_retry_outcome="exhausted"}}[29m30s])))'
    )

    def _lost(self, count, **labels):
        inner = ", ".join(f'{name}="{value}"' for name, value in labels.items())
        return {"labels": f"{{{inner}}}", "value": count}

    def test_spans_are_counted_by_service_and_version(self, promtool):
        """Each version of each service has its own lost replies."""
        one = {"service_name": "support", "service_version": "1"}
        two = {"service_name": "support", "service_version": "2"}
        promtool(
            [
                calls("exhausted", "0+1x60", "deadline", **one),
                calls("exhausted", "0+3x60", "deadline", **two),
                calls("exhausted", "0+2x60", "deadline", service_name="sales"),
                calls("succeeded", "0+9x60", **one),
            ],
            expressions=[
                (
                    "45m",
                    self.LOST,
                    [
                        self._lost(30, **one),
                        self._lost(90, **two),
                        self._lost(60, service_name="sales"),
                    ],
                )
            ],
        )

    def test_agents_counts_take_the_service_from_job(self, promtool):
        """A pushed process has its service as job; vmagent's series have a label for it."""
        vmagent = {"job": "vmagent", "instance": "here:8429"}
        labels = {
            "gen_ai_provider_name": P,
            "traced_retry_outcome": "exhausted",
            "traced_retry_stop_reason": "deadline",
            "service_name": "sales",
            **vmagent,
        }
        promtool(
            [
                own_calls("exhausted", "0+1x60", "p1"),
                own_calls("exhausted", "0+1x60", "p2"),
                _series("traced_retry_replies_total", "0+4x60", **labels),
                _series("up", "1x60", **vmagent),
            ],
            expressions=[
                (
                    "45m",
                    self.LOST,
                    [self._lost(60, service_name="agent"), self._lost(120, service_name="sales")],
                )
            ],
        )

    def test_too_many_services_record_no_series(self, tmp_path):
        """The rule then fails, and Prometheus names the limit."""
        (folder := tmp_path / "rules").mkdir()
        for path in RULES:
            limited = path.read_text().replace("limit: 2000", "limit: 1")
            (folder / path.name).write_text(limited)
        test = {
            "rule_files": [str(path) for path in folder.iterdir()],
            "evaluation_interval": "1m",
            "group_eval_order": GROUPS,
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [
                        calls("exhausted", "0+1x20", "deadline", service_name=name)
                        for name in ("support", "sales")
                    ],
                    "promql_expr_test": [
                        {"expr": f"count({self.SERIES})", "eval_time": "20m", "exp_samples": []}
                    ],
                }
            ],
        }
        done = run_rule_test(tmp_path, test)

        assert 1 == done.returncode
        assert "exceeded limit of 1 with 2 series" in done.stdout + done.stderr

    def test_half_of_the_error_budget_is_left(self, promtool):
        """With an objective of 99 % and 0.5 % lost, half of the budget of 30 days is used up."""
        (left,) = (
            panel["targets"][0]["expr"]
            for panel in panels(dashboards()["overview.json"])
            if panel["title"] == "Error budget left"
        )
        query = left.replace("$provider", ".*").replace("$environment", ".*")
        promtool(
            [calls("succeeded", "0+199x90"), calls("exhausted", "0+1x90", "deadline")],
            expressions=[
                (
                    "80m",
                    f"round({query}, 0.01)",
                    [{"labels": f'{{gen_ai_provider_name="{P}"}}', "value": 0.5}],
                )
            ],
        )


class TestRepliesLost:
    NAME = "TracedRetryRepliesLost"

    def _alert(self, severity, long, short, summary, description, **labels):
        return {
            "exp_labels": {
                "severity": severity,
                "long": long,
                "short": short,
                "gen_ai_provider_name": P,
                **labels,
            },
            "exp_annotations": {"summary": summary, "description": description, **links(1)},
        }

    def test_texts_name_shares_counts_and_code(self, promtool):
        """Four in ten replies are lost: the outage, the hour and six hours each have their text."""
        failed = attempts("send", "0+4x60", traced_retry_result="failed", error_type="server_error")
        burns = "Realtime replies burn too much error budget."
        promtool(
            [calls("succeeded", "0+6x60"), calls("exhausted", "0+4x60", "deadline"), failed],
            alerts=[
                (
                    "30m",
                    self.NAME,
                    [
                        self._alert(
                            "critical",
                            "5m",
                            "5m",
                            "Many realtime replies are lost.",
                            "openai lost 40% of its replies in the last 5m (limit: 30 %). "
                            "Lost: 20 of 50 replies. Most frequent error code: server_error.",
                        ),
                        self._alert(
                            "critical",
                            "1h",
                            "5m",
                            burns,
                            "openai lost 40% of its replies in the last 1h (objective: at most "
                            "1 %). At this rate the 30-day error budget is used up in 4 days. "
                            "Lost: 109 of 272 replies. Most frequent error code: server_error.",
                        ),
                        self._alert(
                            "critical",
                            "6h",
                            "30m",
                            burns,
                            "openai lost 40% of its replies in the last 6h (objective: at most "
                            "1 %). At this rate the 30-day error budget is used up in 5 days. "
                            "Lost: 109 of 272 replies. Most frequent error code: server_error.",
                        ),
                        self._alert(
                            "warning",
                            "3h",
                            "30m",
                            "Realtime replies burn their error budget slowly.",
                            "openai lost 40% of its replies in the last 3h (objective: at most "
                            "1 %). At this rate the 30-day error budget is used up in 10 days. "
                            "Lost: 109 of 272 replies. Most frequent error code: server_error.",
                        ),
                    ],
                )
            ],
        )

    @pytest.mark.parametrize(
        ("outcome", "stop"),
        [
            ("exhausted", "deadline"),
            ("not_recoverable", "output_started"),
            ("not_recoverable", "not_recoverable"),
        ],
    )
    def test_every_kind_of_loss_pages(self, promtool, outcome, stop):
        """Exhausted replies, refused ones and those that broke off page within eight minutes."""
        promtool(
            [calls("succeeded", "0+6x60"), calls(outcome, "0+4x60", stop)],
            expressions=[("8m", firing(self.NAME), alerts_of(OUTAGE, HOUR))],
        )

    def test_closed_session_is_no_loss(self, promtool):
        """Replies whose session was closed have the same outcome and do not count."""
        promtool(
            [
                calls("succeeded", "0+6x60"),
                calls("not_recoverable", "0+40x60", "session_closed"),
            ],
            alerts=[("30m", self.NAME, [])],
        )

    def test_alerts_resolve_after_loss_ends(self, promtool):
        """After 20 minutes of loss, the short windows end within 15 minutes, and all in an hour."""
        promtool(
            [calls("succeeded", "0+60x200"), calls("exhausted", "0+40x20 800+0x180", "deadline")],
            expressions=[
                (
                    "21m",
                    firing(self.NAME),
                    alerts_of(OUTAGE, HOUR, SIX_HOURS, ("warning", "3h")),
                ),
                ("36m", firing(self.NAME, severity="critical"), alerts_of(SIX_HOURS)),
                ("66m", firing(self.NAME, severity="critical"), []),
            ],
        )

    def test_alert_fires_through_a_short_recovery(self, promtool):
        """A loss that pauses for five minutes is one notification: the page does not resolve."""
        name = f'ALERTS{{alertstate="firing", alertname="{self.NAME}", long="5m"}}'
        promtool(
            [
                calls("succeeded", "0+10x90"),
                calls("exhausted", "0+10x20 200+0x5 210+10x60", "deadline"),
            ],
            expressions=[
                (
                    "60m",
                    f"sum(changes(({name} or vector(0))[50m:1m]))",
                    [{"labels": "{}", "value": 0}],
                )
            ],
        )

    @pytest.mark.parametrize(("lost", "fires"), [(2, False), (4, True)])
    def test_slow_burn_is_a_ticket(self, promtool, lost, fires):
        """Four lost in a hundred open a ticket after two hours, two in a hundred do not."""
        promtool(
            [calls("succeeded", f"0+{100 - lost}x160"), calls("exhausted", f"0+{lost}x160")],
            expressions=[
                (
                    "150m",
                    firing(self.NAME),
                    alerts_of(("warning", "1d"), ("warning", "3h")) if fires else [],
                )
            ],
        )

    def test_loss_within_objective_fires_no_alert(self, promtool):
        """One lost reply in two hundred is half of the allowed loss."""
        promtool(
            [calls("succeeded", "0+199x300"), calls("exhausted", "0+1x300")],
            alerts=[("30m", self.NAME, []), ("290m", self.NAME, [])],
        )

    def test_losses_of_one_call_fire_no_page(self, promtool):
        """Nine lost replies of nine are fewer than a page needs."""
        promtool(
            [calls("succeeded", "0x90"), calls("exhausted", "0 1 2 3 4 5 6 7 8 9x80")],
            alerts=[(at, self.NAME, []) for at in ("6m", "10m", "30m")],
        )

    def test_no_traffic_fires_no_alert(self, promtool):
        """Without a reply there is no ratio, no alert and no NaN."""
        promtool(
            [calls("succeeded", "50x90"), calls("exhausted", "50x90")],
            alerts=[("60m", self.NAME, [])],
            expressions=[("60m", "provider:traced_retry_lost:ratio_rate1h", [])],
        )

    def test_provider_without_failure_has_ratio_zero(self, promtool):
        """The ratio is 0 and not absent."""
        series = "provider:traced_retry_lost:ratio_rate1h"
        promtool(
            [calls("succeeded", "0+5x60")],
            alerts=[("50m", self.NAME, [])],
            expressions=[
                ("50m", series, [{"labels": f'{series}{{gen_ai_provider_name="{P}"}}', "value": 0}])
            ],
        )

    def test_interrupted_replies_do_not_dilute_ratio(self, promtool):
        """Interruptions are not successes: callers who hear no reply speak again."""
        series = "provider:traced_retry_lost:ratio_rate1h"
        promtool(
            [
                calls("succeeded", "0+6x60"),
                calls("exhausted", "0+4x60"),
                calls("interrupted", "0+90x60"),
            ],
            expressions=[
                (
                    "40m",
                    f"sum by (gen_ai_provider_name) (round({series}, 0.001))",
                    [{"labels": f'{{gen_ai_provider_name="{P}"}}', "value": 0.4}],
                )
            ],
        )

    def test_counts_of_short_lived_agents_fire_too(self, promtool):
        """Processes that count for themselves and live for ten minutes each lead to the page."""
        series = []
        for number in range(6):
            before, after = "_x" + str(10 * number), " _x60"
            lead = f"{before} " if number else ""
            series += [
                own_calls("succeeded", f"{lead}0+6x9{after}", f"p{number}"),
                own_calls("exhausted", f"{lead}0+4x9{after}", f"p{number}"),
            ]
        promtool(
            series,
            expressions=[
                (
                    "30m",
                    firing(self.NAME, severity="critical"),
                    alerts_of(OUTAGE, HOUR, SIX_HOURS),
                )
            ],
        )

    def test_alert_names_environment_that_fails(self, promtool):
        """Text and link name the failing environment of a provider, and its counts only."""
        of = {"deployment_environment_name": "eu prod"}
        alert = self._alert(
            "critical",
            "5m",
            "5m",
            "Many realtime replies are lost.",
            "openai in eu prod lost 40% of its replies in the last 5m (limit: 30 %). "
            "Lost: 16 of 40 replies.",
            **of,
        )
        alert["exp_annotations"]["dashboard_url"] += "&var-environment=eu+prod"
        promtool(
            [
                calls("succeeded", "0+6x60", **of),
                calls("exhausted", "0+4x60", "deadline", **of),
                calls("succeeded", "0+90x60", deployment_environment_name="test"),
                calls("succeeded", "0+90x60"),
            ],
            alerts=[("4m", self.NAME, [alert])],
        )


class TestFewRepliesLost:
    NAME = "TracedRetryFewRepliesLost"

    def _alert(self, count):
        return {
            "exp_labels": {"severity": "warning", "gen_ai_provider_name": P},
            "exp_annotations": {
                "summary": "A few realtime replies were lost.",
                "description": f"openai lost {count} replies in the last 1h. That may be one call: "
                "a page needs 10 lost replies.",
                **links(2),
            },
        }

    def test_fires_with_little_traffic_and_resolves(self, promtool):
        """Three of three lost replies open a ticket that ends an hour after them."""
        promtool(
            [calls("exhausted", "0 0 1 1 1 2 2 2 3x90", "deadline")],
            alerts=[("20m", self.NAME, [self._alert(3)]), ("80m", self.NAME, [])],
        )

    def test_two_lost_replies_fire_no_alert(self, promtool):
        """Two lost replies are below the threshold."""
        promtool(
            [calls("exhausted", "0 0 1 1 1 2x80", "deadline")],
            alerts=[(f"{m}m", self.NAME, []) for m in (5, 10, 12)],
        )

    def test_three_failures_in_much_traffic_fire_no_alert(self, promtool):
        """Three lost replies of a hundred in an hour are below the share."""
        promtool(
            [calls("exhausted", "0 0 0 1 1 1 2 2 2 3x80"), calls("succeeded", "0+20x90")],
            alerts=[(f"{m}m", self.NAME, []) for m in (5, 10, 15, 30)],
        )

    def test_stop_reasons_are_added_up(self, promtool):
        """Three losses with three stop reasons are three losses, with a sample each 15 s.

        With one sample a minute Prometheus 3 counts 2.4, because a range has a sample less there.
        """
        promtool(
            [
                calls("exhausted", "0x9 1x60", "deadline"),
                calls("exhausted", "0x9 1x60", "budget"),
                calls("not_recoverable", "0x9 1x60", "output_started"),
            ],
            alerts=[("12m", self.NAME, [self._alert(3)])],
            interval="15s",
        )

    def test_no_traffic_fires_no_alert(self, promtool):
        """Losses of more than an hour ago do not fire.

        VictoriaMetrics counts the first value of a new series as new losses.
        """
        promtool([calls("exhausted", "7x90")], alerts=[("80m", self.NAME, [])])


class TestNotRecoverable:
    NAME = "TracedRetryNotRecoverable"
    REFUSED = ("not_recoverable", "not_recoverable")

    def _alert(self, count, code, where=""):
        return {
            "exp_labels": {"severity": "critical", "gen_ai_provider_name": P},
            "exp_annotations": {
                "summary": "A provider refuses realtime replies.",
                "description": f"openai{where} refused {count} replies in the last 5m. A retry "
                f"cannot fix the cause. Most frequent error code: {code}.",
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
        """An expired key pages two minutes after the tenth refusal, and ends after the fix."""
        promtool(
            [*self._refuse("0 6 12 12x60"), calls("succeeded", "0 0 0 0+30x60")],
            alerts=[
                ("1m", self.NAME, []),
                ("3m", self.NAME, [self._alert(12, "invalid_api_key")]),
                ("25m", self.NAME, []),
            ],
        )

    def test_alert_names_most_frequent_code(self, promtool):
        """Of two codes, the text has the more frequent one."""
        other = attempts(
            "send",
            "0+1x60",
            traced_retry_result="failed",
            error_type="insufficient_quota",
            traced_retry_recoverable="false",
        )
        promtool(
            [*self._refuse("0+4x60"), other],
            alerts=[("20m", self.NAME, [self._alert(20, "invalid_api_key")])],
        )

    def test_alert_names_code_of_its_environment_only(self, promtool):
        """A more frequent code of another environment is not in the text."""
        alert = self._alert(20, "invalid_api_key", " in eu")
        alert["exp_labels"]["deployment_environment_name"] = "eu"
        alert["exp_annotations"]["dashboard_url"] += "&var-environment=eu"
        elsewhere = attempts(
            "send",
            "0+40x60",
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
        """Three invalid requests in sixty do not page."""
        promtool(
            [*self._refuse("0+3x60"), calls("succeeded", "0+57x60")],
            alerts=[("30m", self.NAME, [])],
        )

    def test_refusals_of_one_call_fire_no_page(self, promtool):
        """Nine refusals do not page, even if they are all replies."""
        promtool(self._refuse("0 3 6 9x60"), alerts=[(f"{m}m", self.NAME, []) for m in (2, 4, 8)])

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

    ALONE = (
        'count(ALERTS{alertstate="firing", severity="critical"}) '
        f'unless on () ALERTS{{alertstate="firing", alertname="{NAME}"}}'
    )

    def test_fires_before_each_alone(self, promtool):
        """Ten at once: it is there no later than their pages, which it inhibits.

        VictoriaMetrics reads ALERTS of the evaluation before, so evaluate as often as shipped.
        """
        promtool(
            self._outage(f"p{n}" for n in range(10)),
            expressions=[
                ("8m", f"count_over_time(({self.ALONE})[8m:15s])", []),
                (
                    "8m",
                    'count(ALERTS{alertstate="firing", long="5m"})',
                    [{"labels": "{}", "value": 10}],
                ),
            ],
            evaluation="15s",
        )

    def test_fires_and_resolves(self, promtool):
        """Ten at once are one page, which ends after the outage."""
        alert = {
            "exp_labels": {"severity": "critical"},
            "exp_annotations": {
                "summary": "Several providers lose realtime replies.",
                "description": "10 providers lose replies at the same time. Look first for a cause "
                "that they share: network, DNS, a proxy, a deployment of the agents.",
                **links(4, None),
            },
        }
        promtool(
            self._outage(f"p{n}" for n in range(10)),
            alerts=[("20m", self.NAME, [alert]), ("89m", self.NAME, [])],
            expressions=[
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
                "summary": "Several providers lose realtime replies.",
                "description": "3 providers in eu lose replies at the same time. Look first for a "
                "cause that they share: network, DNS, a proxy, a deployment of the agents.",
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
                "summary": "Retries multiply the requests to a provider.",
                "description": "openai got 2.00 requests per reply in the last 10m (limit: 1.5). "
                "Most frequent error code: server_error.",
                **links(5),
            },
        }
        promtool(
            [
                calls("recovered", "0+10x80"),
                attempts("send", "0+10x80", traced_retry_result="succeeded"),
                attempts(
                    "send",
                    "0+10x30 300x50",
                    traced_retry_result="failed",
                    error_type="server_error",
                ),
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
                "summary": "Realtime replies start too late.",
                "description": "95th percentile of the time to first output of openai is 6.2 s in "
                "the last 10m (objective: 3 s).",
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

    def test_refusals_do_not_hide_slow_replies(self, promtool):
        """Immediate refusals of nine in ten replies do not improve the percentile of the heard."""
        slow = {"3": "0x60", "7.5": "0+4x60", "+Inf": "0+4x60"}
        promtool(
            [
                calls("succeeded", "0+4x60"),
                calls("not_recoverable", "0+36x60", "not_recoverable"),
                *silence(slow),
                *silence(dict.fromkeys(slow, "0+36x60"), "not_recoverable"),
            ],
            expressions=[("40m", f"count({firing(self.NAME)})", [{"labels": "{}", "value": 1}])],
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
    JOB = "traced-retry-spans"

    def _alert(self, cause, description, environment=None):
        of = {"deployment_environment_name": environment} if environment else {}
        link = links(7, None)
        if environment:
            link["dashboard_url"] += f"?var-environment={environment}"
        return {
            "exp_labels": {"severity": "critical", "cause": cause, **of},
            "exp_annotations": {
                "summary": "Reply metrics are missing.",
                "description": description,
                **link,
            },
        }

    def _down(self):
        return self._alert(
            "counts_down",
            "No target of job traced-retry-spans is up, so no replies are counted from spans.",
        )

    @pytest.mark.parametrize("values", ["1x5 0x30 1x30", "1x5 _x30 1x30"], ids=["down", "vanished"])
    def test_dead_scrape_target_pages_until_it_is_back(self, promtool, values):
        """All Collectors are down, or gone from discovery, for half an hour."""
        promtool(
            [_series("up", values, instance=instance, job=self.JOB) for instance in "ab"],
            alerts=[
                ("4m", self.NAME, []),
                ("16m", self.NAME, [self._down()]),
                ("50m", self.NAME, []),
            ],
        )

    def test_job_of_another_name_pages(self, promtool):
        """A healthy job of another name is no source of counts."""
        promtool(
            [_series("up", "1x60", job="otel-collector", instance="a")],
            alerts=[("30m", self.NAME, [self._down()])],
        )

    def _jobs(self, values, **labels):
        return _series("lk_agents_active_job_count", values, job="workers", **labels)

    def _silent(self, environment=None):
        where = f" in {environment}" if environment else ""
        return self._alert(
            "agents_silent",
            f"4 agent jobs run{where}, and no reply of theirs was counted in the last 15m.",
            environment,
        )

    def _up(self):
        return _series("up", "1x120", instance="a", job=self.JOB)

    def test_agents_without_new_counts_page(self, promtool):
        """Jobs run while the counters stand still. Then replies come in."""
        promtool(
            [self._up(), self._jobs("4x120"), calls("succeeded", "9x60 9+4x60")],
            alerts=[
                ("4m", self.NAME, []),
                ("40m", self.NAME, [self._silent()]),
                ("90m", self.NAME, []),
            ],
        )

    def test_replies_of_the_provider_alone_do_not_page(self, promtool):
        """Jobs run, and the provider starts all replies of the fleet, because callers speak."""
        promtool(
            [
                self._up(),
                self._jobs("4x120"),
                calls("succeeded", "0+4x120", traced_retry_initiator="provider"),
            ],
            alerts=[(f"{minute}m", self.NAME, []) for minute in (20, 40, 90)],
        )

    def test_agents_without_series_page(self, promtool):
        """Jobs run, and there is no counter at all."""
        promtool([self._up(), self._jobs("4x120")], alerts=[("40m", self.NAME, [self._silent()])])

    def test_silent_environment_pages_beside_a_busy_one(self, promtool):
        """Production is silent while staging counts replies."""
        of = {"deployment_environment_name": "production"}
        staging = {"deployment_environment_name": "staging"}
        promtool(
            [
                self._up(),
                self._jobs("4x120", **of),
                self._jobs("4x120", **staging),
                calls("succeeded", "0+1x120", **staging),
            ],
            alerts=[("40m", self.NAME, [self._silent("production")])],
        )

    def test_worker_without_environment_is_compared_with_all_replies(self, promtool):
        """A worker that is scraped without the label does not page if any replies are counted."""
        promtool(
            [
                self._up(),
                self._jobs("4x120"),
                calls("succeeded", "0+1x120", deployment_environment_name="production"),
            ],
            alerts=[("90m", self.NAME, [])],
        )

    def test_no_agents_fire_no_alert(self, promtool):
        """Without a job there are no replies to count."""
        promtool(
            [self._up(), self._jobs("0x120"), calls("succeeded", "9x120")],
            alerts=[("90m", self.NAME, [])],
        )


class TestTelemetryDegraded:
    NAME = "TracedRetryTelemetryDegraded"

    def _alert(self, cause, description, **labels):
        return {
            "exp_labels": {"severity": "warning", "cause": cause, **labels},
            "exp_annotations": {
                "summary": "A part of the telemetry is lost.",
                "description": description,
                **links(8, None),
            },
        }

    def test_one_collector_of_five_is_a_ticket(self, promtool):
        """One target of five is down for half an hour: a ticket, no page, and its end."""
        job = {"job": "traced-retry-spans"}
        alert = self._alert(
            "some_counts_down",
            "1 targets of job traced-retry-spans are down. The others are up. Replies that pass "
            "through the targets that are down are not counted.",
            **job,
        )
        promtool(
            [
                _series("up", "1x5 0x30 1x60", instance="a", **job),
                *(_series("up", "1x90", instance=instance, **job) for instance in "bcde"),
            ],
            alerts=[
                ("10m", self.NAME, []),
                ("25m", self.NAME, [alert]),
                ("25m", TestTelemetryAbsent.NAME, []),
                ("50m", self.NAME, []),
            ],
        )

    def test_traffic_that_stops_in_one_environment_is_a_ticket(self, promtool):
        """Production's counters stand still after an hour of traffic, and staging goes on.

        Of 470 replies, each engine counts another number at the ends of the range.
        """
        count = {"promtool": 488, "promtool3": 472, "vmalert-tool": 478}[promtool.engine]
        of = {"deployment_environment_name": "production"}
        alert = self._alert(
            "traffic_stopped",
            f"No reply was counted in production in the last 15m, after {count} in the hour "
            "before. Either the traffic ended, or the agents send no telemetry.",
            **of,
        )
        alert["exp_annotations"]["dashboard_url"] += "?var-environment=production"
        promtool(
            [
                calls("succeeded", "0+10x70 700x60", **of),
                calls("succeeded", "0+1x130", deployment_environment_name="staging"),
            ],
            alerts=[("80m", self.NAME, []), ("100m", self.NAME, [alert])],
        )

    def test_little_traffic_that_stops_fires_no_alert(self, promtool):
        """Two replies a minute may pause for a quarter of an hour."""
        promtool(
            [calls("succeeded", "0+2x70 140x60")],
            alerts=[(f"{m}m", self.NAME, []) for m in (80, 95, 110)],
        )

    @pytest.mark.parametrize(
        ("metric", "cause", "what"),
        [
            ("otelcol_receiver_refused_spans", "refused", "refused"),
            ("otelcol_receiver_refused_metric_points", "refused", "refused"),
            ("otelcol_exporter_send_failed_spans", "send_failed", "could not send"),
            ("otelcol_exporter_send_failed_metric_points", "send_failed", "could not send"),
            ("otelcol_exporter_enqueue_failed_spans", "send_failed", "could not send"),
        ],
    )
    def test_lost_items_of_the_collector_are_a_ticket(self, promtool, metric, cause, what):
        """Forty items are lost in a minute, and the ticket ends after the window."""
        alert = self._alert(
            cause,
            f"The Collector of job collector {what} 40 spans or data points in the last 10m.",
            job="collector",
        )
        promtool(
            [_series(metric, "0x5 40x60", job="collector", instance="a")],
            alerts=[("4m", self.NAME, []), ("12m", self.NAME, [alert]), ("40m", self.NAME, [])],
        )

    def test_full_queue_is_a_ticket(self, promtool):
        """A queue that is 90 % full for more than five minutes opens a ticket."""
        alert = self._alert(
            "queue_full",
            "The queue of exporter otlp_grpc of job collector is 90% full. A full queue drops "
            "spans or data points.",
            job="collector",
            exporter="otlp_grpc",
        )
        of = {"job": "collector", "instance": "a", "exporter": "otlp_grpc", "data_type": "traces"}
        promtool(
            [
                _series("otelcol_exporter_queue_size", "0x5 900x20 0x60", **of),
                _series("otelcol_exporter_queue_capacity", "1000x90", **of),
            ],
            alerts=[("9m", self.NAME, []), ("15m", self.NAME, [alert]), ("45m", self.NAME, [])],
        )


class TestSpansDropped:
    NAME = "TracedRetrySpansDropped"

    def _dropped(self, values):
        return _series(
            "traced_retry_export_dropped_total",
            values,
            job="agent",
            instance="a",
            traced_retry_exporter="otlp",
            traced_retry_drop_reason="queue_full",
        )

    def _counted(self, each):
        """Return that many replies a minute with one attempt each."""
        return [
            calls("succeeded", f"0+{each}x60"),
            attempts("send", f"0+{each}x60", traced_retry_result="succeeded"),
        ]

    def test_share_of_dropped_spans_is_a_ticket(self, promtool):
        """One span in eleven finds the queue full; ten minutes later the ticket ends."""
        alert = {
            "exp_labels": {
                "severity": "warning",
                "traced_retry_exporter": "otlp",
                "traced_retry_drop_reason": "queue_full",
            },
            "exp_annotations": {
                "summary": "Spans are dropped.",
                "description": "Exporter otlp dropped 9.091% of the spans of the last 10m "
                "(queue_full). Traces have gaps, and counts from spans are too low.",
                **links(9, None),
            },
        }
        promtool(
            [self._dropped("0x20 2+2x19 40x40"), *self._counted(10)],
            alerts=[("10m", self.NAME, []), ("38m", self.NAME, [alert]), ("60m", self.NAME, [])],
        )

    def test_all_spans_dropped_is_a_ticket(self, promtool):
        """Without a counted reply the share is 100 %."""
        promtool(
            [self._dropped("0 0 7x60")],
            expressions=[
                (
                    "10m",
                    f'count(ALERTS{{alertname="{self.NAME}", alertstate="firing"}})',
                    [{"labels": "{}", "value": 1}],
                )
            ],
        )

    def test_small_share_fires_no_alert(self, promtool):
        """Seven spans of thousands are below 1 %."""
        promtool(
            [self._dropped("0x10 7x60"), *self._counted(100)],
            alerts=[("15m", self.NAME, []), ("30m", self.NAME, [])],
        )

    def test_no_dropped_spans_fire_no_alert(self, promtool):
        """A counter at zero does not fire."""
        promtool([self._dropped("0x60")], alerts=[("30m", self.NAME, [])])


def test_watchdog_always_fires(promtool):
    """The watchdog fires without any series."""
    alert = {
        "exp_labels": {"severity": "none"},
        "exp_annotations": {
            "summary": "Alerting works.",
            "description": "This alert always fires. Route it to a service that notifies you if "
            "it stops.",
            **links(10, None),
        },
    }
    promtool([_series("up", "1x10")], alerts=[("0m", "TracedRetryWatchdog", [alert])])


def test_both_rollups_have_same_sum(promtool):
    """An hour of six replies a minute, of each minute and of each ten: 360 either way."""
    hour = {  # No sample is at the end of a range: only Prometheus 2 would count it.
        "provider:traced_retry_replies:increase1m": "59m30s",
        "provider:traced_retry_replies:increase10m": "59m30s:10m",
    }
    labels = f'{{gen_ai_provider_name="{P}", traced_retry_outcome="succeeded"}}'
    promtool(
        [calls("succeeded", "0+6x180")],
        expressions=[
            ("150m", f"sum_over_time({name}[{of}])", [{"labels": labels, "value": 360}])
            for name, of in hour.items()
        ],
    )


@pytest.mark.parametrize("promtool", ["promtool", "promtool3"])
def test_rules_are_well_formed(promtool):
    """Promtool finds every rule file in order, lint included."""
    done = subprocess.run(
        [command(promtool), "check", "rules", "--lint=all", *map(str, RULES)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
