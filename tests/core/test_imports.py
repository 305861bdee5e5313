# SPDX-License-Identifier: Apache-2.0
"""Dependencies between the packages of traced_retry point one way."""

from __future__ import annotations

import grimp
import pytest

ALLOWED = {
    "core": set(),
    "livekit": {"core"},
    "simulator": set(),
    "monitoring": {"core"},
    "report": {"core"},
    "export": {"core", "livekit"},
    "doctor": {"core", "livekit", "export"},
    "testing": {"core", "report", "simulator"},
    "cli": {"core", "doctor", "export", "monitoring", "report", "simulator", "testing"},
}
"""The packages that a package may import. Each may import the modules of the root."""
ROOT = {"semconv", "errors", "shipped_files", "_version"}
LAZY = {"core", "livekit", "export"}
"""The packages with public names, which ``traced_retry.__getattr__`` imports on first use."""


@pytest.fixture(scope="module")
def graph():
    """Every import of the installed package, those inside of functions included."""
    return grimp.build_graph("traced_retry", include_external_packages=True)


def packages(graph, importer):
    """Return the names directly below ``traced_retry`` that the package ``importer`` imports."""
    modules = {f"traced_retry.{importer}", *graph.find_descendants(f"traced_retry.{importer}")}
    found = {i for m in modules for i in graph.find_modules_directly_imported_by(m)}
    names = {name.split(".")[1] for name in found if name.startswith("traced_retry.")}
    return names - {importer}


def test_root_holds_only_modules_that_all_packages_share(graph):
    """Everything else at the root is a package with a row in this file."""
    children = {name.split(".")[1] for name in graph.find_children("traced_retry")}

    assert ROOT | set(ALLOWED) == children


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_packages_below_it(graph, package):
    """The core knows no other package, livekit knows only core, and nothing imports cli."""
    assert packages(graph, package) - ROOT <= ALLOWED[package]


@pytest.mark.parametrize("module", sorted(ROOT))
def test_root_module_imports_no_package(graph, module):
    """The modules that all packages share do not depend on one of them."""
    assert packages(graph, module) <= ROOT


def test_package_itself_imports_only_public_names(graph):
    """The package's own module imports the core, and two packages on first use."""
    found = graph.find_modules_directly_imported_by("traced_retry")
    ours = {name.split(".")[1] for name in found if name.startswith("traced_retry.")}

    assert ours - ROOT <= LAZY


def test_core_imports_neither_livekit_nor_sdk(graph):
    """The core needs only backoff and the API of OpenTelemetry."""
    lines = [
        detail["line_contents"]
        for module in graph.find_descendants("traced_retry.core")
        for outside in ("livekit", "opentelemetry")
        if graph.direct_import_exists(importer=module, imported=outside)
        for detail in graph.get_import_details(importer=module, imported=outside)
    ]

    assert lines
    assert not [line for line in lines if "livekit" in line or "opentelemetry.sdk" in line]
