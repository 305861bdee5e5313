# SPDX-License-Identifier: Apache-2.0
"""Change the code in small ways, and count the changes that the tests notice: ``make mutants``.

Each change (a *mutant*) is one replaced operator, constant, condition or statement in a copy of the
package. The tests that reach the changed line run against the copy. A mutant *survives* if all of
them pass. Mutants are drawn with a seed, so a run can be repeated:

    python tools/mutants.py --number 40 --seed 2 core/loop.py

The draw depends on the code of each mutant alone, so other changes of the code keep most of it.
``tools/equivalent_mutants.txt`` lists mutants that no test can notice, with the reason. They are
counted apart and are no part of the score. The script needs Python 3.12.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import hashlib
import json
import multiprocessing
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "traced_retry"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
OTHER_CONSTANT = "mutant"

MODULES = {
    "core": [f"core/{path.name}" for path in sorted((ROOT / PACKAGE / "core").glob("*.py"))],
    "openai": ["livekit/openai.py", "livekit/openai_request.py"],
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
        "waiting",
        "hedging",
        "fallback",
        "filler",
        "breaker",
        "generations",
    )
]
"""The files that use the OpenAI adapter."""
CORE_TESTS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("tests/core/test_*.py")
    if path.stem not in ("test_package", "test_mutants")
)

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
    reached_by: range | None
    """The lines of its statement. None if it runs on import, outside of each function."""

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
    tree = ast.parse(source)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    for node, replacement in _changes(tree):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = offsets[node.lineno - 1] + node.col_offset
        end = offsets[node.end_lineno - 1] + node.end_col_offset
        old, code = source[start:end].decode(), lines[node.lineno - 1].decode().strip()
        reached_by = _statement_around(statements, node)
        found.append(Mutant(module, node.lineno, start, end, old, replacement, code, reached_by))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.new))


def _statement_around(statements: list[ast.stmt], node: Any) -> range | None:
    """Return the lines of the innermost statement around a node, or None outside of functions."""
    around = [
        statement
        for statement in statements
        if statement.lineno <= node.lineno and (statement.end_lineno or 0) >= node.end_lineno
    ]
    bodies = [
        function.body[0].lineno
        for function in around
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    if not bodies or node.lineno < min(bodies):
        return None
    first = max(statement.lineno for statement in around)
    return range(first, node.end_lineno + 1)


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
    """``killed``, ``timed out`` or ``survived``."""


class Reach:
    """The tests that reach each line of the package, as runs without a mutant recorded them."""

    def __init__(self, recorded: list[dict[str, Any]]) -> None:
        self._seconds: dict[str, float] = {}
        self._lines: dict[str, dict[str, list[str]]] = {}
        self._elsewhere: set[str] = set()
        for part in recorded:
            self._seconds.update(part["seconds"])
            self._elsewhere.update(part["elsewhere"])
            for module, lines in part["lines"].items():
                for line, names in lines.items():
                    self._lines.setdefault(module, {}).setdefault(line, []).extend(names)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that can notice a mutant, the quickest first.

        A test that starts another process can reach each line there.
        """
        lines = self._lines.get(mutant.module, {})
        numbers = lines if mutant.reached_by is None else map(str, mutant.reached_by)
        names = {name for number in numbers for name in lines.get(number, [])}
        if mutant.reached_by is None:  # A test may read a constant without reaching a line.
            own = f"/test_{Path(mutant.module).stem}.py"
            names.update(name for name in self._seconds if name.partition("::")[0].endswith(own))
        names.update(self._elsewhere)
        return sorted(names, key=lambda name: (name in self._elsewhere, self._seconds[name], name))

    def limit(self, tests: list[str]) -> float:
        """Return the seconds after which the run of a mutant counts as endless."""
        return 60 + 5 * sum(self._seconds[name] for name in tests)


