# SPDX-License-Identifier: Apache-2.0
"""Read fields of provider events, whose types a server may change at any time.

Compatible servers send numbers as codes, strings instead of objects, lists, null, or leave a field
out. The functions here never raise. A value of an unexpected type counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from traced_retry.core.failure import Kind, kind_of, plain_code, wait_in

_EMPTY: Mapping[str, Any] = {}


def mapping(value: object) -> Mapping[str, Any]:
    """Return ``value`` if it is a mapping, and an empty one otherwise."""
    return value if isinstance(value, Mapping) else _EMPTY


def text(value: object) -> str:
    """Return ``value`` if it is a string, and an empty one otherwise."""
    return value if isinstance(value, str) else ""


def field(source: object, name: str) -> object:
    """Return the item or the attribute ``name`` of ``source``, or None."""
    if isinstance(source, Mapping):
        return source.get(name)
    try:
        return getattr(source, name, None)
    except Exception:  # noqa: BLE001 - a property may raise
        return None


class ProviderError(NamedTuple):
    """The error that a provider reports in an event."""

    kind: Kind
    code: str | None
    """The code, or the type if there is no code."""
    retry_after: float | None
    """Seconds, read from the message."""


def read_error(source: object, reason: object = None) -> ProviderError:
    """Classify the error object of an event.

    Args:
        source: a mapping or an object with ``code``, ``type`` and ``message``, or only a code.
        reason: a code to use if the error has neither code nor type.
    """
    code, type_, message = (field(source, name) for name in ("code", "type", "message"))
    if isinstance(source, str):
        code = source
    kind = kind_of(code, type_, message=message)
    plain = plain_code(code)
    if plain is None and kind == kind_of(None, type_):
        # Otherwise the message decided, and the type would contradict it.
        plain = plain_code(type_) or plain_code(reason)
    if kind == "unknown":
        kind = kind_of(plain)
    return ProviderError(kind, plain, wait_in(message))
