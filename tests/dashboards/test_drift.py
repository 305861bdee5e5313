# SPDX-License-Identifier: Apache-2.0
"""Test that queries use only emitted names, and that each emitted name has a panel.

The emitted names are not copied here: our own code records one reply of each kind through
OpenTelemetry's Prometheus exporter, and the labels of the spanmetrics connector come from the
shipped configuration. ``make oldest`` runs this on the oldest supported OpenTelemetry, too.
"""

from __future__ import annotations

import re

import pytest
from dashboards.reading import dashboards, panels, rules

from dashboards import promql
from traced_retry import semconv

pytest.importorskip("opentelemetry.exporter.prometheus")

SCRAPED = {
    "up": promql.TARGET,
    "lk_agents_active_job_count": {*promql.TARGET, "nodename"},
    **{
        f"otelcol_{name}_{items}": {*promql.TARGET, "receiver", "exporter"}
        for name in ("receiver_refused", "exporter_send_failed", "exporter_enqueue_failed")
        for items in ("spans", "metric_points")
    },
    "otelcol_exporter_queue_size": {*promql.TARGET, "exporter", "data_type"},
    "otelcol_exporter_queue_capacity": {*promql.TARGET, "exporter", "data_type"},
    "ALERTS": {
        *promql.TARGET,
        *("alertname", "alertstate", "severity", "long", "short", "cause"),
        *("gen_ai_provider_name", promql.ENVIRONMENT),
    },
}
"""Series of Prometheus itself, of LiveKit's worker and of the Collector about itself."""

NOT_CHARTED = {
    semconv.SERVER_ADDRESS: "on the trace; one provider has one address, or as many as regions",
    semconv.SERVER_PORT: "on the trace",
    semconv.LK_RETRY_COUNT: "on the trace; LiveKit's name for the attempt's number",
    semconv.ATTEMPTS: "on the trace, as an attribute; the metric of the same name is charted",
    semconv.DELAY_TOTAL: "on the trace; charted as the metric traced_retry.delay",
    semconv.ATTEMPT: "on the trace",
    semconv.DELAY: "on the trace; charted as the metric of that name",
    semconv.ERROR_CODE: "on the trace only: it is not bounded",
    semconv.DECISION: "on the trace; the outcomes tell what came of it",
    semconv.NEXT_DELAY: "on the trace; what was really waited is charted",
    semconv.ANSWERED_ATTEMPT: "on the trace; the attempts by action are charted",
    semconv.TRACE_ID: "on log records",
}
"""Attributes that no chart shows, and why."""


@pytest.fixture(scope="module")
def emitted():
    """Return the agents' own metrics: {metric: {label: values}}."""
    from dashboards.emitted import emitted

    return emitted()


@pytest.fixture(scope="module")
def known(emitted):
    """Return {metric: labels}: emitted, counted from spans, scraped, or recorded from those."""
    found = {
        **{name: {*labels, *promql.TARGET} for name, labels in emitted.items()},
        **promql.spans(),
        **SCRAPED,
    }
    for rule in rules():
        if "record" in rule:
            made = promql.result_labels(promql.parse(rule["expr"]), found)
            found[rule["record"]] = (
                found.get(rule["record"], set())
                | made
                | {promql.ENVIRONMENT}
                | {*rule.get("labels", ())}
            )
    return found


ROLLUPS = ("1m", "10m")
"""What the hidden variable of the dashboards may be: see tools/dashboards/panels.py."""


def every_query():
    """Return (place, expression) of each rule, panel, variable and annotation."""
    for rule in rules():
        yield rule.get("record") or rule["alert"], rule["expr"]
    for name, board in dashboards().items():
        for panel in panels(board):
            for target in panel.get("targets", []):
                if "expr" in target:
                    where = f"{name}: {panel['title']}"
                    yield from {
                        (where, target["expr"].replace("$rollup", rolled)) for rolled in ROLLUPS
                    }
        for annotation in board["annotations"]["list"]:
            yield f"{name}: annotation", annotation["expr"]
        for variable in board.get("templating", {}).get("list", []):
            if variable["name"] == "rollup":  # of numbers alone; what comes of it is above
                promql.parse(re.fullmatch(r"query_result\((.+)\)", variable["definition"])[1])
            elif variable["type"] == "query":
                inner = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
                yield f"{name}: ${variable['name']}", f"count by ({inner[2]}) ({inner[1]})"


QUERIES = sorted(set(every_query()))


@pytest.mark.parametrize(("where", "expression"), QUERIES)
def test_every_metric_and_label_is_emitted(known, where, expression):
    """Each query selects an existing series by labels that it can have."""
    tree = promql.parse(expression)

    for selector in promql.selectors(tree):
        matching = [labels for name, labels in known.items() if re.fullmatch(selector.metric, name)]
        assert matching, selector.metric
        can_have = set().union(*matching) | {promql.ENVIRONMENT}
        assert not {m.label for m in selector.matchers} - can_have, selector
    assert [] == promql.wrong_labels(tree, known)


VALUES = {
    semconv.OUTCOME: set(semconv.OUTCOMES),
    semconv.STOP_REASON: set(semconv.STOP_REASONS),
    semconv.ACTION: set(semconv.ACTIONS),
    semconv.RESULT: set(semconv.RESULTS),
    semconv.RECOVERABLE: {"true", "false"},
    semconv.DROP_REASON: set(semconv.DROP_REASONS),
    semconv.OPERATION: {"say"},
    semconv.INITIATOR: set(semconv.INITIATORS),
    "span_name": {semconv.SPAN_REPLY, semconv.SPAN_ATTEMPT},
}


