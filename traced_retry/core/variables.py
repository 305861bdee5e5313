# SPDX-License-Identifier: Apache-2.0
"""The environment variables that traced-retry reads, and those that look like a misspelt one."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Final

from traced_retry.core import supported, switch
from traced_retry.core.guard import log_once
from traced_retry.core.policy import ENV
from traced_retry.core.sanitize import printable

NAMES: Final = (*ENV, supported.VARIABLE, switch.VARIABLE)

_PREFIX: Final = re.compile(r"(TRACED_RETRY|LIVEKIT_REALTIME)_(RETRY_)?")
_OURS: Final = ("TRACED_RETRY_", "LIVEKIT_REALTIME_RETRY_")
_BY_ENDING: Final = {_PREFIX.sub("", name, count=1): name for name in NAMES}
"""Users mix the prefixes up, so only the rest of a name is compared."""
_ALIKE: Final = 0.6
_VERY_ALIKE: Final = 0.75


def misspelt(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Find variables that are not read although their names look like ours.

    Yield each name and the name that was probably meant.
    """
    for name in sorted(environ):
        upper = name.upper()
        if name in NAMES or not _PREFIX.match(upper):
            continue
        # LiveKit may add variables of its own that start with LIVEKIT_REALTIME_.
        cutoff = _ALIKE if upper.startswith(_OURS) else _VERY_ALIKE
        ending = _PREFIX.sub("", upper, count=1)
        for meant in difflib.get_close_matches(ending, _BY_ENDING, 1, cutoff):
            yield name, _BY_ENDING[meant]


def warn_about_misspelt() -> None:
    """Log each misspelt variable once, with the right name."""
    for name, meant in misspelt(os.environ):
        log_once(f"{printable(name)} is not read; did you mean {meant}?", logging.WARNING)
