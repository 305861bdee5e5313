# SPDX-License-Identifier: Apache-2.0
"""A cassette keeps the names, ids, lengths and times of events, and no content."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys

import aiohttp
import pytest

from traced_retry import UsageError
from traced_retry.core.failure import kind_of, wait_in
from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.aws import UNSTABLE
from traced_retry.simulator.aws_cassette import region_in
from traced_retry.simulator.cassette import Filler, Redactor, redact_message
from traced_retry.simulator.nvidia import HANDSHAKE, TEXT, PersonaPlexSimulator
from traced_retry.simulator.record import recorder
from traced_retry.simulator.replay import replayer

SOUND = base64.b64encode(b"SECRET" * 3 + b"1234").decode()
ARGUMENTS = json.dumps({"name": "SECRET", "SECRET": 5})
EVENTS = [
    {"type": "session.created", "session": {"instructions": "SECRET", "tools": [{"SECRET": 1}]}},
    {"type": "conversation.item.create", "item": {"id": "a", "content": [{"text": "SECRET"}]}},
    {"type": "conversation.item.input_audio_transcription.completed", "transcript": "SECRET"},
    {"type": "response.output_audio.delta", "delta": SOUND, "response_id": "r"},
    {"type": "response.done", "response": {"output": [{"name": "f", "arguments": ARGUMENTS}]}},
    {"type": "error", "error": {"code": "invalid_api_key", "message": "Incorrect key: sk-SECRET"}},
    {"toolCall": {"functionCalls": [{"id": "c", "name": "f", "args": {"SECRET": "SECRET"}}]}},
    {"toolResponse": {"functionResponses": [{"response": {"SECRET_id": "SECRET"}}]}},
    {"setup": {"systemInstruction": "SECRET"}},
    {"serverContent": {"modelTurn": {"parts": [{"inlineData": {"data": SOUND}}]}}},
    {"serverContent": {"outputTranscription": {"text": "SECRET"}}},
    {"textInput": {"promptName": "p", "content": "SECRET"}},
    {"audioOutput": {"contentId": "c", "content": SOUND}},
    {"toolUse": {"toolUseId": "t", "toolName": "f", "content": ARGUMENTS}},
    {"toolResult": {"contentName": "c", "content": ARGUMENTS}},
    {"promptStart": {"toolConfiguration": {"tools": [{"toolSpec": {"name": "SECRET"}}]}}},
    {"contentStart": {"additionalModelFields": ARGUMENTS}},
    {"type": "client_tool_invocation", "toolName": "f", "parameters": {"type": "SECRET"}},
    {"type": "audio_chunk", "audio": SOUND, "text": "SECRET"},
    {"type": "config", "api_key": "SECRET", "system_prompt": "SECRET", "a_new_field": ["SECRET"]},
    {"type": "a text, SECRET", "code": "sk-SECRET-0123456789abcdef", "name": "A SECRET"},
]


@pytest.mark.parametrize("event", EVENTS)
def test_no_content_remains(event):
    """Words, sound, arguments, keys and the names of unknown fields are removed."""
    redacted = json.dumps(Redactor()(event))

    assert "SECRET" not in redacted
    assert SOUND not in redacted
    assert "SECRET" in str(event) or SOUND in str(event)


@pytest.mark.parametrize("event", EVENTS)
def test_fillers_have_the_length_of_the_content(event):
    """The event can be sent, with strings of the same length at the same places."""

    def lengths(value):
        if isinstance(value, dict):
            return {
                name: lengths(inner) for name, inner in value.items() if "id" not in name.lower()
            }
        if isinstance(value, list):
            return [lengths(inner) for inner in value]
        return len(value) if isinstance(value, str) else value

    filled, original = lengths(Filler()(Redactor()(event))), lengths(event)

    def check(one, other):
        if isinstance(one, dict):
            for name in one:
                check(one[name], other[name])
        elif isinstance(one, list):
            for a, b in zip(one, other, strict=False):
                check(a, b)
        else:
            assert one == other

    check(filled, original)


def test_fillers_stay_valid():
    """Arguments are a JSON object, sound is base64 of the same length, blanks are blanks."""
    event = {"arguments": ARGUMENTS, "audio": SOUND, "text": " "}
    filled = Filler()(Redactor()(event))

    assert {} == json.loads(filled["arguments"])
    assert len(base64.b64decode(SOUND)) == len(base64.b64decode(filled["audio"], validate=True))
    assert " " == filled["text"]


@pytest.mark.parametrize(
    "event",
    [
        {"contentStart": {"additionalModelFields": json.dumps({"generationStage": "FINAL"})}},
        {"textOutput": {"content": '{ "interrupted" : true }', "role": "USER"}},
        {"contentEnd": {"stopReason": "END_TURN"}},
        {"usageEvent": {"details": {"delta": {"input": {"speechTokens": 5}}}}},
        {"type": "validationException", "message": UNSTABLE},
    ],
)
def test_signals_of_aws_remain(event):
    """The plugin reads the stage of a text, an interruption, usage and the sort of an error."""
    assert event == Filler()(Redactor()(event))


def test_ids_are_those_of_the_present_session():
    """A client's id is echoed, and each id of the server is a new one at all its places."""
    redact, fill = Redactor(), Filler()
    request = redact({"type": "response.create", "event_id": "old"})
    created = redact({"response": {"id": "resp_old", "metadata": {"client_event_id": "old"}}})
    done = redact({"response_id": "resp_old", "previous_item_id": "root"})

    fill.learn(request, {"type": "response.create", "event_id": "new"})
    response = fill(created)["response"]
    ended = fill(done)

    assert "new" == response["metadata"]["client_event_id"]
    assert ended == {"response_id": response["id"], "previous_item_id": "root"}
    assert response["id"] != Filler()(created)["response"]["id"]


