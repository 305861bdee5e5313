# SPDX-License-Identifier: Apache-2.0
"""Test each query of each panel on real servers against the simulators' records.

Job processes with LiveKit's own plugins talk to the simulators, one per provider, with an outage in
their scripts. Spans and metrics go through the real Collector into Jaeger and Prometheus. The rules
run ten times faster than shipped: five minutes take half a minute. They are loaded three times: as
shipped, and once for each of the two ways of counting, without the other.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from backends import fleet as fleets
from backends import servers
from backends.agent import Job
from backends.fleet import CODED, ENGINES, INCOMPLETE, PROVIDER, SERVICES, truth
from dashboards.reading import DASHBOARDS, ROOT, dashboards, faster, panels

from dashboards import expected, preview

pytestmark = pytest.mark.real_time

FASTER = 10
STEP = 60 // FASTER
WINDOW = 4 * STEP
ENVIRONMENT = "staging"
"""Of half the jobs; the others name none."""
SAYS = ("xai", "phonic")
"""Of the providers that speak a given text themselves, those that are told to."""


def plan():
    """Return the jobs with their scripts, and no job to kill.

    The jobs of each provider hear six or seven replies at once, one late, and lose one (two if the
    provider sends no code, so that the 95th percentile is a lost reply). One reply is refused. The
    caller then speaks as often as the agent requested, so that the provider starts half of the
    replies. One of OpenAI's is incomplete, and therefore lost. Some jobs also speak given texts,
    which no panel shows. All of this happens twice, in no environment and in one, and each has jobs
    of two services. The jobs with most replies start last, because replies before the first count
    of spans are counted twice for a while.
    """
    planned = []
    for provider in PROVIDER:
        coded = provider in CODED
        late, lost = (
            ("error:server_error,ok", "error:server_error") if coded else ("late:4", "silence")
        )
        patience = 8.0 if coded else 3.0
        budget = 5.0 if provider == "openai" else None
        job = Job(provider, 2, patience=patience, budget=budget)
        planned += [(job, f"ok,{lost}")] * (1 if coded else 2)
        turns = 8 if coded else 10
        texts = 3 * (provider in SAYS)
        job = Job(provider, 6, texts=texts, turns=turns, pause=0.2, patience=patience)
        lost_turn = f",turn:{INCOMPLETE},turn:ok" if provider == "openai" else ""
        planned += [(job, f"{late},ok{lost_turn}")]
    planned += [(Job("openai"), "error:invalid_request_error")]
    there = {"OTEL_RESOURCE_ATTRIBUTES": f"deployment.environment.name={ENVIRONMENT}"}
    planned += [(replace(job, environment=there), script) for job, script in planned]
    planned.sort(key=lambda one: (one[0].turns > 0, one[0].provider in CODED))
    for place, (job, script) in enumerate(planned):
        service = {"OTEL_SERVICE_NAME": SERVICES[place % 2]}
        planned[place] = (replace(job, environment={**job.environment, **service}), script)
    return planned, {}


_OWN = re.compile(r"\btraced_retry_(replies|attempts|reply_duration|attempt_duration)_")


def _only_spans(text):
    """Return the rules or the query without the agents' own counts."""
    return _renamed(_OWN.sub(r"not_sent_\1_", text), "spans")


def _only_agents(text):
    """Return the rules or the query without counts from spans."""
    return _renamed(text.replace("traces_span_metrics_", "not_counted_"), "agents")


def _renamed(text, path):
    text = re.sub(r"\b(provider|exporter):traced_retry_", rf"{path}:traced_retry_", text)
    return text.replace("name: traced_retry_", f"name: {path}_traced_retry_")


PATHS = {"spans": _only_spans, "agents": _only_agents}
ALL = {"as shipped": str, **PATHS}


