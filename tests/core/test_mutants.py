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


def test_draw_keeps_the_mutants_of_unchanged_code(tool):
    """A larger draw contains a smaller one, so a new mutant replaces one at most."""
    every = [path for paths in tool.MODULES.values() for path in paths]

    assert set(tool.draw(every, 20, 1)) < set(tool.draw(every, 21, 1))
    assert len(set(tool.draw(every, 0, 1))) == sum(len(tool.mutants_of(path)) for path in every)


def test_listed_mutants_exist(tool):
    """A row of the list whose code has changed is removed, and no row lacks its reason."""
    listed = tool.equivalents()
    every = {
        m.key for names in tool.MODULES.values() for name in names for m in tool.mutants_of(name)
    }

    assert set() == set(listed) - every
    assert not [key for key, reason in listed.items() if len(reason) < 20]


def test_mutant_runs_the_tests_that_reach_its_statement(tool):
    """The quickest is first. Code that runs on import belongs to all tests that use the module."""
    in_function, on_import = (
        tool.Mutant("core/loop.py", 11, 0, 1, "1", "2", "a = 1", reached_by)
        for reached_by in (range(10, 12), None)
    )
    one = {
        "seconds": {"slow": 2.0, "quick": 1.0, "process": 0.1, "far": 0.1},
        "lines": {
            "core/loop.py": {"10": ["slow"], "11": ["slow", "quick"]},
            "core/policy.py": {"10": ["far"]},
        },
        "elsewhere": ["process"],
    }
    other = {
        "seconds": {"other": 0.5},
        "lines": {"core/loop.py": {"12": ["other"]}},
        "elsewhere": [],
    }
    reach = tool.Reach([one, other])

    assert ["quick", "slow", "process"] == reach.tests_of(in_function)
    assert ["other", "quick", "slow", "process"] == reach.tests_of(on_import)


def test_statement_of_a_mutant(tool):
    """A mutant in a function has the lines of its statement, and one of a class has none."""
    found = {m.code: m.reached_by for m in tool.mutants_of("core/driver.py")}

    (line,) = {
        m.line for m in tool.mutants_of("core/driver.py") if m.code == "self._running = True"
    }
    assert range(line, line + 1) == found["self._running = True"]
    assert None in {m.reached_by for m in tool.mutants_of("core/policy.py")}


def test_summary_counts_each_outcome(tool, capsys):
    """The score leaves out equivalent mutants, counts time-outs and names the survivors."""
    outcomes = ["killed"] * 6 + ["timed out"] * 2 + ["survived"] * 2 + ["equivalent"] * 5
    drawn = tool.draw(["core/loop.py"], len(outcomes), 1)
    results = [tool.Result(m, outcome) for m, outcome in zip(drawn, outcomes, strict=True)]
    score = tool.summarize(results, 7)
    *named, _, row, total, seed = capsys.readouterr().out.splitlines()

    assert 80.0 == score
    assert 4 == len(named)
    for mutant, line in zip(drawn[6:10], named, strict=True):
        assert line.endswith(f"{mutant.line}  {mutant.key}")
    assert ["core/loop.py", "6", "2", "2", "5", "80.0%"] == row.split()
    assert ["all", "6", "2", "2", "5", "80.0%"] == total.split()
    assert "15 mutants drawn with seed 7" == seed
