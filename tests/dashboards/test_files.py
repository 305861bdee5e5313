# SPDX-License-Identifier: Apache-2.0
"""Test that committed files are the generated ones, and the command's own thresholds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from backends.servers import command
from dashboards.reading import DASHBOARDS, dashboards, panels
from support.fresh import COMMAND, program

from traced_retry.errors import UsageError
from traced_retry.monitoring import alerts, config, formats
from traced_retry.monitoring.files import files, root


def run(*arguments):
    """Run the command as a process."""
    return program(COMMAND, "traced-retry", "dashboards", *arguments, environ=dict(os.environ))


def test_rules_are_as_generated():
    """alerts.yaml and its other forms are as ``make dashboards`` generates them."""
    made = formats.files(config.read(DASHBOARDS / "config.yaml"))

    assert made == {name: (DASHBOARDS / name).read_text() for name in made}


def test_everything_is_as_generated(tmp_path):
    """Running the generator in a copy of the folders changes no file and no table."""
    pytest.importorskip("grafana_foundation_sdk")
    root = DASHBOARDS.parent
    for folder in ("dashboards", "docs", "tools/dashboards"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / folder, tmp_path / folder, ignore=ignore)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    subprocess.run([sys.executable, "-B", str(tmp_path / "tools" / "dashboards")], check=True)

    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert before == after


class TestRunbook:
    def sections(self):
        """Return the titles of the runbook's sections."""
        return re.findall(r"^## (.+)$", (DASHBOARDS / "runbook.md").read_text(), re.MULTILINE)

    def test_each_alert_has_section(self):
        """The sections have the order by which links count them."""
        assert list(alerts.ALERTS) == self.sections()

    def test_each_section_has_required_parts(self):
        """Each section has effect, place to look, cause, action and check."""
        text = (DASHBOARDS / "runbook.md").read_text()
        for section in text.split("\n## ")[1:]:
            for heading in (
                "**What callers experience.**",
                "**First look.**",
                "**Likely causes",
                "**What to do now.**",
                "**How to know that it worked.**",
            ):
                assert heading in section, section[:40]

    def test_links_lead_to_section(self, shipped):
        """Each alert links to its section, by the panel's id or the heading's anchor."""
        board = dashboards()["runbook.json"]
        title = {p["id"]: p["title"] for p in panels(board)}
        for alert in alerts.alerts(shipped):
            url = alert.document(shipped)["annotations"]["runbook_url"]
            assert alert.alert == title[int(url.rpartition("=")[2])]
            assert f"/d/{board['uid']}?" in url
        elsewhere = shipped.replace(runbook_url="https://wiki.example/runbook")
        for alert in alerts.alerts(elsewhere):
            url = alert.document(elsewhere)["annotations"]["runbook_url"]
            assert f"https://wiki.example/runbook#{alert.alert.lower()}" == url

    def test_runbook_names_only_existing_panels(self):
        """Each panel that the runbook names is on a dashboard."""
        text = re.sub(r"\s+", " ", (DASHBOARDS / "runbook.md").read_text())
        named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text))
        boards = dashboards().values()
        titles = {p["title"] for b in boards for p in panels(b)} | {b["title"] for b in boards}
        titles |= {p["title"] for b in boards for p in b["panels"] if p["type"] == "row"}

        assert set() == named - titles


