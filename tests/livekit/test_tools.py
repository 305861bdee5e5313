# SPDX-License-Identifier: Apache-2.0
"""The scripts in ``tools/``, which import helpers of the tests."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = sorted((Path(__file__).parents[2] / "tools").glob("*.py"))
IMPORT = """
import runpy, sys
for path in sys.argv[1:]:
    runpy.run_path(path, run_name="imported")
"""


def test_scripts_in_tools_find_all_that_they_import():
    """A helper that moved is found here, and not by the next person who runs a script."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert 0 == done.returncode, done.stderr
