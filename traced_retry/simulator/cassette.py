# SPDX-License-Identifier: Apache-2.0
"""The file of a recorded session: its events without keys, words, sound and arguments.

A cassette is a file of JSON lines. The first line names the provider. Each other line has ``at``
(seconds since the start), ``connection`` (a number) and ``from`` (``client`` or ``server``), and
one of these:

* ``http``: the method of a request, or the status of its answer. 101 opened a WebSocket.
* ``event``: a JSON event. ``binary`` is true if it came in a binary frame, ``exception`` if it came
  in a frame of AWS for exceptions.
* ``text`` or ``binary``: the length of a frame that is not JSON. ``first`` is NVIDIA's kind.
* ``close``: the code of a close frame, and ``reason``. 1006 means that no close frame came. The end
  of a stream of AWS has the code 1000.

An event keeps its keys, numbers and the names of :data:`_NAMES`. Only the objects of
:data:`_ENTERED` keep their content, so a provider's new field is empty. An id becomes ``#N``. All
other text becomes ``~LENGTH``, and its filler in a replay has that length. ``!`` marks loud sound.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from array import array
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final

from traced_retry.errors import UsageError

Entry = dict[str, Any]
"""One line of a cassette."""

VERSION: Final = 1
ABORTED: Final = 1006
"""The close code of a connection that ended without a close frame."""

_ENTERED: Final = frozenset(
    {
        # OpenAI and compatible protocols, Phonic
        *("response", "item", "error", "metadata", "output", "content", "part", "usage"),
        *("status_details", "input_token_details", "output_token_details"),
        # Google
        *("serverContent", "modelTurn", "parts", "inlineData", "usageMetadata", "goAway"),
        *("inputTranscription", "outputTranscription", "toolCall", "functionCalls", "ids"),
        *("setupComplete", "sessionResumptionUpdate", "toolCallCancellation", "realtime_input"),
        # AWS
        *("completionStart", "completionEnd", "contentStart", "contentEnd", "textInput"),
        *("textOutput", "audioInput", "audioOutput", "toolUse", "toolResult"),
        *("usageEvent", "details", "delta", "total", "input"),
    }
)
_NAMES: Final = frozenset(
    {
        *("type", "object", "status", "reason", "code", "role", "state", "medium", "phase"),
        *("name", "toolName", "tool_name", "turnCompleteReason", "urgency", "stopReason"),
    }
)
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z_.:/-]{0,63}|[A-Za-z][\w.:/-]{0,22}|\d{3,5}")
"""A name is an identifier. With a digit it is shorter than a key."""
_ID: Final = re.compile(r"(?:.*_)?ids?|.*(?:Id|[hH]andle)")
_CONSTANT_IDS: Final = ("", "root")
_SIGNAL: Final = re.compile(
    r'\{ ?"(?:interrupted" ?: ?true|generationStage" ?: ?"(?:FINAL|SPECULATIVE)") ?\}'
)
"""The texts of AWS that are signals to its plugin."""
_MEANING: Final = re.compile(
    r"(?i)already has an active response|rate limit|too many requests|quota"
    r"|system instability detected\. please retry your request\.|tool response parsing error"
    r"|InternalErrorCode=531::RST_STREAM closed stream\. HTTP/2 error code: NO_ERROR"
    r"|\b(?:try(?:ing)? again|retry(?:ing)?)[\s-]*(?:in|after)[:\s]*(?:[\d.]+\s?"
    r"(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h)?(?![a-z])[\s,]*)+"
)
"""The parts of an error's message that say the sort of error, and the wait. AWS's plugin opens a
new stream after some of them."""
_QUIET: Final = 500
"""The largest amplitude of sound that counts as silence, of 32768."""
_LOUD: Final = "uAu4C7gL"
"""Three samples of an amplitude of 3000, in base64."""
_AUDIO: Final = ("input_audio_buffer.append", "audio_chunk", "realtime_input.", "audioInput")
"""The start of the kinds of the caller's sound."""


