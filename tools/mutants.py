# SPDX-License-Identifier: Apache-2.0
"""Change the code in small ways, and count the changes that the tests notice: ``make mutants``.

Each change (a *mutant*) is one replaced operator, constant, condition or statement in a copy of the
package. The tests run against the copy. A mutant *survives* if all of them pass. Mutants are drawn
with a seed, so a run can be repeated:

    python tools/mutants.py --number 40 --seed 2 core/loop.py

``tools/equivalent_mutants.txt`` lists mutants that no test can notice, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "traced_retry"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
OTHER_CONSTANT = "mutant"

MODULES = {
    "core": [f"core/{path.name}" for path in sorted((ROOT / PACKAGE / "core").glob("*.py"))],
    "openai": ["livekit/openai.py"],
    "streams": ["livekit/streams.py"],
}
LIVEKIT_TESTS = [
    f"tests/livekit/test_{name}.py"
    for name in (
        "openai",
        "openai_adapter",
        "streams",
        "failure_before_output",
        "server_events",
        "interruption",
        "hook",
        "provider_contract",
        "thunderphone",
        "turns",
        "shutdown",
        "fatal",
        "regressions",
        "say",
        "openai_compatible",
        "stateful",
    )
]
"""The files that use the OpenAI adapter, the quickest first."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}

FALSE = ("None", "False", "0", "0.0")
"""Values that None stands for. Returning None instead is no change."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    """The path below the package."""
    line: int
    start: int
    end: int
    """The replaced bytes of the source."""
    old: str
    new: str
    code: str
    """The whole line."""

    @property
    def key(self) -> str:
        """A description that stays the same if other lines move."""
        return f"{self.module} | {self.code} | {_short(self.old)} -> {_short(self.new)}"

    def applied_to(self, source: bytes) -> bytes:
        """Return the changed source."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def _short(text: str) -> str:
    return " ".join(text.split())[:80]


# --- mutants --------------------------------------------------------------------------------------


def mutants_of(module: str) -> list[Mutant]:
    """Return every mutant of a module, in the order of the source."""
    source = (ROOT / PACKAGE / module).read_bytes()
    lines = source.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    found = []
    for node, replacement in _changes(ast.parse(source)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = offsets[node.lineno - 1] + node.col_offset
        end = offsets[node.end_lineno - 1] + node.end_col_offset
        old, code = source[start:end].decode(), lines[node.lineno - 1].decode().strip()
        found.append(Mutant(module, node.lineno, start, end, old, replacement, code))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.new))


def _changes(node: ast.AST) -> Iterator[tuple[Any, str]]:
    """Yield each node to replace, with its new source."""
    if isinstance(node, (ast.JoinedStr, ast.Assert)) or _is_documentation(node):
        return
    if isinstance(node, ast.stmt):
        yield from _changed_statement(node)
    elif isinstance(node, ast.expr):
        yield from _changed_expression(node)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "cast":
        node.args = node.args[1:]
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child)


def _is_documentation(node: ast.AST) -> bool:
    """Return whether a statement is a docstring, an import, a type or a list of slots."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign):
        names = {ast.unparse(target) for target in node.targets}
        types = ("Literal", "TypeVar", "Callable", "Generator", "Awaitable", "dict[str,")
        return names == {"__slots__"} or ast.unparse(node.value).startswith(types)
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _changed_statement(node: ast.stmt) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.Expr(value=ast.Yield() | ast.YieldFrom()):
            return  # Without its sleep, a loop runs for ever.
        case ast.Expr() | ast.Raise() | ast.Continue() | ast.Break() | ast.AugAssign():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) not in FALSE:
            yield node, "return None"
        case ast.If(test=test) | ast.While(test=test) if not isinstance(
            test, (ast.Compare, ast.UnaryOp, ast.Constant)
        ):
            yield test, f"not ({ast.unparse(test)})"


def _changed_expression(node: ast.expr) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=comparators):
            changed = ast.Compare(left, [COMPARISONS[type(operator)]()], comparators)
            yield node, ast.unparse(changed)
        case ast.BoolOp(op=operator, values=values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield node, f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
            changed = ast.BinOp(left, OPERATORS[type(operator)](), right)
            yield node, f"({ast.unparse(changed)})"
        case ast.Constant(value=bool() as value):
            yield node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, repr(value + 1)
        case ast.Constant(value=str() as value):
            yield node, repr(OTHER_CONSTANT if value else "x")
        case ast.Lambda(body=body) if not isinstance(body, ast.Constant):
            yield body, "None"


# --- runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The run of one mutant."""

    mutant: Mutant
    outcome: str
    """``killed``, ``timeout`` or ``survived``."""
    seconds: float


