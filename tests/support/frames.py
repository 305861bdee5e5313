# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server that answers its first requests with given events, word for word."""

from __future__ import annotations

from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator._openai_protocol import describe
from traced_retry.simulator.openai import _ScriptedConnection

OURS = "<the event id of the request>"
"""Stands for the id of the request that an event answers."""


class FramesServer(OpenAISimulator):
    """Answers request N with ``answers[N - 1]``, and later requests by the script.

    An answer is a list of events. :data:`OURS` in them becomes the event id of the request, and
    ``BEGIN`` begins a response to it, whose id replaces ``"<response>"`` in later events.
    """

    BEGIN = "begin"

    def __init__(self, answers, script="ok"):
        super().__init__(script)
        self.answers = list(answers)

    def connect(self, ws, http):
        """A connection just accepted."""
        return _FramesConnection(self, ws, "gpt-realtime")


class _FramesConnection(_ScriptedConnection):
    async def answer(self, request, fault):
        if not self.server.answers:
            await super().answer(request, fault)
            return
        response = None
        for event in self.server.answers.pop(0):
            if event == FramesServer.BEGIN:
                response = await self.begin(request.metadata)
                continue
            known = {OURS: request.event_id, "<metadata>": request.metadata}
            if response is not None:
                known["<response>"] = response.id
                known["<done>"] = describe(response, "completed")
            filled = _fill(event, known)
            if filled.get("type") == "response.done":
                self.active = None
                self.idle.set()
            await self.send(filled.pop("type"), **filled)


def _fill(value, known):
    if isinstance(value, dict):
        return {key: _fill(of, known) for key, of in value.items()}
    if isinstance(value, list):
        return [_fill(of, known) for of in value]
    return known.get(value, value) if isinstance(value, str) else value
