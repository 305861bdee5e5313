# SPDX-License-Identifier: Apache-2.0
"""Generate the rules, dashboards and tables of documents: ``python tools/dashboards``.

Each step reads the output of the steps before it. The rules come from
``traced_retry.monitoring`` and ``dashboards/config.yaml``. The dashboards include the runbook. The
tables in ``docs/`` and ``dashboards/README.md`` describe telemetry, rules and dashboards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import docs_tables
import grafana

from traced_retry.monitoring import config, formats

ROOT: Final = Path(__file__).parents[2]


def main() -> None:
    """Write all generated files below the repository's root."""
    dashboards = ROOT / "dashboards"
    rules = formats.files(config.read(dashboards / "config.yaml"))
    _write(dashboards, rules)
    _write(dashboards, grafana.files(dashboards / "runbook.md"))
    _write(ROOT, docs_tables.documents(ROOT))


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
