# SPDX-License-Identifier: Apache-2.0
"""The files of ``exporters/``: what is handed to an OpenTelemetry SDK, a Collector or a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from traced_retry import shipping
from traced_retry.shipping import FilesError

_COMMENT = "#"


@dataclass(frozen=True)
class ShippedFile:
    """One file of ``exporters/``."""

    name: str
    """Its path below ``exporters/``, with forward slashes, such as ``presets/jaeger.yaml``."""
    path: Path

    @property
    def text(self) -> str:
        """What is in it."""
        return self.path.read_text(encoding="utf-8")

    @property
    def description(self) -> str:
        """Its first sentence about itself: the first comment or heading; empty without one."""
        for line in self.text.splitlines():
            words = line.lstrip(_COMMENT + " ").strip()
            if line.startswith(_COMMENT) and words and not words.startswith("SPDX-"):
                return words
        return ""


def root() -> Path:
    """The folder itself."""
    return shipping.folder("exporters")


def shipped() -> list[ShippedFile]:
    """Every file, by name."""
    folder = root()
    paths = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return [ShippedFile(p.relative_to(folder).as_posix(), p) for p in sorted(paths)]


def find(name: str) -> ShippedFile:
    """The file of that name.

    Raises:
        FilesError: there is none; the message lists those that are there.
    """
    files = {file.name: file for file in shipped()}
    if name not in files:
        raise FilesError(f"there is no {name!r}; there are {', '.join(files)}")
    return files[name]


def presets() -> dict[str, Path]:
    """The presets by name, such as ``jaeger``."""
    return {path.stem: path for path in sorted((root() / "presets").glob("*.yaml"))}


def write(directory: Path, *, force: bool = False) -> list[Path]:
    """Copy all files below ``directory``, which is made; returns where each now is.

    Raises:
        FilesError: a file is there already, with other content, and ``force`` is not set; then
            nothing is written. Or the directory cannot be written.
    """
    contents = {file.name: file.path.read_bytes() for file in shipped()}
    return shipping.write(directory, contents, force=force)
