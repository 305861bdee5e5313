# SPDX-License-Identifier: Apache-2.0
"""Reach a simulator from another process: the lines of Python that make a plugin connect to it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Final

from traced_retry.simulator.server import Simulator

_KEY: Final = 'api_key="x"'
_TEXT: Final = 'modalities=["text"]'

_entered: Final = ExitStack()
"""The redirections of this process. They last as long as the process."""

WITH_TLS: Final = ("google", "aws")
"""The providers whose plugin speaks only TLS, so that it must trust the simulator's certificate."""

_LINES: Final = {
    "openai": f"""\
from livekit.plugins import openai
model = openai.realtime.RealtimeModel({_KEY}, base_url="{{url}}", {_TEXT})""",
    "xai": f"""\
from livekit.plugins import xai
model = xai.realtime.RealtimeModel({_KEY}, base_url="{{url}}")""",
    "azure-openai": f"""\
from livekit.plugins import openai
model = openai.realtime.RealtimeModel.with_azure(
    azure_deployment="x", azure_endpoint="{{url}}", {_KEY}, {_TEXT}
)""",
    "gpt-live": f"""\
from livekit.plugins import openai
model = openai.realtime.GPTLiveModel({_KEY}, base_url="{{url}}")""",
    "azure-voicelive": f"""\
from livekit.plugins import azure
model = azure.realtime.RealtimeModel(endpoint="{{url}}", {_KEY}, {_TEXT})""",
    "google": f"""\
import ssl
from google.genai import types
from livekit.plugins import google
model = google.realtime.RealtimeModel(
    {_KEY}, modalities=[types.Modality.TEXT], http_options=types.HttpOptions(
        base_url="{{url}}",
        async_client_args={{{{"ssl": ssl.create_default_context(cafile="{{ca}}")}}}},
    )
)""",
    "ultravox": f"""\
from livekit.plugins import ultravox
model = ultravox.realtime.RealtimeModel({_KEY}, base_url="{{url}}", output_medium="text")""",
    "phonic": f"""\
from livekit.plugins import phonic
from traced_retry.simulator.reach import redirect
redirect("phonic", "{{url}}")
model = phonic.realtime.RealtimeModel({_KEY})""",
    "aws": """\
from livekit.plugins.aws.experimental import realtime
from traced_retry.simulator.reach import redirect
redirect("aws", "{url}", "{ca}")
model = realtime.RealtimeModel()""",
    "nvidia": """\
from livekit.plugins.nvidia.experimental import realtime
model = realtime.RealtimeModel(base_url="{host}")""",
}


def constructor(provider: str, server: Simulator, ca: Path | None = None) -> str:
    """Return the lines of Python that create a model of LiveKit's plugin for this server.

    Args:
        provider: one of :data:`traced_retry.simulator.PROVIDERS`.
        server: the simulator; it must be running.
        ca: the file of the certificate authority, if the provider is one of :data:`WITH_TLS`.
    """
    host = server.url.partition("//")[2]
    return _LINES[provider].format(url=server.url, host=host, ca=ca)


def redirect(provider: str, url: str, ca: str | None = None) -> None:
    """Connect a plugin that has no setting for its address to a simulator, in this process.

    Args:
        provider: ``"phonic"`` or ``"aws"``.
        url: the simulator's.
        ca: the path of the certificate authority that ``simulate`` wrote, for AWS.

    Raises:
        RuntimeError: if this version of the plugin cannot be redirected.
        KeyError: if the plugin of ``provider`` has a setting for its address.
    """
    if provider == "phonic":
        from traced_retry.simulator.phonic import redirected  # noqa: PLC0415

        _entered.enter_context(redirected(url))
    elif provider == "aws":
        from traced_retry.simulator.aws import redirected as redirected_aws  # noqa: PLC0415

        _entered.enter_context(redirected_aws(url, Path(ca or "").read_bytes()))
    else:
        raise KeyError(provider)
