# SPDX-License-Identifier: Apache-2.0
"""The data files that ship with the package, from ``exporters/`` and ``dashboards/``."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import traced_retry
from traced_retry.errors import UsageError

_COMMENT: Final = "#"


class FilesError(UsageError):
    """A shipped file that does not exist or is not writable. The message names the remedy."""


@dataclass(frozen=True)
class ShippedFile:
    """One file of ``exporters/`` or ``dashboards/``."""

    name: str
    """The path below the folder, with forward slashes, such as ``presets/jaeger.yaml``."""
    content: str

    @property
    def description(self) -> str:
        """The first comment or heading, or a dashboard's title, or an empty text."""
        if self.name.endswith(".json"):
            return str(json.loads(self.content).get("title", "Jaeger's UI: searches and links"))
        for line in self.content.splitlines():
            words = line.lstrip(_COMMENT + " ").strip()
            if line.startswith(_COMMENT) and words and not words.startswith("SPDX-"):
                return words
        return ""


def folder(name: str) -> Path:
    """Return the folder inside the installed package, or beside it in an editable install."""
    package = Path(traced_retry.__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def exporters() -> list[ShippedFile]:
    """Return every file of ``exporters/``, sorted by name."""
    root = folder("exporters")
    paths = (p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [
        ShippedFile(p.relative_to(root).as_posix(), p.read_text(encoding="utf-8"))
        for p in sorted(paths)
    ]


def presets() -> dict[str, Path]:
    """Return the path of each preset by its name, such as ``jaeger``."""
    paths = sorted((folder("exporters") / "presets").glob("*.yaml"))
    return {path.stem: path for path in paths}


def find(files: Iterable[ShippedFile], name: str) -> ShippedFile:
    """Return the file with that name.

    Raises:
        FilesError: if no file has that name. The message lists the names.
    """
    by_name = {file.name: file for file in files}
    if name not in by_name:
        raise FilesError(f"there is no {name!r}; there are {', '.join(by_name)}")
    return by_name[name]


def write(directory: Path, files: Iterable[ShippedFile], *, force: bool = False) -> list[Path]:
    """Write the files below ``directory`` and return their paths.

    Args:
        directory: the target. It is created if it does not exist.
        files: the files to write.
        force: overwrite files that exist with other content.

    Raises:
        FilesError: if ``directory`` cannot be written, if a folder in it is a link to another
            place, or if a file exists with other content and ``force`` is not set. In the last two
            cases no file is written.
    """
    contents = {directory / file.name: file.content.encode() for file in files}
    try:
        for path, content in contents.items():
            _check_target(directory, path, content, force=force)
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path) and not _is_regular(path):
                path.unlink()  # Writing would follow the link, or wait for a reader of the pipe.
            path.write_bytes(content)
    except OSError as error:
        raise FilesError(
            f"{error.filename} cannot be written ({error.strerror}): name another directory"
        ) from None
    return list(contents)


def _check_target(directory: Path, path: Path, content: bytes, *, force: bool) -> None:
    if not path.parent.resolve().is_relative_to(directory.resolve()):
        raise FilesError(
            f"{path.parent} is a link to a folder outside of {directory}: remove the link, or name "
            "another directory"
        )
    if force or not os.path.lexists(path):
        return
    if not _is_regular(path) or path.read_bytes() != content:
        raise FilesError(
            f"{path} is there already and differs: --force overwrites it, or name another directory"
        )


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)