class Runner:
    """Runs tests against copies of the package, one copy per process."""

    def __init__(self, jobs: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # Importing LiveKit takes seconds. The package itself must not be imported here.
        plugins = [f"livekit.plugins.{name}" for name in ("openai", "google", "ultravox", "xai")]
        self._context.set_forkserver_preload(["pytest", "hypothesis", *plugins])
        self._copies: SimpleQueue[Path] = SimpleQueue()
        self._folder = tempfile.TemporaryDirectory()
        for number in range(jobs):
            # Hypothesis draws constants of modules outside of such a folder. The same examples then
            # could not be drawn for each mutant.
            copy = Path(self._folder.name) / str(number) / "site-packages"
            shutil.copytree(ROOT / PACKAGE, copy / PACKAGE)
            for data in ("dashboards", "exporters"):
                shutil.copytree(ROOT / data, copy / PACKAGE / data)
            # Each run then compiles only the changed module, which it knows by its content.
            by_content = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(copy, quiet=2, invalidation_mode=by_content)
            self._copies.put(copy)

    def close(self) -> None:
        """Delete the copies."""
        self._folder.cleanup()

    def reach(self, files: list[str]) -> dict[str, Any]:
        """Run all tests of files without a mutant, and record the lines that each reaches."""
        copy = self._copies.get()
        try:
            process = self._context.Process(target=_run_tests, args=(str(copy), files, None))
            process.start()
            process.join()
            if process.exitcode:
                print((copy / "output.txt").read_text()[-4000:])
                raise SystemExit(f"the tests fail without a mutant: {' '.join(files)}")
            recorded: dict[str, Any] = json.loads((copy / "reach.json").read_text())
            return recorded
        finally:
            self._copies.put(copy)

    def passes(self, mutant: Mutant, tests: list[str], limit: float) -> bool | None:
        """Return whether the tests pass with a mutant, or None after ``limit`` seconds."""
        copy = self._copies.get()
        path = copy / PACKAGE / mutant.module
        source = path.read_bytes()
        files = sorted({name.partition("::")[0] for name in tests})
        try:
            path.write_bytes(mutant.applied_to(source))
            process = self._context.Process(target=_run_tests, args=(str(copy), files, tests))
            process.start()
            assert process.pid is not None
            started, waited = time.monotonic(), 0.0
            while process.exitcode is None:
                process.join(1)
                waited = max(waited, _waited_for_cpu(process.pid))  # 0 if it has just ended
                if time.monotonic() - started - waited > limit:
                    with contextlib.suppress(ProcessLookupError):  # It may have ended by now.
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                    process.join()
                    return None
            return process.exitcode == 0
        finally:
            path.write_bytes(source)
            self._copies.put(copy)


def _waited_for_cpu(pid: int) -> float:
    """Return the seconds for which a process was ready to run, but the machine ran others.

    A busy machine must not make a slow run look like an endless one.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:  # The process has ended, or the system is not Linux.
        return 0.0


class _Order:
    """A plugin of pytest that runs the named tests only, in the order of the names."""

    def __init__(self, names: list[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self._places]
        items[:] = sorted(chosen, key=lambda item: self._places[item.nodeid])


class _Recorder:
    """A plugin of pytest that records the lines that each test reaches, and its duration."""

    def __init__(self, copy: str) -> None:
        self._copy = copy
        self._test = ""
        self._seconds: dict[str, float] = {}
        self._lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._elsewhere: set[str] = set()
        monitoring: Any = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
        self._monitoring = monitoring
        monitoring.use_tool_id(monitoring.COVERAGE_ID, "mutants")
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, self._on_line)
        monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)
        sys.addaudithook(self._on_audit)

    def _on_line(self, code: Any, line: int) -> Any:
        if code.co_filename.startswith(self._copy) and self._test:
            module = code.co_filename.removeprefix(f"{self._copy}/{PACKAGE}/")
            self._lines[module][line].add(self._test)
        return self._monitoring.DISABLE

    def _on_audit(self, event: str, _: Any) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and self._test:
            self._elsewhere.add(self._test)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._test = item.nodeid
        self._monitoring.restart_events()
        started = time.monotonic()
        result = yield
        self._seconds[item.nodeid] = time.monotonic() - started
        return result

    def pytest_sessionfinish(self) -> None:
        lines = {
            module: {line: sorted(tests) for line, tests in found.items()}
            for module, found in self._lines.items()
        }
        recorded = {"seconds": self._seconds, "lines": lines, "elsewhere": sorted(self._elsewhere)}
        Path(self._copy, "reach.json").write_text(json.dumps(recorded))


def _run_tests(copy: str, files: list[str], tests: list[str] | None) -> None:
    """Run pytest in this process, and end it with pytest's status.

    Without ``tests``, run all of the files, and record the lines that they reach.
    """
    os.setsid()
    output = os.open(Path(copy) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    # A changed module must not be written, and compiled tests are read again by each run.
    sys.dont_write_bytecode = tests is not None
    sys.path.insert(0, copy)
    os.environ.update(PYTHONPATH=copy, PYTHONDONTWRITEBYTECODE="1", TRACED_RETRY_BACKENDS="none")
    options = [
        "-q",
        "-x",
        "--show-capture=no",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # pytest is imported already
    # A test on the wall clock could fail because the machine is busy.
    options += ["-m", "not packages and not real_time"]
    # So could a test with a deadline, or another draw of its examples.
    hypothesis.settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutants")
    plugin = _Recorder(copy) if tests is None else _Order(tests)
    os._exit(pytest.main([*options, *files], plugins=[plugin]))


def _steps(module: str, quick: bool) -> list[list[str]]:
    """Return the test files of a module. A later step runs if the mutant is still alive."""
    if module.startswith("core/"):
        return [CORE_TESTS] if quick else [CORE_TESTS, LIVEKIT_TESTS]
    return [LIVEKIT_TESTS[:3], LIVEKIT_TESTS[3:]]


def run(
    runner: Runner, mutants: list[Mutant], jobs: int, *, quick: bool = False
) -> Iterator[Result]:
    """Run the tests against each mutant, and yield the results as they come."""
    modules = {mutant.module for mutant in mutants}
    files = sorted({file for m in modules for step in _steps(m, quick) for file in step})

    def one(mutant: Mutant) -> Result:
        for step in _steps(mutant.module, quick):
            tests = [name for name in reach.tests_of(mutant) if name.partition("::")[0] in step]
            passed = not tests or runner.passes(mutant, tests, reach.limit(tests))
            if not passed:
                return Result(mutant, "timed out" if passed is None else "killed")
        return Result(mutant, "survived")

    with ThreadPoolExecutor(jobs) as pool:
        parts = [files[first::jobs] for first in range(jobs)]
        reach = Reach(list(pool.map(runner.reach, filter(None, parts))))
        yield from pool.map(one, mutants)


# --- command --------------------------------------------------------------------------------------


def equivalents() -> dict[str, str]:
    """Return the reason of each mutant that is listed as equivalent."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    pairs = (line.rpartition(" | ") for line in lines if line and not line.startswith("#"))
    return {key.strip(): reason for key, _, reason in pairs}


def draw(modules: list[str], number: int, seed: int) -> list[Mutant]:
    """Draw mutants evenly from all mutants of the modules, or return all if ``number`` is 0."""
    every = [mutant for module in modules for mutant in mutants_of(module)]
    seen: Counter[str] = Counter()
    places = {}
    for mutant in every:
        name = f"{seed} {mutant.key} {seen[mutant.key]}"
        seen[mutant.key] += 1
        places[mutant] = hashlib.sha256(name.encode()).digest()
    drawn = sorted(every, key=lambda mutant: places[mutant])[: number or None]
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
    parser.add_argument("--at-least", type=float, default=0.0, help="percent to be noticed")
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
    known = equivalents()
    results = [Result(mutant, "equivalent") for mutant in drawn if mutant.key in known]
    runner = Runner(given.jobs)
    try:
        tested = [mutant for mutant in drawn if mutant.key not in known]
        for result in run(runner, tested, given.jobs, quick=given.quick):
            results.append(result)
            print(f"{len(results)}/{len(drawn)}  {_line(result)}", flush=True)
    finally:
        runner.close()
    score = summarize(results, given.seed)
    return int(score < given.at_least)


def _line(result: Result) -> str:
    return f"{result.outcome:<10} {result.mutant.line:>4}  {result.mutant.key}"


def summarize(results: list[Result], seed: int) -> float:
    """Print the score of each module and the mutants that no test noticed, and return the score.

    The score is the percentage of the mutants that were killed or timed out. Equivalent mutants are
    no part of it.
    """
    for outcome in ("timed out", "survived"):
        for result in results:
            if result.outcome == outcome:
                print(_line(result))
    columns = ("killed", "timed out", "survived", "equivalent")
    print(f"{'':<24}" + "".join(f"{column:>12}" for column in columns) + f"{'score':>9}")
    score = 0.0
    for module in [*sorted({result.mutant.module for result in results}), "all"]:
        of = [result for result in results if module in (result.mutant.module, "all")]
        counts = Counter(result.outcome for result in of)
        noticed = counts["killed"] + counts["timed out"]
        score = 100 * noticed / ((noticed + counts["survived"]) or 1)
        row = "".join(f"{counts[column]:>12}" for column in columns)
        print(f"{module:<24}{row}{score:>8.1f}%")
    print(f"{len(results)} mutants drawn with seed {seed}")
    return score


if __name__ == "__main__":
    raise SystemExit(main())
