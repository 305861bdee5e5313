# SPDX-License-Identifier: Apache-2.0
"""Compare each panel with the simulators' records: its value, the expected value, the tolerance.

The expected value comes from the requests of each simulator, their times and the faults of its
script. The duration of an immediate answer is unknown beforehand. It counts as 0 s, and the machine
may need up to :data:`BUSY` for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from backends.fleet import INCOMPLETE, NOT_RECOVERABLE, PROVIDER

from traced_retry.semconv import ACTIONS, DURATION_BUCKETS

BUSY = 0.6
"""Seconds that a busy machine may add to what takes no time."""
OVERVIEW, ONE = "overview.json", "provider.json"
LOST = ("exhausted", "not_recoverable")
NEVER = (NOT_RECOVERABLE, "content_filter")
"""The codes after which no request may follow."""

UNTOLD = {
    (OVERVIEW, "Alerts"): "`test_alerts.py` and `test_end_to_end.py` test which alerts fire",
    (ONE, "Alerts"): "`test_alerts.py` and `test_end_to_end.py` test which alerts fire",
    (
        ONE,
        "Exhausted replies",
    ): "a list of traces. `test_jaeger_searches_find_failed_replies` compares it",
    (
        ONE,
        "Refused replies",
    ): "a list of traces. `test_jaeger_searches_find_failed_replies` compares it",
    (
        ONE,
        "Lost replies",
    ): "a list of traces from Tempo: not tested",
}
"""Panels without a row, and why."""


@dataclass(frozen=True)
class Attempt:
    """One attempt as its simulator must have caused it. ``code`` is "" if it succeeded."""

    action: str
    code: str
    seconds: float


@dataclass(frozen=True)
class Reply:
    """One reply as its simulator must have caused it."""

    provider: str
    attempts: tuple[Attempt, ...]
    initiator: str = "agent"

    @property
    def outcome(self):
        """Return the outcome, as in ``semconv.Outcome``."""
        last = self.attempts[-1].code
        if not last:
            return "succeeded" if len(self.attempts) == 1 else "recovered"
        return "not_recoverable" if last in NEVER else "exhausted"

    @property
    def seconds(self):
        """Return the time until the reply was heard or failed."""
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def requests(self):
        """Return the number of requests that were sent."""
        return sum(attempt.action != "listen" for attempt in self.attempts)


def replies(played):
    """Yield the replies of one job. At most the last one is lost."""
    provider, patience = PROVIDER[played.job.provider], played.job.patience
    again = "restart" if played.job.provider == "google" else "listen"
    failed, silent = [], False
    for request in played.requests:
        match request.fault.name:
            case "ok":
                yield Reply(provider, (*failed, Attempt("send", "", 0.0)))
                failed = []
            case "late":
                rest = request.fault.seconds - patience
                yield Reply(
                    provider,
                    (Attempt("send", "timeout", patience), Attempt("listen", "", rest)),
                )
            case "error":
                failed.append(Attempt("send", request.fault.argument, 0.0))
            case "silence":
                silent = True
    if silent:
        actions = ("send", "listen", again)
        yield Reply(provider, tuple(Attempt(action, "timeout", patience) for action in actions))
    elif failed:
        yield Reply(provider, tuple(failed))
    for turn in played.turns:
        code = "content_filter" if turn.fault.name == INCOMPLETE else ""
        yield Reply(provider, (Attempt("listen", code, 0.0),), "provider")


@dataclass(frozen=True)
class Row:
    """One value of a panel, and its expected value."""

    board: str
    panel: str
    series: str
    value: float
    true: str
    tolerance: str
    low: float
    high: float

    @property
    def fits(self):
        """Return whether the value is within its tolerance."""
        return self.low <= self.value <= self.high


def count(number, part=0.2):
    """Return (expected, tolerance, low, high) of a count.

    A panel's count comes from rates, which extrapolate. Most are within 3 %, and a late scrape on a
    busy machine adds more.
    """
    if not number:
        return "0", "±0.05", -0.05, 0.05
    off = max(part * number, 0.75)
    return f"{number:g}", f"{part * 100:.0f} %, at least 0.75", number - off, number + off


def share(part, whole=1.0):
    """Return (expected, tolerance, low, high) of a ratio."""
    ratio = part / whole
    off = max(0.15 * ratio, 0.05)
    return f"{ratio:.3f}", "15 %, at least 0.05", ratio - off, ratio + off


def difference(part, whole):
    """Return (expected, tolerance, low, high) of the surplus of one count over another."""
    ratio = part / whole
    return f"{ratio:.3f}", "±0.15", ratio - 0.15, ratio + 0.15


def exactly(number):
    """Return (expected, tolerance, low, high) of an exact value."""
    return f"{number:g}", "exact", number - 1e-9, number + 1e-9


def between(low, high, true):
    """Return (expected, tolerance, low, high) of a value with known bounds."""
    return true, f"{low:.3g} to {high:.3g}", low, high


def quantile(q, seconds):
    """Return (expected, tolerance, low, high) of a quantile, from the bounds of its bucket.

    The next bucket is allowed if the quantile is near its bound.
    """
    ordered = sorted(seconds)

    def at(rank):
        return ordered[min(max(int(rank * len(ordered)), 0), len(ordered) - 1)]

    bounds = (0.0, *DURATION_BUCKETS)
    low = max(bound for bound in bounds if bound <= max(at(q - 0.02) - 0.05, 0.0))
    high = min(bound for bound in bounds if bound >= at(q + 0.02) + BUSY)
    return between(low, high, f"{at(q):g} s")


class Fleet:
    """The simulators' records of all replies, or of one provider's."""

    def __init__(self, jobs, provider=None):
        self.replies = [
            reply for job in jobs for reply in replies(job) if provider in (None, reply.provider)
        ]
        self.attempts = [attempt for reply in self.replies for attempt in reply.attempts]
        self.failed = [attempt for attempt in self.attempts if attempt.code]
        self.waits = len(self.attempts) - len(self.replies)

    def of(self, *outcomes):
        """Return the number of replies with these outcomes."""
        return sum(reply.outcome in outcomes for reply in self.replies)

    @property
    def heard(self):
        """Return the seconds of the heard replies."""
        return [reply.seconds for reply in self.replies if reply.outcome not in LOST]

    def requests(self):
        """Return the number of requests that were sent."""
        return sum(reply.requests for reply in self.replies)


class Panels:
    """Gives a :class:`Row` for each value of each panel whose truth is known.

    Args:
        ask: ``ask.now``, ``ask.one`` and ``ask.total`` ask as the panel does; see test_fleet.py.
        jobs: what was played.
        shipped: the thresholds.
        path: how replies were counted, ``spans`` or ``agents``.
    """

    def __init__(self, ask, jobs, shipped, path):
        self.ask, self.shipped, self.path = ask, shipped, path
        self.jobs = len(jobs)
        self.lost = Counter()
        for played in jobs:
            lost = sum(reply.outcome in LOST for reply in replies(played))
            self.lost[played.job.environment["OTEL_SERVICE_NAME"]] += lost
        self.every = Fleet(jobs)
        names = sorted({reply.provider for reply in self.every.replies})
        self.each = {name: Fleet(jobs, name) for name in names}

    def rows(self):
        """Yield all rows."""
        yield from self._glance(OVERVIEW, self.every)
        for name, of in self.each.items():
            yield from self._outcomes(OVERVIEW, "$provider", of, provider=name)
        yield from self._exhausted(OVERVIEW)
        yield from self._initiators()
        yield from self._services()
        yield from self._ratios()
        yield from self._why(OVERVIEW, self.every)
        yield from self._codes()
        yield from self._times(OVERVIEW, self.every)
        yield from self._dots(OVERVIEW, self.every)
        yield from self._health()
        for name, of in self.each.items():
            yield from self._glance(ONE, of, provider=name)
            yield from self._outcomes(ONE, "Replies by outcome", of, provider=name)
        yield from self._exhausted(ONE)
        # One that tells codes, and one that tells none, and can restart.
        for name in ("openai", "gcp.gemini"):
            of, where = self.each[name], {"provider": name}
            yield from self._windows(of, **where)
            if self.path == "spans":
                yield from self._models(of, **where)
            yield from self._why(ONE, of, **where)
            yield from self._kinds(of, **where)
            yield from self._times(ONE, of, **where)
            yield from self._dots(ONE, of, **where)

    def _glance(self, board, of, **where):
        who = where.get("provider", "all")
        settled = len(of.replies)
        whole = {
            "Replies": count(settled),
            "Succeeded at first attempt": share(of.of("succeeded"), settled),
            "Recovered by retry": share(of.of("recovered"), settled),
            "Lost": share(of.of(*LOST), settled),
            "Requests per reply": share(of.requests(), settled),
            "Time to first output, p95": quantile(0.95, of.heard),
        }
        for panel, known in whole.items():
            yield _row(board, panel, who, self.ask.one(board, panel, **where), known)
        worst = max(
            fleet.of(*LOST) / len(fleet.replies)
            for name, fleet in self.each.items()
            if who in ("all", name)
        )
        burn = share(worst, self.shipped.budget)
        yield _row(board, "Burn rate", who, self.ask.one(board, "Burn rate", **where), burn)

    def _outcomes(self, board, panel, of, **where):
        found = self.ask.total(board, panel, "traced_retry_outcome", **where)
        for outcome in ("succeeded", "recovered", "exhausted", "not_recoverable"):
            series = f"{where['provider']} {outcome}"
            yield _row(board, panel, series, found.get(outcome, 0), count(of.of(outcome)))

    def _initiators(self):
        """Yield the rows by initiator: the provider starts half of the replies of this fleet."""
        for panel, some in (
            ("Replies by initiator", self.every.replies),
            ("Lost replies by initiator", [r for r in self.every.replies if r.outcome in LOST]),
        ):
            found = self.ask.total(OVERVIEW, panel, "traced_retry_initiator")
            for initiator in ("agent", "provider"):
                number = sum(reply.initiator == initiator for reply in some)
                yield _row(OVERVIEW, panel, initiator, found.get(initiator, 0), count(number))

    def _services(self):
        """Yield the rows by service, and the error budget, which this fleet overdraws."""
        panel = "Lost by service"
        found = self.ask.total(OVERVIEW, panel, "service_name")
        for name, number in self.lost.items():
            yield _row(OVERVIEW, panel, name, found.get(name, 0), count(number))
        panel = "Lost by version"
        found = self.ask.total(OVERVIEW, panel, "service_version")
        yield _row(OVERVIEW, panel, "no version", found[""], count(self.lost.total()))
        panel = "Error budget left"
        for name in self.each:
            value = self.ask.one(OVERVIEW, panel, provider=name)
            yield _row(OVERVIEW, panel, name, value, exactly(-1))

    def _exhausted(self, board):
        panel = "Lost in the last hour"
        for name in self.each:
            of = self.each[name]
            known = share(of.of(*LOST), len(of.replies))
            yield _row(board, panel, name, self.ask.one(board, panel, provider=name), known)
        critical = max(r.factor for r in self.shipped.burn_rates if r.severity == "critical")
        warning = min(r.factor for r in self.shipped.burn_rates if r.severity == "warning")
        for number, factor, series in ((1, critical, "page"), (2, warning, "ticket")):
            value = self.ask.one(board, panel, number)
            yield _row(
                board, panel, series, value, exactly(round(factor * self.shipped.budget, 10))
            )

    def _why(self, board, of, **where):
        who = f"{where['provider']} " if where else ""
        found = self.ask.total(board, "Failed attempts by code", "error_type", **where)
        for code, number in sorted(Counter(a.code for a in of.failed).items()):
            yield _row(board, "Failed attempts by code", who + code, found[code], count(number))
        panel = "Replies by stop reason"
        found = self.ask.total(board, panel, "traced_retry_stop_reason", **where)
        for reason, outcome in (
            ("max_attempts", "exhausted"),
            ("not_recoverable", "not_recoverable"),
        ):
            yield _row(board, panel, who + reason, found.get(reason, 0), count(of.of(outcome)))

    def _times(self, board, of, **where):
        who = f"{where['provider']} " if where else ""
        silences = [reply.seconds for reply in of.replies]
        failures = [reply.seconds for reply in of.replies if reply.outcome in LOST]
        attempts = [attempt.seconds for attempt in of.attempts]
        waits = [0.0] * of.waits
        for panel, heat, seconds in (
            ("Time to first output", "Time to first output (distribution)", of.heard),
            ("Time to failure", None, failures),
            ("Attempt duration", "Attempt duration (distribution)", attempts),
            ("Backoff delay", "Backoff delay (distribution)", waits),
        ):
            for number, q in enumerate((0.5, 0.95, 0.99)):
                value = self.ask.one(board, panel, number, whole=True, **where)
                yield _row(board, panel, f"{who}p{q * 100:.0f}", value, quantile(q, seconds))
            if heat is None:
                continue
            found = self.ask.now(board, heat, "le", whole=True, **where)
            below = {float(le.replace("+Inf", "inf")): value for le, value in found.items()}
            for bound in (2.0, 5.0, float("inf")):
                known = count(sum(second < bound for second in seconds))
                yield _row(board, heat, f"{who}up to {bound:g} s", below[bound], known)
        panel = "Time to first output"
        value = self.ask.one(board, panel, 3)
        yield _row(board, panel, "objective, p95", value, exactly(self.shipped.silence_seconds))
        panel = "Mean reply duration by part"
        mean = sum(silences) / len(silences)
        value = self.ask.one(board, panel, 0, whole=True, **where)
        known = between(0.9 * mean, 1.1 * mean + BUSY / 2, f"{mean:.2f} s")
        yield _row(board, panel, f"{who}attempts", value, known)
        value = self.ask.one(board, panel, 1, whole=True, **where)
        # Full jitter up to 0.05 s, then up to 0.1 s, and none before a listen.
        known = between(0, 0.1 * of.waits / len(silences) + 0.05, "below 0.1 s a retry")
        yield _row(board, panel, f"{who}waiting", value, known)

    def _dots(self, board, of, **where):
        who = f"{where['provider']} " if where else ""
        panel = "Recovered and lost replies, with traces"
        found = self.ask.total(board, panel, "traced_retry_outcome", **where)
        for outcome in ("recovered", "exhausted", "not_recoverable"):
            number = count(of.of(outcome))
            yield _row(board, panel, who + outcome, found.get(outcome, 0), number)

    def _health(self):
        board = OVERVIEW
        panel = "Processes reporting"
        yield _row(board, panel, "processes", self.ask.one(board, panel), exactly(self.jobs))
        panel = "Spans dropped"
        dropped = sum(self.ask.total(board, panel, "traced_retry_exporter").values())
        yield _row(board, panel, "all", dropped, count(0))
        panel = "Retry budget left"
        left = self.ask.now(board, panel, "gen_ai_provider_name")
        known = between(3, 3.5, "5, less 2 retries")
        yield _row(board, panel, "openai", left["openai"], known)
        panel = "In-flight replies"
        for name, value in sorted(self.ask.now(board, panel, "gen_ai_provider_name").items()):
            yield _row(board, panel, name, value, exactly(0))
        panel = "Late replies"
        for name, value in sorted(self.ask.total(board, panel, "gen_ai_provider_name").items()):
            yield _row(board, panel, name, value, count(0))
        panel = "Scrape targets up"
        for job, value in sorted(self.ask.now(board, panel, "job").items()):
            yield _row(board, panel, job, value, exactly(1))

    def _ratios(self):
        ratios = {
            "Retries per reply": lambda of: difference(of.waits, len(of.replies)),
            "Retry success rate": lambda of: share(
                of.of("recovered"), of.of("recovered", "exhausted")
            ),
            "Requests per reply, by provider": lambda of: share(of.requests(), len(of.replies)),
        }
        for panel, known in ratios.items():
            found = self.ask.now(OVERVIEW, panel, "gen_ai_provider_name", whole=True)
            for name, of in self.each.items():
                yield _row(OVERVIEW, panel, name, found[name], known(of))
        limit = exactly(self.shipped.storm_amplification)
        yield _row(OVERVIEW, panel, "ticket", self.ask.one(OVERVIEW, panel, 1), limit)

    def _codes(self):
        panel = "Failed attempts by recoverability"
        found = self.ask.total(OVERVIEW, panel, "traced_retry_recoverable")
        failed = self.every.failed
        never = sum(attempt.code in NEVER for attempt in failed)
        for value, number in (("true", len(failed) - never), ("false", never)):
            yield _row(OVERVIEW, panel, value, found[value], count(number))
        panel = "Failed attempts: providers and codes"
        found = self.ask.now(OVERVIEW, panel, "gen_ai_provider_name", "error_type")
        known = {
            f"{name} {code}": sum(attempt.code == code for attempt in of.failed)
            for name, of in self.each.items()
            for code in {attempt.code for attempt in of.failed}
        }
        for series in sorted({*known, *found}):
            number = count(known.get(series, 0))
            yield _row(OVERVIEW, panel, series, found.get(series, 0), number)

    def _windows(self, of, provider):
        panel = "Burn rate by window"
        found = self.ask.now(ONE, panel, "window", provider=provider)
        for window in ("1h", "6h", "1d", "3d"):  # six minutes and more, here: all of it
            known = share(of.of(*LOST) / len(of.replies), self.shipped.budget)
            yield _row(ONE, panel, f"{provider} {window}", found[window], known)

    def _models(self, of, provider):
        numbers = {
            "Replies by model": len(of.replies),
            "Lost by model": of.of(*LOST),
        }
        for panel, number in numbers.items():
            found = self.ask.total(ONE, panel, "gen_ai_request_model", provider=provider)
            ((model, value),) = found.items()
            # Of the raw series, whose rate nothing averages.
            yield _row(ONE, panel, f"{provider} {model}", value, count(number, 0.3))

    def _kinds(self, of, provider):
        panel = "Failed attempts by action"
        found = self.ask.total(ONE, panel, "traced_retry_action", provider=provider)
        for action in ACTIONS:
            number = count(sum(attempt.action == action for attempt in of.failed))
            yield _row(ONE, panel, f"{provider} {action}", found[action], number)
        labels = ("error_type", "traced_retry_recoverable")
        found = self.ask.now(
            ONE, "Failed attempts by code and recoverability", *labels, provider=provider
        )
        for code, number in sorted(Counter(attempt.code for attempt in of.failed).items()):
            series = f"{code} {'false' if code in NEVER else 'true'}"
            yield _row(
                ONE,
                "Failed attempts by code and recoverability",
                f"{provider} {series}",
                found[series],
                count(number),
            )


def _row(board, panel, series, value, known):
    true, tolerance, low, high = known
    return Row(board, panel, series, value, true, tolerance, low, high)


HEAD = """\
# Panels and expected values

