# SPDX-License-Identifier: Apache-2.0
"""The objectives, thresholds and windows of the shipped alerts, read from a file and checked.

``dashboards/config.yaml`` has the defaults and explains each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from traced_retry import semconv
from traced_retry.core.failure import finite
from traced_retry.core.sanitize import is_url, shown
from traced_retry.errors import UsageError

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"([1-9][0-9]*)([smhd])")

_EVERY: Final = 0.999
"""A ratio that a total outage hardly exceeds: one success in a thousand replies is enough."""

_ATTRIBUTE: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+")
_OWN: Final = ("traced_retry.", "gen_ai.", "deployment.environment", "service.name")
"""The beginnings of the attributes that have labels already."""
_MOST_LABELS: Final = 4

STEP: Final = 60
"""Seconds between two samples of the rolled-up series, the shortest possible window."""


class ThresholdError(UsageError):
    """An invalid threshold; the message names it, its value and the allowed values."""


def seconds(duration: str) -> int:
    """Return the seconds of a Prometheus duration of one unit, such as ``90s``, ``5m``, ``1h``.

    Raises:
        ThresholdError: if the duration is invalid.
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None:
        raise ThresholdError(f"{duration!r} is no duration; write one such as 90s, 5m, 1h or 3d")
    return int(match[1]) * _SECONDS[match[2]]


@dataclass(frozen=True)
class BurnRate:
    """One pair of windows of the multi-window burn-rate alert."""

    severity: Literal["critical", "warning"]
    factor: float
    """The rate at which the budget burns, as a multiple of the rate that the objective allows."""
    long: str
    short: str
    for_: str


@dataclass(frozen=True)
class Thresholds:
    """All of ``dashboards/config.yaml``, flat; durations are Prometheus's."""

    objective: float
    """Percent of replies that are not lost."""
    min_replies: int
    min_lost: int
    outage_share: float
    """0 to 1."""
    outage_window: str
    outage_for: str
    burn_rates: tuple[BurnRate, ...]
    few_lost_replies: int
    few_lost_share: float
    """0 to 1."""
    few_lost_window: str
    few_lost_for: str
    not_recoverable_share: float
    """0 to 1."""
    not_recoverable_window: str
    not_recoverable_for: str
    storm_amplification: float
    """Requests sent per reply."""
    storm_window: str
    storm_for: str
    silence_seconds: float
    silence_quantile: float
    """0 to 1."""
    silence_window: str
    silence_for: str
    many_providers_providers: int
    many_providers_for: str
    spans_dropped_share: float
    """0 to 1."""
    spans_dropped_window: str
    keep_firing_for: str
    telemetry_for: str
    telemetry_ticket_for: str
    spans_job: str
    """A regular expression. Empty if no job has counts from spans."""
    services_labels: tuple[str, ...]
    """Attributes of the resource by which replies are counted besides ``service.name``."""
    services_max_series: int
    grafana_url: str
    runbook_url: str

    def __post_init__(self) -> None:
        _check(self)

    @property
    def budget(self) -> float:
        """The share of replies that may be lost, 0 to 1."""
        return round(1 - self.objective / 100, 10)

    @property
    def keep_cause_firing_for(self) -> str:
        """The time for which an alert that holds others back fires after its end.

        It is longer than theirs, because Alertmanager notifies them once it has ended.
        """
        return f"{2 * seconds(self.keep_firing_for)}s"

    def replace(self, **changes: Any) -> Thresholds:
        """Return a copy with some values changed; None changes nothing.

        Raises:
            ThresholdError: if a value is invalid.
        """
        return replace(self, **{name: v for name, v in changes.items() if v is not None})


_SLOWER: Final = (
    BurnRate("critical", 6, "6h", "30m", "15m"),
    BurnRate("warning", 3, "3h", "30m", "15m"),
    BurnRate("warning", 2, "1d", "2h", "1h"),
    BurnRate("warning", 1, "3d", "6h", "3h"),
)

