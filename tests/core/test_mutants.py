# SPDX-License-Identifier: Apache-2.0
"""The tool that changes the code in small ways, without its runs."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("module", ["core/budget.py", "core/driver.py", "livekit/streams.py"])
def test_each_mutant_is_another_program(module, tool):
    """Each mutant can be compiled, and differs from the source and from the other mutants."""
    source = (ROOT / "traced_retry" / module).read_bytes()
    programs = [ast.dump(ast.parse(source))]
    programs += [ast.dump(ast.parse(m.applied_to(source))) for m in tool.mutants_of(module)]

    assert len(programs) == len(set(programs)) > 30


def test_documentation_is_not_changed(tool):
    """Docstrings, annotations, imports and slots are no behaviour."""
    found = tool.mutants_of("core/driver.py")

    assert not [m for m in found if m.code.startswith(('"""', "import", "from", "__slots__"))]
    assert not [m for m in found if "float | None" in m.old]


def test_seed_repeats_a_draw(tool):
    """The same seed draws the same mutants, and another seed others."""
    first, again, other = (tool.draw(["core/loop.py"], 20, seed) for seed in (1, 1, 2))

    assert first == again != other
    assert 20 == len(first)


def test_listed_mutants_exist_and_are_not_drawn(tool):
    """A row of the list whose code has changed is removed, and no row lacks its reason."""
    listed = tool.equivalents()
    every = {
        m.key for names in tool.MODULES.values() for name in names for m in tool.mutants_of(name)
    }

    assert set() == set(listed) - every
    assert not [key for key, reason in listed.items() if len(reason) < 20]
    drawn = tool.draw([name for names in tool.MODULES.values() for name in names], 0, 1)
    assert not [m for m in drawn if m.key in listed]
