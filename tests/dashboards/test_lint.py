# SPDX-License-Identifier: Apache-2.0
"""The rules of Grafana's dashboard-linter that fit, and some of ours.

Left out: template-job-rule, template-instance-rule, target-job-rule and target-instance-rule (a
reply belongs to a provider; a job process lives for minutes), the two for Loki (there is none).
"""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from dashboards.reading import dashboards, panels

from dashboards import promql

BOARDS = dashboards()
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in panels(board)
]
SHOWN = [p for p in PANELS if p.values[0]["type"] != "text"]
QUERIES = [
    pytest.param(p.values[0], target, id=f"{p.id}: {target['refId']}")
    for p in SHOWN
    for target in p.values[0]["targets"]
    if "expr" in target
]
UNITS = {"short", "percentunit", "s", "cpm", "none"}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
class TestDashboard:
    def test_cannot_be_edited_by_accident(self, board):
        """uneditable-dashboard: what is generated is changed where it is made."""
        assert board["editable"] is False

    def test_data_source_is_a_variable(self, board):
        """template-datasource-rule: imported anywhere, it asks for no name of ours."""
        if not board.get("templating", {}).get("list"):
            pytest.skip("it has no query")
        kinds = {
            v["name"]: (v["query"], v["label"])
            for v in board["templating"]["list"]
            if v["type"] == "datasource"
        }
        assert ("prometheus", "Prometheus data source") == kinds["prometheus_datasource"]
        assert all(name == f"{query}_datasource" for name, (query, _) in kinds.items())
        assert "__inputs" not in board

    def test_variables_read_again_when_the_time_changes(self, board):
        """template-on-time-change-reload-rule, and template-label-promql-rule."""
        for variable in board.get("templating", {}).get("list", []):
            if variable["type"] == "query":
                assert 2 == variable["refresh"]
                query = "query_result" if variable["name"] == "rollup" else "label_values"
                assert variable["definition"].startswith(f"{query}(")
                assert variable["definition"] == variable["query"]["query"]

    def test_ids_are_unique(self, board):
        """Panels' ids and titles within the dashboard, queries' refIds within the panel."""
        ids = [p["id"] for p in board["panels"]]
        ids += [p["id"] for row in board["panels"] for p in row.get("panels", [])]
        assert not [n for n, count in Counter(ids).items() if count > 1]
        titles = Counter(p["title"] for p in panels(board))
        assert not [title for title, count in titles.items() if count > 1]
        for panel in panels(board):
            refs = [t["refId"] for t in panel.get("targets", [])]
            assert len(refs) == len(set(refs))

    def test_panels_do_not_overlap(self, board):
        """Each has its place, and none is off the grid."""
        taken = Counter(
            (x, y)
            for p in board["panels"]
            for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
            for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
        )
        assert 1 == max(taken.values())
        assert 24 > max(x for x, _ in taken)

    @pytest.mark.filterwarnings("ignore:Prefer using dashboardv2")
    def test_goes_through_the_sdk_unchanged(self, board):
        """Grafana's own types read it and write it back as it is; but for the place of links, which
        they put into a menu and we do not.
        """
        pytest.importorskip("grafana_foundation_sdk")
        from grafana_foundation_sdk.cog.encoder import JSONEncoder
        from grafana_foundation_sdk.cog.plugins import register_default_plugins
        from grafana_foundation_sdk.models.dashboard import Dashboard

        register_default_plugins()
        again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))

        assert board == without_menu(again)


def without_menu(found):
    """Without ``placement: inControlsMenu``."""
    if isinstance(found, dict):
        return {k: without_menu(v) for k, v in found.items() if v != "inControlsMenu"}
    return [without_menu(v) for v in found] if isinstance(found, list) else found


def test_uids_are_unique():
    """Links name them."""
    assert {"traced-retry-overview", "traced-retry-provider", "traced-retry-runbook"} == {
        board["uid"] for board in BOARDS.values()
    }


