# SPDX-License-Identifier: Apache-2.0
"""The Gemini Live simulator, driven by google-genai's own client."""

from __future__ import annotations

import contextlib
import ssl

import aiohttp
import pytest
from google import genai
from google.genai import errors, types

from traced_retry.simulator import ScriptError
from traced_retry.simulator.google import GoogleSimulator

DOT = types.Content(role="user", parts=[types.Part(text=".")])


@contextlib.asynccontextmanager
async def client_of(server, handle=None):
    """A connected session of google-genai."""
    client = genai.Client(api_key="k", http_options=types.HttpOptions(**server.http_options))
    config = types.LiveConnectConfig(
        response_modalities=[types.Modality.TEXT],
        session_resumption=types.SessionResumptionConfig(handle=handle),
    )
    async with client.aio.live.connect(model="m", config=config) as session:
        yield session
    await client.aio.aclose()


async def turn(session):
    """What the server says until its turn ends: the text, and the last handle given before."""
    text, handle = "", None
    async for message in session.receive():
        if message.session_resumption_update:
            handle = message.session_resumption_update.new_handle
        text += message.text or ""
    return text, handle


async def ask(session):
    """Complete a turn, and hear the answer."""
    await session.send_client_content(turns=[DOT], turn_complete=True)
    return await turn(session)


class TestAnswers:
    @pytest.mark.parametrize(
        ("script", "said"),
        [("ok", "reply 1"), ("late:3", "reply 1"), ("slow:3", "reply 1"), ("incomplete", "")],
    )
    async def test_a_turn(self, script, said):
        """Request N is answered "reply N", or with nothing."""
        async with GoogleSimulator(script) as server, client_of(server) as session:
            text, _ = await ask(session)

        assert said == text
        assert ([said] if said else []) == server.completed
        assert [(1, None)] == [(r.number, r.instructions) for r in server.requests]

    @pytest.mark.parametrize(
        ("script", "code"),
        [
            ("error:1008", 1008),
            ("error:1011", 1011),
            ("error:503", 503),
            ("error:strange", 500),
            ("rate_limit", 429),
            ("quota", 1011),
            ("drop_before", 1011),
            ("unauthorized,unauthorized", None),
        ],
    )
    async def test_a_fault(self, script, code):
        """As Gemini tells it: in the close code, in a message, or at the door."""
        expected = errors.APIError if code else Exception
        async with GoogleSimulator(script) as server:
            with pytest.raises(expected) as caught:
                async with client_of(server) as session:
                    await ask(session)

        assert code == getattr(caught.value, "code", None)

    @pytest.mark.parametrize("script", ["active", "uncorrelated", "failed", "drop_queued"])
    def test_what_gemini_does_not_do(self, script):
        """A word without a meaning here is refused, not ignored."""
        with pytest.raises(ScriptError, match="means nothing to GoogleSimulator"):
            GoogleSimulator(script)


class TestResumption:
    async def test_the_old_turn_is_answered(self):
        """A client that comes back with its handle gets what the server owes it."""
        async with GoogleSimulator("drop_before,ok") as server:
            handles = []
            async with client_of(server) as session:
                with pytest.raises(errors.APIError):
                    await ask(session)
                handles += server.conversations
            async with client_of(server, handles[-1]) as session:
                text, _ = await turn(session)
                again, _ = await ask(session)

        assert ("reply 1", "reply 2") == (text, again)
        assert [None, handles[-1]] == server.handles
        assert [("user", "."), ("model", "reply 1"), ("user", ".")] == server.contexts[1]

    async def test_nor_does_a_late_one_get_lost(self):
        """It is answered when it is due, on the connection of then."""
        async with GoogleSimulator("late:5") as server:
            async with client_of(server) as session:
                await session.send_client_content(turns=[DOT], turn_complete=True)
                await server.wait_for(lambda: server.requests)
                handle = list(server.conversations)[-1]
            async with client_of(server, handle) as session:
                text, _ = await turn(session)

        assert "reply 1" == text

    async def test_without_a_handle_all_is_new(self):
        """The server knows what it is told, and owes nothing."""
        async with GoogleSimulator("drop_before,ok") as server:
            async with client_of(server) as session:
                with pytest.raises(errors.APIError):
                    await ask(session)
            async with client_of(server) as session:
                told = types.Content(role="user", parts=[types.Part(text="one")])
                await session.send_client_content(turns=[told], turn_complete=False)
                text, _ = await ask(session)

        assert "reply 2" == text
        assert [("user", "one"), ("user", ".")] == server.contexts[1]


class TestTLS:
    async def test_who_does_not_trust_it_does_not_talk_to_it(self):
        """The certificate is its own."""
        async with GoogleSimulator() as server, aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await http.get(server.url)
            async with http.get(server.url, ssl=server.client_ssl) as answer:
                assert 404 == answer.status

    def test_only_here(self):
        """It binds to 127.0.0.1."""
        with pytest.raises(ValueError, match=r"127\.0\.0\.1 only"):
            GoogleSimulator(host="0.0.0.0")

    async def test_url(self):
        """``https``, of which google-genai makes ``wss``."""
        async with GoogleSimulator() as server:
            assert server.url.startswith("https://127.0.0.1:")
            assert isinstance(server.client_ssl, ssl.SSLContext)
