# SPDX-License-Identifier: Apache-2.0
"""Load OpenTelemetry's declarative configuration files, with errors that name file and key.

The SDK's own loader (opentelemetry-configuration 0.66) names neither the file nor the allowed
values, and only logs invalid options of an instrumentor. It accepts a mistyped component until the
component is looked up. Its messages are not passed on whole, because they may quote a key from the
file.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib.metadata import distributions, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter

from traced_retry.core.sanitize import is_url, printable
from traced_retry.errors import ConfigurationFileError, UsageError
from traced_retry.export.processor import DELAY, BoundedSpanProcessor
from traced_retry.livekit.instrumentor import RetryOptions

if TYPE_CHECKING:
    from opentelemetry.configuration import OpenTelemetryConfiguration
    from opentelemetry.configuration.models import OtlpHttpExporter

INSTRUMENTOR: Final = "traced_retry"
"""Our name below ``instrumentation/development`` → ``python``."""

_COMPRESSIONS: Final = ("gzip", "deflate", "none")
_QUOTED: Final = re.compile(r"""(?s)(['"])(?!(?:<[a-z ]+>|.|\\.)\1).*?\1(?=[\s,.;:)]|$)""")


@dataclass(frozen=True)
class ConfigFile:
    """A valid configuration file."""

    path: Path
    model: OpenTelemetryConfiguration
    """The SDK's part of the file, without our own options."""
    options: RetryOptions
    """Our own options."""


def load(path: str | os.PathLike[str]) -> ConfigFile:
    """Read a file and check all of it.

    Raises:
        ConfigurationFileError: if the file cannot be read or holds an invalid value.
    """
    path = Path(path)
    from opentelemetry.configuration import (  # noqa: PLC0415 - an extra of its own
        ConfigurationError,
        load_config_file,
    )

    try:
        with _suppress_sdk_errors():
            model = load_config_file(path)
    except ConfigurationError as error:
        raise ConfigurationFileError(f"{path}: {_describe_error(error)}") from None
    except Exception as error:  # noqa: BLE001 - a file that is not UTF-8 or too deeply nested
        raise ConfigurationFileError(f"{path}: cannot be read ({type(error).__name__})") from None
    for problem in _problems(model, ""):
        raise ConfigurationFileError(f"{path}: {problem}")
    return ConfigFile(path, model, _extract_options(path, model))


def extract_batch_processors(
    model: OpenTelemetryConfiguration,
    construct: Callable[[str, Callable[[], SpanExporter]], SpanExporter | None],
) -> list[Callable[[], BoundedSpanProcessor]]:
    """Remove the ``batch`` processors from the model, and return a factory of ours for each.

    Leave the processors of ``otlp_grpc`` and ``otlp_file/development`` to the SDK. ``construct``
    gets the name of an exporter and a function that creates it, and may return None.
    """
    provider = model.tracer_provider
    if provider is None:
        return []
    taken: list[Callable[[], BoundedSpanProcessor]] = []
    left = []
    for processor in provider.processors:
        found = processor.batch and _find_batch_exporter(processor.batch.exporter)
        if not processor.batch or not found:
            left.append(processor)
            continue
        name, make = found
        exporter = construct(name, make)
        if exporter is None:
            continue
        delay = processor.batch.schedule_delay
        taken.append(
            partial(
                BoundedSpanProcessor,
                exporter,
                name,
                queue_size=processor.batch.max_queue_size,
                batch_size=processor.batch.max_export_batch_size,
                delay=DELAY if delay is None else delay / 1000,
            )
        )
    provider.processors = left
    return taken


def _find_batch_exporter(declared: Any) -> tuple[str, Callable[[], SpanExporter]] | None:
    """Return the name and a factory, or None if our processor does not support the exporter."""
    if declared.otlp_http is not None:
        return "otlp_http", partial(_otlp_http, declared.otlp_http)
    if declared.console is not None:
        return "console", ConsoleSpanExporter
    for name, settings in declared.additional_properties.items():
        (entry_point,) = entry_points(group="opentelemetry_traces_exporter", name=name)
        return name, partial(entry_point.load(), **(settings or {}))
    return None


def _otlp_http(declared: OtlpHttpExporter) -> SpanExporter:
    """Create the exporter, with ``tls``, which the SDK ignores in a file (configuration 0.66)."""
    from opentelemetry.exporter.otlp.proto.http import Compression  # noqa: PLC0415 - takes a while

    from traced_retry.export.otlp import OtlpSpanExporter  # noqa: PLC0415

    listed = (pair.partition("=") for pair in (declared.headers_list or "").split(","))
    headers = {name.strip(): value.strip() for name, equals, value in listed if equals}
    headers.update({pair.name: pair.value or "" for pair in declared.headers or ()})
    files = declared.tls
    return OtlpSpanExporter(
        endpoint=declared.endpoint,
        headers=headers or None,
        timeout=None if declared.timeout is None else declared.timeout / 1000,
        compression=declared.compression and Compression(declared.compression.lower()),
        certificate_file=(files and files.ca_file) or None,
        client_key_file=(files and files.key_file) or None,
        client_certificate_file=(files and files.cert_file) or None,
    )


@contextmanager
def _suppress_sdk_errors() -> Iterator[None]:
    """Suppress the loader's ERROR records. It logs a traceback that quotes lines of the file.

    The loader also raises each of these errors.
    """
    loader = logging.getLogger("opentelemetry.configuration.file._loader")

    def below_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    loader.addFilter(below_error)
    try:
        yield
    finally:
        loader.removeFilter(below_error)


def without_quotes(error: object) -> str:
    """Return the text of an SDK's error with "(hidden)" for each word that it quotes.

    Such a word may be a header's value in the wrong place. Single characters and the names of
    tokens, such as ``'<block end>'``, remain.
    """
    return printable(_QUOTED.sub("(hidden)", str(error)))


def _describe_error(error: Exception) -> str:
    """Describe the loader's finding without values from the file."""
    cause = error.__cause__
    mark = getattr(cause, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1} is no YAML: {without_quotes(getattr(cause, 'problem', ''))}"
    if isinstance(cause, json.JSONDecodeError):
        return f"line {cause.lineno} is no JSON: {cause.msg}"
    if getattr(cause, "validator", None) is None:
        return without_quotes(error)
    return _describe_schema_error(cause)


def _describe_schema_error(cause: object) -> str:
    validator = getattr(cause, "validator", None)
    instance, schema = getattr(cause, "instance", None), getattr(cause, "schema", {})
    at = ".".join(str(part) for part in getattr(cause, "absolute_path", ())) or "the top level"
    if validator == "additionalProperties":
        known = schema.get("properties", {})
        odd = sorted(set(instance or ()) - set(known))
        if ".headers" in at:
            return f"{len(odd)} key(s) at {at} are not known; allowed: {', '.join(sorted(known))}"
        return f"{_listed(odd)} at {at} is not known; allowed: {', '.join(sorted(known))}"
    if validator == "required":
        missing = sorted(set(schema["required"]) - set(instance or ()))
        return f"{at} lacks {_listed(missing)}"
    return f"{at} must have {validator} {getattr(cause, 'validator_value', '')}"


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _problems(node: object, at: str) -> Iterator[str]:
    """Find the mistakes that the schema accepts, in ``node`` and below.

    These are components that neither the SDK nor an installed package provides, and endpoints that
    are no URL, for example because a variable is not set.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _problems(item, f"{at}.{index}")
    if not is_dataclass(node) or isinstance(node, type):
        return
    known = [field.name for field in fields(node)]
    for name in getattr(node, "additional_properties", None) or {}:
        # An entry point may provide a component, except at the top level.
        if not at or name not in _plugin_names():
            where = at.removeprefix(".") or "the top level"
            allowed = sorted(word.replace("_development", "/development") for word in known)
            yield f"{name!r} at {where} is not known; allowed: {', '.join(allowed)}"
    endpoint = getattr(node, "endpoint", None)
    if type(node).__name__.startswith("OtlpHttp") and not (endpoint is None or is_url(endpoint)):
        yield (
            f"{at.removeprefix('.')}.endpoint is no http:// or https:// URL; is a variable in it "
            "not set?"
        )
    compression = getattr(node, "compression", None) or "none"
    if compression.lower() not in _COMPRESSIONS:
        yield (
            f"{at.removeprefix('.')}.compression is invalid; it must be one of "
            f"{', '.join(_COMPRESSIONS)}"
        )
    for name in known:
        yield from _problems(getattr(node, name), f"{at}.{name}")


def _plugin_names() -> set[str]:
    # entry_points() without arguments is deprecated on Python 3.11.
    found = (entry for distribution in distributions() for entry in distribution.entry_points)
    return {entry.name for entry in found if entry.group.startswith("opentelemetry_")}


def _extract_options(path: Path, model: OpenTelemetryConfiguration) -> RetryOptions:
    """Remove our own options from the model, and return them for the instrumentation."""
    section = model.instrumentation_development
    listed: dict[str, Any] = dict((section and section.python) or {})
    at = "instrumentation/development.python"
    for name in listed:
        if name != INSTRUMENTOR and difflib.get_close_matches(name, [INSTRUMENTOR], cutoff=0.8):
            raise ConfigurationFileError(
                f"{path}: {name!r} at {at} is not known; did you mean {INSTRUMENTOR!r}?"
            )
    given: Mapping[str, Any] = listed.pop(INSTRUMENTOR, None) or {}
    if section is not None:
        section.python = listed
    try:
        return RetryOptions(**given)
    except UsageError as error:
        raise ConfigurationFileError(f"{path}: {at}.{INSTRUMENTOR}: {error}") from None