@pytest.mark.parametrize("panel", PANELS)
class TestPanel:
    def test_panel_has_title_and_description(self, panel):
        """panel-title-description-rule: a sentence, and no metric's name in it."""
        assert panel["title"]
        assert panel["description"][0].isupper()
        assert panel["description"].endswith(".")
        assert not re.search(r"\w+_\w+_\w+", panel["description"])

    def test_panel_has_unit_and_text_for_no_data(self, panel):
        """panel-units-rule; a healthy zero is not shown as broken."""
        if panel["type"] == "text":
            assert panel["options"]["content"]
            return
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["fieldConfig"]["defaults"]["noValue"]

    def test_panel_queries_variable_data_source(self, panel):
        """panel-no-targets-rule, panel-datasource-rule."""
        if panel["type"] == "text":
            return
        assert panel["targets"]
        for source in (panel["datasource"], *(t["datasource"] for t in panel["targets"])):
            assert f"${{{source['type']}_datasource}}" == source["uid"]

    def test_panel_has_legend(self, panel):
        """Each line has a name that is not its query."""
        if panel["type"] in ("timeseries", "heatmap"):
            assert all(t["legendFormat"] not in ("", "__auto") for t in panel["targets"])


@pytest.mark.parametrize(("panel", "target"), QUERIES)
class TestQuery:
    def test_query_parses(self, panel, target):
        """target-promql-rule."""
        promql.parse(target["expr"])

    def test_query_aggregates_exporter_labels(self, panel, target):
        """Whatever labels an exporter adds (otel_scope_*, instance, ...), series are added up."""
        assert promql.ends_aggregated(promql.parse(target["expr"]))

    def test_rates_span_the_interval(self, panel, target):
        """target-rate-interval-rule: a range is Grafana's, or an hour on purpose."""
        ranges = set(re.findall(r"\[([^\]]+)\]", target["expr"]))
        allowed = {"$__range"} if target["instant"] else {"$__rate_interval"}
        assert ranges <= allowed | {"1h"}
        assert not re.search(r"\b(irate|increase)\(", target["expr"])

    def test_only_counters_have_a_rate(self, panel, target):
        """A rate is only of a counter, and a counter is only drawn as a rate."""
        rated = set(re.findall(r"\brate\((\w+)", target["expr"]))
        assert all(name.endswith(("_total", "_sum", "_count", "_bucket")) for name in rated)

    def test_query_names_no_bucket(self, panel, target):
        """Exporters write the same bound in different ways."""
        for selector in promql.selectors(promql.parse(target["expr"])):
            assert "le" not in {m.label for m in selector.matchers}

    def test_query_step_is_not_finer_than_data(self, panel, target):
        """The rolled-up series have a sample a minute, or in ten: below that there are gaps."""
        if "increase$rollup" in target["expr"] and not target["instant"]:
            assert "$rollup" == target["interval"]

    def test_query_filters_by_provider_and_environment(self, panel, target):
        """Provider and environment are filtered wherever a reply, an attempt or a wait is meant."""
        for selector in promql.selectors(promql.parse(target["expr"])):
            if selector.metric.startswith(("provider:", "traces_", "traced_retry_")):
                labels = {m.label for m in selector.matchers}
                assert "gen_ai_provider_name" in labels, selector
                if "$environment" in json.dumps(target):
                    assert promql.ENVIRONMENT in labels or "span_name" in labels


def test_first_screen_of_overview_has_about_ten_panels():
    """All other panels are in folded rows, which send no query until they are opened."""
    board = BOARDS["overview.json"]
    first = [panel for panel in board["panels"] if panel["type"] != "row"]
    folded = [row["collapsed"] for row in board["panels"] if row["type"] == "row"]

    assert 8 <= len(first) <= 12
    assert [False, *[True] * (len(folded) - 1)] == folded
