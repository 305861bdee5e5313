# SPDX-License-Identifier: Apache-2.0
"""Every query of every panel, on real servers, beside what the simulators know.

Job processes with LiveKit's own plugins talk to the simulators, one per provider, with an outage in
their scripts; spans and metrics go through the real Collector into Jaeger and Prometheus. The rules
run ten times faster than shipped: five minutes take half a minute. They are there three times:
as shipped, and for each of the two ways of counting as if there were no other.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from backends import fleet as fleets
from backends import servers
from backends.agent import Job
from backends.fleet import PROVIDER, truth
from dashboards.reading import DASHBOARDS, dashboards, faster, panels

from dashboards import preview

pytestmark = pytest.mark.real_time

FASTER = 10
STEP = 60 // FASTER
WINDOW = 4 * STEP
CODED = ("openai", "azure-openai", "xai")
"""Providers that tell a code; of the others nothing is heard."""


SAYS = ("xai", "phonic")
"""Providers that speak a given text themselves, and are told to. (So does Ultravox; its plugin cannot
close a connection on which it did, without a warning.)"""


def plan():
    """Twice over, of each provider six replies heard at once, one late, and one lost (two of those
    that tell no code: so many that the 95th percentile is theirs); one refused. Some speak given
    texts as well, of which no panel tells.

    Twice, for a connector's histograms do not begin at 0: what is in the first flush of a new one
    is an increase to nobody. (Its counts do.)
    """
    planned = []
    for provider in PROVIDER:
        coded = provider in CODED
        late, lost = (
            ("error:server_error,ok", "error:server_error") if coded else ("late:3", "silence")
        )
        patience = 8.0 if coded else 2.0
        planned += [(Job(provider, 2, pause=0.1, patience=patience), f"{late},ok")]
        planned += [(Job(provider, 2 if coded else 3, patience=patience), f"ok,{lost}")]
        planned += [(Job(provider, 4, texts=3 * (provider in SAYS), pause=0.2), "ok")]
    planned += [(Job("openai"), "error:invalid_request_error")]
    return [*planned, *planned], {}


_OWN = re.compile(r"\btraced_retry_(replies|attempts|reply_duration|attempt_duration)_")


def _only_spans(text):
    """The same rules or query where agents count neither replies nor attempts."""
    return _renamed(_OWN.sub(r"not_sent_\1_", text), "spans")


def _only_agents(text):
    """The same rules or query where nothing is counted from spans."""
    return _renamed(text.replace("traces_span_metrics_", "not_counted_"), "agents")


def _renamed(text, path):
    text = re.sub(r"\b(provider|exporter):traced_retry_", rf"{path}:traced_retry_", text)
    return text.replace("name: traced_retry_", f"name: {path}_traced_retry_")


PATHS = {"spans": _only_spans, "agents": _only_agents}
ALL = {"as shipped": str, **PATHS}


@dataclass
class Measured:
    """The servers, and what was played."""

    fleet: fleets.Fleet
    began: float
    ended: float

    @property
    def truth(self):
        """{(provider, outcome): replies}."""
        return truth(self.fleet.played)

    def ask(self, expression, at=None):
        """An instant query: {frozenset of labels: value}."""
        return self.fleet.prometheus.query(expression, at or self.ended)

    def draw(self, expression):
        """A range query: [(labels, [values])]."""
        answer = servers.get(
            f"{self.fleet.prometheus.url}/api/v1/query_range",
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
def measured(tmp_path_factory):
    """The fleet once it was played, and the last count is in."""
    for name in ("jaeger", "otelcol", "prometheus"):
        servers.command(name)
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "shipped/prometheus").mkdir(parents=True)
    for path in (DASHBOARDS / "prometheus").glob("*.yaml"):
        for name, change in ALL.items():
            text = change(faster(path.read_text(), FASTER))
            (folder / f"shipped/prometheus/{path.stem}-{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "DASHBOARDS", folder / "shipped")
        patch.setattr(fleets, "plan", plan)
        began = time.time()
        with fleets.measure(folder) as fleet:
            settled = time.time() + (300 + 60) / FASTER + 2 * servers.FLUSH + 2 * STEP
            servers.until(lambda: time.time() > settled, 60, "the last minutes being counted")
            yield Measured(fleet, began, time.time())


def filled(expression, measured, provider=".*"):
    """The query as Grafana would send it."""
    for name, value in {
        "$__rate_interval_ms": str(WINDOW * 1000),
        "$__rate_interval": f"{WINDOW}s",
        "$__range": f"{int(measured.ended - measured.began)}s",
        "$provider": provider,
        "$environment": ".*",
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
SPANS_ONLY = ("Lost, by model", "Replies, by model")
"""Titles of the panels that need counts from spans, as their descriptions say."""


NO_BUDGET = "Retry budget left"
"""The fleet's policy has no budget; test_drift.py proves that the gauge is what is charted."""


