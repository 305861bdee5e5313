# SPDX-License-Identifier: Apache-2.0
"""Each realtime model of LiveKit and of its installed plugins has a row in the docs."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

import livekit.agents
import livekit.plugins
import pytest
from livekit.agents import llm

PAGE = Path(__file__).parents[2] / "docs/providers.md"
BASES = tuple(getattr(llm, name) for name in ("RealtimeModel", "DuplexModel") if hasattr(llm, name))
MISSING_ONLY_HERE = ("livekit.plugins.thunderphone",)
"""Plugins that the machine of the tests may lack."""
if sys.version_info < (3, 12):
    MISSING_ONLY_HERE += ("livekit.plugins.aws",)  # It needs Python 3.12.


def modules():
    """The modules of LiveKit whose source names one of the base classes."""
    folders = [("livekit.agents", Path(livekit.agents.__file__).parent)]
    folders += [("livekit.plugins", Path(path)) for path in livekit.plugins.__path__]
    for package, folder in folders:
        for file in folder.rglob("*.py"):
            if re.search("RealtimeModel|DuplexModel", file.read_text(encoding="utf-8")):
                parts = file.relative_to(folder).with_suffix("").parts
                yield ".".join([package, *(part for part in parts if part != "__init__")])


def models():
    """Every model that can be created, except the engines of others, which are private."""
    found = {
        value
        for name in modules()
        for value in vars(importlib.import_module(name)).values()
        if inspect.isclass(value) and issubclass(value, BASES)
    }
    return {
        model
        for model in found
        if not inspect.isabstract(model) and "._" not in model.__module__ and model not in BASES
    }


def rows():
    """The names in the first column of the table of models."""
    section = PAGE.read_text(encoding="utf-8").partition("## Models\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(livekit\.[\w.]+)` \|", section, re.MULTILINE)


def resolved(name):
    """The class of that name, or None if its package is not installed."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError:
        return None


@pytest.fixture(scope="module")
def documented():
    """Return the classes in the table."""
    return {resolved(name) for name in rows()}


def test_each_model_has_a_row(documented):
    """A new plugin, or a new model of a known one, needs a decision about safe actions."""
    assert set() == models() - documented


def test_each_row_is_a_model(documented):
    """A row whose model was renamed or removed is wrong."""
    unknown = [name for name in rows() if resolved(name) is None]

    assert not [name for name in unknown if not name.startswith(MISSING_ONLY_HERE)]
    assert documented - {None} <= models()


def test_models_are_found():
    """The search sees plugins, the framework and duplex models."""
    names = {model.__name__ for model in models()}
    packages = {model.__module__.split(".")[2] for model in models()}

    assert {"RealtimeModel", "GPTLiveModel", "DuplexModel", "DuplexRealtimeAdapter"} <= names
    assert {"openai", "xai", "google", "ultravox", "phonic", "nvidia", "inference"} <= packages
