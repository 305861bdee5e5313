# SPDX-License-Identifier: Apache-2.0
"""What all errors of the user's making are, so that the command line can tell them from ours."""

from __future__ import annotations


class UsageError(ValueError):
    """Something given to us cannot be. The message names it, and what is allowed."""