PRESETS: Final = {
    "99": (
        99.0,
        (
            BurnRate("critical", 8, "1h", "5m", "2m"),
            *_SLOWER,
        ),
    ),
    "99.5": (
        99.5,
        (
            BurnRate("critical", 14.4, "1h", "5m", "2m"),
            *_SLOWER,
        ),
    ),
}
"""Objectives with their burn rates. ``config.yaml`` has those of ``99``."""


def preset(name: str) -> dict[str, Any]:
    """Return the changes that a preset makes to the shipped thresholds.

    Raises:
        ThresholdError: if there is no preset of that name.
    """
    if name not in PRESETS:
        raise ThresholdError(f"unknown preset {name!r}: expected {' or '.join(PRESETS)}")
    objective, burn_rates = PRESETS[name]
    return {"objective": objective, "burn_rates": burn_rates}


def read(path: Path) -> Thresholds:
    """Return the thresholds in a file in the format of ``dashboards/config.yaml``.

    Raises:
        ThresholdError: if the file cannot be read, if a key is missing, unknown or of the wrong
            type, or if a value is invalid.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ThresholdError(
            f"{path} cannot be read as YAML ({type(error).__name__}): copy the shipped config.yaml "
            "and edit that"
        ) from None
    return parse(found, str(path))


def parse(found: Any, where: str) -> Thresholds:
    """Return the thresholds in the content of a YAML file.

    Raises:
        ThresholdError: as :func:`read`.
    """
    flat: dict[str, Any] = {}
    for key, value in _mapping(found, where).items():
        if isinstance(value, Mapping):
            flat.update({f"{key}_{inner}": v for inner, v in value.items()})
        else:
            flat[key] = value
    types = {field.name: str(field.type) for field in fields(Thresholds)}
    _same_keys(set(flat), set(types), where)
    for name, kind in types.items():
        if kind in _KINDS:
            _of_kind(name, flat[name], kind, where)
    flat["burn_rates"] = tuple(_burn_rate(row, where) for row in _list(flat["burn_rates"], where))
    labels = flat["services_labels"]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ThresholdError(
            f"{where}: services.labels is {labels!r}; it must be a list of attributes"
        )
    flat["services_labels"] = tuple(labels)
    return Thresholds(**flat)


_KINDS: Final[dict[str, tuple[type, ...]]] = {"float": (int, float), "int": (int,), "str": (str,)}


def _of_kind(name: str, value: Any, kind: str, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, _KINDS[kind]):
        expected = {"float": "a number", "int": "a whole number", "str": "text"}[kind]
        raise ThresholdError(f"{where}: {name} is {value!r}; it must be {expected}")


def _burn_rate(row: Any, where: str) -> BurnRate:
    row = {("for_" if key == "for" else key): v for key, v in _mapping(row, where).items()}
    types = {field.name: str(field.type) for field in fields(BurnRate)}
    _same_keys(set(row), set(types), f"{where}: burn_rates")
    for name, kind in types.items():
        _of_kind(f"burn_rates.{name}", row[name], kind if kind in _KINDS else "str", where)
    return BurnRate(**row)


def _mapping(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ThresholdError(
            f"{where} holds no mapping; copy the shipped config.yaml and edit that"
        )
    return found


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise ThresholdError(f"{where}: burn_rates is {found!r}; it must be a list of at least one")
    return found


def _same_keys(found: set[str], expected: set[str], where: str) -> None:
    missing = ", ".join(sorted(name.rstrip("_") for name in expected - found))
    unknown = ", ".join(sorted(map(str, found - expected)))
    known = ", ".join(sorted(name.rstrip("_") for name in expected))
    if missing:
        raise ThresholdError(f"{where} has no {missing}; add what the shipped config.yaml has")
    if unknown:
        raise ThresholdError(f"{where}: unknown {unknown}; known: {known}")


def _check(of: Thresholds) -> None:
    _between("objective", of.objective, 0, 100, "percent")
    for key in ("outage", "few_lost", "not_recoverable", "spans_dropped"):
        _between(f"{key}.share", getattr(of, f"{key}_share"), 0, 1, "share")
    _between("silence.quantile", of.silence_quantile, 0, 1, "share")
    for name in ("min_replies", "min_lost", "few_lost_replies"):
        _at_least(name, getattr(of, name), 1)
    _at_least("many_providers.providers", of.many_providers_providers, 2)
    if (finite(of.storm_amplification) or 0) <= 1:
        raise ThresholdError(
            f"storm.amplification is {shown(of.storm_amplification)}; it must be above 1, which is "
            "one request per reply"
        )
    if (finite(of.silence_seconds) or 0) <= 0:
        raise ThresholdError(f"silence.seconds is {shown(of.silence_seconds)}; it must be above 0")
    if of.silence_seconds >= (largest := max(semconv.DURATION_BUCKETS)):
        raise ThresholdError(
            f"silence.seconds is {of.silence_seconds}; the alert would never fire, because the "
            f"largest bucket of the histogram ends at {largest:g} s. Name less than that"
        )
    _url("grafana_url", of.grafana_url)
    if of.runbook_url:
        _url("runbook_url", of.runbook_url)
    _check_durations(of)
    try:
        re.compile(of.spans_job)
    except re.error as error:
        raise ThresholdError(
            f"spans_job is {of.spans_job!r}; it must be a regular expression ({error})"
        ) from None
    _check_services(of)
    for row in of.burn_rates:
        _check_burn_rate(row, of)
    if not any(row.severity == "critical" for row in of.burn_rates):
        raise ThresholdError("no row of burn_rates is critical; add one that pages")


def _check_services(of: Thresholds) -> None:
    _at_least("services.max_series", of.services_max_series, 1)
    if len(of.services_labels) > _MOST_LABELS:
        raise ThresholdError(
            f"services.labels has {len(of.services_labels)} attributes; it may have at most "
            f"{_MOST_LABELS}, because their values multiply the series"
        )
    for label in of.services_labels:
        if not _ATTRIBUTE.fullmatch(label) or label.startswith(_OWN):
            raise ThresholdError(
                f"services.labels has {label!r}; it must be an attribute of the resource such as "
                "service.version or cloud.region"
            )


def _check_durations(of: Thresholds) -> None:
    for name in ("outage", "few_lost", "not_recoverable", "storm", "silence", "spans_dropped"):
        _window(f"{name}.window", getattr(of, f"{name}_window"))
    for name in ("outage", "few_lost", "not_recoverable", "storm", "silence", "many_providers"):
        seconds(getattr(of, f"{name}_for"))
    for duration in (of.telemetry_for, of.telemetry_ticket_for, of.keep_firing_for):
        seconds(duration)


def _check_burn_rate(row: BurnRate, of: Thresholds) -> None:
    if row.severity not in ("critical", "warning"):
        raise ThresholdError(
            f"burn_rates.severity is {row.severity!r}; it must be critical or warning"
        )
    if (finite(row.factor) or 0) <= 0:
        raise ThresholdError(f"burn_rates.factor is {shown(row.factor)}; it must be above 0")
    if row.factor * of.budget >= _EVERY:
        lowest = math.ceil((1 - _EVERY / row.factor) * 10000) / 100
        raise ThresholdError(
            f"at an objective of {of.objective:g} % the alert with factor {row.factor:g} never "
            f"fires: more than {row.factor * of.budget:.1%} of replies would have to be lost. "
            f"Name an objective above {lowest:.2f} %, or a smaller factor in the config"
        )
    _window("burn_rates.short", row.short)
    if seconds(row.long) <= seconds(row.short):
        raise ThresholdError(
            f"burn_rates: the long window ({row.long}) must be longer than the short ({row.short})"
        )
    seconds(row.for_)


def _window(name: str, duration: str) -> None:
    if seconds(duration) < 5 * STEP:
        raise ThresholdError(
            f"{name} is {duration}; counts are five-minute ones, so it must be 5m or longer"
        )


def _url(name: str, value: str) -> None:
    if not is_url(value) or any(c.isspace() or not c.isprintable() for c in value):
        raise ThresholdError(
            f"{name} is {shown(value)}; it must be a URL such as https://grafana.example"
        )


def _between(name: str, value: float, low: float, high: float, what: str) -> None:
    if not low < value < high:
        raise ThresholdError(f"{name} is {value}; it must be a {what} above {low} and below {high}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ThresholdError(f"{name} is {value}; it must be {least} or more")
