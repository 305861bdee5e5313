# SPDX-License-Identifier: Apache-2.0
"""The folders that ship as data, ``exporters`` and ``dashboards``, and copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import traced_retry
from traced_retry.errors import UsageError


class FilesError(UsageError):
    """There is no such file, or it cannot be written there; the message names the remedy."""


def folder(name: str) -> Path:
    """The folder: inside the installed package, or beside it in an editable install."""
    package = Path(traced_retry.__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def write(directory: Path, contents: Mapping[str, bytes], *, force: bool = False) -> list[Path]:
    """Write the files below ``directory``, which is made; returns where each now is.

    Args:
        directory: where to.
        contents: by path below it.
        force: overwrite what differs.

    Raises:
        FilesError: a file is there already, with other content, and ``force`` is not set; then
            nothing is written. Or the directory cannot be written.
    """
    files = {directory / name: content for name, content in contents.items()}
    if not force:
        changed = [p for p, content in files.items() if p.is_file() and p.read_bytes() != content]
        if changed:
            raise FilesError(
                f"{changed[0]} is there already and differs: --force overwrites it, or name "
                "another directory"
            )
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise FilesError(
            f"{error.filename} cannot be written ({error.strerror}): name another directory"
        ) from None
    return list(files)
