# SPDX-License-Identifier: Apache-2.0
"""The versions that are supported: in the README, in the metadata, and at run time."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from traced_retry.core import supported

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
)


def floor(name, *extras):
    """Return the oldest version of a package that the metadata allows."""
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    (found,) = {m[1] for r in wanted if (m := re.match(rf"{name}(?:\[\w+\])?>=([\d.]+)", r))}
    return found


def padded(version):
    """Return a version with three parts."""
    return ".".join([*version.split("."), "0", "0"][:3])


class TestNumbers:
    def test_readme(self):
        """The README's table shows the numbers that the code checks."""
        rows = dict(
            re.findall(
                r"^\| ([\w -]+?) \| (\d[\d.]* to \d[\d.]*)",
                (ROOT / "README.md").read_text(),
                re.MULTILINE,
            )
        )
        expected = {
            "Python": supported.PYTHON,
            "livekit-agents and plugins": supported.LIVEKIT,
            "opentelemetry-api": supported.OPENTELEMETRY,
            "opentelemetry-sdk": supported.OPENTELEMETRY_SDK,
        }

        assert {name: f"{v.oldest} to {v.newest}" for name, v in expected.items()} == rows

    def test_metadata(self):
        """Nothing older than the oldest version supported can be installed."""
        assert f">={supported.PYTHON.oldest}" == PROJECT["requires-python"]
        classifiers = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: 3." in c]
        assert (supported.PYTHON.oldest, supported.PYTHON.newest) == (
            classifiers[0],
            classifiers[-1],
        )
        assert supported.OPENTELEMETRY.oldest == padded(floor("opentelemetry-api"))
        assert supported.OPENTELEMETRY_SDK.oldest == padded(floor("opentelemetry-sdk", "export"))
        assert supported.LIVEKIT.oldest == padded(floor("livekit-agents", "livekit"))
        for name in supported.PLUGINS:
            assert supported.LIVEKIT.oldest == padded(
                floor(f"livekit-plugins-{name}", "demo", "test")
            )

    def test_newest(self):
        """The newest version tested is the one that the tests run on."""
        assert supported.OPENTELEMETRY.newest == PINNED["opentelemetry-api"]
        assert supported.OPENTELEMETRY_SDK.newest == PINNED["opentelemetry-sdk"]
        names = ["livekit-agents", *(f"livekit-plugins-{name}" for name in supported.PLUGINS)]
        assert {supported.LIVEKIT.newest} == {PINNED[name] for name in names}

    def test_oldest(self):
        """`make oldest` installs the oldest versions supported."""
        makefile = (ROOT / "Makefile").read_text()

        assert f"livekit-%=={supported.LIVEKIT.oldest}," in makefile
        assert f"opentelemetry-api=={supported.OPENTELEMETRY.oldest} " in makefile

    def test_constraints_hold_no_address(self):
        """A committed file names no package index."""
        assert "://" not in (ROOT / "constraints.txt").read_text()


class TestVersions:
    @pytest.mark.parametrize(
        ("installed", "inside", "newer"),
        [
            ("1.7.0", True, False),
            ("1.8.9", True, False),
            ("1.8", True, False),
            ("1.8.9.post1", True, False),
            ("1.6.9", False, False),
            ("1.8.10", False, True),
            ("1.9.0rc1", False, True),
            ("2.0", False, True),
        ],
    )
    def test_compare(self, installed, inside, newer):
        """Versions compare by number, and both ends are inside."""
        versions = supported.Versions("1.7.0", "1.8.9")

        assert (inside, newer) == (installed in versions, versions.newer(installed))

    def test_missing_number_is_zero(self):
        """A version may leave out its last numbers."""
        versions = supported.Versions("1.8.0", "1.9.0")

        assert (True, False) == ("1.8" in versions, versions.newer("1.9"))

    def test_frozen(self):
        """No caller can change the supported versions."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            supported.LIVEKIT.newest = "9.9.9"


class TestChoice:
    @pytest.mark.parametrize("value", ["warn", "allow", "observe"])
    def test_value(self, value, monkeypatch):
        """The variable holds one of three words."""
        monkeypatch.setenv(supported.VARIABLE, value)

        assert value == supported.choice()

    @pytest.mark.parametrize("value", ["", " "])
    def test_default(self, value, monkeypatch):
        """An empty variable means a warning."""
        monkeypatch.setenv(supported.VARIABLE, value)

        assert "warn" == supported.choice()

    def test_invalid(self, monkeypatch):
        """The error names the variable, its value and the values allowed."""
        monkeypatch.setenv(supported.VARIABLE, "yes")

        with pytest.raises(supported.SupportError, match="is 'yes': expected warn, allow, observe"):
            supported.choice()


class TestCheck:
    @pytest.fixture
    def newer(self, monkeypatch):
        """Every LiveKit package is newer than the newest version tested."""
        monkeypatch.setattr(supported, "version", lambda _: "9.9.9")
        supported.newer_livekit.cache_clear()
        yield
        supported.newer_livekit.cache_clear()

    @pytest.mark.parametrize(
        ("value", "may_retry", "says"),
        [
            ("warn", True, "Replies are retried all the same."),
            ("observe", False, "Replies are traced and not retried."),
            ("allow", True, None),
        ],
    )
    def test_newer_livekit_is_reported_once(
        self, value, may_retry, says, newer, monkeypatch, caplog
    ):
        """The variable decides about retries, and ``allow`` also about the warning."""
        monkeypatch.setenv(supported.VARIABLE, value)
        for _ in range(2):
            assert may_retry is supported.check_livekit()

        assert ([] if says is None else ["WARNING"]) == [r.levelname for r in caplog.records]
        for record in caplog.records:
            assert says in record.getMessage()
            assert "livekit-agents 9.9.9, livekit-plugins-aws 9.9.9" in record.getMessage()
            assert "set TRACED_RETRY_UNTESTED_LIVEKIT to one of warn, allow, observe." in (
                record.getMessage()
            )

    @pytest.mark.parametrize("value", ["warn", "observe", "allow"])
    def test_tested_livekit_is_retried_without_warning(self, value, monkeypatch, caplog):
        """The choice concerns only a newer LiveKit."""
        monkeypatch.setattr(supported, "version", lambda _: supported.LIVEKIT.newest)
        supported.newer_livekit.cache_clear()
        monkeypatch.setenv(supported.VARIABLE, value)

        assert supported.check_livekit()
        assert [] == caplog.records
        supported.newer_livekit.cache_clear()
