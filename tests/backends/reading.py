# SPDX-License-Identifier: Apache-2.0
"""How many replies there were in the last ten minutes, read from Prometheus on either path."""

from __future__ import annotations

import time

from backends.servers import FLUSH, SCRAPE, until

WINDOW = "10m"
LABELS = "gen_ai_provider_name, traced_retry_outcome"


def spans(service):
    """Return the series that a spanmetrics connector counts, for a regular expression."""
    return (
        f'traces_span_metrics_calls_total{{span_name="generate_reply",service_name=~"{service}"}}'
    )


def own(service):
    """Return the series that the agents count themselves, for a regular expression."""
    return f'traced_retry_replies_total{{job=~"{service}"}}'


def increase(series):
    """Prometheus's own function."""
    return f"sum by ({LABELS}) (increase({series}[{WINDOW}]))"


def last_less_first(series):
    """What each process counted since the window began: the recording rules' arithmetic."""
    last, first = (
        f"last_over_time({series}[{WINDOW}])",
        f"last_over_time({series}[5m] offset {WINDOW})",
    )
    return f"sum by ({LABELS}) ({last} - {first} or {last})"


def counted(prometheus, expression, at=None):
    """{(provider, outcome): value}, without what is 0."""
    found = prometheus.query(expression, at)
    pairs = {
        (dict(series)["gen_ai_provider_name"], dict(series)["traced_retry_outcome"]): value
        for series, value in found.items()
    }
    return {pair: value for pair, value in pairs.items() if value}


def last_scrape(prometheus, series):
    """Unix time of the newest sample; None where there is none."""
    (at,) = prometheus.query(f"max(timestamp({series}))").values() or (None,)
    return at


def settle(prometheus, service):
    """Wait until all that was sent by now has been flushed, counted and scraped.

    A new count is 0 in one flush and right in the next.
    """
    over = time.time()
    until(
        lambda: (last_scrape(prometheus, spans(service)) or 0) > over + 2 * FLUSH + 2 * SCRAPE,
        seconds=60.0,
        what=f"a scrape after the last flush of {service}",
    )


def from_spans(prometheus, service):
    """Path (a), at the time of the last scrape: `increase` has nothing to extrapolate there, for
    the other end of each series is the 0 that it began with.
    """
    at = last_scrape(prometheus, spans(service))
    return counted(prometheus, increase(spans(service)), at) if at else {}


def from_metrics(prometheus, service):
    """Path (b), now."""
    return counted(prometheus, last_less_first(own(service)))


PATHS = {"spans": from_spans, "metrics": from_metrics}
