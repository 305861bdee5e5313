# SPDX-License-Identifier: Apache-2.0
"""Azure VoiceLive: the beta of OpenAI's protocol, with another plugin.

Each request carries an id that its response echoes, and the plugin takes more care of it than
OpenAI's does. So there is less to do here than in :mod:`traced_retry.livekit.openai`.

Facts (livekit-plugins-azure 1.8.9, ``livekit/plugins/azure/realtime/realtime_model.py``):

* Cancelling the plugin's future, setting an exception on it and the plugin's own time-out (10 s,
  the wait for a connection included) have the same effect: the plugin sends no event, discards the
  id, and cancels a late response by its id without surfacing it. A request still queued is never
  sent.
* A request that a lost connection left unanswered is sent again on the next one, with its id, and
  the same future resolves. The adapter only waits: the caller hears one reply.
* The plugin resolves or fails each future and never cancels one. No reply is superseded.
* Error events that answer a request are never fatal, not even for lack of quota.
* The raw events are mappings with the names of OpenAI's fields, and the beta's names of events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from azure.ai.voicelive.models import ClientEventResponseCancel

from traced_retry import semconv
from traced_retry.core.failure import Failure, failure
from traced_retry.core.sanitize import host_and_port
from traced_retry.core.telemetry import Target
from traced_retry.livekit.openai import OpenAIAdapter
from traced_retry.livekit.openai_request import OpenAIRequest
from traced_retry.livekit.request import Call

PROVIDER: Final = "azure_voicelive"
"""The semantic conventions (0.66b2) name Azure OpenAI and Azure AI Inference, not VoiceLive."""

_NAMES: Final = {
    "response.text.delta": "response.output_text.delta",
    "response.audio.delta": "response.output_audio.delta",
    "response.audio_transcript.delta": "response.output_audio_transcript.delta",
}
"""Beta names of events with output, and their present names."""


class VoiceLiveAdapter(OpenAIAdapter):
    """The state of the replies of one session, read from the server's events."""

    required_attributes: ClassVar[tuple[str, ...]] = ("_response_created_futures", "_send")
    relied_methods: ClassVar[tuple[str, ...]] = ("_send",)
    actions: ClassVar[tuple[semconv.Action, ...]] = ("send",)
    turn_actions: ClassVar[tuple[semconv.Action, ...]] = ("listen",)
    recovers_turns: ClassVar[bool] = False
    raw_event: ClassVar[str] = "azure_server_event_received"

    def target(self) -> Target:
        """Return the provider and the server, which is in the model's private options."""
        model = self.session.realtime_model
        server = host_and_port(getattr(getattr(model, "_opts", None), "endpoint", None))
        return Target(PROVIDER, model.model, *server)

    def request(self, call: Call) -> VoiceLiveRequest:
        """Create the request for one reply."""
        return VoiceLiveRequest(self, call)

    def stop(self, response_id: str) -> None:
        """As the plugin cancels a response that came too late."""
        self.session._send(  # type: ignore[attr-defined]
            ClientEventResponseCancel(response_id=response_id)
        )

    def discard(self, ids: set[str]) -> None:
        """Nothing: the plugin discards the id of a future that ended, over a reconnect as well."""

    def _on_reconnected(self, _: object) -> None:
        # An error event came before, and what was sent again may have begun to be answered.
        self._on_connected()

    def _on_server_event(self, kind: str, event: Mapping[str, Any]) -> None:
        super()._on_server_event(_NAMES.get(kind, kind), event)


class VoiceLiveRequest(OpenAIRequest):
    """One reply's request to a VoiceLive server."""

    def explain(self, error: BaseException) -> Failure:
        """Classify an error. Without a code, only its text has the reason.

        A connection that was lost and is up again is not what ended it: the plugin sent the
        request again, and there it met silence.
        """
        why = super().explain(error)
        if why.code is not None or why.kind not in ("timeout", "connection_lost"):
            return why
        if "closed" in str(error):
            return failure(error, "session_closed")
        return failure(error, "timeout" if self._adapter.connected else "connection_lost")