class TestWrite:
    def test_write_puts_all_files_into_folder(self, tmp_path):
        """All files are written with the default numbers."""
        done = run("write", tmp_path / "d")

        assert 0 == done.returncode, done.stderr
        written = {p.relative_to(tmp_path / "d").as_posix() for p in (tmp_path / "d").rglob("*.*")}
        assert {file.name for file in files()} == written
        for name in ("prometheus/alerts.yaml", "config.yaml", "grafana/overview.json"):
            assert (DASHBOARDS / name).read_text() == (tmp_path / "d" / name).read_text()

    def test_own_thresholds_reach_rules_and_panels(self, tmp_path):
        """The thresholds are in the rules, the panels and the written config."""
        options = {
            "--objective": 99.5,
            "--min-replies": 7,
            "--min-lost": 4,
            "--silence": 2.5,
            "--grafana-url": "https://grafana.example/",
            "--runbook-url": "https://wiki.example/r",
        }
        done = run("write", tmp_path, *(x for pair in options.items() for x in pair))
        assert 0 == done.returncode, done.stderr
        written = (tmp_path / "prometheus/alerts.yaml").read_text()

        assert "> 8 * 0.005" in written
        assert "> 6.5" in written
        assert "> 3.5" in written
        assert "vector(2.5)" in written
        assert "https://grafana.example/d/traced-retry-provider" in written
        assert "https://wiki.example/r#tracedretryreplieslost" in written
        again = config.read(tmp_path / "config.yaml")
        assert (99.5, 7, 4, 2.5) == (
            again.objective,
            again.min_replies,
            again.min_lost,
            again.silence_seconds,
        )
        assert done.stdout == run("write", tmp_path, "--config", tmp_path / "config.yaml").stdout

    def test_labels_of_services_reach_rules_and_panels(self, tmp_path):
        """Each attribute in the config is a label of the rule and has a panel of its own."""
        text = (DASHBOARDS / "config.yaml").read_text()
        shipped, ours = "[service.version]", "[service.version, cloud.region, k8s.cluster.name]"
        assert shipped in text
        (tmp_path / "c.yaml").write_text(text.replace(shipped, ours))
        found = {file.name: file.content for file in files(tmp_path / "c.yaml")}
        by = "service_name, service_version, cloud_region, k8s_cluster_name, traced_retry_outcome"
        board = json.loads(found["grafana/overview.json"])
        lost = {
            panel["title"]: panel["targets"][0]["expr"].split("(")[1].rstrip(") ")
            for panel in panels(board)
            if panel["title"].startswith("Lost by")
        }
        (row,) = (row for row in board["panels"] if "Lost by cloud.region" in json.dumps(row))
        places = [(each["gridPos"]["x"], each["gridPos"]["y"]) for each in row["panels"]]
        ids = [panel["id"] for panel in panels(board)]

        assert by in found["prometheus/rollup.yaml"]
        assert by in found["kubernetes/prometheus-rule.yaml"]
        assert {
            "Lost by service": "service_name",
            "Lost by version": "service_version",
            "Lost by cloud.region": "cloud_region",
            "Lost by k8s.cluster.name": "k8s_cluster_name",
        } == lost
        assert len(places) == len(set(places))
        assert len(ids) == len(set(ids))

    def test_rules_written_with_any_threshold_are_well_formed(self, tmp_path):
        """Promtool accepts the written rules."""
        run("write", tmp_path, "--objective", 99.95, "--min-replies", 1)
        done = subprocess.run(
            [command("promtool"), "check", "rules", *map(str, tmp_path.glob("prometheus/*.yaml"))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == done.returncode, done.stderr

    def test_preset_reaches_rules_and_config(self, tmp_path):
        """The preset's objective and burn rates are in the rules and in the written config."""
        done = run("write", tmp_path, "--preset", "99.5")
        assert 0 == done.returncode, done.stderr
        again = config.read(tmp_path / "config.yaml")

        assert "> 14.4 * 0.005" in (tmp_path / "prometheus/alerts.yaml").read_text()
        assert config.preset("99.5") == {
            "objective": again.objective,
            "burn_rates": again.burn_rates,
        }

    def test_unknown_preset_is_refused(self, tmp_path):
        """The message lists the presets."""
        done = run("write", tmp_path / "d", "--preset", "98")

        assert 2 == done.returncode
        assert "unknown preset '98': expected 99 or 99.5" in done.stderr

    @pytest.mark.parametrize("objective", [80, 87.5])
    def test_threshold_that_can_never_fire_is_refused(self, objective, tmp_path):
        """The message has the reason and a possible value."""
        done = run("write", tmp_path / "d", "--objective", objective)

        assert 2 == done.returncode
        assert f"at an objective of {objective:g} % the alert with factor 8 never" in done.stderr
        assert "Name an objective above 87.52 %" in done.stderr
        assert not (tmp_path / "d").exists()

    @pytest.mark.parametrize(
        ("option", "value", "says"),
        [
            ("--objective", 100, "objective is 100.0; it must be a percent above 0 and below 100"),
            ("--objective", "nan", "objective is nan"),
            ("--min-replies", 0, "min_replies is 0; it must be 1 or more"),
            ("--min-lost", 0, "min_lost is 0; it must be 1 or more"),
            ("--silence", 0, "silence.seconds is 0.0; it must be above 0"),
            ("--silence", "inf", "silence.seconds is inf; it must be above 0"),
            ("--silence", 30, "silence.seconds is 30.0; the alert would never fire"),
            ("--silence", 1e300, "largest bucket of the histogram ends at 30 s"),
            ("--grafana-url", "grafana.example", "grafana_url is 'grafana.example'; it must be a"),
            ("--grafana-url", "", "grafana_url is ''; it must be a URL such as https://grafana"),
            ("--grafana-url", "javascript:alert(1)", "grafana_url is 'javascript:alert(1)'; it"),
            ("--runbook-url", "https://wiki.example/a b", "runbook_url is 'https://wiki"),
            ("--runbook-url", "wiki", "runbook_url is 'wiki'; it must be a URL"),
            ("--config", "/nowhere.yaml", "/nowhere.yaml cannot be read"),
        ],
    )
    def test_invalid_option_is_refused(self, option, value, says, tmp_path):
        """One line names the option, and the status is 2."""
        done = run("write", tmp_path / "d", option, value)

        assert 2 == done.returncode
        assert says in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(("option", "value"), [("--silence", 29.9), ("--runbook-url", "")])
    def test_largest_useful_threshold_and_empty_runbook_are_accepted(self, option, value, tmp_path):
        """The last bucket is a valid limit, and without a URL the runbook is in Grafana."""
        assert 0 == run("write", tmp_path / "d", option, value).returncode

    def test_edited_file_is_kept_without_force(self, tmp_path):
        """An edited file stops the command before it writes, unless --force is set."""
        run("write", tmp_path)
        (tmp_path / "prometheus/alerts.yaml").write_text("mine")
        (tmp_path / "runbook.md").unlink()
        done = run("write", tmp_path)

        assert 2 == done.returncode
        assert "--force" in done.stderr
        assert not (tmp_path / "runbook.md").exists()
        assert 0 == run("write", tmp_path, "--force").returncode
        assert "mine" != (tmp_path / "prometheus/alerts.yaml").read_text()

    def test_list_and_show_print_files(self):
        """``list`` prints each file with its purpose, and ``show`` prints one file."""
        listed = run("list").stdout
        assert {file.name for file in files()} == {line.split()[0] for line in listed.splitlines()}
        assert (DASHBOARDS / "runbook.md").read_text() == run("show", "runbook.md").stdout
        missing = run("show", "runbok.md")
        assert 2 == missing.returncode
        assert "there is no 'runbok.md'; there are alertmanager/inhibit.yaml" in missing.stderr


class TestConfig:
    def change(self, **changes):
        """Return the shipped configuration with a change."""
        found = yaml.safe_load((root() / "config.yaml").read_text())
        for path, value in changes.items():
            *outer, name = path.split("__")
            of = found
            for key in outer:
                of = of[int(key) if key.isdigit() else key]
            if value is None:
                del of[name]
            else:
                of[name] = value
        return found

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"objective": "99"}, "objective is '99'; it must be a number"),
            ({"min_replies": 1.5}, "min_replies is 1.5; it must be a whole number"),
            ({"objective": None}, "has no objective"),
            ({"objektive": 99}, "unknown objektive; known: "),
            ({"storm__amplification": 1}, "storm.amplification is 1; it must be above 1"),
            ({"storm__amplification": 10**400}, "storm.amplification is 1000"),
            ({"silence__seconds": 10**5000}, "silence.seconds is a int that cannot be printed"),
            ({"silence__window": "4m"}, "it must be 5m or longer"),
            ({"silence__window": "ten"}, "'ten' is no duration; write one such as 90s"),
            ({"silence__window": 10}, "silence_window is 10; it must be text"),
            ({"silence__quantile": 1.0}, "silence.quantile is 1.0"),
            ({"many_providers__providers": 1}, "must be 2 or more"),
            ({"outage__share": 1.5}, "outage.share is 1.5"),
            ({"keep_firing_for": "5"}, "'5' is no duration"),
            ({"spans_job": "("}, "spans_job is '('; it must be a regular expression"),
            ({"services__labels": "region"}, "services.labels is 'region'; it must be a list"),
            ({"services__labels": ["region"]}, "services.labels has 'region'; it must be an"),
            (
                {"services__labels": ["gen_ai.request.model"]},
                "must be an attribute of the resource",
            ),
            ({"services__labels": [f"a.b{n}" for n in range(5)]}, "it may have at most 4"),
            ({"services__max_series": 0}, "services.max_series is 0; it must be 1 or more"),
            ({"burn_rates": []}, "it must be a list of at least one"),
            ({"burn_rates__0__factor": 200}, "the alert with factor 200 never"),
            ({"burn_rates__0__factor": 0}, "burn_rates.factor is 0; it must be above 0"),
            ({"burn_rates__0__severity": "loud"}, "it must be critical or warning"),
            ({"burn_rates__0__long": "5m"}, "the long window (5m) must be longer"),
            ({"burn_rates__0__for": None}, "burn_rates has no for"),
        ],
    )
    def test_invalid_config_is_refused(self, change, says):
        """The error names the key, the value and the allowed values."""
        with pytest.raises(UsageError, match=re.escape(says)):
            config.parse(self.change(**change), "config.yaml")

    def test_config_without_page_is_refused(self):
        """A config with tickets only is refused."""
        rows = [row for row in self.change()["burn_rates"] if row["severity"] == "warning"]
        with pytest.raises(UsageError, match="no row of burn_rates is critical"):
            config.parse(self.change(burn_rates=rows), "config.yaml")

    @pytest.mark.parametrize("text", ["[1, 2", "just words", "- a\n- b"])
    def test_file_without_config_is_refused(self, text, tmp_path):
        """Broken YAML, or YAML without a mapping, is one error."""
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UsageError, match=r"c\.yaml"):
            config.read(tmp_path / "c.yaml")


