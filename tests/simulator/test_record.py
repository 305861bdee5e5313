# SPDX-License-Identifier: Apache-2.0
"""A recorded session has no content, and its replay ends as the session did."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import ssl

import aiohttp
import pytest
from livekit.agents import Agent, AgentSession, function_tool
from support.providers import CONN_OPTIONS, PROVIDERS
from support.recorder import Recorder

import traced_retry
from traced_retry.core.budget import refill
from traced_retry.report.read import order, replies_of
from traced_retry.simulator import PROVIDERS as SIMULATED
from traced_retry.simulator.record import recorder as recording
from traced_retry.simulator.replay import replayer
from traced_retry.testing.spans import _as_stored

NAMES = {
    "openai": "openai",
    "xai": "xai",
    "azure openai": "azure-openai",
    "azure openai beta": "azure-openai",
    "inference": "openai",
    "voicelive": "azure-voicelive",
    "google": "google",
    "ultravox": "ultravox",
    "phonic": "phonic",
    "gpt-live": "gpt-live",
    "aws": "aws",
}
"""The name on the command line of each provider of the tests."""
SECRET = "SECRET Rumpelstiltskin"
KEY = "sk-SECRET-0123456789abcdef0123456789"

SESSIONS = [
    ("openai", "ok"),
    ("openai", "rate_limit:2,ok"),
    ("openai", "late:7,ok"),
    ("openai", "failed_message,failed_during,ok"),
    ("openai", "tool:look_up,turn:ok"),
    ("openai", "drop_queued:2,drop_before,unauthorized,ok"),
    ("openai", "silence,active:0.5,ok"),
    ("inference", "malformed"),
    ("inference", "ok,turn:failed"),
    ("xai", "error:server_error,ok,turn:ok"),
    ("xai", "rate_limit"),
    ("azure openai", "ok,error:model_not_found"),
    ("azure openai", "drop_before,ok"),
    ("azure openai beta", "quota"),
    ("voicelive", "ok"),
    ("voicelive", "error:server_error,ok"),
    ("google", "ok,turn:ok"),
    ("google", "drop_before,rate_limit,ok"),
    ("google", "quota,empty,ok"),
    ("google", "tool:look_up,late:3"),
    ("ultravox", "ok,drop_during,ok"),
    ("ultravox", "late:7,tool:look_up,ok"),
    ("ultravox", "unauthorized,ok"),
    ("phonic", "ok,turn:ok"),
    ("phonic", "late:7,rate_limit,tool:look_up"),
    ("phonic", "drop_before"),
    ("gpt-live", "ok"),
    ("gpt-live", "drop_before,ok"),
    ("aws", "ok,turn:ok"),
    ("aws", "late:12,error:systemInstability,ok"),
    ("aws", "late:7,tool:look_up,drop_during"),
    ("aws", "unauthorized,ok"),
]


@pytest.fixture(autouse=True)
def _aws_keys(monkeypatch):
    """Set the credentials with which the recorder signs for AWS."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)


class Caller(Agent):
    """An agent with a tool, the result of which is a secret."""

    def __init__(self):
        super().__init__(instructions=SECRET)

    @function_tool
    async def look_up(self) -> str:
        """Look up the SECRET."""
        return SECRET


def trust_in(server):
    """Return a context that trusts the certificate of a simulator, if it has one."""
    if not hasattr(server, "ca"):
        return None
    return ssl.create_default_context(cadata=server.ca.decode())


async def talk(provider, server, *, turns=None):
    """Have an agent give three replies, and let the caller speak if it can.

    Return each reply's outcome and stop reason, and its times: the duration, and the start and end
    of each attempt.
    """
    refill()
    recorder = Recorder()
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        stack.enter_context(provider.redirected(server))
        model = provider.model(
            api_key=KEY,
            http_session=http,
            conn_options=CONN_OPTIONS,
            **provider.address(server),
        )
        traced_retry.wrap(model, **recorder.providers)
        session = await stack.enter_async_context(AgentSession(llm=model))
        await session.start(Caller())
        await provider.until_ready(provider.conversation(server, model, session))
        for number in range(3):
            with contextlib.suppress(RuntimeError):  # A fatal failure has closed the session.
                session.generate_reply(instructions=SECRET, user_input=f"{SECRET} {number}")
            await asyncio.sleep(40)
            if turns is not None:
                await turns.caller_speaks(SECRET)
            await asyncio.sleep(20)
    spans = [_as_stored(span) for span in recorder.spans()]
    recorder.shutdown()
    replies = sorted(replies_of(spans), key=order)
    outcomes = [(r.outcome, r.stop_reason, r.codes, r.initiator) for r in replies]
    times = [
        [r.seconds, *(t - r.start for a in r.attempts for t in (a.start, a.end))] for r in replies
    ]
    return outcomes, times