@dataclass
class Measured:
    """The servers, and the jobs that ran."""

    fleet: fleets.Fleet
    began: float
    ended: float
    prometheus: servers.Prometheus

    def ask(self, expression, at=None):
        """Send an instant query, and return {frozenset of labels: value}."""
        return self.prometheus.query(expression, at or self.ended)

    def draw(self, expression):
        """Send a range query, and return [(labels, [(time, value)])]."""
        answer = servers.get(
            f"{self.prometheus.url}/api/v1/query_range",
            query=expression,
            start=self.began,
            end=self.ended,
            step=STEP,
        )
        assert "success" == answer["status"]
        return [
            (series["metric"], [(float(at), float(value)) for at, value in series["values"]])
            for series in answer["data"]["result"]
        ]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Run the fleet, and wait until the last count has arrived."""
    for name in ("jaeger", "otelcol", "prometheus"):
        servers.command(name)
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "shipped/prometheus").mkdir(parents=True)
    for path in (DASHBOARDS / "prometheus").glob("*.yaml"):
        for name, change in ALL.items():
            text = path.read_text()
            if name in PATHS:  # the alerts run once, as shipped
                text = text.partition("- name: traced_retry_alerts")[0]
            text = change(faster(text, FASTER))
            (folder / f"shipped/prometheus/{path.stem}-{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "DASHBOARDS", folder / "shipped")
        began = time.time()
        programs = [name for name in ENGINES if servers.found_command(name)]
        # Twice the scaled interval between evaluations, so that rules of both versions keep up.
        with fleets.measure(folder, plan, 300 / FASTER, programs, 30 / FASTER) as fleet:
            settled = time.time() + (300 + 60) / FASTER + 2 * servers.FLUSH + 2 * STEP
            servers.until(lambda: time.time() > settled, 60, "the last minutes being counted")
            measured = Measured(fleet, began, time.time(), fleet.prometheus)
            for engine in fleet.engines.values():
                engine.stop_rules()
            yield measured


@pytest.fixture(scope="module", params=ENGINES)
def measured(request, played):
    """The same, asked on each version of Prometheus."""
    servers.command(request.param)
    return replace(played, prometheus=played.fleet.engines[request.param])


def filled(expression, measured, provider=".*", environment=".*", rollup="1m"):
    """Return the query as Grafana would send it."""
    for name, value in {
        "$rollup": rollup,
        "$__rate_interval_ms": str(WINDOW * 1000),
        "$__rate_interval": f"{WINDOW}s",
        "$__range": f"{int(measured.ended - measured.began)}s",
        "$provider": provider,
        "$environment": environment,
        "$initiator": ".*",
        "$model": ".*",
        "$code": ".*",
    }.items():
        expression = expression.replace(name, value)
    return expression.replace("[1h]", f"[{3600 // FASTER}s]")


QUERIES = [
    (board, panel, target)
    for board, of in dashboards().items()
    for panel in panels(of)
    for target in panel.get("targets", [])
    if "expr" in target
]
SPANS_ONLY = ("Lost by model", "Replies by model")
"""Titles of the panels that need counts from spans, as their descriptions say."""


@pytest.mark.parametrize("rollup", ["1m", "10m"])
@pytest.mark.parametrize("path", ALL)
def test_every_query_has_data(measured, path, rollup):
    """Each query returns a number, with no labels but the legend's."""
    empty, unnamed = [], []
    for board, panel, target in QUERIES:
        if path == "agents" and panel["title"] in SPANS_ONLY:
            continue
        if "@ 0" in target["expr"]:
            continue  # for its exemplars alone: test_dots_lead_to_traces
        provider = "openai" if board == "provider.json" else ".*"
        expression = filled(target["expr"], measured, provider, rollup=rollup)
        found = measured.draw(ALL[path](expression))
        where = f"{board}: {panel['title']}: {target['refId']}"
        if not any(not math.isnan(value) for _, values in found for _, value in values):
            empty.append(where)
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        if not target["instant"] and any(set(labels) - named for labels, _ in found):
            unnamed.append(where)

    assert [] == empty
    assert [] == unnamed


class Ask:
    """The queries of the panels, on one of the ways of counting."""

    def __init__(self, measured, path, environment=".*"):
        self._measured, self._change, self._environment = measured, ALL[path], environment
        self._queries = {}
        for board, panel, target in QUERIES:
            self._queries.setdefault((board, panel["title"]), []).append(target["expr"])

    def _filled(self, board, panel, number, provider, whole):
        expression = self._queries[board, panel][number]
        if whole:  # over an interval as long as the whole, a ratio or quantile is that of the whole
            expression = expression.replace("$__rate_interval", "$__range")
        return self._change(filled(expression, self._measured, provider, self._environment))

    def now(self, board, panel, *labels, number=0, provider=".*", whole=False):
        """Return the query's last values: {the labels' values: value}."""
        found = self._measured.ask(self._filled(board, panel, number, provider, whole))
        named = [(dict(pairs), value) for pairs, value in found.items()]
        return {" ".join(of.get(name, "") for name in labels): value for of, value in named}

    def one(self, board, panel, number=0, **where):
        """Return the query's single last value."""
        (value,) = self.now(board, panel, number=number, **where).values()
        return value

    def total(self, board, panel, label, *, provider=".*"):
        """Return the sums of the panel's lines per minute: {the label's value: number}."""
        found = Counter()
        for of, values in self._measured.draw(self._filled(board, panel, 0, provider, whole=False)):
            found[of.get(label, "")] += sum(value for _, value in values) * STEP / 60
        return found


