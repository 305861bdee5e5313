# SPDX-License-Identifier: Apache-2.0
"""The files of ``dashboards/``, with the shipped thresholds or with the user's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from traced_retry import shipped_files
from traced_retry.monitoring import formats
from traced_retry.monitoring.alerts import label
from traced_retry.monitoring.config import BurnRate, Thresholds, read
from traced_retry.monitoring.config import preset as presets
from traced_retry.shipped_files import ShippedFile

_VERSION: Final = "service.version"
_BY_VERSION: Final = "Lost by version"
_TOP: Final = ("objective", "min_replies", "min_lost", "grafana_url", "runbook_url")


def root() -> Path:
    """Return the folder."""
    return shipped_files.folder("dashboards")


def files(
    config: Path | None = None, *, preset: str | None = None, **changes: Any
) -> list[ShippedFile]:
    """Return every file, sorted by name.

    Args:
        config: a file in the format of ``dashboards/config.yaml``, which is the default.
        preset: the name of one of :data:`.PRESETS`.
        changes: fields of :class:`.Thresholds` to change. None keeps a value.

    Raises:
        ThresholdError: if a threshold is invalid; the message names the reason.
    """
    folder = root()
    source = config or folder / "config.yaml"
    wanted = read(source).replace(**({} if preset is None else presets(preset)))
    wanted = wanted.replace(**changes)
    labels = wanted.services_labels
    boards = {
        f"grafana/{path.name}": _with_labels(_read(path), labels)
        for path in sorted(folder.glob("grafana/*.json"))
    }
    found = {
        "config.yaml": _config(_read(source), wanted),
        **{name: _read(folder / name) for name in ("jaeger-ui.json", "runbook.md")},
        **boards,
        **formats.files(wanted),
        "kubernetes/dashboards.yaml": formats.config_maps(boards),
    }
    return [ShippedFile(name, text) for name, text in sorted(found.items())]


def _with_labels(board: str, labels: Iterable[str]) -> str:
    """Return a dashboard whose panel of losses by version exists once for each of the labels."""
    wanted = [each for each in labels if each != _VERSION]
    found = json.loads(board)
    rows = [row["panels"] for row in found["panels"] if row.get("panels")]
    shipped = [(row, panel) for row in rows for panel in row if panel["title"] == _BY_VERSION]
    if not (wanted and shipped):
        return board
    row, panel = shipped[0]
    bottom = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in row)
    for number, attribute in enumerate(wanted):
        text = json.dumps(panel).replace(label(_VERSION), label(attribute))
        place = {"x": 8 * (number % 3), "y": bottom + 8 * (number // 3)}
        row.append(
            {
                **json.loads(text),
                "id": 200 + number,
                "title": f"Lost by {attribute}",
                "description": f"Replies a minute that were lost, by {attribute}.",
                "gridPos": {**panel["gridPos"], **place},
            }
        )
    return json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _config(text: str, wanted: Thresholds) -> str:
    """Return the configuration with the changed values and all comments, ready for reuse."""
    for name in _TOP:
        line = f"{name}: {json.dumps(getattr(wanted, name))}".replace("\\", r"\\")
        text = re.sub(rf"(?m)^{name}:.*$", line, text)
    rows = "".join(map(_row, wanted.burn_rates))
    text = re.sub(r"(?m)^(burn_rates:\n)(?:  - \{.*\n)+", rf"\g<1>{rows}", text)
    return re.sub(
        r"(?m)^(silence:\n(?:[ #].*\n)*?  seconds:).*$",
        lambda match: f"{match[1]} {wanted.silence_seconds}",
        text,
    )


def _row(rate: BurnRate) -> str:
    """Return a row of ``burn_rates``."""
    return (
        f"  - {{severity: {rate.severity}, factor: {rate.factor:g}, long: {rate.long}, "
        f"short: {rate.short}, for: {rate.for_}}}\n"
    )
