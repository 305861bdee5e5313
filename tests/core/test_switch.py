# SPDX-License-Identifier: Apache-2.0
"""The off switch: a function under ``@retry`` is then called as it is."""

from __future__ import annotations

import asyncio

import pytest
from support.scripted import ProviderError, Scripted

import traced_retry
from traced_retry import retry
from traced_retry.core import switch


@pytest.fixture(autouse=True)
def switch_on():
    """Leave the switch on for the next test."""
    yield
    switch.switch_on()


def turn_off(how, monkeypatch):
    """Switch off by the call or by the variable."""
    if how == "call":
        traced_retry.disable()
    else:
        monkeypatch.setenv("TRACED_RETRY_DISABLED", "True")
        switch.switch_on()


@pytest.mark.parametrize("how", ["call", "variable"])
@pytest.mark.parametrize("kind", ["coroutine", "future"])
async def test_function_is_called_once_and_not_traced(how, kind, recorder, monkeypatch):
    """The failure is raised as it is, with one call and no span."""
    script = Scripted(ProviderError("server_error"))
    ask = retry(provider="openai", **recorder.providers)(getattr(script, kind))
    turn_off(how, monkeypatch)

    with pytest.raises(ProviderError) as caught:
        await ask()

    assert 1 == script.calls
    assert not hasattr(caught.value, "__notes__")
    assert [] == recorder.spans()


@pytest.mark.parametrize("how", ["call", "variable"])
async def test_plugin_author_session_is_called_once(how, recorder, monkeypatch):
    """RetryingRealtimeSession returns the future of ``_do_generate_reply``."""
    script = Scripted(ProviderError("server_error"))

    class Session(traced_retry.RetryingRealtimeSession):
        def _do_generate_reply(self):
            return script.future()

    turn_off(how, monkeypatch)
    with pytest.raises(ProviderError):
        await Session().generate_reply()

    assert 1 == script.calls


async def test_reply_in_progress_ends_as_it_would():
    """The switch acts on the next reply."""
    script = Scripted(ProviderError("server_error"), "hello")
    reply = asyncio.ensure_future(retry(provider="openai")(script.coroutine)())
    await asyncio.sleep(0)
    traced_retry.disable()

    assert "hello" == await reply


async def test_switched_on_again():
    """``enable()`` calls this function."""
    script = Scripted(ProviderError("server_error"), "hello")
    traced_retry.disable()
    switch.switch_on()

    assert "hello" == await retry(provider="openai")(script.coroutine)()


@pytest.mark.parametrize(("value", "off"), [("", False), ("false", False), (" TRUE ", True)])
def test_values_of_the_variable(value, off, monkeypatch):
    """True and false are known, in any case."""
    monkeypatch.setenv("TRACED_RETRY_DISABLED", value)

    assert off is switch.check()


def test_other_value_is_an_error(monkeypatch):
    """The message names the variable, its value and the expected values."""
    monkeypatch.setenv("TRACED_RETRY_DISABLED", "yes")

    with pytest.raises(traced_retry.UsageError, match="DISABLED is 'yes': expected true or false"):
        switch.check()
