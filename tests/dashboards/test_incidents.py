# SPDX-License-Identifier: Apache-2.0
"""The minute of the first page and the first ticket of each incident, by promtool.

``tools/dashboards/incidents.yaml`` has the incidents and their minutes. Each incident has an
environment of its own, so that one run of promtool plays all of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from dashboards.reading import GROUPS, ROOT, RULES, needed, run_rule_test

from traced_retry.monitoring import config
from traced_retry.monitoring.files import files
from traced_retry.semconv import OUTCOME_OF

INCIDENTS = yaml.safe_load((ROOT / "tools/dashboards/incidents.yaml").read_text("utf-8"))
BEFORE = 24 * 60
"""Minutes without a lost reply before an incident."""
GOES_ON = 4 * 60


def values(before, during, minutes, after):
    """Return the samples of a counter: rates a minute before, during and after the incident."""
    first = before * BEFORE
    last = first + during * minutes
    return (
        f"0+{before}x{BEFORE} {first + during:.4f}+{during}x{minutes - 1} "
        f"{last + after:.4f}+{after}x{GOES_ON - minutes}"
    )


def replies(environment, outcome, samples, stop=None, **labels):
    """Return the series of replies counted from spans."""
    named = {
        "span_name": "generate_reply",
        "gen_ai_provider_name": "openai",
        "deployment_environment_name": environment,
        "traced_retry_outcome": outcome,
        **({"traced_retry_stop_reason": stop} if stop else {}),
        **labels,
    }
    inner = ", ".join(f'{name}="{value}"' for name, value in named.items())
    return {"series": f"traces_span_metrics_calls_total{{{inner}}}", "values": samples}


def series(number, incident):
    """Yield the series of one incident."""
    minutes = incident.get("minutes", GOES_ON)
    stop, labels = incident.get("stop", "deadline"), incident.get("labels", {})
    healthy = dict.fromkeys(labels, "b")
    before = incident["before"]
    yield replies(number, "succeeded", values(before, incident["good"], minutes, before), **healthy)
    lost = values(0, incident["lost"], minutes, 0)
    yield replies(number, OUTCOME_OF[stop], lost, stop, **labels)
    if beside := incident.get("beside"):
        yield replies(f"{number}-beside", "succeeded", values(beside, beside, minutes, beside))


def first_notices(folder, rules, incidents=INCIDENTS, engine="promtool"):
    """Return the minute of the first firing alert: {(environment, severity): minute}."""
    first = (
        'min(min_over_time(timestamp(ALERTS{{alertstate="firing", '
        'deployment_environment_name="{}", severity="{}"}})'
        f"[{GOES_ON}m:1m])) / 60 - {BEFORE}"
    )
    environments = [str(n) for n in range(len(incidents))]
    environments += [f"{n}-beside" for n in environments if "beside" in incidents[int(n)]]
    (folder / "needed.yaml").write_text(json.dumps(needed(rules)))
    test = {
        "rule_files": [str(folder / "needed.yaml")],
        "evaluation_interval": "1m",
        "group_eval_order": GROUPS,
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    each for n, incident in enumerate(incidents) for each in series(n, incident)
                ],
                "promql_expr_test": [
                    # A wrong expectation, because promtool shows the result only then.
                    {
                        "expr": first.format(environment, severity),
                        "eval_time": f"{BEFORE + GOES_ON}m",
                        "exp_samples": [{"labels": "{}", "value": -1}],
                    }
                    for environment in environments
                    for severity in ("critical", "warning")
                ],
            }
        ],
    }
    done = run_rule_test(folder, test, engine)
    shown = re.findall(
        r'environment_name=\\?"([\w-]+)\\?", severity=\\?"(\w+).*?got:(.*?)(?=expr:|\Z)',
        done.stdout + done.stderr,
        re.DOTALL,
    )
    assert 2 * len(environments) == len(shown), done.stdout + done.stderr
    return {
        (environment, severity): round(float(found[1]))
        for environment, severity, got in shown
        if (found := re.search(r"\{\} (\S+?)[\",\s]", got))
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The first notices with the shipped thresholds."""
    return first_notices(tmp_path_factory.mktemp("incidents"), RULES)


@pytest.mark.parametrize("number", range(len(INCIDENTS)), ids=lambda n: INCIDENTS[n]["incident"])
def test_first_notice_comes_at_the_documented_minute(measured, number):
    """Page and ticket fire at the minute in the table, and at no other time."""
    incident = INCIDENTS[number]

    assert (incident["page"], incident["ticket"]) == (
        measured.get((str(number), "critical")),
        measured.get((str(number), "warning")),
    )


def test_healthy_environment_beside_an_incident_has_no_notice(measured):
    """Only the environment that loses replies is notified."""
    assert not [environment for environment, _ in measured if "beside" in environment]


class TestPreset:
    def test_shipped_config_is_preset_99(self, shipped):
        """The default thresholds and the preset of that objective are the same."""
        assert shipped == shipped.replace(**config.preset("99"))

    def test_preset_99_5_pages_for_a_brown_out(self, tmp_path):
        """A loss of 10 % pages earlier than with 99 %, and a loss of 5 % opens a ticket earlier."""
        for file in files(preset="99.5"):
            if file.name.startswith("prometheus/"):
                (tmp_path / Path(file.name).name).write_text(file.content)
        ten, five = (
            next(each for each in INCIDENTS if each["incident"] == f"{share} % brown-out")
            for share in (10, 5)
        )
        found = first_notices(tmp_path, sorted(tmp_path.glob("*.yaml")), [ten, five])

        assert found["0", "critical"] < ten["page"]
        assert found["1", "warning"] < five["ticket"]