@pytest.mark.parametrize("path", ALL)
def test_every_query_has_data(measured, path):
    """Something comes back for each, that is not all NaN, with no labels but the legend's."""
    empty, unnamed = [], []
    for board, panel, target in QUERIES:
        if panel["title"] == NO_BUDGET or (path == "agents" and panel["title"] in SPANS_ONLY):
            continue
        provider = "openai" if board == "provider.json" else ".*"
        found = measured.draw(ALL[path](filled(target["expr"], measured, provider)))
        where = f"{board}: {panel['title']}: {target['refId']}"
        if not any(not math.isnan(value) for _, values in found for _, value in values):
            empty.append(where)
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        if not target["instant"] and any(set(labels) - named for labels, _ in found):
            unnamed.append(where)

    assert [] == empty
    assert [] == unnamed


def total(measured, expression):
    """What a per-minute line adds up to, by its labels."""
    return {
        frozenset(labels.items()): sum(value for _, value in values) * STEP / 60
        for labels, values in measured.draw(expression)
    }


class Truths:
    """What the simulators counted, by panel: {labels: number}."""

    def __init__(self, measured):
        self.counted = measured.truth
        self.requests = Counter()
        self.failed = Counter()
        for played in measured.fleet.played:
            name = PROVIDER[played.job.provider]
            self.requests[name] += len(played.requests)
            for request in played.requests:
                if request.fault and request.fault.name == "error":
                    self.failed[name, request.fault.argument] += 1
        self.providers = sorted({provider for provider, _ in self.counted})

    def of(self, *outcomes, provider=None):
        """Replies that ended so."""
        return sum(
            n
            for (who, outcome), n in self.counted.items()
            if outcome in outcomes and provider in (None, who)
        )

    def share(self, *outcomes, provider=None):
        """Their share of all (here none is called off)."""
        return self.of(*outcomes, provider=provider) / self.replies(provider)

    def replies(self, provider=None):
        """All of them."""
        return sum(n for (who, _), n in self.counted.items() if provider in (None, who))


NAMED = {PROVIDER[name] for name in CODED}


def rows(measured, path):
    """(panel, series, value, truth, tolerance) of every panel whose truth is known."""
    truths = Truths(measured)
    by_title = {(board, panel["title"]): panel["targets"][0]["expr"] for board, panel, _ in QUERIES}

    def expression(title, board="overview.json", provider=".*"):
        return ALL[path](filled(by_title[board, title], measured, provider))

    def one(title, **where):
        (value,) = measured.ask(expression(title, **where)).values()
        return value

    def each(title, key, **where):
        summed = total(measured, expression(title, **where))
        return {dict(labels).get(key, ""): value for labels, value in summed.items()}

    yield "Replies", "all", one("Replies"), truths.replies(), 0.1
    for title, outcomes in {
        "Heard at first try": ["succeeded"],
        "Recovered by retry": ["recovered"],
        "Lost": ["exhausted", "not_recoverable"],
    }.items():
        yield title, "all", one(title), truths.share(*outcomes), 0.05
    worst = max(truths.share("exhausted", provider=p) for p in truths.providers)
    yield "Burn rate", "worst", one("Burn rate"), worst / 0.01, 0.1
    sent = sum(truths.requests.values()) / truths.replies()
    yield "Requests per reply", "all", one("Requests per reply"), sent, 0.05

    for provider in truths.providers:
        found = each("$provider", "traced_retry_outcome", provider=provider)
        for outcome in ("succeeded", "recovered", "exhausted", "not_recoverable"):
            expected = truths.of(outcome, provider=provider)
            yield (
                "Replies by outcome",
                f"{provider} {outcome}",
                found.get(outcome, 0),
                expected,
                0.1,
            )
        place = {"board": "provider.json", "provider": provider}
        yield "Replies (provider)", provider, one("Replies", **place), truths.replies(provider), 0.1
        share = truths.share("exhausted", provider=provider)
        drawn = measured.draw(expression("Exhausted in the last hour", **place))
        yield "Exhausted in the last hour", provider, drawn[0][1][-1][1], share, 0.1
        retried = truths.of("recovered", "exhausted", provider=provider)
        helped = truths.of("recovered", provider=provider) / retried
        # A ratio per interval; over an interval as long as the whole it is that of the whole.
        whole = by_title["overview.json", "Is retrying helping?"].replace(
            "$__rate_interval", "$__range"
        )
        (value,) = measured.ask(ALL[path](filled(whole, measured, provider))).values()
        yield "Is retrying helping?", provider, value, helped, 0.1
    stops = each("Why no further attempt was made", "traced_retry_stop_reason")
    expected = truths.of("not_recoverable")
    yield "Why no further attempt", "not_recoverable", stops["not_recoverable"], expected, 0.1
    given_up = sum(
        stops.get(r, 0) for r in ("max_attempts", "deadline", "budget", "unsafe_to_resend")
    )
    yield "Why no further attempt", "exhausted", given_up, truths.of("exhausted"), 0.1
    failed = measured.ask(expression("Failed attempts: providers and codes"))
    for (provider, code), count in sorted(truths.failed.items()):
        labels = frozenset({"gen_ai_provider_name": provider, "error_type": code}.items())
        yield "Providers and codes", f"{provider} {code}", failed.get(labels, 0), count, 0.1
    mend = each("Could a retry mend it?", "traced_retry_recoverable")
    yield "Could a retry mend it?", "false", mend["false"], truths.of("not_recoverable"), 0.1
    # Six in a hundred, lost where no code is told, took 6 s: that is in the bucket from 5 to 7.5.
    slow = sum(truths.of("exhausted", provider=p) for p in truths.providers if p not in NAMED)
    assert 0.05 < slow / truths.replies() < 0.5
    yield "Silence, p95", "6 s, give or take its bucket", one("Silence, p95"), 6.25, 0.3


