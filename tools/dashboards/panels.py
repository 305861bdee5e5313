# SPDX-License-Identifier: Apache-2.0
"""The parts of the dashboards: panels, queries and variables, built with Grafana's foundation SDK.

Every panel has a description, a unit and a text for the case without data.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import (
    heatmap,
    prometheus,
    stat,
    table,
    tempo,
    text,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.runtime import UnknownDataquery
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

PROMETHEUS: Final = common.DataSourceRef("prometheus", "${prometheus_datasource}")
JAEGER: Final = common.DataSourceRef("jaeger", "${jaeger_datasource}")
TEMPO: Final = common.DataSourceRef("tempo", "${tempo_datasource}")

STEP: Final = "$rollup"
"""The interval of the rolled-up series. A shorter step would find no sample."""
COARSE_FROM: Final = 3 * 86_400
"""Seconds. For a longer time, queries read one sample per ten minutes instead of one per minute."""

POINTS: Final = 500
"""The largest number of steps on any screen. The cost of a query is its series times steps."""

COLORS: Final = {
    "succeeded": "green",
    "recovered": "yellow",
    "exhausted": "red",
    "not_recoverable": "dark-red",
    "interrupted": "blue",
    "superseded": "purple",
}


@dataclass(frozen=True)
class Query:
    """One query to Prometheus."""

    expr: str
    legend: str = ""
    instant: bool = False
    heat: bool = False
    exemplar: bool = False
    step: str = STEP
    dashed: str = ""
    """Draw it as a dashed line of that colour: a threshold."""


@dataclass(frozen=True)
class Panel:
    """One panel."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str
    none: str
    """The text without data. It says what the missing data means."""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    steps: tuple[tuple[float, str], ...] = ()
    """The colours of a stat: (lowest value, colour)."""
    decimals: int | None = None
    repeat: str = ""
    link: bool = False
    """Whether its series lead to their provider's dashboard."""
    transformations: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Row:
    """The title of a row and its panels. A folded row sends no query until it is opened."""

    title: str
    panels: tuple[Any, ...]
    folded: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    description: str
    variables: tuple[Any, ...]
    rows: tuple[Row, ...]
    span: str = "now-3h"
    links: tuple[Any, ...] = field(default=())


# --- panels ---------------------------------------------------------------------------------------


def _target(number: int, query: Query) -> prometheus.Dataquery:
    target = (
        prometheus.Dataquery()
        .ref_id(string.ascii_uppercase[number])
        .datasource(PROMETHEUS)
        .expr(query.expr)
        .legend_format(query.legend or "__auto")
    )
    if query.exemplar:
        target = target.exemplar(exemplar=True)
    if query.heat:
        target = target.format(PromQueryFormat.HEATMAP)
    if query.instant:
        return target.instant().format(PromQueryFormat.TABLE)
    return target.range().interval(query.step)


def _steps(panel: Panel) -> builders.ThresholdsConfig:
    steps = [dashboard.Threshold(None, "text" if not panel.steps else panel.steps[0][1])]
    steps += [dashboard.Threshold(value, color) for value, color in panel.steps[1:]]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _stat(panel: Panel) -> Any:
    return (
        stat.Panel()
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.VALUE)
        .thresholds(_steps(panel))
    )


def _timeseries(panel: Panel) -> Any:
    made = (
        timeseries.Panel()
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(show_legend=True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .calcs([])
        )
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
        .axis_soft_min(0)
        .line_width(1)
        .fill_opacity(70 if panel.stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
    )
    if panel.stacked:
        made = made.stacking(
            common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A")
        )
    for outcome, color in COLORS.items():
        if panel.stacked:
            made = made.override_by_name(outcome, [_fixed(color)])
    for query in panel.queries:
        if query.dashed:
            made = made.override_by_name(
                query.legend,
                [
                    _fixed(query.dashed),
                    dashboard.DynamicConfigValue(
                        "custom.lineStyle", {"fill": "dash", "dash": [8, 8]}
                    ),
                    dashboard.DynamicConfigValue("custom.fillOpacity", 0),
                    dashboard.DynamicConfigValue("custom.stacking", {"mode": "none"}),
                ],
            )
    return made


def _fixed(color: str) -> dashboard.DynamicConfigValue:
    return dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})


