# SPDX-License-Identifier: Apache-2.0
"""Build the servers of tests/backends: ``python tools/backends/build.py [jaeger] [otelcol]``.

The ordinary ``go`` command (1.24 or newer) gets the sources from the Go module proxy. The servers
are written to ``~/.cache/traced-retry/backends`` or to ``TRACED_RETRY_BACKENDS``. On two
cores Jaeger takes six minutes and the Collector two. A second run builds only outdated servers.
Prometheus and Alertmanager are Debian packages: ``apt-get install prometheus
prometheus-alertmanager``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

JAEGER = "github.com/jaegertracing/jaeger@v1.76.0"
"""Jaeger 2.13.0. Its module has no v2 tag. The tag v1.76.0 is on the same commit, and the proxy has
no later one."""
BUILDER = "go.opentelemetry.io/collector/cmd/builder@v0.155.0"
MANIFEST = Path(__file__).with_name("otelcol.yaml")
CACHE = Path(
    os.environ.get("TRACED_RETRY_BACKENDS") or Path.home() / ".cache/traced-retry/backends"
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command and return its standard output. Its errors go to the terminal."""
    print("$", *command, flush=True)
    env = {**os.environ, "CGO_ENABLED": "0", **environment}
    return subprocess.run(  # noqa: S603 - our own commands
        command, cwd=cwd, env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def workshop(name: str) -> Path:
    """Return an empty folder for a build."""
    folder = CACHE / "src" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (CACHE / "bin").mkdir(exist_ok=True)
    return folder


def install(built: Path) -> None:
    """Move a server into the folder of the tests. An older one may be running."""
    new = CACHE / "bin" / f"{built.name}.new"
    shutil.copy(built, new)
    new.replace(new.with_suffix(""))


def jaeger() -> None:
    """Build Jaeger as a tool of a module of ours: its ``replace`` line forbids ``go install``."""
    folder = workshop("jaeger")
    module, _, version = JAEGER.partition("@")
    (folder / "go.mod").write_text("module traced-retry/backends/jaeger\n\ngo 1.24\n")
    # The public checksum database lacks some of its dependencies, so use its own checksums.
    there = json.loads(run("go", "mod", "download", "-json", JAEGER, cwd=folder))["Dir"]
    (folder / "go.sum").write_bytes(Path(there, "go.sum").read_bytes())
    run("go", "get", "-tool", f"{module}/cmd/jaeger@{version}", cwd=folder)
    run("go", "build", "-trimpath", "-ldflags=-s -w", f"{module}/cmd/jaeger", cwd=folder)
    install(folder / "jaeger")


def otelcol() -> None:
    """Build the Collector of the manifest.

    The builder only writes the source. Its next step would be ``go mod tidy``, which needs the
    modules of its components' tests, and the proxy does not have all of them.
    """
    folder = workshop("otelcol")
    run("go", "install", BUILDER, cwd=folder, GOBIN=str(folder))
    generate = ("./builder", "--skip-compilation", "--skip-get-modules", f"--config={MANIFEST}")
    run(*generate, cwd=folder)
    source = folder / "_build"
    modules = re.findall(r"^ *- gomod: (\S+) (\S+)$", MANIFEST.read_text(), re.MULTILINE)
    run("go", "mod", "init", "traced-retry/backends/otelcol", cwd=source)
    run(
        "go",
        "mod",
        "edit",
        *(f"-require={name}@{version}" for name, version in modules),
        cwd=source,
    )
    build = ("go", "build", "-mod=mod", "-trimpath", "-ldflags=-s -w", "-o", "otelcol", ".")
    run(*build, cwd=source)
    install(source / "otelcol")
    shutil.copy(MANIFEST, CACHE / "bin")


def outdated(name: str) -> bool:
    """Return whether a server is missing, or was built from another manifest."""
    if not (CACHE / "bin" / name).exists():
        return True
    built_from = CACHE / "bin" / MANIFEST.name
    same = built_from.exists() and built_from.read_bytes() == MANIFEST.read_bytes()
    return name == "otelcol" and not same


def main() -> None:
    """Build the named servers, or all, if they are missing or outdated."""
    wanted = sys.argv[1:] or ["jaeger", "otelcol"]
    makers = {"jaeger": jaeger, "otelcol": otelcol}
    if unknown := set(wanted) - set(makers):
        sys.exit(f"unknown server {', '.join(sorted(unknown))}: expected {', '.join(makers)}")
    for name in wanted:
        if outdated(name):
            makers[name]()
        print(f"{CACHE / 'bin' / name}")


if __name__ == "__main__":
    main()
