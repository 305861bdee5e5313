# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of ``@retry``, and misspelt variables."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from support.scripted import ProviderError, Scripted

from traced_retry import PolicyError, RetryingRealtimeSession, RetryPolicy, retry
from traced_retry.core.telemetry import Telemetry
from traced_retry.core.variables import NAMES, misspelt

MISSPELT = {
    "TRACED_RETRY_DEADLIN": "TRACED_RETRY_DEADLINE",
    "traced_retry_deadline": "TRACED_RETRY_DEADLINE",
    "TRACED_RETRY_BUDGTE": "TRACED_RETRY_BUDGET",
    "TRACED_RETRY_MAX_RETRIES": "LIVEKIT_REALTIME_MAX_RETRIES",
    "LIVEKIT_REALTIME_RETRY_MAX_RETRIES": "LIVEKIT_REALTIME_MAX_RETRIES",
    "LIVEKIT_REALTIME_BUDG": "TRACED_RETRY_BUDGET",
    "LIVEKIT_REALTIME_BASE_DELAY": "LIVEKIT_REALTIME_RETRY_BASE_DELAY",
    "LIVEKIT_REALTIME_RETRY_MAXDELAY": "LIVEKIT_REALTIME_RETRY_MAX_DELAY",
    "TRACED_RETRY_TIMEOUT": "TRACED_RETRY_ATTEMPT_TIMEOUT",
    "TRACED_RETRY_RATE_LIMIT": "TRACED_RETRY_RETRY_RATE_LIMITS",
    "TRACED_RETRY_SILENCE": "TRACED_RETRY_ON_SILENCE",
    "TRACED_RETRY_UNTESTED": "TRACED_RETRY_UNTESTED_LIVEKIT",
}
OTHERS = (*NAMES, "TRACED_RETRY_BACKENDS", "LIVEKIT_REALTIME_MODEL", "LIVEKIT_URL", "OTEL_DEADLINE")


class TestMisspelt:
    @pytest.mark.parametrize("name", MISSPELT)
    def test_right_name_is_suggested(self, name):
        """A name that only looks like ours has no effect, and its user believes that it has."""
        assert [(name, MISSPELT[name])] == list(misspelt({name: "x"}))

    def test_other_names_are_left_alone(self):
        """Our own names, those of other programs, and those of our tests are not reported."""
        assert [] == list(misspelt(dict.fromkeys(OTHERS, "x")))

    def test_warning_is_logged_once(self, monkeypatch, caplog):
        """The first use of the package says it, at WARN, and later ones do not."""
        monkeypatch.setenv("TRACED_RETRY_DEADLIN", "5")
        for _ in range(2):
            retry(provider="openai")
        (record,) = caplog.records

        assert logging.WARNING == record.levelno
        assert "TRACED_RETRY_DEADLIN is not read; did you mean TRACED_RETRY_DEADLINE?" == (
            record.getMessage()
        )


@pytest.mark.parametrize("policy", [{"max_retries": 1}, "none", 3, RetryPolicy, False])
class TestPolicyArgument:
    def test_retry_refuses_what_is_no_policy(self, policy):
        """The decorator raises before a reply is asked, and the message shows what is right."""
        with pytest.raises(TypeError, match=r"policy is a \w+; it must be a RetryPolicy, for ex"):
            retry(provider="openai", policy=policy)

    async def test_session_refuses_what_is_no_policy(self, policy):
        """The base class for plugins raises at the first reply, without a request."""
        script = Scripted("hello")

        class Session(RetryingRealtimeSession):
            retry_policy = policy

            def _do_generate_reply(self):
                return script.future()

        with pytest.raises(TypeError, match="it must be a RetryPolicy"):
            Session().generate_reply()
        assert 0 == script.calls


def test_wrong_policy_is_also_a_value_error():
    """Callers that catch the errors of wrong settings catch this one too."""
    with pytest.raises(ValueError, match="policy is a dict"):
        retry(provider="openai", policy={})
    assert not issubclass(PolicyError, TypeError)


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        (SimpleNamespace(provider="My.Provider", model="m-1"), "my.provider", "m-1"),
        (SimpleNamespace(), "session", None),
        (None, "session", None),
    ],
)
async def test_session_is_named_after_its_model(model, provider, name, recorder):
    """Without a provider the class names the telemetry."""

    class Session(RetryingRealtimeSession):
        retry_telemetry = Telemetry(**recorder.providers)
        realtime_model = model

        def _do_generate_reply(self):
            return Scripted("hello").future()

    assert "hello" == await Session().generate_reply()
    (reply,) = recorder.replies
    assert (provider, name) == (reply["gen_ai.provider.name"], reply.get("gen_ai.request.model"))
    assert 0 == min(recorder.points("traced_retry.attempts").values())


async def test_session_without_telemetry_uses_global_providers():
    """A plugin's author sets nothing, and replies are retried."""
    script = Scripted(ProviderError("server_error"), "hello")

    class Session(RetryingRealtimeSession):
        def _do_generate_reply(self):
            return script.future()

    session = Session()
    assert "hello" == await session.generate_reply()
    assert 2 == script.calls
    assert RetryPolicy() == session.retry_policy
