# SPDX-License-Identifier: Apache-2.0
"""Errors that the user can correct. The command line shows them without a traceback."""

from __future__ import annotations

from typing import Final


class UsageError(ValueError):
    """An invalid value from the user. The message names the value and the allowed ones."""


class ArgumentError(UsageError, TypeError):
    """An argument of a wrong type. The message names the argument and the allowed types."""


class MissingExtraError(UsageError, ModuleNotFoundError):
    """A package is not installed. The message names the command that installs it."""


class ExportError(UsageError):
    """An invalid setting of the export. The message names the setting and the remedy."""


class ConfigurationFileError(UsageError):
    """An invalid configuration file. The message names file, key and allowed values."""


_EXTRAS: Final = {
    "livekit.plugins": "agent",
    "livekit": "livekit",
    "opentelemetry.configuration": "presets",
    "opentelemetry.instrumentation": "presets",
    "opentelemetry": "export",
    "platformdirs": "export",
    "requests": "export",
    "aiohttp": "simulator",
    "pytest": "testing",
    "h2": "simulator",
    "trustme": "simulator",
    "rich": "cli",
    "typer": "cli",
    "yaml": "cli",
}
"""The extra that installs a module."""


def missing_extra(feature: str, error: ModuleNotFoundError) -> MissingExtraError:
    """Return the error for a feature that failed to import.

    Args:
        feature: the subject of the message, such as ``enable()``.
        error: raised by the import.
    """
    module = error.name or "a package"
    needed = next((e for m, e in _EXTRAS.items() if f"{module}.".startswith(f"{m}.")), "agent")
    missing = MissingExtraError(
        f"{feature} needs {module}, which is not installed: {install_command(needed)}"
    )
    missing.name = error.name
    return missing


def install_command(extra: str) -> str:
    """Return the command that adds an extra to the installed package.

    pip reads the extra from the package that is installed, so the command needs no index that
    has traced-retry.
    """
    return f"pip install 'traced-retry[{extra}]'"
