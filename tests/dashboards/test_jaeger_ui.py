# SPDX-License-Identifier: Apache-2.0
"""The configuration of Jaeger's UI: a real Jaeger takes it; its links lead somewhere."""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request

import pytest
from backends.servers import Jaeger
from dashboards.reading import DASHBOARDS, dashboards

from traced_retry import semconv

UI = json.loads((DASHBOARDS / "jaeger-ui.json").read_text())
LINKS = [item["url"] for menu in UI["menu"] for item in menu["items"]]


@pytest.mark.parametrize("url", [url for url in LINKS if url.startswith("/search?")])
def test_searches_use_emitted_names(url):
    """The span, and tags with values that it can have."""
    asked = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    tags = json.loads(asked.get("tags", ["{}"])[0])

    assert [semconv.SPAN_REPLY] == asked["operation"]
    assert set(tags) <= {semconv.OUTCOME}
    assert set(tags.values()) <= set(semconv.OUTCOMES)


def test_links_lead_to_our_dashboards():
    """By uid, with a variable that there is."""
    uids = {board["uid"] for board in dashboards().values()}
    links = [*(u for u in LINKS if "/d/" in u), *(p["url"] for p in UI["linkPatterns"])]
    assert {re.search(r"/d/([\w-]+)", link)[1] for link in links} <= uids
    assert {semconv.PROVIDER} == {p["key"] for p in UI["linkPatterns"]}


@pytest.mark.real_time
def test_jaeger_serves_it(tmp_path):
    """A real Jaeger, set up with the shipped files and this one, puts it into its page."""
    overlay = tmp_path / "ui.yaml"
    overlay.write_text(
        json.dumps(
            {
                "extensions": {
                    "jaeger_query": {"ui": {"config_file": str(DASHBOARDS / "jaeger-ui.json")}}
                }
            }
        )
    )
    jaeger = Jaeger(tmp_path)
    jaeger._process.arguments += ["--config", str(overlay)]
    with jaeger, urllib.request.urlopen(f"{jaeger.url}/search", timeout=5) as response:
        served = response.read().decode()

    assert "Failed after all retries" in served