def _heatmap(panel: Panel) -> Any:
    return (
        heatmap.Panel()
        .calculate(calculate=False)
        .y_axis(heatmap.YAxisConfig().unit(panel.unit))
        .exemplars_color("rgba(255,0,255,0.7)")
    )


def _table(_: Panel) -> Any:
    return table.Panel()


_KINDS: Final = {"stat": _stat, "timeseries": _timeseries, "heatmap": _heatmap, "table": _table}


def _panel(panel: Panel, number: int, x: int, y: int) -> Any:
    made = (
        _KINDS[panel.kind](panel)
        .id(number)
        .title(panel.title)
        .description(panel.description)
        .datasource(PROMETHEUS)
        .unit(panel.unit)
        .no_value(panel.none)
        .targets([_target(place, query) for place, query in enumerate(panel.queries)])
        .max_data_points(POINTS)
        .grid_pos(dashboard.GridPos(panel.height, panel.width, x, y))
    )
    if panel.decimals is not None:
        made = made.decimals(panel.decimals)
    if panel.repeat:
        made = made.repeat(panel.repeat).repeat_direction("h").max_per_row(4)
    if panel.link:
        made = made.data_links(
            [
                builders.DashboardLink("This provider")
                .type(dashboard.DashboardLinkType.LINK)
                .url(
                    "/d/traced-retry-provider?var-provider="
                    "${__field.labels.gen_ai_provider_name}"
                    "&${environment:queryparam}&${__url_time_range}"
                )
            ]
        )
    for name, options in panel.transformations:
        made = made.with_transformation(dashboard.DataTransformerConfig(name, options=options))
    return made


@dataclass(frozen=True)
class Markdown:
    """A panel of text."""

    title: str
    description: str
    content: str
    width: int = 24
    height: int = 10


@dataclass(frozen=True)
class Traces:
    """A panel that lists traces of Jaeger or Tempo."""

    title: str
    description: str
    none: str
    jaeger: dict[str, Any] | None = None
    """A search: service, operation, tags."""
    traceql: str = ""
    width: int = 24
    height: int = 9


def _markdown(panel: Markdown, number: int, x: int, y: int) -> Any:
    return (
        text.Panel()
        .id(number)
        .title(panel.title)
        .description(panel.description)
        .mode(TextMode.MARKDOWN)
        .content(panel.content)
        .grid_pos(dashboard.GridPos(panel.height, panel.width, x, y))
    )


class _Ready:
    """An object in the place of a builder, which returns it as it is."""

    def __init__(self, built: Any) -> None:
        self._built = built

    def build(self) -> Any:
        return self._built


def _traces(panel: Traces, number: int, x: int, y: int) -> Any:
    if panel.jaeger is not None:
        source = JAEGER
        search = {"refId": "A", "queryType": "search", **panel.jaeger}
        target: Any = _Ready(UnknownDataquery({"datasource": source.to_json(), **search}))
    else:
        source = TEMPO
        target = (
            tempo.Dataquery()
            .ref_id("A")
            .datasource(source)
            .query_type("traceql")
            .query(panel.traceql)
            .limit(20)
        )
    return (
        table.Panel()
        .id(number)
        .title(panel.title)
        .description(panel.description)
        .datasource(source)
        .unit("none")
        .no_value(panel.none)
        .targets([target])
        .grid_pos(dashboard.GridPos(panel.height, panel.width, x, y))
    )


_MAKE: Final = {Panel: _panel, Markdown: _markdown, Traces: _traces}


# --- variables ------------------------------------------------------------------------------------


def data_source(kind: str, title: str) -> Any:
    """Return the variable for a data source of that kind. dashboard-linter checks its name."""
    return (
        builders.DatasourceVariable(f"{kind}_datasource")
        .label(f"{title} data source")
        .type(kind)
        .current(dashboard.VariableOption(selected=False, text="default", value="default"))
        .multi(multi=False)
        .include_all(include_all=False)
    )


def choice(name: str, title: str, query: str, *, several: bool = True) -> Any:
    """Return a variable with the values in Prometheus. The user selects one or several."""
    made = (
        builders.QueryVariable(name)
        .label(title)
        .query({"query": query, "refId": name})
        .definition(query)
        .datasource(PROMETHEUS)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(multi=several)
        .include_all(include_all=several)
    )
    if several:
        # It matches a label that is not there, too: an environment nobody named, for one.
        made = made.all_value(".*").current(
            dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
        )
    return made


