# SPDX-License-Identifier: Apache-2.0
"""Resolve constraints.txt again: ``python tools/constraints.py``.

uv finds one version of each package for all supported Pythons and all extras. Where two Pythons
need different versions, the line carries a marker. The header has no command and no address,
because those differ from machine to machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# The versions that tools, tests and the demo run on. `make constraints` resolves them again.
# Users install from the ranges in pyproject.toml.
"""


def resolve() -> str:
    """Return one line per package, for every Python from 3.11 on."""
    return subprocess.run(  # noqa: S603 - a fixed command
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"),
            *("--universal", "--python-version", "3.11", "--all-extras", "--upgrade"),
            *("--quiet", "--no-header", "--no-annotate"),
            *("--no-emit-index-url", "--no-emit-find-links"),
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


if __name__ == "__main__":
    lines = resolve()
    assert "://" not in lines, "a package comes from a URL, and constraints.txt may hold none"
    (ROOT / "constraints.txt").write_text(HEADER + lines)
