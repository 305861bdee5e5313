# SPDX-License-Identifier: Apache-2.0
"""Define a finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding."""

    check: str
    """The subject of the check: a word or a variable's name."""
    status: Status
    message: str
    fix: str = ""
    """The remedy, empty if the check passed."""