@pytest.fixture(scope="module")
def rows(measured, shipped):
    """Return a function that returns the rows of a way of counting. They are read once."""
    return functools.cache(
        lambda path: list(
            expected.Panels(Ask(measured, path), measured.fleet.played, shipped, path).rows()
        )
    )


@pytest.mark.parametrize("path", PATHS)
def test_panels_show_counts_of_simulators(rows, path, capsys):
    """Counts, ratios and quantiles agree with the simulators within the tolerance."""
    lines = [f"\n\ncounted by the {path}: panel, series, value, truth, tolerance"]
    for row in rows(path):
        place = f"{row.board.removesuffix('.json')}: {row.panel}"
        lines.append(
            f"{' ' if row.fits else '!'} {place:<50} {row.series:<38} {row.value:9.3f} "
            f"{row.true:>12}   {row.tolerance}"
        )
    with capsys.disabled():
        sys.stdout.write("\n".join(lines) + "\n")

    assert [] == [row for row in rows(path) if not row.fits]


def test_every_panel_has_expected_value_or_reason(rows):
    """Each panel has a row or a listed reason, and not both."""
    told = {(row.board, row.panel) for row in rows("spans")}
    there = {
        (name, panel["title"])
        for name, board in dashboards().items()
        for panel in panels(board)
        if panel["type"] != "text"
    }

    assert there - told == set(expected.UNTOLD)


def test_preview_lists_every_panel(rows):
    """docs/panels.md has the list. ``make preview`` writes it, and its values may differ."""
    if "aws" not in PROVIDER:
        pytest.skip("the list is of eight providers: AWS's client needs Python 3.12")
    path = ROOT / "docs/panels.md"
    made = expected.as_markdown(rows("spans"), rows("agents"))
    if os.environ.get("TRACED_RETRY_PREVIEW"):
        path.write_text(made)

    assert expected.without_values(made) == expected.without_values(path.read_text())


def test_replies_counted_both_ways_count_once(rows):
    """As shipped, with spans and agents both counting: what counts at first gives way.

    In the seconds until a new provider's spans are counted its agents are believed: in an outage of
    the first minute a few replies of that minute are counted twice. The rules here run ten times
    faster than that, and all is in the first minute.
    """
    found = {
        row.panel: row
        for row in rows("as shipped")
        if row.board == expected.OVERVIEW and row.series == "all"
    }

    assert abs(found["Replies"].value - float(found["Replies"].true)) <= 0.15 * float(
        found["Replies"].true
    )
    assert found["Time to first output, p95"].fits


@pytest.mark.parametrize("path", ALL)
def test_query_shows_only_chosen_environment(measured, path):
    """The query shows the replies of the environment, by provider and outcome."""
    there = truth(
        played for played in measured.fleet.played if ENVIRONMENT in str(played.job.environment)
    )
    query = (
        "sum by (gen_ai_provider_name, traced_retry_outcome) (sum_over_time("
        'provider:traced_retry_replies:increase1m{deployment_environment_name=~"$environment"}'
        "[$__range]))"
    )

    found = measured.ask(ALL[path](filled(query, measured, environment=ENVIRONMENT)))
    counted = {
        (of["gen_ai_provider_name"], of["traced_retry_outcome"]): value
        for of, value in ((dict(labels), value) for labels, value in found.items())
    }
    others = {pair: value for pair, value in counted.items() if pair not in there}

    assert dict.fromkeys(others, 0) == others
    # With the tolerance of the panels: their counts come from the same series.
    for pair, number in there.items():
        _, _, low, high = expected.count(number)
        assert low <= counted.get(pair, 0) <= high, (pair, number, counted)


@pytest.mark.parametrize("path", PATHS)
def test_every_panel_shows_only_chosen_environment(measured, shipped, path):
    """Each panel shows the replies of the chosen environment only."""
    there = [job for job in measured.fleet.played if ENVIRONMENT in str(job.job.environment)]
    found = expected.Panels(Ask(measured, path, ENVIRONMENT), there, shipped, path)

    assert [] == [row for row in found.rows() if not row.fits]