class TestOtherForms:
    def test_kubernetes_objects_hold_all_rules_and_dashboards(self):
        """The operator's object has each rule, and the ConfigMaps have each dashboard unchanged."""
        rule = yaml.safe_load((DASHBOARDS / "kubernetes/prometheus-rule.yaml").read_text())
        prometheus = [
            group
            for name in ("recording", "rollup", "alerts")
            for group in yaml.safe_load((DASHBOARDS / f"prometheus/{name}.yaml").read_text())[
                "groups"
            ]
        ]
        assert ("monitoring.coreos.com/v1", "PrometheusRule") == (rule["apiVersion"], rule["kind"])
        assert prometheus == rule["spec"]["groups"]

        (maps,) = [f.content for f in files() if f.name == "kubernetes/dashboards.yaml"]
        found = {}
        for item in yaml.safe_load(maps)["items"]:
            assert {"grafana_dashboard": "1"} == item["metadata"]["labels"]
            found.update(item["data"])
        assert {f"traced-retry-{n}": b for n, b in dashboards().items()} == {
            name: json.loads(text) for name, text in found.items()
        }

    def test_grafana_alerts_hold_each_alert(self, shipped):
        """Each alert but one has its query, labels and links under its own uid."""
        (group,) = yaml.safe_load((DASHBOARDS / "grafana-alerting/alerts.yaml").read_text())[
            "groups"
        ]
        wanted = [a for a in alerts.alerts(shipped) if a.alert != alerts.MANY]

        assert [a.expr for a in wanted] == [r["data"][0]["model"]["expr"] for r in group["rules"]]
        assert len(wanted) == len({r["uid"] for r in group["rules"]})
        assert len(wanted) == len({r["title"] for r in group["rules"]})
        for rule in group["rules"]:
            assert rule["condition"] in {d["refId"] for d in rule["data"]}
            assert {"summary", "description", "runbook_url", "dashboard_url"} == set(
                rule["annotations"]
            )
            assert "$value " not in json.dumps(rule)
            assert "range query" not in json.dumps(rule)
