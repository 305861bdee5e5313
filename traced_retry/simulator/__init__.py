# SPDX-License-Identifier: Apache-2.0
"""Local servers that fail on a script, for testing without a provider."""

from traced_retry.simulator.openai import OpenAISimulator as OpenAISimulator
from traced_retry.simulator.script import FAULTS as FAULTS
from traced_retry.simulator.script import Fault as Fault
from traced_retry.simulator.script import Script as Script
from traced_retry.simulator.script import ScriptError as ScriptError
from traced_retry.simulator.script import describe_faults as describe_faults
from traced_retry.simulator.server import Request as Request
from traced_retry.simulator.server import Simulator as Simulator

PROVIDERS = {"openai": OpenAISimulator}
"""The simulators by the name of their provider."""
