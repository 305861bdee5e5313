# SPDX-License-Identifier: Apache-2.0
"""Check the adapter of each installed LiveKit plugin."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from traced_retry.core import supported
from traced_retry.core.supported import LIVEKIT, installed
from traced_retry.doctor.check import Check
from traced_retry.errors import install_command

_BASE_PLUGIN: Final = {"xai": "openai"}
"""Plugins with a session that derives from another's."""


def checks() -> Iterator[Check]:
    """Report the adapter of each installed plugin."""
    try:
        from traced_retry.livekit.registry import ADAPTERS  # noqa: PLC0415
    except ModuleNotFoundError as error:
        message = f"nothing is retried: {error.name} is not installed"
        yield Check("livekit", "fail", message, install_command("livekit"))
        return
    chosen: supported.Choice = "warn"
    try:
        chosen = supported.choice()
    except supported.SupportError as error:
        yield Check(supported.VARIABLE, "fail", str(error), "correct the variable, or unset it")
    yield _livekit(installed("livekit-agents") or "", chosen)
    known = sorted(
        {home.split(".")[2] for home in ADAPTERS if ".plugins." in home} | set(_BASE_PLUGIN)
    )
    for name in known:
        if there := installed(f"livekit-plugins-{name}"):
            yield _plugin(name, there, ADAPTERS, chosen)
    if there := installed("livekit-plugins-nvidia"):
        yield Check("plugin nvidia", "ok", f"{there}: has no generate_reply; nothing to retry")


def _livekit(there: str, chosen: supported.Choice) -> Check:
    said = f"livekit-agents {there}"
    if LIVEKIT.newer(there) and chosen != "allow":
        effect = "traced and not retried" if chosen == "observe" else "retried all the same"
        message = f"{said} is newer than {LIVEKIT.newest}, the newest tested; replies are {effect}"
        fix = f"look for a newer traced-retry, or set {supported.VARIABLE}=allow"
        return Check("livekit", "warn", message, fix)
    return Check("livekit", "ok", said)


def _plugin(name: str, there: str, adapters: dict[str, str], chosen: supported.Choice) -> Check:
    check, like = f"plugin {name}", f"livekit.plugins.{_BASE_PLUGIN.get(name, name)}."
    adapter = next(adapter for home, adapter in adapters.items() if home.startswith(like))
    tested = there in LIVEKIT
    names = [n for home, a in adapters.items() if a == adapter and (n := session_names(home))]
    module, _, class_name = adapter.partition(":")
    try:
        required = getattr(importlib.import_module(module), class_name).required_attributes
    except ModuleNotFoundError as error:
        said = f"{there}: its realtime part is not installed (no {error.name})"
        return Check(check, "ok", said)
    missing = [name for name in required if not any(name in found for found in names)]
    between = f"tested are {LIVEKIT.oldest} to {LIVEKIT.newest}"
    fix = f"install a version of livekit-plugins-{name} that was tested: {between}"
    if names and missing:
        gone = ", ".join(missing)
        return Check(check, "warn", f"{there}: observe-only, for {gone} is gone", fix)
    if not names and not tested:
        said = f"{there}: no RealtimeSession was found; it may be observe-only"
        return Check(check, "warn", said, fix)
    if not tested and chosen != "allow":
        return Check(check, "warn", f"{there}: {class_name} is active; {between}", fix)
    return Check(check, "ok", f"{there}: {class_name} is active")


def session_names(module: str) -> set[str]:
    """Return the methods and attributes of the RealtimeSession in a module's source.

    Read the source instead of importing it, because plugins take seconds and may need keys. The
    result is empty if the module has no such class.
    """
    depth = 3 if module.startswith("livekit.plugins.") else 2  # deeper, finding would import
    package = ".".join(module.split(".")[:depth])
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    for folder in folders:
        path = Path(folder, *module.removeprefix(package + ".").split(".")).with_suffix(".py")
        if path.is_file():
            tree = _parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name == "RealtimeSession":
                    return _names(node)
    return set()


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SystemError:
        # Python 3.11 loses count of its recursion if a garbage collection parses too (gh-106905).
        return ast.parse(source)


def _names(session: ast.ClassDef) -> set[str]:
    names = set()
    for node in ast.walk(session):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names
