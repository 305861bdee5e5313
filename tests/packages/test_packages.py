# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist: their files, each extra in an empty environment, the README's code.

``make packages`` runs these tests. They install packages, so ``make test`` leaves them out.
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
EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"bench", "test"})
README = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)


def blocks(language):
    """Return the code blocks of the README in a language."""
    return [code for name, code in README if name == language]


class Environment:
    """A virtual environment outside of the checkout."""

    def __init__(self, folder):
        self.folder = folder
        venv.create(folder / "venv", with_pip=False)
        self.bin = folder / "venv" / "bin"

    def pip_install(self, *arguments):
        """Install with this interpreter's pip, in the versions of constraints.txt."""
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--disable-pip-version-check"),
                *("--python", str(self.bin / "python"), "install", "--quiet"),
                *("--constraint", str(ROOT / "constraints.txt"), *arguments),
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
        made.pip_install(f"{wheel}[{extra}]")
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
    "preset": "import traced_retry; traced_retry.enable(preset='console')",
    "report": "from traced_retry.cli.main import app; app(['report', '--help'])",
    "simulator": "from traced_retry.simulator import OpenAISimulator; OpenAISimulator('ok')",
}
WORKS = {
    "agent": set(FEATURES),
    "cli": {"report"},
    "demo": set(FEATURES) - {"preset"},
    "export": set(),
    "instrumentation": set(),
    "livekit": {"report", "wrap"},  # livekit-agents needs typer and rich itself
    "presets": set(),
    "simulator": {"report", "simulator"},
    "testing": set(FEATURES) - {"preset"},
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
        works = set()
        for feature, code in FEATURES.items():
            if feature == "simulator" and extra not in ("agent", "demo", "simulator", "testing"):
                continue  # a module for tests; its import error names the package
            done = made.python(code)
            if done.returncode == 0:
                works.add(feature)
            else:
                last = done.stderr.strip().splitlines()[-1]
                assert HINT.search(last), done.stderr
                assert "which is not installed: " in last
                if feature == "preset" and extra in ("demo", "testing"):
                    assert "ExportError: preset 'console' needs opentelemetry." in last

        assert WORKS[extra] == works

    def test_hints_work(self, environment):
        """Follow the hints until a preset works; the package is on no index."""
        made = environment("livekit")
        added = []
        while (done := made.python(FEATURES["preset"])).returncode:
            added.append(HINT.search(done.stderr.splitlines()[-1])[1])
            assert len(set(added)) == len(added), done.stderr
            made.pip_install(added[-1])

        assert ["traced-retry[export]", "traced-retry[presets]"] == added

    def test_simulate_alone(self, environment):
        """`[simulator]` serves a provider's protocol."""
        made = environment("simulator")
        with subprocess.Popen(
            [str(made.bin / "traced-retry"), "simulate", "openai"],
            stdout=subprocess.PIPE,
            text=True,
            env=made.environ(),
            cwd=made.folder,
        ) as process:
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)

        assert first.startswith("openai on http://127.0.0.1:")


ENTRYPOINT = """
import asyncio, json
from types import SimpleNamespace
{code}
class Job:
    job = SimpleNamespace(agent_name="readme")
    def add_shutdown_callback(self, callback): pass
asyncio.run(entrypoint(Job()))
"""


@pytest.fixture(scope="module")
def agent(tmp_path_factory, wheel):
    """An environment with the extra that the README installs."""
    made = Environment(tmp_path_factory.mktemp("agent"))
    made.pip_install(f"{wheel}[agent]")
    return made


class TestReadme:
    @pytest.mark.parametrize("number", range(len(blocks("python"))))
    def test_python(self, number, agent):
        """Each block runs by itself; an entrypoint is called."""
        code = blocks("python")[number]
        if "def entrypoint" in code:
            code = ENTRYPOINT.format(code=code)
        done = agent.python(code, OPENAI_API_KEY="sk-none")

        assert 0 == done.returncode, done.stderr

    def test_console(self, agent):
        """Each command of the README is known here, and works."""
        lines = [line for code in blocks("console") for line in code.splitlines()]
        commands = [line[2:].partition("  #")[0].strip() for line in lines if line[:2] == "$ "]
        made = [c for c in commands if c.startswith("make ")]
        installs = [c for c in commands if c.startswith("pip install ")]
        ours = [c for c in commands if c.startswith("traced-retry ")]
        assert sorted(commands) == sorted(made + installs + ours)

        targets = (ROOT / "Makefile").read_text()
        assert [] == [c for c in made if not re.search(rf"^{c.split()[1]}:", targets, re.MULTILINE)]
        for command in installs:
            (target,) = re.findall(r"'(\S+)\[agent\]'", command)
            assert target in (".", f"dist/traced_retry-{PROJECT['version']}-py3-none-any.whl")

        demo = agent.run("traced-retry", "demo", "--json", "--store", "spans.jsonl")
        assert 0 == demo.returncode, demo.stderr
        for command in ours:
            words = re.findall(r'"[^"]*"|\S+', command)[1:]
            words = [word.strip('"') for word in words]
            if words[0] == "simulate":
                continue  # see test_simulate_alone
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
        for name in ("agents.py", "test_verdict.py"):
            shutil.copy(ROOT / "tests" / "testing" / name, tmp_path)
        done = made.run("python", "-m", "pytest", "-q", tmp_path / "test_verdict.py")

        assert 0 == done.returncode, done.stdout[-3000:]
        assert "11 passed" in done.stdout
