# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist: their files, each extra in an empty environment, the README's code.

``make packages`` runs these tests. They install packages, so ``make test`` leaves them out. uv
fills the environment of each extra, because it is faster than pip. The README's own commands are
run as they stand, with pip.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packages
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"bench", "docs", "test"})
PAGES = "".join(
    (ROOT / name).read_text()
    for name in ("README.md", "docs/index.md", "docs/settings.md", "docs/simulate.md")
)
README = list(dict.fromkeys(re.findall(r"^```(\w+)\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)))
"""The code blocks of the README and of the first pages, without repetitions."""


def blocks(language):
    """Return the code blocks in a language."""
    return [code for name, code in README if name == language]


class Environment:
    """A virtual environment outside of the checkout."""

    def __init__(self, folder, *, with_pip=False):
        self.folder = folder
        venv.create(folder / "venv", with_pip=with_pip)
        self.bin = folder / "venv" / "bin"

    def install(self, *requirements):
        """Install in the versions of constraints.txt."""
        done = subprocess.run(
            [
                *(sys.executable, "-m", "uv", "pip", "install", "--quiet"),
                *("--python", str(self.bin / "python")),
                *("--constraint", str(ROOT / "constraints.txt"), *requirements),
            ],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == done.returncode, done.stderr[-3000:]

    def run(self, command, *arguments, **environ):
        """Run a command of the environment, in a folder outside of the checkout."""
        return subprocess.run(
            [str(self.bin / command), *map(str, arguments)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=self.environ(**environ),
        )

    def environ(self, **environ):
        """Return the variables of a command."""
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        state = {"XDG_STATE_HOME": str(self.folder / "state"), "HOME": str(self.folder)}
        return {"PATH": path, "LANG": "C.UTF-8", **state, **environ}

    def python(self, code, **environ):
        """Run code."""
        return self.run("python", "-c", textwrap.dedent(code), **environ)

    def serve(self, *arguments):
        """Run a command that serves until its first line; return the line, or its error."""
        with subprocess.Popen(
            [str(self.bin / "traced-retry"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environ(),
            cwd=self.folder,
        ) as process:
            first = process.stdout.readline()
            if first:
                process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=20)
        return first, error


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of a wheel and an sdist; the wheel is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    """The wheel."""
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture
def environment(tmp_path, wheel):
    """Make an environment with an extra: ``environment("cli")``."""

    def make(extra):
        made = Environment(tmp_path)
        made.install(f"{wheel}[{extra}]")
        return made

    return make


class TestFiles:
    def test_wheel(self, wheel):
        """The wheel has the package's modules and shipped files, and no generator."""
        with zipfile.ZipFile(wheel) as opened:
            names = opened.namelist()
            (metadata,) = [n for n in names if n.endswith("/METADATA")]
            text = opened.read(metadata).decode()
        expected = {f"traced_retry/{p.relative_to(ROOT / 'traced_retry').as_posix()}"
                    for p in (ROOT / "traced_retry").rglob("*.py")}  # fmt: skip
        modules = {n for n in names if n.endswith(".py")}

        assert expected == modules
        assert {"traced_retry"} == {n.split("/")[0] for n in names if ".dist-info/" not in n}
        assert "traced_retry/py.typed" in names
        assert "traced_retry/dashboards/grafana/overview.json" in names
        assert "traced_retry/exporters/presets/jaeger.yaml" in names
        assert "Author: The traced-retry authors\n" in text

    def test_sdist(self, dist):
        """The sdist has everything that git has, but .gitignore."""
        (sdist,) = dist.glob("*.tar.gz")
        with tarfile.open(sdist) as opened:
            names = {n.partition("/")[2] for n in opened.getnames()}
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()

        assert set() == set(tracked) - names - {".gitignore"}


HINT = re.compile(r"pip install '(traced-retry\[\w+\])'")
FEATURES = {
    "wrap": "import traced_retry; traced_retry.wrap",
    "enable": "import traced_retry; traced_retry.enable()",
    "preset": "import traced_retry; traced_retry.enable(preset='jaeger')",
    "report": "from traced_retry.cli.main import app; app(['report', '--help'])",
}
WORKS = {
    "agent": {*FEATURES, "simulate"},
    "cli": {"report"},
    "demo": {*FEATURES, "simulate"} - {"preset"},
    "export": set(),
    "instrumentation": set(),
    "livekit": {"report", "simulate", "wrap"},  # livekit-agents needs typer, rich and aiohttp
    "presets": set(),
    "simulator": {"report", "simulate"},
    "testing": {*FEATURES, "simulate"} - {"preset"},
}
"""The features that work with each extra alone. With any other, the error names an extra."""


class TestExtras:
    def test_each_is_tested_here(self):
        """A new extra needs a row."""
        assert EXTRAS == sorted(WORKS)

    @pytest.mark.parametrize("extra", EXTRAS)
    def test_alone(self, extra, environment):
        """A feature works, or its error is one sentence with a command that adds an extra."""
        made = environment(extra)
        served, error = made.serve("simulate", "openai")
        errors = {} if served else {"simulate": error}
        works = {"simulate"} if served else set()
        for feature, code in FEATURES.items():
            done = made.python(code)
            if done.returncode == 0:
                works.add(feature)
            else:
                errors[feature] = done.stderr
        last = {feature: error.strip().splitlines()[-1] for feature, error in errors.items()}

        assert WORKS[extra] == works, errors
        for line in last.values():
            assert HINT.search(line), errors
            assert "which is not installed: " in line
        if extra == "demo":
            assert "ExportError: preset 'jaeger' needs opentelemetry." in last["preset"]

    def test_hints_work(self, environment, wheel):
        """Follow the hints until a preset works; the package is on no index."""
        made = environment("livekit")
        added = []
        while (done := made.python(FEATURES["preset"])).returncode:
            added.append(HINT.search(done.stderr.splitlines()[-1])[1])
            assert len(set(added)) == len(added), done.stderr
            made.install(added[-1].replace("traced-retry", str(wheel)))

        assert ["traced-retry[export]", "traced-retry[presets]"] == added


ENTRYPOINT = """
import asyncio, json
from types import SimpleNamespace
{code}
class Job:
    job = SimpleNamespace(agent_name="readme")
    def add_shutdown_callback(self, callback): pass
asyncio.run(entrypoint(Job()))
"""


COMMANDS = list(
    dict.fromkeys(
        line[2:].partition("  #")[0].strip()
        for code in blocks("console")
        for line in code.splitlines()
        if line.startswith("$ ")
    )
)
"""The commands of these pages, in their order."""


def varying(text):
    """Replace trace ids, ports and seconds, which differ from run to run."""
    return re.sub(r"\b[0-9a-f]{32}\b|(?<=127\.0\.0\.1:)\d+|\d+\.\d+(?= s)", "N", text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git has."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    names = listed.stdout.decode().splitlines()
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def agent(tmp_path_factory, checkout):
    """An environment in which the README's installation commands were run in a checkout."""
    made = Environment(tmp_path_factory.mktemp("agent"), with_pip=True)
    environ = {
        **os.environ,
        "PATH": made.environ()["PATH"],
        "PIP_CONSTRAINT": str(checkout / "constraints.txt"),
    }
    commands = [c for c in COMMANDS if c.startswith(("make wheel", "pip install "))]
    assert [
        "pip install '.[agent]'",
        "make wheel",
        f"pip install 'dist/traced_retry-{PROJECT['version']}-py3-none-any.whl[agent]'",
    ] == commands
    for command in commands:
        done = subprocess.run(
            command,
            shell=True,
            cwd=checkout,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == done.returncode, done.stdout + done.stderr
    return made


class TestReadme:
    def test_each_block_is_tested_here(self):
        """A block in another language, or another command, needs a test."""
        runs = ("make ", "pip install ", "traced-retry ")

        assert {"console", "python", "text"} == {language for language, _ in README}
        assert [] == [c for c in COMMANDS if not c.startswith(runs)]

    @pytest.mark.parametrize("number", range(len(blocks("python"))))
    def test_python(self, number, agent):
        """Each block runs by itself; an entrypoint is called."""
        code = blocks("python")[number]
        if "def entrypoint" in code:
            code = ENTRYPOINT.format(code=code)
        done = agent.python(code, OPENAI_API_KEY="sk-none")

        assert 0 == done.returncode, done.stderr

    def test_make(self, agent, checkout):
        """Every target is there.

        The fixture ``agent`` runs ``make wheel``. CI runs ``make demo`` and ``make test`` in a
        fresh clone per Python, because they install an environment of their own and ``make test``
        takes minutes. The next test runs the program behind ``make demo``.
        """
        targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
        assert {"demo", "test", "wheel"} == set(targets)
        for target in targets:
            done = subprocess.run(
                ["make", "--dry-run", target], cwd=checkout, capture_output=True, check=False
            )
            assert 0 == done.returncode, done.stderr

    def test_traced_retry(self, agent):
        """Each command works on the spans of a demo, and prints the output that is shown."""
        demo = agent.run("traced-retry", "demo", "--store", "spans.jsonl")
        assert 0 == demo.returncode, demo.stderr
        (text,) = blocks("text")
        for line in text.splitlines()[:2]:
            assert varying(line) in varying(demo.stdout)

        for command in [c for c in COMMANDS if c.startswith("traced-retry ")]:
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)[1:]]
            if words[0] in ("simulate", "record"):
                first, error = agent.serve(*words)
                assert varying(first) in varying("\n".join(blocks("console"))), error
            else:
                done = agent.run("traced-retry", *words)
                assert 0 == done.returncode, done.stdout + done.stderr

    def test_without_a_line_of_code(self, agent):
        """`opentelemetry-instrument python agent.py` is there."""
        (agent.folder / "agent.py").write_text("print('ran')\n")
        done = agent.run("opentelemetry-instrument", "python", "agent.py")

        assert (0, "ran\n") == (done.returncode, done.stdout), done.stderr


class TestTesting:
    def test_verdicts_from_the_wheel(self, environment, tmp_path):
        """The verdict names each planted error in an environment that has only the extra."""
        made = environment("testing")
        (tmp_path / "pytest.ini").touch()
        for name in ("agents.py", "test_verdict.py"):
            shutil.copy(ROOT / "tests" / "testing" / name, tmp_path)
        done = made.run("python", "-m", "pytest", "-q", tmp_path / "test_verdict.py")

        assert 0 == done.returncode, done.stdout[-3000:]
        assert "11 passed" in done.stdout