def rollup() -> Any:
    """Return the hidden variable that chooses the series of 1m or of 10m."""
    coarse = f'label_replace(vector($__range_s) > {COARSE_FROM}, "rollup", "10m", "", "")'
    fine = 'label_replace(vector(1), "rollup", "1m", "", "")'
    query = f"query_result({coarse} or on () {fine})"
    return (
        builders.QueryVariable("rollup")
        .label("Rolled up")
        .hide(dashboard.VariableHide.HIDE_VARIABLE)
        .query({"query": query, "refId": "rollup"})
        .definition(query)
        .regex('/rollup="([^"]+)"/')
        .datasource(PROMETHEUS)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(multi=False)
        .include_all(include_all=False)
        .current(dashboard.VariableOption(selected=True, text="1m", value="1m"))
    )


# --- dashboards -----------------------------------------------------------------------------------

_FULL: Final = 24
_SIDES: Final = ("bottom", "right")


def as_json(board: Board) -> str:
    """Return the dashboard as Grafana reads it, with sorted keys."""
    made = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["traced-retry"])
        .readonly()
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time(board.span, "now")
        .refresh("1m")
        .variables(list(board.variables))
        .link(
            builders.DashboardLink("Realtime replies")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["traced-retry"])
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
            .as_dropdown(as_dropdown=True)
        )
    )
    if board.variables:
        made = made.annotation(_alerts()).annotation(_deployments())
    number, y = 1, 0
    for row in board.rows:
        if row.title:
            header = (
                builders.Row(row.title).id(100 + number).grid_pos(dashboard.GridPos(1, 24, 0, y))
            )
            y += 1
        placed = list(_placed(row.panels, number, y))
        number += len(placed)
        if row.title and row.folded:
            for panel, _, _ in placed:
                header = header.with_panel(panel)
            made = made.with_row(header)
            continue
        if row.title:
            made = made.with_row(header.collapsed(collapsed=False))
        for panel, _, _ in placed:
            made = made.with_panel(panel)
        y = max(bottom for _, _, bottom in placed)
    found = _without_placement(json.loads(json.dumps(made.build(), cls=JSONEncoder)))
    found.setdefault("annotations", {}).setdefault("list", [])
    return json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _without_placement(found: Any) -> Any:
    """Return the links without the SDK's setting that hides them in a menu."""
    if isinstance(found, dict):
        return {
            k: _without_placement(v) for k, v in found.items() if k != "placement" or v in _SIDES
        }
    if isinstance(found, list):
        return [_without_placement(each) for each in found]
    return found


def _placed(panels: Iterable[Any], number: int, y: int) -> Iterable[tuple[Any, int, int]]:
    """Place panels from left to right, then on the next line."""
    x, high = 0, 0
    for place, panel in enumerate(panels):
        if x + panel.width > _FULL:
            x, y, high = 0, y + high, 0
        made = _MAKE[type(panel)](panel, number + place, x, y)
        x, high = x + panel.width, max(high, panel.height)
        yield made, number + place, y + high


def _annotation(name: str, color: str, expr: str) -> Any:
    """Return an annotation for each time at which ``expr`` has a value."""
    return (
        builders.AnnotationQuery()
        .name(name)
        .datasource(PROMETHEUS)
        .enable(enable=True)
        .icon_color(color)
        .expr(expr)
        .step("60s")
    )


def _deployments() -> Any:
    """Return the annotation for the first replies of a version of a service."""
    series = "provider:traced_retry_service_replies:increase1m{deployment_environment_name=~"
    series += '"$environment", service_version!=""}'
    by = "max by (service_name, service_version)"
    expr = f"{by} ({series}) > 0 unless {by} (max_over_time({series}[1h] offset 1m)) > 0"
    return (
        _annotation("Deployments", "blue", expr)
        .title_format("{{service_name}} {{service_version}}")
        .tag_keys("service_name")
    )


def _alerts() -> Any:
    expr = "max by (alertname, gen_ai_provider_name, severity) "
    expr += '(ALERTS{alertname=~"TracedRetry.*", alertstate="firing", '
    expr += 'deployment_environment_name=~"$environment|"})'
    return (
        _annotation("Alerts", "red", expr)
        .title_format("{{alertname}}")
        .text_format("{{gen_ai_provider_name}}")
        .tag_keys("severity")
    )