class Redactor:
    """A function that removes the content of events. It gives each id of a session one number."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}

    def __call__(self, value: Any, key: str | None = None) -> Any:
        """Return ``value``, found under ``key``, without content."""
        entered = key is None or key in _ENTERED
        if isinstance(value, dict):
            return {name: self(inner, name) for name, inner in value.items() if entered}
        if isinstance(value, list):
            return [self(inner, key) for inner in value if entered]
        return self._text(value, key or "") if isinstance(value, str) else value

    def _text(self, text: str, key: str) -> str:
        if _ID.fullmatch(key):
            constant = text in _CONSTANT_IDS
            return text if constant else self._ids.setdefault(text, f"#{len(self._ids) + 1}")
        if (key in _NAMES and _NAME.fullmatch(text)) or _SIGNAL.fullmatch(text):
            return text
        if key == "message":
            return redact_message(text)
        return f"~{len(text)}{_ending(text)}"


def redact_message(text: str) -> str:
    """Return an error's message with a dot for each character that does not say its meaning."""
    kept = {i for found in _MEANING.finditer(text) for i in range(*found.span())}
    return "".join(c if i in kept or c.isspace() else "." for i, c in enumerate(text))


def _ending(text: str) -> str:
    """Return the mark of a text for which the usual filler is invalid."""
    if text.isspace():
        return " "
    if text.startswith("{") and text.endswith("}"):
        return "{"
    if len(text) % 4:
        return ""
    return ("!" if _is_loud(text) else "") + "=" * (len(text) - len(text.rstrip("=")))


def _is_loud(text: str) -> bool:
    """Return whether a text is sound above :data:`_QUIET`. GPT-Live's plugin listens for it."""
    try:
        sound = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    samples = array("h", sound[: len(sound) // 2 * 2])
    return bool(samples) and max(map(abs, samples)) > _QUIET


class Filler:
    """A function that makes redacted events sendable, with the ids of the present session."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self._prefix = uuid.uuid4().hex[:12]

    def __call__(self, value: Any) -> Any:
        """Return ``value`` with fillers of the recorded length."""
        if isinstance(value, dict):
            return {name: self(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self(inner) for inner in value]
        if not isinstance(value, str) or value[:1] not in ("~", "#"):
            return value
        if value.startswith("#"):
            return self.ids.setdefault(value, f"{self._prefix}_{value[1:]}")
        return _filler(value)

    def learn(self, recorded: Any, present: Any) -> None:
        """Map the ids of a recorded event of the client to those of the present one."""
        if isinstance(recorded, dict) and isinstance(present, dict):
            for name in recorded.keys() & present.keys():
                self.learn(recorded[name], present[name])
        elif isinstance(recorded, list) and isinstance(present, list):
            for one, other in zip(recorded, present, strict=False):
                self.learn(one, other)
        elif isinstance(recorded, str) and recorded.startswith("#") and isinstance(present, str):
            self.ids.setdefault(recorded, present)


def _filler(mark: str) -> str:
    digits = mark[1:].rstrip("={! ")
    length, ending = int(digits), mark[len(digits) + 1 :]
    if ending == "{":
        return "{}".ljust(length)
    if ending == " ":
        return " " * length
    padding = ending.lstrip("!")
    filler = _LOUD if ending.startswith("!") else "A"
    return (filler * length)[: length - len(padding)] + padding


def event_kind(event: Any) -> str:
    """Return an event's type, or its first key if it has no type, as with Google."""
    if not isinstance(event, dict) or not event:
        return ""
    if isinstance(event.get("type"), str):
        return str(event["type"])
    name, body = next(iter(event.items()))
    return f"{name}.{next(iter(body), '')}" if name == "realtime_input" else str(name)


def is_sound(kind: str) -> bool:
    """Return whether events of this kind are the caller's sound."""
    return kind.startswith(_AUDIO)


def read_cassette(path: Path, provider: str) -> Iterator[Entry]:
    """Yield the lines of a cassette after the first.

    Raises:
        UsageError: if the file cannot be read, is no cassette, or is one of another provider.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    for number, line in zip(count(1), text.splitlines() or [""], strict=False):
        try:
            entry = json.loads(line)
            valid = ("cassette" if number == 1 else "connection") in entry
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise UsageError(
                f"line {number} of {path} is not of a cassette: give a file that "
                "`traced-retry record` has written"
            )
        if number > 1:
            yield entry
        elif entry["cassette"] != VERSION or entry.get("provider") != provider:
            raise UsageError(
                f"{path} is a cassette of version {entry['cassette']} and provider "
                f"{entry.get('provider')!r}: expected version {VERSION} and {provider!r}"
            )
