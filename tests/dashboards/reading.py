# SPDX-License-Identifier: Apache-2.0
"""Reads what ``dashboards/`` ships."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import yaml
from backends.servers import command

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "dashboards"
RULES = sorted((DASHBOARDS / "prometheus").glob("*.yaml"))


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def faster(text, times):
    """Rules or a query with each window, wait and interval that much shorter.

    Names and thresholds stay. What was counted per minute is counted per 60 s / ``times``.
    """

    def shorter(match):
        return f"{match[1]}{int(match[2]) * _UNITS[match[3]] * 1000 // times}ms"

    text = text.replace("[59s999ms:15s]", f"[{59999 // times}ms:{15000 // times}ms]")
    text = text.replace("[9m59s999ms]", f"[{599999 // times}ms]")
    text = re.sub(r"(\[|offset |for: |interval: )(\d+)([smhd])\b", shorter, text)
    for number in (15, 300):
        text = re.sub(rf"(?<![\w.]){number} \* (?=sum)", f"{number / times:g} * ", text)
    return text.replace("/ 300", f"/ {300 / times:g}")


def rules():
    """Every rule of every file in dashboards/prometheus."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def dashboards():
    """{file name: dashboard}."""
    return {
        path.name: json.loads(path.read_text())
        for path in sorted((DASHBOARDS / "grafana").glob("*.json"))
    }


def panels(dashboard):
    """Every panel that shows something, those in collapsed rows too."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", [])
        else:
            yield panel


GROUPS = [
    "traced_retry_recording",
    "traced_retry_rollup",
    "traced_retry_rollup_10m",
    "traced_retry_services",
    "traced_retry_services_10m",
    "traced_retry_ratios",
    "traced_retry_alerts",
]
"""Each reads what those before it record. promtool would take them in any order."""
ENGINES = {
    "promtool": ["promtool", "test", "rules"],
    "promtool3": ["promtool3", "test", "rules"],
    "vmalert-tool": ["vmalert-tool", "unittest", "--disableAlertgroupLabel", "--files"],
}
"""The commands that test rules for Prometheus 2, Prometheus 3 and VictoriaMetrics."""


def needed(paths):
    """Return the rules of the files, without records that no alert reads.

    An evaluation of all rules takes twice as long. The tests of alerts evaluate all of them.
    """
    loaded = [yaml.safe_load(Path(path).read_text()) for path in paths]
    groups = [group for file in loaded for group in file["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    read, unread = "", "\n".join(r["expr"] for r in rules if "alert" in r)
    while unread:
        read += unread
        names = set(re.findall(r"[\w:]+", unread))
        unread = "\n".join(
            rule["expr"]
            for rule in rules
            if rule.get("record") in names and rule["expr"] not in read
        )
    names = set(re.findall(r"[\w:]+", read))
    for group in groups:
        group["rules"] = [r for r in group["rules"] if "alert" in r or r["record"] in names]
    return {"groups": groups}


def run_rule_test(folder, test, engine="promtool"):
    """Run one test of rules with an engine, and return the finished process."""
    if engine == "vmalert-tool":
        cases = [dict(case) for case in test["tests"]]
        for case in cases:
            case["metricsql_expr_test"] = case.pop("promql_expr_test")
        test = {**test, "tests": cases}
    path = folder / "test.yaml"
    path.write_text(json.dumps(test))
    program, *arguments = ENGINES[engine]
    return subprocess.run(
        [command(program), *arguments, str(path)], capture_output=True, text=True, check=False
    )