@pytest.mark.parametrize("path", PATHS)
def test_values_are_true(measured, path, capsys):
    """Counts, ratios and the quantile's bounds agree with the simulators, within what is stated."""
    found = list(rows(measured, path))

    lines = [f"\n\ncounted by the {path}: panel, series, value, truth, tolerance"]
    for title, series, value, true, tolerance in found:
        lines.append(f"  {title:<28} {series:<36} {value:9.3f} {true:9.3f} {2 * tolerance:5.0%}")
    with capsys.disabled():
        sys.stdout.write("\n".join(lines) + "\n")
    # A count of one or two may be off by half a reply: rates extrapolate. And with ten processes
    # and five servers on two cores a scrape may come late, which doubles what a rate is off.
    wrong = [
        row
        for row in found
        if abs(row[2] - row[3]) > max(2 * row[4] * row[3], 0.5 if row[3] >= 1 else 0.04)
    ]
    assert [] == wrong


def test_counted_both_ways_is_counted_once(measured):
    """As shipped, with spans and agents both counting: what counts at first gives way.

    In the seconds until a new provider's spans are counted its agents are believed; the rules here
    run ten times faster than that, hence the tolerance.
    """
    found = {title: (value, true) for title, series, value, true, _ in rows(measured, "as shipped")}

    for title in ("Replies", "Silence, p95"):
        value, true = found[title]
        assert abs(value - true) <= 0.2 * true, title


def test_what_is_said_is_no_reply(measured):
    """What a plugin was told to say is counted on both paths, and is in no panel."""
    told = sum(played.texts for played in measured.fleet.played)
    own = 'sum(last_over_time(traced_retry_replies_total{traced_retry_operation="say"}[5m]))'
    spans = 'sum(traces_span_metrics_calls_total{span_name="say"})'

    assert 2 * 3 * len(SAYS) == told
    assert [told] == list(measured.ask(own).values())
    assert [told] == list(measured.ask(spans).values())


def test_dots_lead_to_traces(measured):
    """The exemplars of the panel that has them name traces that Jaeger has."""
    (target,) = {
        json.dumps(t["expr"])
        for board, panel, t in QUERIES
        if board == "overview.json" and t.get("exemplar")
    }
    found = measured.fleet.prometheus.exemplars(filled(json.loads(target), measured))

    assert found
    assert [] == [
        (series, exemplar)
        for series, exemplar in found
        if not measured.fleet.jaeger.trace(exemplar["labels"]["trace_id"])
    ]


def test_lost_replies_are_found_in_jaeger(measured):
    """The searches of the provider's dashboard, sent as Grafana sends them, find the lost ones."""
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
        answer = servers.get(
            f"{measured.fleet.jaeger.url}/api/traces",
            service=fleets.ENDED,
            operation=target["operation"],
            tags=json.dumps(tags),
            limit=target["limit"],
        )
        found[tags["traced_retry.outcome"]] = len(answer["data"])

    lost = ("exhausted", "not_recoverable")
    assert {outcome: measured.truth["openai", outcome] for outcome in lost} == found


def test_preview(measured, tmp_path):
    """Each panel is drawn from its real answers, on a page that loads nothing.

    Into the folder TRACED_RETRY_PREVIEW where that is set, with a picture of each dashboard.
    """
    boards = {n: b for n, b in dashboards().items() if preview.shown(b)}
    answers = {name: {p["id"]: [] for p in preview.shown(b)} for name, b in boards.items()}
    for board, panel, target in QUERIES:
        provider = "openai" if board == "provider.json" else ".*"
        expression = PATHS["spans"](filled(target["expr"], measured, provider))
        found = measured.draw(expression)
        if target["instant"]:
            found = [(dict(of), [(0.0, v)]) for of, v in measured.ask(expression).items()]
        answers[board][panel["id"]].append((target, found))
    folder = Path(os.environ.get("TRACED_RETRY_PREVIEW") or tmp_path)

    whole = preview.page(boards, answers)

    assert not re.search(r"<script|src=|href=|url\(", whole)
    for name, board in boards.items():
        for panel in preview.shown(board):
            body = preview.draw(panel, answers[name][panel["id"]], 400, 250)
            assert 'class="none"' not in body or panel["title"] == NO_BUDGET, panel["title"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dashboards.html").write_text(whole)
    for name, board in boards.items():
        one = folder / f"{Path(name).stem}.html"
        one.write_text(preview.page({name: board}, answers))
        preview.screenshot(one, folder / f"{Path(name).stem}.png")
        one.unlink()