@pytest.mark.parametrize(("where", "expression"), QUERIES)
def test_every_query_is_about_replies(known, where, expression):
    """Each query excludes ``say``, which has metrics of the same names."""
    operation = semconv.OPERATION.replace(".", "_")
    mixed = [
        selector
        for selector in promql.selectors(promql.parse(expression))
        if operation in known.get(selector.metric, ())
        and promql.Matcher(operation, "=", "") not in selector.matchers
    ]

    assert [] == mixed or where == "traced_retry:processes:count"


def test_every_count_keeps_the_environment():
    """Each rule that sums per provider, process or exporter keeps the environment."""
    mixed = [
        (rule["record"], node.modifier.labels)
        for rule in rules()
        if "record" in rule
        for node in promql.nodes(promql.parse(rule["expr"]))
        if type(node).__name__ == "AggregateExpr"
        if promql.ENVIRONMENT not in node.modifier.labels
        # Counted from spans in any environment: what agents count in none gives way to it.
        and node.modifier.labels != ["gen_ai_provider_name"]
    ]

    assert [] == mixed


@pytest.mark.parametrize(("where", "expression"), [q for q in QUERIES if ".json" in q[0]])
def test_every_panel_filters_by_environment(where, expression):
    """Each panel, annotation and other variable filters by environment."""
    constant = re.compile(r"up|traced_retry:(objective|.*_(threshold|objective|limit)):.*")
    mixed = [
        selector.metric
        for selector in promql.selectors(promql.parse(expression))
        if not constant.fullmatch(selector.metric)
        and promql.ENVIRONMENT not in {matcher.label for matcher in selector.matchers}
    ]

    assert [] == mixed or where.endswith("$environment")


@pytest.mark.parametrize(("where", "expression"), QUERIES)
def test_every_value_is_emitted(where, expression):
    """Each value in a query is a possible value of its label."""
    values = {name.replace(".", "_"): of for name, of in VALUES.items()}

    for selector in promql.selectors(promql.parse(expression)):
        for matcher in selector.matchers:
            variable = matcher.value.startswith("$")
            if matcher.label in values and matcher.value != ".*" and not variable:
                assert set(matcher.value.split("|")) - {""} <= values[matcher.label], matcher


def test_emitted_values_match_vocabulary(emitted):
    """The vocabulary of the test above is the emitted one."""
    replies, attempts = (
        emitted["traced_retry_replies_total"],
        emitted["traced_retry_attempts_total"],
    )

    assert set(semconv.OUTCOMES) == replies["traced_retry_outcome"]
    assert set(semconv.STOP_REASONS) <= replies["traced_retry_stop_reason"]
    assert set(semconv.ACTIONS) == attempts["traced_retry_action"]
    assert set(semconv.RESULTS) == attempts["traced_retry_result"]
    assert {"say"} == replies["traced_retry_operation"] - {""}
    assert {"true", "false"} >= {v.lower() for v in attempts["traced_retry_recoverable"] - {""}}


def _shown():
    """Return the metrics behind all panels, and the labels by which a panel groups."""
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    metrics, labels, seen = set(), set(), set()
    todo = [
        (expression, True)
        for where, expression in QUERIES
        if ".json" in where and "annotation" not in where
    ]
    while todo:
        expression, visible = todo.pop()
        tree = promql.parse(expression)
        labels |= promql.grouped_by(tree) if visible else set()
        for selector in promql.selectors(tree):
            if visible:
                labels |= {m.label for m in selector.matchers}
            metrics.add(selector.metric)
            for name in set(recorded) - seen:
                if re.fullmatch(selector.metric, name):
                    seen.add(name)
                    todo.append((recorded[name], False))
    return metrics, labels


def test_every_instrument_is_charted(emitted):
    """Each emitted family and each instrument of the vocabulary is behind a panel."""
    metrics, _ = _shown()
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in emitted}
    charted = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in metrics}
    instruments = {re.sub(r"_seconds$", "", family).replace("_", ".") for family in families}
    vocabulary = {v for n, v in vars(semconv).items() if n.startswith("METRIC_")}

    assert set() == families - charted
    assert {name.replace("_", ".") for name in vocabulary} == instruments


def test_every_attribute_is_charted_or_listed_with_reason():
    """Each attribute is a label of a panel, or is listed with a reason."""
    _, labels = _shown()
    ours = {
        semconv.PROVIDER,
        semconv.MODEL,
        semconv.SERVER_ADDRESS,
        semconv.SERVER_PORT,
        semconv.ERROR_TYPE,
        semconv.LK_RETRY_COUNT,
        semconv.TRACE_ID,
    } | {
        value
        for name, value in vars(semconv).items()
        if name.isupper() and isinstance(value, str) and value.startswith("traced_retry.")
        if not name.startswith("METRIC_")
    }
    charted = {name for name in ours if name.replace(".", "_") in labels}

    assert ours - charted == set(NOT_CHARTED)


def test_every_outcome_has_a_colour_of_its_own():
    """Each outcome has its own colour, also if one is added to the vocabulary."""
    board = dashboards()["provider.json"]
    (panel,) = [p for p in panels(board) if p["title"] == "Replies by outcome"]
    named = {o["matcher"]["options"] for o in panel["fieldConfig"]["overrides"]}

    assert set(semconv.OUTCOMES) == named