def test_services_and_initiators_are_counted_apart(measured):
    """On both paths, the counters of each service have its own replies, half of them answers."""
    known = Counter()
    for played in measured.fleet.played:
        service = played.job.environment["OTEL_SERVICE_NAME"]
        for reply in expected.replies(played):
            known[service, reply.initiator] += 1
    spans = 'traces_span_metrics_calls_total{span_name="generate_reply"}'
    own = (
        'label_replace(last_over_time(traced_retry_replies_total{traced_retry_operation=""}[10m]),'
    )
    own += ' "service_name", "$1", "job", "(.*)")'

    for series in (spans, own):
        found = measured.ask(f"sum by (service_name, traced_retry_initiator) ({series})")
        counted = {
            (of["service_name"], of["traced_retry_initiator"]): value
            for of, value in ((dict(labels), value) for labels, value in found.items())
        }
        assert known == counted
    half = sum(known.values()) / 2
    assert half == pytest.approx(sum(known[s, "provider"] for s in SERVICES), abs=2)


def test_variable_lists_environments(measured):
    """The variable has the environments' names, and an empty one for jobs without a name."""
    (variable,) = (
        variable
        for variable in dashboards()["overview.json"]["templating"]["list"]
        if variable["name"] == "environment"
    )
    series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()

    for change in ALL.values():
        found = measured.ask(f"count by ({label}) (last_over_time({change(series)}[5m]))")
        assert {"", ENVIRONMENT} == {dict(labels).get(label, "") for labels in found}


def test_texts_are_in_no_panel(measured):
    """A ``say`` is counted on both paths, and is in no panel."""
    told = sum(played.texts for played in measured.fleet.played)
    own = 'sum(last_over_time(traced_retry_replies_total{traced_retry_operation="say"}[5m]))'
    spans = 'sum(traces_span_metrics_calls_total{span_name="say"})'

    assert 2 * 3 * len(SAYS) == told
    assert [told] == list(measured.ask(own).values())
    assert [told] == list(measured.ask(spans).values())


def test_exemplars_lead_to_traces(measured):
    """The exemplars of the panel that shows them name traces in Jaeger."""
    (target,) = {
        json.dumps(t["expr"])
        for board, panel, t in QUERIES
        if board == "overview.json" and t.get("exemplar")
    }
    found = measured.prometheus.exemplars(filled(json.loads(target), measured))

    assert found
    assert [] == [
        (series, exemplar)
        for series, exemplar in found
        if not measured.fleet.jaeger.trace(exemplar["labels"]["trace_id"])
    ]


def test_jaeger_searches_find_failed_replies(measured):
    """The searches of the provider's dashboard find the lost replies."""
    targets = [
        target
        for panel in panels(dashboards()["provider.json"])
        for target in panel["targets"]
        if target["datasource"]["type"] == "jaeger"
    ]
    found = {}
    for target in targets:
        tags = dict(pair.split("=") for pair in target["tags"].split())
        tags["gen_ai.provider.name"] = "openai"
        answers = [
            servers.get(
                f"{measured.fleet.jaeger.url}/api/traces",
                service=service,
                operation=target["operation"],
                tags=json.dumps(tags),
                limit=target["limit"],
            )
            for service in SERVICES
        ]
        found[tags["traced_retry.outcome"]] = sum(len(answer["data"]) for answer in answers)

    known = expected.Fleet(measured.fleet.played, "openai")
    assert {outcome: known.of(outcome) for outcome in ("exhausted", "not_recoverable")} == found


def test_preview_draws_each_panel(played, tmp_path):
    """Each panel is drawn from its real answers, on a page that loads no other file.

    The page and a picture of each dashboard go into the folder TRACED_RETRY_PREVIEW, if it is set.
    """
    boards = {
        name: preview.repeated(board, sorted(PROVIDER.values()))
        for name, board in dashboards().items()
        if preview.shown(board)
    }
    answers = {}
    for name, board in boards.items():
        answers[name] = {}
        provider = "openai" if name == "provider.json" else ".*"
        for panel in preview.shown(board):
            found = answers[name][panel["id"]] = []
            for target in panel["targets"]:
                expression = PATHS["spans"](filled(target["expr"], played, provider))
                lines = (
                    [(dict(of), [(0.0, v)]) for of, v in played.ask(expression).items()]
                    if target["instant"]
                    else played.draw(expression)
                )
                found.append((target, lines))
    folder = Path(os.environ.get("TRACED_RETRY_PREVIEW") or tmp_path).resolve()

    whole = preview.page(boards, answers)

    assert not re.search(r"<script|src=|href=|url\(", whole)
    for name, board in boards.items():
        for panel in preview.shown(board):
            body = preview.draw(panel, answers[name][panel["id"]], 400, 250)
            assert 'class="none"' not in body, panel["title"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dashboards.html").write_text(whole)
    for name, board in boards.items():
        one = folder / f"{Path(name).stem}.html"
        one.write_text(preview.page({name: board}, answers))
        picture = folder / f"{Path(name).stem}.png"
        preview.screenshot(one, picture, 1290, preview.height(board))
        one.unlink()
