# SPDX-License-Identifier: Apache-2.0
"""``help()`` explains the public classes, because attribute docstrings are not shown there."""

from __future__ import annotations

import dataclasses
import pydoc
import re

import pytest

import traced_retry


@pytest.mark.parametrize(
    "cls", [traced_retry.RetryPolicy, traced_retry.Failure, traced_retry.FailedReply]
)
def test_help_explains_each_field(cls):
    """Each field has an entry, in the order of the fields."""
    text = pydoc.plain(pydoc.render_doc(cls))
    names = [f.name for f in dataclasses.fields(cls)]

    found = re.findall(r"^ \|      (\w+): ", text.split("Raises:")[0], re.MULTILINE)
    # Python 3.13 repeats the text below, for methods without one of their own.
    assert names == found[: len(names)]


@pytest.mark.parametrize("cls", [traced_retry.RetryPolicy, traced_retry.Failure])
def test_help_has_each_default(cls):
    """The default in the text is the default in the code, and times have their unit."""
    text = " ".join(cls.__doc__.split())
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            continue
        entry = re.search(rf" {field.name}: (.*?)(?= \w+: [a-z`]|$| Raises:)", text)[1]
        unit = " s" if isinstance(field.default, float) else ""
        assert f"Default: {field.default}{unit}" in text[text.index(entry[:30]) :], field.name
