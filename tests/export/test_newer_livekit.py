# SPDX-License-Identifier: Apache-2.0
"""A LiveKit that is newer than the newest version tested, by the metadata of its packages."""

from __future__ import annotations

import json

import pytest
from support.fresh import fresh

from traced_retry import supported

CODE = """
import asyncio, json, sys
sys.path.insert(0, {site!r})
{code}
"""
CONVERSE = """
import traced_retry
from support.run_conversation import run_conversation
traced_retry.enable()
traced_retry.enable(policy=traced_retry.RetryPolicy(base_delay=0))
result = asyncio.run(run_conversation("rate_limit:0.01,ok"))["requests"]
"""
EXAMINE = """
import dataclasses
from traced_retry.doctor import examine
result = json.dumps([dataclasses.asdict(check) for check in examine()])
"""


@pytest.fixture
def newer(tmp_path):
    """Run code beside packages that say they are newer: ``newer(code, "livekit-agents", ...)``."""

    def run(code, *names, **environ):
        site = tmp_path / "site"
        for name in names:
            folder = site / f"{name.replace('-', '_')}-9.9.9.dist-info"
            folder.mkdir(parents=True)
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n"
            (folder / "METADATA").write_text(text)
        site.mkdir(exist_ok=True)
        code = CODE.format(site=str(site), code=code)
        ended = fresh(code, XDG_STATE_HOME=tmp_path / "state", **environ)
        assert "" == ended.error
        return ended

    return run


def warnings(ended):
    """Return what was logged about versions."""
    return [line for line in ended.log if "was tested up to" in line]


class TestEnable:
    def test_default_is_a_warning(self, newer):
        """One warning names the packages and the variable; replies are retried."""
        ended = newer(CONVERSE, "livekit-agents", "livekit-plugins-openai")

        assert 2 == ended.result
        (line,) = warnings(ended)
        assert line.startswith("WARNING traced_retry: traced-retry ")
        assert "livekit-agents 9.9.9, livekit-plugins-openai 9.9.9. Replies are retried" in line
        assert supported.VARIABLE in line

    def test_allow(self, newer):
        """The user insists: replies are retried without a warning."""
        ended = newer(CONVERSE, "livekit-agents", **{supported.VARIABLE: "allow"})

        assert (2, []) == (ended.result, warnings(ended))

    def test_observe(self, newer):
        """The user wants no retries on it: replies are traced, with a warning."""
        ended = newer(CONVERSE, "livekit-plugins-openai", **{supported.VARIABLE: "observe"})

        assert 1 == ended.result
        (line,) = warnings(ended)
        assert "Replies are traced and not retried" in line

    @pytest.mark.parametrize("choice", ["warn", "observe"])
    def test_tested_version(self, newer, choice):
        """On a tested version nothing changes."""
        ended = newer(CONVERSE, **{supported.VARIABLE: choice})

        assert (2, []) == (ended.result, warnings(ended))


class TestDoctor:
    @staticmethod
    def bad(ended):
        """Return the checks that are not ok."""
        return {c["check"]: c for c in json.loads(ended.result) if c["status"] != "ok"}

    def test_warns(self, newer):
        """The doctor names both versions and the variable."""
        found = self.bad(newer(EXAMINE, "livekit-agents", "livekit-plugins-openai"))

        assert {"livekit", "plugin openai"} == set(found)
        assert found["livekit"]["message"].startswith("livekit-agents 9.9.9 is newer than ")
        assert f"{supported.VARIABLE}=allow" in found["livekit"]["fix"]

    def test_allow(self, newer):
        """The doctor agrees if the user insists."""
        names = ("livekit-agents", "livekit-plugins-openai")

        assert {} == self.bad(newer(EXAMINE, *names, **{supported.VARIABLE: "allow"}))

    def test_invalid_choice(self, newer):
        """The doctor reports an invalid value."""
        found = self.bad(newer(EXAMINE, **{supported.VARIABLE: "yes"}))

        assert "is 'yes': expected warn, allow, observe" in found[supported.VARIABLE]["message"]