@pytest.mark.parametrize(("name", "script"), SESSIONS)
async def test_replay_ends_as_the_session_did(name, script, tmp_path, monkeypatch):
    """Outcomes are the same, times differ by at most 50 ms, and the cassette has no secret."""
    monkeypatch.setattr(random, "uniform", lambda _, high: high)  # the jitter
    case, cassette = PROVIDERS[name], tmp_path / "cassette.jsonl"
    with cassette.open("w") as file:
        async with case.simulator(script) as upstream:
            server = recording(
                NAMES[name],
                upstream.url,
                lambda entry: file.write(json.dumps(entry) + "\n"),
                trust=trust_in(upstream),
            )
            async with server:
                turns = upstream if "turn:" in script else None
                recorded = await talk(case, server, turns=turns)

    async with replayer(NAMES[name], cassette) as server:
        replayed = await talk(case, server)

    assert recorded[0] == replayed[0]
    assert [pytest.approx(times, abs=0.05) for times in recorded[1]] == replayed[1]
    assert "SECRET" not in cassette.read_text()
    assert server.played == server.events


class Expired:
    """A lookup of AWS credentials that have expired."""

    async def get_identity(self, **_):
        raise ValueError(SECRET)


@pytest.mark.parametrize("expired", [False, True])
async def test_aws_that_cannot_be_reached_is_counted(expired):
    """The agent fails at once, and the recorder counts the connections without an answer."""
    case, entries = PROVIDERS["aws"], []
    async with case.simulator("ok") as upstream:
        url = upstream.url
    async with recording("aws", url, entries.append) as server:
        if expired:
            server.credentials = Expired()
        outcomes, _ = await talk(case, server)

    assert {"not_recoverable"} == {outcome for outcome, *_ in outcomes}
    assert 1 == server.unreachable
    assert [502] == [entry["http"] for entry in entries[1:] if entry["from"] == "server"]


async def test_aws_request_is_signed_for_the_provider():
    """The request that arrives at the provider has the signature that botocore computes for it."""
    auth = pytest.importorskip("botocore.auth", reason="livekit-plugins-aws[realtime]")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    case, received = PROVIDERS["aws"], []
    async with case.simulator("ok") as upstream:
        new_stream = upstream.new_stream
        upstream.new_stream = lambda client, number, headers: (
            received.append(headers) or new_stream(client, number, headers)
        )
        async with recording("aws", upstream.url, print, trust=trust_in(upstream)) as server:
            await talk(case, server)

    (headers,) = received
    url = f"https://{headers[':authority']}{headers[':path']}"
    request = AWSRequest("POST", url, {n: v for n, v in headers.items() if n[0] != ":"})
    request.context["timestamp"] = headers["x-amz-date"]
    method, scope, signed, signature = re.split(r",? \w+=", headers["authorization"])
    for name in set(request.headers) - set(signed.split(";")):
        del request.headers[name]
    signer = auth.SigV4Auth(Credentials(KEY, KEY), "bedrock", "us-east-1")
    text = signer.string_to_sign(request, signer.canonical_request(request))

    assert ("AWS4-HMAC-SHA256", signer.scope(request)) == (method, scope)
    assert signer.signature(text, request) == signature


def test_each_provider_has_a_recorded_session():
    """A new simulator needs a session here. test_cassette.py has NVIDIA's."""
    recorded = {NAMES[name] for name, _ in SESSIONS}

    assert set(SIMULATED) == recorded | {"nvidia"}
