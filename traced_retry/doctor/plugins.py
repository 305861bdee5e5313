# SPDX-License-Identifier: Apache-2.0
"""Check the adapter of each installed LiveKit plugin."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from traced_retry.doctor.check import Check

TESTED: Final = ((1, 7, 0), (1, 8, 9))
"""The first and the last version of LiveKit's plugins that the adapters were tested with."""
_BASE_PLUGIN: Final = {"xai": "openai"}
"""Plugins whose session derives from another's."""


def checks() -> Iterator[Check]:
    """Report the adapter of each installed plugin."""
    try:
        from traced_retry.livekit.registry import ADAPTERS  # noqa: PLC0415
    except ModuleNotFoundError as error:
        fix = "pip install 'traced-retry[livekit]'"
        yield Check("livekit", "fail", f"nothing is retried: there is no {error.name}", fix)
        return
    yield Check("livekit", "ok", f"livekit-agents {_version('livekit-agents')}")
    known = sorted(
        {home.split(".")[2] for home in ADAPTERS if ".plugins." in home} | set(_BASE_PLUGIN)
    )
    for name in known:
        if installed := _version(f"livekit-plugins-{name}"):
            yield _plugin(name, installed, ADAPTERS)
    if installed := _version("livekit-plugins-nvidia"):
        yield Check("plugin nvidia", "ok", f"{installed}: has no generate_reply; nothing to retry")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _plugin(name: str, installed: str, adapters: dict[str, str]) -> Check:
    check, like = f"plugin {name}", f"livekit.plugins.{_BASE_PLUGIN.get(name, name)}."
    adapter = next(adapter for home, adapter in adapters.items() if home.startswith(like))
    parts = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    tested = TESTED[0] <= parts <= TESTED[1]
    names = [n for home, a in adapters.items() if a == adapter and (n := session_names(home))]
    module, _, class_name = adapter.partition(":")
    try:
        required = getattr(importlib.import_module(module), class_name).required_attributes
    except ModuleNotFoundError as error:
        said = f"{installed}: its realtime part is not installed (no {error.name})"
        return Check(check, "ok", said)
    missing = [name for name in required if not any(name in there for there in names)]
    between = "tested are {}.{}.{} to {}.{}.{}".format(*TESTED[0], *TESTED[1])
    fix = f"install a version of livekit-plugins-{name} that was tested: {between}"
    if names and missing:
        gone = ", ".join(missing)
        return Check(check, "warn", f"{installed}: observe-only, for {gone} is gone", fix)
    if not names and not tested:
        said = f"{installed}: no RealtimeSession was found; it may be observe-only"
        return Check(check, "warn", said, fix)
    untested = "" if tested else f" (not a version it was tested with; {between})"
    return Check(check, "ok", f"{installed}: {class_name} is active{untested}")


def session_names(module: str) -> set[str]:
    """Return the methods and attributes of the RealtimeSession in a module's source.

    Read the source instead of importing it, because plugins take seconds and may need keys. The
    result is empty if the module has no such class.
    """
    depth = 3 if module.startswith("livekit.plugins.") else 2  # as deep as finding imports nothing
    package = ".".join(module.split(".")[:depth])
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    for folder in folders:
        path = Path(folder, *module.removeprefix(package + ".").split(".")).with_suffix(".py")
        if path.is_file():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name == "RealtimeSession":
                    return _names(node)
    return set()


def _names(session: ast.ClassDef) -> set[str]:
    names = set()
    for node in ast.walk(session):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names
