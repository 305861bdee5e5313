# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/recipes.md run, and the others say why they do not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support.fresh import fresh
from support.receiver import receiver

import traced_retry

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```\n(.*?)(?=^```|^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
EXPORTS = [code for language, code, _ in BLOCKS if language == "sh"]


def variables(block):
    """Return the variables that a block exports."""
    pairs = (line.removeprefix("export ").partition("=") for line in block.splitlines())
    return {name: shlex.split(value)[0] for name, _, value in pairs}


@pytest.mark.parametrize("block", EXPORTS, ids=["langfuse", "datadog", "grafana", "logfire"])
def test_spans_arrive_with_path_and_header(block, tmp_path):
    """The variables send spans to the vendor's path, with the vendor's header."""
    wanted = variables(block)
    path = "/v1/traces"
    with receiver() as server:
        for name, value in wanted.items():
            if name.endswith("ENDPOINT"):
                base = urlsplit(value).path
                path = base if "TRACES" in name else f"{base}/v1/traces"
                wanted[name] = server.url + base
        ended = fresh(
            "import asyncio, traced_retry\n"
            "from support.run_conversation import run_conversation\n"
            "tracing = traced_retry.enable()\n"
            "result = asyncio.run(run_conversation()), tracing.flush(5.0)",
            XDG_STATE_HOME=tmp_path,
            **wanted,
        )

    assert 0 == ended.exitcode
    found = [headers for posted, headers, _ in server.posted if posted == path]
    assert found
    headers = {key.lower(): text for key, text in found[0].items()}
    for header in filter(None, wanted.get("OTEL_EXPORTER_OTLP_HEADERS", "").split(",")):
        name, _, value = header.partition("=")
        assert unquote(value) == headers[name.lower()]


def test_classify_decides():
    """The code of the page is recoverable after 2 s, and other codes keep their classification."""
    (code,) = [code for language, code, _ in BLOCKS if language == "python"]
    names = {"__name__": "recipe"}
    exec(code, names)
    failure = traced_retry.Failure(Exception(), "unknown", recoverable=False)
    classify = names["policy"].classify

    changed = classify(traced_retry.Failure(Exception(), "unknown", False, "model_warming_up"))
    assert (True, 2.0) == (changed.recoverable, changed.retry_after)
    assert classify(failure) is None


def test_other_blocks_say_why_they_are_not_run():
    """A block is a shell's or Python's and is run, or the text after it has the reason."""
    for language, code, after in BLOCKS:
        assert language in ("sh", "python") or "Not run" in after, code


RUN_ELSEWHERE = {
    "README.md": "tests/packages",
    "docs/index.md": "tests/packages",
    "docs/settings.md": "tests/packages",
    "docs/simulate.md": "tests/packages",
    "docs/recipes.md": "this module",
    "docs/testing.md": "tests/testing/test_plugin.py",
    "docs/waiting.md": "tests/examples/test_waiting_page.py",
}
"""The pages whose blocks a test runs."""


def test_blocks_of_other_pages_are_marked():
    """A reader finds in the section of each block whether a test has run it."""
    root = Path(__file__).parents[2]
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("[de]*s/README.md")]
    unmarked = [
        (name, section.partition("\n")[0])
        for page in pages
        if (name := str(page.relative_to(root))) not in RUN_ELSEWHERE
        for section in page.read_text().split("\n## ")
        if re.search(r"^ *```(?!text)\w+$", section, re.MULTILINE)
        and not re.search(r"Not run|A test runs", section)
        and "the blocks of this page" not in page.read_text()
    ]

    assert [] == unmarked
