# SPDX-License-Identifier: Apache-2.0
"""Reads PromQL: which series an expression selects, and which labels its result can have."""

from __future__ import annotations

import re
from dataclasses import dataclass

import promql_parser
import yaml
from dashboards.reading import ROOT

ENVIRONMENT = "deployment_environment_name"
"""A deployment may set it; no query needs it, and none fails without it."""
SERVICE = {"service_name", "service_version"}
"""Labels of the agents' own series by the service, which their path to Prometheus adds."""
TARGET = {"job", "instance"}
"""Prometheus gives these to whatever it scrapes or takes by OTLP."""


@dataclass(frozen=True)
class Matcher:
    """One of a selector's conditions."""

    label: str
    operator: str
    value: str


@dataclass(frozen=True)
class Selector:
    """What one selector asks for; no name where that is a pattern."""

    metric: str
    matchers: tuple[Matcher, ...]


_OPERATORS = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}
GRAFANA = {
    "$__rate_interval_ms": "300000",
    "$__rate_interval": "5m",
    "$__range_s": "3600",
    "$__range": "1h",
    "$rollup": "1m",
    "$provider": ".*",
    "$environment": ".*",
    "$initiator": ".*",
    "$model": ".*",
    "$code": ".*",
}
"""What Grafana would put in; the longer name first."""


def parse(expression):
    """The expression's tree; Grafana's variables are filled in first."""
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    return promql_parser.parse(expression)


def _children(node):
    kind = type(node).__name__
    if kind == "Call":
        return [a for a in node.args if not type(a).__name__.endswith("Literal")]
    if kind == "MatrixSelector":
        return [node.vector_selector]
    if kind == "BinaryExpr":
        return [node.lhs, node.rhs]
    return [node.expr] if hasattr(node, "expr") else []


def nodes(node):
    """The node and all below it."""
    yield node
    for child in _children(node):
        yield from nodes(child)


def selectors(node):
    """Every selector of the expression."""
    for each in nodes(node):
        if type(each).__name__ == "VectorSelector":
            matchers = tuple(
                Matcher(m.name, _OPERATORS[str(m.op).removeprefix("MatchOp.")], m.value)
                for m in each.matchers.matchers
            )
            name = each.name or next((m.value for m in matchers if m.label == "__name__"), "")
            yield Selector(name, tuple(m for m in matchers if m.label != "__name__"))


def grouped_by(node):
    """The labels of every aggregation."""
    return {
        label
        for each in nodes(node)
        if type(each).__name__ == "AggregateExpr" and each.modifier
        for label in each.modifier.labels
    }


def ends_aggregated(node):
    """Whether the result is put together from all series, whatever further labels they have."""
    kind = type(node).__name__
    if kind == "AggregateExpr":
        return True
    if kind == "NumberLiteral":
        return True
    if kind == "Call" and node.func.name in ("vector", "scalar"):
        return True
    return bool(_children(node)) and all(ends_aggregated(child) for child in _children(node))


def wrong_labels(node, known):
    """Labels that the expression groups by and its input cannot have: [(label, of what)]."""
    return [
        (label, each.prettify())
        for each in nodes(node)
        if type(each).__name__ == "AggregateExpr" and each.modifier
        for label in each.modifier.labels
        if label not in result_labels(each.expr, known) | {ENVIRONMENT} | SERVICE
    ]


def result_labels(node, known):  # noqa: PLR0911 - a case each
    """The labels that an expression's result can have.

    Args:
        node: the expression.
        known: {metric: its labels}.
    """
    kind = type(node).__name__
    if kind == "VectorSelector":
        (selector,) = selectors(node)
        matching = [v for name, v in known.items() if re.fullmatch(selector.metric, name)]
        return set().union(*matching)
    if kind == "AggregateExpr":
        return set(node.modifier.labels) if node.modifier else set()
    if kind == "Call" and node.func.name == "label_replace":
        return result_labels(node.args[0], known) | {node.args[1].val}
    if kind == "Call" and node.func.name == "histogram_quantile":
        return result_labels(node.args[1], known) - {"le"}
    if kind == "BinaryExpr":
        if type(node.lhs).__name__ == "NumberLiteral":
            return result_labels(node.rhs, known)
        both = str(node.op).lower() == "or"
        return result_labels(node.lhs, known) | (result_labels(node.rhs, known) if both else set())
    return set().union(*(result_labels(child, known) for child in _children(node)))


def spans():
    """{metric: labels} that spanmetrics makes of our spans, set up as in jaeger.yaml."""
    document = yaml.safe_load((ROOT / "exporters/jaeger/jaeger.yaml").read_text())
    connector = document["connectors"]["spanmetrics"]
    always = {"span_name", "span_kind", "status_code", "service_name", *TARGET}
    durations = always | {d["name"].replace(".", "_") for d in connector["dimensions"]}
    calls = durations | {d["name"].replace(".", "_") for d in connector["calls_dimensions"]}
    name = "traces_span_metrics_duration_seconds"
    return {
        "traces_span_metrics_calls_total": calls,
        f"{name}_bucket": durations | {"le"},
        f"{name}_sum": durations,
        f"{name}_count": durations,
    }
