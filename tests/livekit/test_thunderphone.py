# SPDX-License-Identifier: Apache-2.0
"""ThunderPhone, and other sessions that derive from a known one and change it."""

from __future__ import annotations

import logging

import pytest
from livekit.plugins import openai
from support.conversation import ended
from support.providers import OPENAI

from traced_retry.livekit import hook
from traced_retry.livekit.adapter import Adapter
from traced_retry.livekit.openai import OpenAIAdapter
from traced_retry.livekit.registry import adapter_class


def thunderphone_model(*, api_key, **kwargs):
    """Make ThunderPhone's model, for text only."""
    thunderphone = pytest.importorskip(
        "livekit.plugins.thunderphone.realtime", reason="ThunderPhone's plugin is not installed"
    )
    kwargs.pop("conn_options")  # By default the plugin does not reconnect.
    return thunderphone.RealtimeModel(api_key="sk_live_SECRET", modalities=["text"], **kwargs)


class LoggingSession(openai.realtime.RealtimeSession):
    """A user's subclass that changes the events that are sent."""

    def send_event(self, event):
        super().send_event(event)


class LoggingModel(openai.realtime.RealtimeModel):
    def session(self, **kwargs):
        return LoggingSession(self, **kwargs)


def adapter(talk):
    """Return the adapter of a conversation."""
    return getattr(talk.realtime, hook._HOOK)._adapter


class TestThunderPhone:
    """Its session assigns a response without an id to the oldest request, so it is observed."""

    async def test_reply_is_traced_under_its_own_name(self, start_conversation, recorder):
        talk = await start_conversation("ok", model=thunderphone_model)

        assert None is await talk.reply()
        await talk.settle()

        assert ["reply 1"] == talk.heard
        assert [("succeeded", None)] == ended(recorder)
        assert "thunderphone" == recorder.replies[0]["gen_ai.provider.name"]
        assert Adapter is type(adapter(talk))

    @pytest.mark.parametrize("script", ["unlabelled", "late:12", "error:server_error,ok"])
    async def test_request_is_sent_once(self, script, start_conversation, recorder):
        """With OpenAI's adapter ``late:12`` was heard twice. The plugin alone: heard once."""
        talk = await start_conversation(script, model=thunderphone_model)
        await talk.reply()
        await talk.settle(60)

        assert 1 == len(talk.server.requests)
        assert 1 >= len(talk.heard)
        assert 0 == recorder.open_spans


class TestSubclass:
    async def test_subclass_that_overrides_a_relied_method_is_observed(
        self, start_conversation, recorder, caplog
    ):
        """Its author may have changed how requests and responses belong together."""
        caplog.set_level(logging.WARNING, "traced_retry")

        def model(**kwargs):
            return LoggingModel(modalities=["text"], **kwargs)

        talk = await start_conversation("error:server_error,ok", model=model)
        await talk.reply()
        await talk.settle()

        assert 1 == len(talk.server.requests)
        assert [("exhausted", "unsafe_to_resend")] == ended(recorder)
        (record,) = [r for r in caplog.records if r.name == "traced_retry"][:1]
        assert "LoggingSession overrides send_event" in record.getMessage()

    @pytest.mark.parametrize(
        "method",
        [
            "send_event",
            "_run_ws",
            "_handle_response_created",
            "_handle_response_done",
            "_handle_error",
        ],
    )
    def test_each_relied_method_counts(self, method):
        """The adapter needs each of these methods as the plugin has it."""
        changed = type("Changed", (openai.realtime.RealtimeSession,), {method: lambda self: None})

        assert Adapter is adapter_class(changed.__new__(changed))

    def test_other_methods_may_be_overridden(self):
        """An override of a method that the adapter does not need changes nothing."""
        changed = type("Changed", (openai.realtime.RealtimeSession,), {"aclose": lambda self: None})

        assert OpenAIAdapter is adapter_class(changed.__new__(changed))

    def test_relied_methods_exist(self):
        """A plugin that renames one of them would hide an override."""
        for name in OpenAIAdapter.relied_methods:
            assert callable(getattr(openai.realtime.RealtimeSession, name)), name

    async def test_tested_subclasses_keep_their_adapter(self, start_conversation):
        """OpenAI's own class and the tested subclasses are retried."""
        talk = await start_conversation("ok")
        assert OPENAI.adapter is type(adapter(talk))
