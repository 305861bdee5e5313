# SPDX-License-Identifier: Apache-2.0
"""Test ``traced-retry exporters list | show | write | check``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.fresh import COMMAND, program

from traced_retry import shipped_files
from traced_retry.monitoring.files import files as dashboard_files

ROOT = Path(__file__).parents[2] / "exporters"
FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file())


def run(*arguments):
    """Run the command, and return its status and its output as text."""
    return program(
        COMMAND,
        "traced-retry",
        "exporters",
        *arguments,
        environ={**os.environ, "COLUMNS": "80"},
    )


class TestList:
    def test_every_file_is_there(self):
        """The list has one line per file, with its name."""
        done = run("list")

        assert (0, "") == (done.returncode, done.stderr)
        assert FILES == sorted(line.split()[0] for line in done.stdout.splitlines())

    def test_each_configuration_says_what_it_is(self):
        """Each YAML file has a description in its first comment."""
        lines = run("list").stdout.splitlines()

        assert [] == [line for line in lines if ".yaml" in line and len(line.split()) < 4]
        assert any(line.startswith("presets/jaeger.yaml") and "Jaeger:" in line for line in lines)

    @pytest.mark.parametrize("files", [shipped_files.exporters, dashboard_files])
    def test_descriptions_are_whole_sentences(self, files):
        """A description in YAML ends with a full stop, or with the command to apply it."""
        described = {file.name: file.description for file in files() if file.name.endswith("yaml")}
        commands = [f"kubectl apply -f {Path(name).name}" for name in described]

        assert described
        assert {} == {n: t for n, t in described.items() if not t.endswith((".", *commands))}


class TestShow:
    def test_the_file_as_it_is(self):
        """The file is printed without a change, so that it can be redirected into a file."""
        assert (ROOT / "presets/jaeger.yaml").read_text() == run(
            "show", "presets/jaeger.yaml"
        ).stdout

    def test_no_such_file(self):
        """The error lists the files that exist."""
        done = run("show", "jaeger")

        assert 2 == done.returncode
        assert "there is no 'jaeger'; there are README.md, " in done.stderr
        assert "presets/jaeger.yaml" in done.stderr
        assert "Traceback" not in done.stderr


class TestWrite:
    def test_all_files(self, tmp_path):
        """All files are copied byte for byte, and each name is printed."""
        done = run("write", tmp_path / "new" / "folder")
        written = [Path(line) for line in done.stdout.splitlines()]

        assert FILES == sorted(p.relative_to(tmp_path / "new/folder").as_posix() for p in written)
        assert [(ROOT / name).read_bytes() for name in FILES] == [
            (tmp_path / "new/folder" / name).read_bytes() for name in FILES
        ]

    def test_what_was_edited_is_kept(self, tmp_path):
        """Edited files are kept without --force, and a second run without edits succeeds."""
        run("write", tmp_path)
        assert 0 == run("write", tmp_path).returncode
        edited, missing = tmp_path / "presets" / "jaeger.yaml", tmp_path / "README.md"
        edited.write_text("mine")
        missing.unlink()

        refused = run("write", tmp_path)
        assert 2 == refused.returncode
        assert f"{edited} is there already and differs: --force overwrites it" in refused.stderr
        assert ("mine", False) == (edited.read_text(), missing.exists())

        assert 0 == run("write", tmp_path, "--force").returncode
        assert (ROOT / "presets/jaeger.yaml").read_text() == edited.read_text()

    @pytest.mark.parametrize("outside", ["there.yaml", "missing.yaml", "pipe"])
    def test_link_is_not_followed(self, outside, tmp_path):
        """A link in the folder, dangling or not, or to a pipe, is replaced only with --force."""
        (tmp_path / "there.yaml").write_text("mine")
        os.mkfifo(tmp_path / "pipe")
        link = tmp_path / "new" / "presets" / "jaeger.yaml"
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / outside)

        refused = run("write", tmp_path / "new")
        assert (2, True) == (refused.returncode, f"{link} is there already" in refused.stderr)
        assert [link] == [path for path in (tmp_path / "new").rglob("*") if not path.is_dir()]

        assert 0 == run("write", tmp_path / "new", "--force").returncode
        assert (ROOT / "presets/jaeger.yaml").read_text() == link.read_text()
        assert not link.is_symlink()
        assert "mine" == (tmp_path / "there.yaml").read_text()
        assert not (tmp_path / "missing.yaml").exists()

    @pytest.mark.parametrize("force", [(), ("--force",)])
    @pytest.mark.parametrize("there", [True, False])
    def test_link_to_another_folder_is_refused(self, there, force, tmp_path):
        """No file is written outside of the folder that was named."""
        if there:
            (tmp_path / "outside").mkdir()
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "presets").symlink_to(tmp_path / "outside")

        refused = run("write", tmp_path / "new", *force)
        assert 2 == refused.returncode
        assert "presets is a link to a folder outside of" in refused.stderr
        assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]

    @pytest.mark.parametrize("folder", ["file", "file/below", "x" * 300])
    def test_where_it_cannot(self, folder, tmp_path):
        """The error is one line if the folder cannot be written."""
        (tmp_path / "file").touch()
        done = run("write", tmp_path / folder)

        assert 2 == done.returncode
        assert "cannot be written" in done.stderr
        assert "Traceback" not in done.stderr


class TestCheck:
    def test_folder_as_written_fails(self, tmp_path):
        """Each example receiver and the missing rules fail, with a fix each."""
        run("write", tmp_path)
        done = run("check", tmp_path)

        assert (1, "") == (done.returncode, done.stderr)
        assert "there are no rules, so no alert can fire" in done.stdout
        for receiver in ("page", "ticket", "watchdog"):
            url = f"http://127.0.0.1:9099/{receiver}"
            assert f"receiver {receiver} is still the example: it sends to {url}" in done.stdout
        assert f"fix: traced-retry dashboards write {tmp_path / 'dashboards'}" in done.stdout
        assert 4 == done.stdout.count("      fix: ")

    def test_own_receivers_and_rules_pass(self, tmp_path):
        """An example that no route names does not count."""
        file = tmp_path / "alertmanager" / "alertmanager.yaml"
        file.parent.mkdir()
        file.write_text(
            "route: {receiver: mine}\n"
            "receivers:\n"
            "  - {name: mine, webhook_configs: [{url: 'https://hooks.example.org'}]}\n"
            "  - {name: page, webhook_configs: [{url: 'http://127.0.0.1:9099/page'}]}\n"
        )
        rules = tmp_path / "dashboards" / "prometheus"
        rules.mkdir(parents=True)
        (rules / "alerts.yaml").touch()

        assert 0 == run("check", tmp_path).returncode
        assert 0 == run("check", file).returncode

    def test_receiver_without_a_service_fails(self, tmp_path):
        """Alertmanager accepts such a receiver and notifies no one."""
        file = tmp_path / "alertmanager.yaml"
        file.write_text("route: {receiver: mine}\nreceivers: [{name: mine}]\n")
        done = run("check", file)

        assert 1 == done.returncode
        assert "receiver mine notifies no service" in done.stdout

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (None, "cannot be read as YAML (FileNotFoundError)"),
            ("[1", "cannot be read as YAML (ParserError)"),
            ("- a", "has no route"),
            ("a: 1", "has no route"),
        ],
    )
    def test_other_file_is_refused(self, text, says, tmp_path):
        """One line names the file and the remedy, with status 2."""
        file = tmp_path / "alertmanager.yaml"
        if text is not None:
            file.write_text(text)
        done = run("check", file)

        assert (2, "") == (done.returncode, done.stdout)
        assert f"{file} {says}" in done.stderr
        assert "Traceback" not in done.stderr
