# SPDX-License-Identifier: Apache-2.0
"""Build the servers of the tests: ``python tools/backends/build.py [NAME ...]``.

They come from the Go module proxy with the ordinary ``go`` command (1.26 or newer) and land in
``~/.cache/traced-retry/backends`` (or in the folder that ``TRACED_RETRY_BACKENDS`` names), never in
the tree. On two cores Jaeger takes six minutes, the Collector two, Prometheus 3 with its promtool
three, and the two parts of VictoriaMetrics two. A second run builds only missing ones.
Prometheus 2 and Alertmanager are Debian packages: ``apt-get install prometheus
prometheus-alertmanager``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

JAEGER = "github.com/jaegertracing/jaeger@v1.76.0"
"""Jaeger 2.13.0. Its module has no v2 tag: v1.76.0 is the last one it has, made on the same
commit, and the proxy has no later commit."""
BUILDER = "go.opentelemetry.io/collector/cmd/builder@v0.155.0"
PROMETHEUS = "github.com/prometheus/prometheus/cmd/%s@v0.316.0"
"""Prometheus 3.16, named ``prometheus3`` here, beside Debian's 2.42."""
VICTORIAMETRICS = "github.com/VictoriaMetrics/VictoriaMetrics/app/%s@v1.151.0"
MANIFEST = Path(__file__).with_name("otelcol.yaml")
CACHE = Path(
    os.environ.get("TRACED_RETRY_BACKENDS") or Path.home() / ".cache/traced-retry/backends"
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; its errors go to the terminal."""
    print("$", *command, flush=True)
    env = {**os.environ, "CGO_ENABLED": "0", **environment}
    return subprocess.run(  # noqa: S603 - our own commands
        command, cwd=cwd, env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def workshop(name: str) -> Path:
    """An empty folder to build in."""
    folder = CACHE / "src" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (CACHE / "bin").mkdir(exist_ok=True)
    return folder


def install(built: Path, name: str | None = None) -> None:
    """Move the program to the folder where the tests look, also while an older one runs."""
    new = CACHE / "bin" / f"{name or built.name}.new"
    shutil.copy(built, new)
    new.replace(new.with_suffix(""))


def package(path: str, name: str, tags: str = "") -> Callable[[], None]:
    """Return a function that builds a package as its authors publish it."""

    def build() -> None:
        folder = workshop(name)
        flags = (f"-tags={tags}", "-trimpath", "-ldflags=-s -w")
        run("go", "install", *flags, path, cwd=folder, GOBIN=str(folder))
        install(folder / path.rpartition("/")[2].partition("@")[0], name)

    return build


def jaeger() -> None:
    """Build Jaeger as a tool of a module of ours: its ``replace`` line forbids ``go install``."""
    folder = workshop("jaeger")
    module, _, version = JAEGER.partition("@")
    (folder / "go.mod").write_text("module traced-retry/backends/jaeger\n\ngo 1.24\n")
    # Its own checksums, for of some of what it needs the public checksum database has no record.
    there = json.loads(run("go", "mod", "download", "-json", JAEGER, cwd=folder))["Dir"]
    (folder / "go.sum").write_bytes(Path(there, "go.sum").read_bytes())
    run("go", "get", "-tool", f"{module}/cmd/jaeger@{version}", cwd=folder)
    run("go", "build", "-trimpath", "-ldflags=-s -w", f"{module}/cmd/jaeger", cwd=folder)
    install(folder / "jaeger")


def otelcol() -> None:
    """Build the Collector of the manifest.

    The builder only writes its source: it would go on with ``go mod tidy``, which wants the modules
    of its components' tests too, and the proxy does not have all of them.
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
    """Whether it is not there, or was built from another manifest."""
    if not (CACHE / "bin" / name).exists():
        return True
    built_from = CACHE / "bin" / MANIFEST.name
    same = built_from.exists() and built_from.read_bytes() == MANIFEST.read_bytes()
    return name == "otelcol" and not same


MAKERS: dict[str, Callable[[], None]] = {
    "jaeger": jaeger,
    "otelcol": otelcol,
    **{
        # With service discovery this takes five times as long. Tests name their targets.
        f"{name}3": package(PROMETHEUS % name, f"{name}3", "remove_all_sd")
        for name in ("prometheus", "promtool")
    },
    **{name: package(VICTORIAMETRICS % name, name) for name in ("vmagent", "vmalert-tool")},
}


def main() -> None:
    """Build the named servers, or all, unless they are there in the right version."""
    wanted = sys.argv[1:] or list(MAKERS)
    if unknown := set(wanted) - set(MAKERS):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(MAKERS)}")
    for name in wanted:
        if outdated(name):
            MAKERS[name]()
        print(f"{CACHE / 'bin' / name}")


if __name__ == "__main__":
    main()
