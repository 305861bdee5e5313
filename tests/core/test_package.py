# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

import pytest

import traced_retry
import traced_retry.testing


def test_tests_run_against_installed_package():
    """The tests import the installed package and not the folder beside them."""
    site = Path(sysconfig.get_path("purelib"))

    assert site / "traced_retry" == Path(traced_retry.__file__).parent


def test_core_needs_only_backoff_and_otel_api():
    """The metadata and the import need only backoff and the OpenTelemetry API."""
    base = [r for r in requires("traced-retry") if "extra ==" not in r]
    script = (
        "import sys; before = set(sys.modules); import traced_retry\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))\n"
        "print('opentelemetry.sdk' in sys.modules)"
    )
    printed = subprocess.check_output([sys.executable, "-c", script], text=True)
    packages, sdk = printed.splitlines()

    assert ["backoff", "opentelemetry-api"] == sorted(r.split(">")[0] for r in base)
    # typing_extensions is a dependency of opentelemetry-api's.
    assert {"backoff", "opentelemetry", "traced_retry"} == set(packages.split()) - {
        "typing_extensions"
    }
    assert "False" == sdk


@pytest.mark.parametrize("folder", ["exporters", "dashboards"])
def test_data_folders_install_below_package(folder):
    """The data folders are no top-level names in site-packages."""
    assert (files("traced_retry") / folder / "README.md").is_file()
    assert not (Path(sysconfig.get_path("purelib")) / folder).exists()


@pytest.mark.parametrize("folder", ["exporters", "dashboards"])
def test_data_folders_ship_without_code(folder):
    """The installed data folders hold no Python file, so no generator ships."""
    assert [] == list(Path(str(files("traced_retry") / folder)).rglob("*.py"))


def test_package_is_marked_as_typed():
    """Type checkers use the package's annotations."""
    assert (files("traced_retry") / "py.typed").is_file()


def test_each_public_name_is_on_the_page_of_the_api():
    """The page has all names of the package and of its testing tools."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    documented = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith(":::")}

    assert set() == {*traced_retry.__all__, *traced_retry.testing.__all__} - documented - {
        "__version__"
    }


def test_public_names_are_listed_and_importable():
    """Each public name is listed, and those that need no extra can be imported."""
    for name in set(traced_retry.__all__) - set(traced_retry._LATE):
        assert getattr(traced_retry, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        traced_retry.nonsense  # noqa: B018