@pytest.mark.parametrize(
    "message",
    [
        "SECRET. Please try again in 1m26.4s.",
        "Rate limit reached for SECRET, Limit 3. (Retry after: 6 seconds)",
        "Conversation already has an active response in progress: resp_SECRET.",
        "Too many requests, SECRET; retrying in 20ms",
        "SECRET",
    ],
)
def test_message_keeps_its_meaning(message):
    """The wait and the sort of the error are read as from the original."""
    redacted = redact_message(message)

    assert "SECRET" not in redacted
    assert len(message) == len(redacted)
    assert wait_in(message) == wait_in(redacted)
    assert kind_of(None, message=message) == kind_of(None, message=redacted)


def test_aws_without_its_plugin(monkeypatch):
    """The message says how to install the plugin."""
    monkeypatch.setitem(sys.modules, "aws_sdk_bedrock_runtime.client", None)
    with pytest.raises(UsageError, match="and the plugin with a recent SDK: pip install"):
        recorder("aws", "https://127.0.0.1:1", print)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the plugin needs Python 3.12")
@pytest.mark.parametrize("profile", [None, "gone"])
def test_aws_without_credentials(profile, monkeypatch):
    """The message names the variables."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(UsageError, match="no valid AWS credentials were found: set AWS_ACCESS_KE"):
        recorder("aws", "https://127.0.0.1:1", print)


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("https://bedrock-runtime.eu-north-1.amazonaws.com", "eu-north-1"),
        ("https://bedrock-runtime-fips.us-west-2.amazonaws.com", "us-west-2"),
        ("https://vpce-1.bedrock-runtime.eu-west-1.vpce.amazonaws.com", "eu-west-1"),
        ("https://127.0.0.1:40123", "us-east-1"),
    ],
)
def test_region_of_aws_is_in_the_address(url, region):
    """AWS accepts only requests that are signed for its region."""
    assert region == region_in(url)


def test_address_is_checked():
    """The message has the value and an example."""
    with pytest.raises(UsageError, match="is not a URL: expected for example https"):
        recorder("openai", "api.openai.com", print)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1 of .* is not of a cassette"),
        ('{"cassette": 1, "provider": "openai"}\nhello', "line 2 of .* is not of a cassette"),
        ('{"cassette": 1, "provider": "google"}', "provider 'google': expected version 1 and 'op"),
        ('{"cassette": 9, "provider": "openai"}', "version 9"),
    ],
)
def test_other_files_are_refused(text, problem, tmp_path):
    """The message names the line, or the provider of the cassette."""
    (tmp_path / "file").write_text(text)

    with pytest.raises(UsageError, match=problem):
        replayer("openai", tmp_path / "file")


def test_missing_file_is_refused(tmp_path):
    """The message names the file."""
    with pytest.raises(UsageError, match="gone cannot be read"):
        replayer("openai", tmp_path / "gone")


async def test_provider_that_cannot_be_reached_is_counted():
    """The agent gets 502, and the recorder counts it."""
    async with OpenAISimulator() as upstream:
        url = upstream.url
    entries = []
    async with recorder("openai", url, entries.append) as server, aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.WSServerHandshakeError, match="502"):
            await http.ws_connect(f"{server.url}/realtime")
        assert 1 == server.unreachable
    assert [502] == [entry["http"] for entry in entries[1:] if entry["from"] == "server"]


async def test_binary_frames_keep_their_kind_and_length(tmp_path):
    """NVIDIA's first byte is the kind of a frame, and words become a filler."""
    cassette = tmp_path / "cassette.jsonl"
    with cassette.open("w") as file:
        async with (
            PersonaPlexSimulator() as upstream,
            recorder("nvidia", upstream.url, lambda e: file.write(f"{json.dumps(e)}\n")) as server,
            aiohttp.ClientSession() as http,
            http.ws_connect(f"{server.url}/api/chat?text_prompt=SECRET") as client,
        ):
            assert HANDSHAKE == await client.receive_bytes()
            await asyncio.sleep(2)
            await upstream.say("SECRET")
            assert TEXT + b"SECRET" == await client.receive_bytes()

    async with (
        replayer("nvidia", cassette) as server,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{server.url}/api/chat") as client,
    ):
        assert HANDSHAKE == await client.receive_bytes()
        began = asyncio.get_running_loop().time()
        assert TEXT + b"AAAAAA" == await client.receive_bytes()
        assert 2 == pytest.approx(asyncio.get_running_loop().time() - began, abs=0.05)
        with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
            await http.ws_connect(f"{server.url}/api/chat")
    assert "SECRET" not in cassette.read_text()