class Runner:
    """Runs tests against copies of the package, one copy per process."""

    def __init__(self, jobs: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # Importing LiveKit takes seconds. The package itself must not be imported here.
        self._context.set_forkserver_preload(["pytest", "hypothesis", "livekit.plugins.openai"])
        self._copies: SimpleQueue[Path] = SimpleQueue()
        self._folder = tempfile.TemporaryDirectory()
        for number in range(jobs):
            copy = Path(self._folder.name) / str(number)
            shutil.copytree(ROOT / PACKAGE, copy / PACKAGE)
            for data in ("dashboards", "exporters"):
                shutil.copytree(ROOT / data, copy / PACKAGE / data)
            self._copies.put(copy)

    def close(self) -> None:
        """Delete the copies."""
        self._folder.cleanup()

    def passes(self, tests: list[str], limit: float, mutant: Mutant | None = None) -> bool | None:
        """Return whether the tests pass, or None after ``limit`` seconds."""
        copy = self._copies.get()
        path = copy / PACKAGE / mutant.module if mutant is not None else None
        source = path.read_bytes() if path is not None else b""
        try:
            if mutant is not None and path is not None:
                path.write_bytes(mutant.applied_to(source))
            process = self._context.Process(target=_run_tests, args=(str(copy), tests))
            process.start()
            process.join(limit)
            if process.exitcode is None:
                assert process.pid is not None
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                return None
            if mutant is None and process.exitcode:
                print((copy / "output.txt").read_text()[-2000:])
            return process.exitcode == 0
        finally:
            if path is not None:
                path.write_bytes(source)
            self._copies.put(copy)


def _run_tests(copy: str, tests: list[str]) -> None:
    """Run pytest in this process, and end it with pytest's status."""
    os.setsid()
    output = os.open(Path(copy) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    sys.path.insert(0, copy)
    os.environ.update(PYTHONPATH=copy, PYTHONDONTWRITEBYTECODE="1", TRACED_RETRY_BACKENDS="none")
    options = ["-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # pytest is imported already
    os._exit(pytest.main([*options, *tests]))


def _ordered(module: str) -> list[list[str]]:
    """Return the test files of a module in steps: a later step runs if the mutant still lives."""
    name = Path(module).stem
    core = sorted(ROOT.glob("tests/core/test_*.py"), key=lambda p: (name not in p.stem, p.name))
    files = [str(path.relative_to(ROOT)) for path in core if path.stem != "test_package"]
    if module.startswith("core/"):
        return [files, LIVEKIT_TESTS]
    return [sorted(LIVEKIT_TESTS, key=lambda path: name not in path)]


def run(
    runner: Runner, mutants: list[Mutant], jobs: int, *, quick: bool = False
) -> Iterator[Result]:
    """Run the tests against each mutant, and yield the results as they come."""

    def steps_of(mutant: Mutant) -> list[list[str]]:
        return _ordered(mutant.module)[: 1 if quick else None]

    steps = {tuple(step) for mutant in mutants for step in steps_of(mutant)}
    limits = {}
    for step in sorted(steps):
        started = time.monotonic()
        if not runner.passes(list(step), 900):
            raise SystemExit(f"the tests fail without a mutant: {' '.join(step)}")
        limits[step] = 3 * (time.monotonic() - started) + 10

    def one(mutant: Mutant) -> Result:
        started = time.monotonic()
        outcome = "survived"
        for step in steps_of(mutant):
            passed = runner.passes(step, limits[tuple(step)], mutant)
            if not passed:
                outcome = "timeout" if passed is None else "killed"
                break
        return Result(mutant, outcome, time.monotonic() - started)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, mutants)


# --- command --------------------------------------------------------------------------------------


def equivalents() -> dict[str, str]:
    """Return the reason of each mutant that is listed as equivalent."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    pairs = (line.rpartition(" | ") for line in lines if line and not line.startswith("#"))
    return {key.strip(): reason for key, _, reason in pairs}


def draw(modules: list[str], number: int, seed: int) -> list[Mutant]:
    """Draw mutants evenly from all mutants of the modules."""
    known = equivalents()
    every = [mutant for module in modules for mutant in mutants_of(module)]
    alive = [mutant for mutant in every if mutant.key not in known]
    rng = random.Random(seed)
    drawn = rng.sample(alive, min(number, len(alive))) if number else alive
    print(f"{len(every)} mutants, {len(every) - len(alive)} equivalent, {len(drawn)} drawn")
    return sorted(drawn, key=lambda mutant: (mutant.module, mutant.start))


def main() -> int:
    """Run the command line, and return 1 if the score is below ``--at-least``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "modules",
        nargs="*",
        default=list(MODULES),
        help=f"{', '.join(MODULES)}, or a path below {PACKAGE}/, such as core/loop.py",
    )
    parser.add_argument("--number", type=int, default=60, help="mutants to draw; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--at-least", type=float, default=0.0, help="percent to be killed")
    parser.add_argument(
        "--quick", action="store_true", help="run only the tests of the same package"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants without a run")
    given = parser.parse_args()
    modules = [path for name in given.modules for path in MODULES.get(name, [name])]
    drawn = draw(modules, given.number, given.seed)
    if given.list:
        print("\n".join(f"{mutant.line:>5}  {mutant.key}" for mutant in drawn))
        return 0
    runner = Runner(given.jobs)
    counts: Counter[tuple[str, str]] = Counter()
    try:
        for result in run(runner, drawn, given.jobs, quick=given.quick):
            counts[result.mutant.module, result.outcome] += 1
            if result.outcome == "survived":
                print(f"survived  {result.mutant.line:>4}  {result.mutant.key}", flush=True)
    finally:
        runner.close()
    for module in sorted({module for module, _ in counts}):
        killed, all_ = _score(counts, module)
        print(f"{module:<24} {killed:>4} of {all_:>4} killed  {killed / all_:>6.1%}")
    killed, all_ = _score(counts)
    print(f"{'all':<24} {killed:>4} of {all_:>4} killed  {killed / all_:>6.1%}  seed {given.seed}")
    return int(killed / all_ * 100 < given.at_least)


def _score(counts: Counter[tuple[str, str]], module: str | None = None) -> tuple[int, int]:
    of = {key: count for key, count in counts.items() if module in (None, key[0])}
    killed = sum(count for (_, outcome), count in of.items() if outcome != "survived")
    return killed, sum(of.values())


if __name__ == "__main__":
    raise SystemExit(main())
