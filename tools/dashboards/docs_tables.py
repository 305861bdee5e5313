# SPDX-License-Identifier: Apache-2.0
"""The tables between markers in ``docs/`` and in ``dashboards/README.md``.

The tables come from the emitted telemetry (``telemetry_tables.py``), from the generated rules and
from the dashboards' JSON. A table begins at ``<!-- table: NAME -->`` and ends at ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import promql_parser
import telemetry_tables
import yaml

from traced_retry.monitoring import alerts, config
from traced_retry.monitoring.config import Thresholds

DOCUMENTS: Final = ("dashboards/README.md", "docs/dashboards.md", "docs/telemetry.md")
UNITS: Final = {
    "s": "s",
    "percentunit": "ratio, as %",
    "cpm": "per minute",
    "short": "number",
    "none": "list",
}
"""Grafana's units, in words."""
VARIABLES: Final = {
    "$__rate_interval_ms": "300000",
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$rollup": "1m",
}
"""Values for the variables that Grafana fills in. The longer name comes first."""

SHARED: Final = ("gen_ai_provider_name", "deployment_environment_name")
"""The labels of each series whose name begins with ``provider:``."""

Rows = list[list[str]]


def markdown(rows: Rows) -> str:
    """Return a table. The first row has the headings."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in cells]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# --- alerts ---------------------------------------------------------------------------------------


def alert_rows(of: Thresholds) -> Iterator[list[str]]:
    """Yield each alert with its numbers, in the order of the runbook."""
    yield ["alert", "severity", "when", "for at least"]
    for alert in alerts.alerts(of):
        yield [alert.alert, alert.severity, _when(alert, of), alert.for_]


def _when(alert: alerts.Alert, of: Thresholds) -> str:
    enough = f"and at least {of.min_lost} of them"
    if alert.alert == alerts.LOST_REPLIES and alert.labels["long"] == alert.labels["short"]:
        share = of.outage_share * 100
        return f"more than {share:.4g} % of the replies lost in {of.outage_window}, {enough}"
    if alert.alert == alerts.LOST_REPLIES:
        row = next(r for r in of.burn_rates if (r.long, r.short) == tuple(alert.labels.values()))
        return (
            f"more than {row.factor * of.budget * 100:.4g} % of the replies lost in {row.long}, "
            f"{enough}, and still in {row.short}: {row.factor:g} times the allowed rate"
        )
    if alert.alert in (alerts.ABSENT, alerts.DEGRADED):
        return {
            "counts_down": f"no target of the job with the counts from spans ({of.spans_job}) is "
            "up",
            "agents_silent": "agents run in an environment, and no reply is counted there in "
            f"{of.telemetry_ticket_for}",
            "some_counts_down": "some targets of that job are down, others are up",
            "traffic_stopped": f"an environment with {10 * of.min_replies} replies in an hour has "
            f"none in {of.telemetry_ticket_for}",
            "refused": "the Collector refused spans or data points",
            "send_failed": "the Collector could not send spans or data points",
            "queue_full": "a queue of the Collector is over 80 % full",
        }[alert.labels["cause"]]
    return {
        alerts.FEW_LOST: f"{of.few_lost_replies} to {of.min_lost - 1} replies lost in "
        f"{of.few_lost_window}, and more than {of.few_lost_share * 100:.4g} % of all",
        alerts.NOT_RECOVERABLE: f"{of.min_lost} replies, and "
        f"{of.not_recoverable_share * 100:.4g} % of all, refused in "
        f"{of.not_recoverable_window}: a key, a quota",
        alerts.MANY: f"{of.many_providers_providers} providers at once; this page holds theirs "
        "back",
        alerts.STORM: f"more than {of.storm_amplification:g} requests per reply in "
        f"{of.storm_window}",
        alerts.SLOW: f"{of.silence_quantile * 100:g}th percentile of the time to first output "
        f"above {of.silence_seconds:g} s in {of.silence_window}",
        alerts.SPANS_DROPPED: f"more than {of.spans_dropped_share * 100:.4g} % of the spans "
        f"dropped in {of.spans_dropped_window}",
        alerts.WATCHDOG: "always, for a dead man's switch",
    }[alert.alert]


def incident_rows(incidents: Path) -> Iterator[list[str]]:
    """Yield each incident with the minute of its first notice."""
    yield ["incident", "first notice"]
    for each in yaml.safe_load(incidents.read_text("utf-8")):
        page, ticket = each["page"], each["ticket"]
        notices = [f"page at minute {page}"] if page else []
        if ticket and not (page and page <= ticket):
            notices.append(f"ticket at minute {ticket}")
        yield [each["incident"], ", ".join(notices) or "none within 4 h"]


# --- series and panels ----------------------------------------------------------------------------


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    kind = type(node).__name__
    if kind == "Call":
        below = [arg for arg in node.args if not type(arg).__name__.endswith("Literal")]
    elif kind == "MatrixSelector":
        below = [node.vector_selector]
    elif kind == "BinaryExpr":
        below = [node.lhs, node.rhs]
    else:
        below = [node.expr] if hasattr(node, "expr") else []
    for each in below:
        yield from _nodes(each)


def _reads(expressions: Iterable[str]) -> list[str]:
    """Return the names or name patterns of the selected series, each once."""
    found: dict[str, None] = {}
    for expression in expressions:
        text = expression
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        for node in _nodes(promql_parser.parse(text)):
            if type(node).__name__ == "VectorSelector":
                patterns = (m.value for m in node.matchers.matchers if m.name == "__name__")
                found[node.name or next(patterns)] = None
    return list(found)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def series(dashboards: Path) -> Iterator[list[str]]:
    """Yield each recorded series with its sources. Series with the same sources share a row.

    The text above the table describes the labels ``SHARED`` and the series of ten minutes.
    """
    yield ["series", "more labels", "read from"]
    recorded: dict[str, dict[str, Any]] = {}
    for name in ("recording", "rollup", "alerts"):
        document = yaml.safe_load((dashboards / f"prometheus/{name}.yaml").read_text("utf-8"))
        for rule in (rule for group in document["groups"] for rule in group["rules"]):
            if "record" in rule and not rule["record"].endswith(":increase10m"):
                recorded[rule["record"]] = rule
    alike: dict[tuple[str, str], list[str]] = {}
    for record, rule in recorded.items():
        all_labels = (*_labels(rule["expr"], recorded), *rule.get("labels", ()))
        hidden = SHARED if set(SHARED) <= set(all_labels) else ()
        labels = [name for name in all_labels if name not in hidden]
        read = _code(_reads([rule["expr"]])) or "a constant"
        alike.setdefault((_code(labels), read), []).append(record)
    for (kept, read), records in alike.items():
        yield [_code(records), kept, read]


def _labels(expression: str, recorded: dict[str, dict[str, Any]]) -> list[str]:
    """Return the labels of the first aggregation, or those of the series it reads."""
    for node in _nodes(promql_parser.parse(expression)):
        if type(node).__name__ == "AggregateExpr":
            return list(node.modifier.labels) if node.modifier else []
        if type(node).__name__ == "VectorSelector" and node.name in recorded:
            return _labels(recorded[node.name]["expr"], recorded)
    return []


def panels(boards: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Yield each panel of the dashboards. A panel on several of them has one row."""
    yield ["panel", "dashboard", "unit", "reads", "text without data"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, board in boards.items():
        for panel in _panels(board):
            defaults = panel["fieldConfig"]["defaults"]
            targets = panel["targets"]
            reads = _reads(target["expr"] for target in targets if "expr" in target)
            row = (
                panel["title"].replace("$provider", "(each provider)"),
                UNITS[defaults["unit"]],
                _code(reads) or f"traces, from {panel['datasource']['type'].title()}",
                defaults["noValue"],
            )
            rows.setdefault(row, []).append(name)
    for (title, *rest), names in rows.items():
        yield [title, ", ".join(names), *rest]


def _panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield from panel.get("panels", []) if panel["type"] == "row" else [panel]


# --- documents ------------------------------------------------------------------------------------


def tables(dashboards: Path) -> dict[str, Rows]:
    """Return every table by its name, headings first."""
    boards = {
        name: json.loads((dashboards / f"grafana/{name}.json").read_text("utf-8"))
        for name in ("overview", "provider")
    }
    return {
        **telemetry_tables.tables(),
        "alerts": list(alert_rows(config.read(dashboards / "config.yaml"))),
        "incidents": list(incident_rows(Path(__file__).with_name("incidents.yaml"))),
        "series": list(series(dashboards)),
        "panels": list(panels(boards)),
    }


_MARKED: Final = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, made: dict[str, Rows]) -> str:
    """Return the document with the tables that its markers name.

    Raises:
        KeyError: if a marker names an unknown table.
    """
    return _MARKED.sub(lambda m: f"{m[1]}\n{markdown(made[m[2]])}\n\n{m[3]}", text)


def documents(root: Path) -> dict[str, str]:
    """Return each document with its tables: {path below ``root``: text}.

    Raises:
        ValueError: if no document has a marker for a table.
    """
    made = tables(root / "dashboards")
    texts = {name: filled((root / name).read_text("utf-8"), made) for name in DOCUMENTS}
    unused = set(made) - {name for text in texts.values() for _, name, _ in _MARKED.findall(text)}
    if unused:
        raise ValueError(f"no document has a marker for {', '.join(sorted(unused))}")
    return texts
