# SPDX-License-Identifier: Apache-2.0
"""Local servers that fail on a script, for testing without a provider."""

from __future__ import annotations

import importlib
from typing import Final

from traced_retry.simulator.openai import OpenAISimulator as OpenAISimulator
from traced_retry.simulator.script import FAULTS as FAULTS
from traced_retry.simulator.script import Fault as Fault
from traced_retry.simulator.script import Script as Script
from traced_retry.simulator.script import ScriptError as ScriptError
from traced_retry.simulator.script import describe_faults as describe_faults
from traced_retry.simulator.server import Request as Request
from traced_retry.simulator.server import Simulator as Simulator

PROVIDERS: Final = {
    "openai": "openai:OpenAISimulator",
    "xai": "openai_compatible:XAISimulator",
    "azure-openai": "openai_compatible:AzureOpenAISimulator",
    "gpt-live": "gpt_live:GPTLiveSimulator",
    "azure-voicelive": "azure:VoiceLiveSimulator",
    "google": "google:GoogleSimulator",
    "ultravox": "ultravox:UltravoxSimulator",
    "phonic": "phonic:PhonicSimulator",
    "aws": "aws:AWSSimulator",
    "nvidia": "nvidia:PersonaPlexSimulator",
}
"""The module and class of each provider's simulator. OpenAI's also serves LiveKit inference."""


def simulator(provider: str) -> type[Simulator]:
    """Return the simulator class of ``provider``, one of :data:`PROVIDERS`.

    Raises:
        KeyError: if ``provider`` is not one of them.
        ModuleNotFoundError: if the simulator needs a package that is not installed
            (``traced-retry[simulator]``).
    """
    module, _, name = PROVIDERS[provider].partition(":")
    found: type[Simulator] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found