Generated by `make preview` (`tests/dashboards/test_fleet.py`). Do not edit.

This page shows that each panel of the dashboards displays the right number. A test runs job
processes with the real plugins of eight providers against simulators that fail on a script. The
agents request half of the replies. The providers start the other half, because the caller speaks.
Spans and metrics go through a real Collector into a real Jaeger, Prometheus 2.42 and Prometheus
3.16. The test then sends each panel's own query to both and compares the value with the simulators'
records. It fails if a value is outside its tolerance. The values here are those of one Prometheus.

| column | meaning |
|---|---|
| panel | the title. `$provider` is the panel that the dashboard repeats for each provider |
| series | the line of the panel, for example a provider and an outcome |
| expected | the value by the simulators' records. A time is 0 s if the simulator answered at once |
| tolerance | the allowed difference from the expected value, or the allowed range |
| from spans | the value in this run, if replies are [counted from spans](exactness.md) |
| by the agents | the value in this run, if the agents count replies |

The rules ran ten times faster than shipped, so counts are estimates from few samples. On a busy
machine an immediate answer takes some tenths of a second. LiveKit inference is not in the list,
because it uses OpenAI's protocol and adapter. NVIDIA is not, because its plugin has no
`generate_reply`.
"""


def as_markdown(spans, agents):
    """Return the whole list with the values of a run."""
    by_agents = {(row.board, row.panel, row.series): row for row in agents}
    lines = [HEAD]
    for board, title in ((OVERVIEW, "Overview"), (ONE, "One provider")):
        lines += [
            f"## {title}\n",
            "| panel | series | expected | tolerance | from spans | by the agents |",
            "|---|---|---|---|---|---|",
        ]
        for row in spans:
            if row.board == board:
                other = by_agents.get((row.board, row.panel, row.series))
                value = "not known" if other is None else f"{other.value:.3f}"
                told = row.tolerance
                if other is not None and other.tolerance != told:
                    told += f"; by the agents {other.tolerance}"
                cells = (row.panel, row.series, row.true, told, f"{row.value:.3f}", value)
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "## Panels without an expected value\n",
        "| dashboard | panel | reason |",
        "|---|---|---|",
    ]
    for (board, panel), why in UNTOLD.items():
        lines.append(f"| {board.removesuffix('.json')} | {panel} | {why} |")
    return "\n".join(lines) + "\n"


def without_values(markdown):
    """Return the list without the values of a run."""
    return [line.rsplit(" | ", 2)[0] for line in markdown.splitlines()]
