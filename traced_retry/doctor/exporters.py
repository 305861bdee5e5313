# SPDX-License-Identifier: Apache-2.0
"""Check a folder that ``traced-retry exporters write`` filled and you edited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from traced_retry import shipped_files
from traced_retry.doctor.check import Check
from traced_retry.errors import UsageError


class CheckError(UsageError):
    """A file that cannot be checked. The message names it and the remedy."""


def run_checks(path: Path) -> Iterator[Check]:
    """Check that alerts reach a person, and that Prometheus would find its rules.

    Args:
        path: the folder, or Alertmanager's file alone.

    Raises:
        CheckError: if Alertmanager's file cannot be read.
    """
    if path.is_dir():
        yield _rules(path / "dashboards" / "prometheus")
        path = path / "alertmanager" / "alertmanager.yaml"
    yield from _receivers(path)


def _rules(folder: Path) -> Check:
    found = sorted(folder.glob("*.yaml"))
    if found:
        return Check(str(folder), "ok", f"{len(found)} files with rules")
    fix = f"traced-retry dashboards write {folder.parent}"
    return Check(str(folder), "fail", "there are no rules, so no alert can fire", fix)


def _receivers(path: Path) -> Iterator[Check]:
    """Check each receiver that a route names. Alertmanager ignores the others."""
    config = _read(path)
    examples = _example_urls()
    routed = dict.fromkeys(_routed(config.get("route")))
    for receiver in config.get("receivers") or []:
        if not isinstance(receiver, dict) or (name := receiver.get("name")) not in routed:
            continue
        urls = [url for url in _urls(receiver) if url in examples]
        if urls:
            yield Check(
                str(path),
                "fail",
                f"receiver {name} is still the example: it sends to {', '.join(urls)}, where no "
                "person reads it",
                "replace it, for example with one of `traced-retry exporters show "
                "alertmanager/receivers/pagerduty.yaml`, slack.yaml or opsgenie.yaml",
            )
        elif len(receiver) == 1:
            fix = f"add a service to it, or remove the routes to {name}"
            yield Check(str(path), "fail", f"receiver {name} notifies no service", fix)
        else:
            yield Check(str(path), "ok", f"receiver {name} is your own")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckError(
            f"{path} cannot be read as YAML ({type(error).__name__}): name the folder that "
            "`traced-retry exporters write` filled, or your alertmanager.yaml"
        ) from None
    if not isinstance(found, dict) or not found.get("route"):
        raise CheckError(f"{path} has no route: name the file that Alertmanager reads")
    return found


def _routed(route: Any) -> Iterator[str]:
    """Yield the receivers that a route and the routes below it name."""
    if isinstance(route, dict):
        yield str(route.get("receiver"))
        for each in route.get("routes") or []:
            yield from _routed(each)


def _urls(value: Any) -> Iterator[str]:
    """Yield every ``url`` in a part of the configuration."""
    if isinstance(value, list):
        for each in value:
            yield from _urls(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key == "url":
                yield str(each)
            else:
                yield from _urls(each)


def _example_urls() -> set[str]:
    """Return the URLs of all webhooks in the shipped files."""
    return {
        url
        for file in shipped_files.exporters()
        if file.name.startswith("alertmanager/")
        for url in _urls(yaml.safe_load(file.content))
    }
