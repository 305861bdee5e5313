# SPDX-License-Identifier: Apache-2.0
"""The files of ``dashboards/``, as shipped or with thresholds of one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from traced_retry import rules, shipped_files, thresholds
from traced_retry.shipped_files import ShippedFile

_TOP: Final = ("objective", "min_replies", "grafana_url", "runbook_url")


def root() -> Path:
    """The folder itself."""
    return shipped_files.folder("dashboards")


def files(config: Path | None = None, **changes: Any) -> list[ShippedFile]:
    """Every file, by name.

    Args:
        config: thresholds of one's own, of the shape of ``dashboards/config.yaml``; default: that.
        changes: fields of :class:`~traced_retry.thresholds.Thresholds` to change; None: as it is.

    Raises:
        ThresholdError: one of them cannot be; the message says why.
    """
    folder = root()
    source = config or folder / "config.yaml"
    wanted = thresholds.read(source).but(**changes)
    boards = {f"grafana/{p.name}": _read(p) for p in sorted(folder.glob("grafana/*.json"))}
    found = {
        "config.yaml": _config(_read(source), wanted),
        **{name: _read(folder / name) for name in ("jaeger-ui.json", "runbook.md")},
        **{f"prometheus/{n}.yaml": _read(folder / f"prometheus/{n}.yaml") for n in _RECORDED},
        **boards,
        **rules.files(wanted, folder),
        "kubernetes/dashboards.yaml": rules.config_maps(boards),
    }
    return [ShippedFile(name, text) for name, text in sorted(found.items())]


_RECORDED: Final = ("recording", "rollup")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _config(text: str, wanted: thresholds.Thresholds) -> str:
    """The configuration with what was changed, comments and all, so that it can be used again."""
    for name in _TOP:
        line = f"{name}: {json.dumps(getattr(wanted, name))}".replace("\\", r"\\")
        text = re.sub(rf"(?m)^{name}:.*$", line, text)
    return re.sub(
        r"(?m)^(silence:\n(?:[ #].*\n)*?  seconds:).*$",
        lambda match: f"{match[1]} {wanted.silence_seconds}",
        text,
    )
