# SPDX-License-Identifier: Apache-2.0
"""The files of ``dashboards/``, as shipped or with thresholds of one's own."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from traced_retry import rules, shipping, thresholds

_TOP: Final = ("objective", "min_replies", "grafana_url", "runbook_url")


@dataclass(frozen=True)
class DashboardFile:
    """One file, and what it is for."""

    name: str
    """Its path below ``dashboards/``, with forward slashes, such as ``grafana/overview.json``."""
    text: str

    @property
    def description(self) -> str:
        """Its own first words; a dashboard's title."""
        if self.name.endswith(".json"):
            return str(json.loads(self.text).get("title", "Jaeger's UI: searches and links"))
        lines = (line.lstrip("# ").strip() for line in self.text.splitlines())
        return next((line for line in lines if line), "")


def root() -> Path:
    """The folder itself."""
    return shipping.folder("dashboards")


def files(config: Path | None = None, **changes: Any) -> list[DashboardFile]:
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
    return [DashboardFile(name, text) for name, text in sorted(found.items())]


_RECORDED: Final = ("recording", "rollup")


def write(directory: Path, found: list[DashboardFile], *, force: bool = False) -> list[Path]:
    """Write the files below ``directory``, which is made; returns where each now is.

    Raises:
        FilesError: see :func:`traced_retry.shipping.write`.
    """
    contents = {file.name: file.text.encode() for file in found}
    return shipping.write(directory, contents, force=force)


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
