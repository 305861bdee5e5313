# SPDX-License-Identifier: Apache-2.0
"""The report as one page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from traced_retry import semconv
from traced_retry.report import ReportError, Summary, sentence, write_html

from .conftest import FAILED, HEARD

HOSTILE = "\"><script>alert('x')</script><img src=//evil.example/x>&"


@pytest.fixture
def page(tmp_path):
    """``page(replies)`` -> the text of the page."""

    def page(replies, **how):
        path = tmp_path / "report.html"
        write_html(path, replies, **how)
        return path.read_text(encoding="utf-8")

    return page


class Tags(HTMLParser):
    """The names of a page's elements, and its text."""

    def __init__(self, page):
        super().__init__()
        self.opened, self.closed, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)

    def handle_endtag(self, tag):
        self.closed.append(tag)

    def handle_data(self, data):
        self.text += data


def test_it_tells_the_same(page, varied):
    """Sentences, trace ids, codes and numbers."""
    replies = varied.read()
    text = Tags(page(replies, unreadable_lines=1)).text

    for reply in replies:
        assert sentence(reply) in text
        assert reply.trace_id in text
    assert "conversation_already_has_active_response -> retry" in text
    assert "gpt-4o-realtime-preview" in text
    assert "1 torn line left out" in text


def test_only_the_user_can_read_the_page(varied, tmp_path):
    """The page has the store's mode. The mode of a page that exists is kept."""
    path = tmp_path / "report.html"
    write_html(path, varied.read())
    assert 0o600 == path.stat().st_mode & 0o777

    path.chmod(0o644)
    write_html(path, varied.read())
    assert 0o644 == path.stat().st_mode & 0o777


def test_page_that_cannot_be_written_is_an_error(varied, tmp_path):
    """The message names the file and the remedy."""
    with pytest.raises(ReportError, match=r"page\.html cannot be written \(No such file.*another"):
        write_html(tmp_path / "gone" / "page.html", varied.read())


def test_bars_stand_where_the_time_was(page, varied):
    """As shares of the reply's duration."""
    assert [
        "margin-left:0.00%;width:25.00%",
        "margin-left:25.00%;width:50.00%",
        "margin-left:75.00%;width:25.00%",
    ] == re.findall(r'<i style="(.*?)">', page(varied.read()[1:2]))


def test_what_others_wrote_is_text(page, store):
    """A hostile name stays a name, wherever it is shown."""
    store.timed(
        (0, 1, {**FAILED, "ERROR_CODE": HOSTILE, "ACTION": HOSTILE, "DECISION": HOSTILE}),
        (1, 2, {**HEARD, "RESULT": HOSTILE}),
        seconds=2,
        about=dict.fromkeys((semconv.PROVIDER, semconv.MODEL, semconv.SERVER_ADDRESS), HOSTILE),
        OUTCOME=HOSTILE,
        STOP_REASON=HOSTILE,
    )

    html = page(store.read())
    tags = Tags(html)

    assert set() == {"script", "img"} & set(tags.opened)
    assert HOSTILE in tags.text
    assert HOSTILE not in html


def test_it_needs_nothing_else(page, varied):
    """No address in it, no script, and a policy that forbids both."""
    html = page(varied.read())

    assert [] == re.findall(r"https?://|src=|href=|url\(|@import", html)
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html


def test_every_element_is_closed(page, varied):
    """But those that need no end."""
    tags = Tags(page(varied.read()))
    without_end = {"html", "meta", "input"}

    assert sorted(t for t in tags.opened if t not in without_end) == sorted(tags.closed)


def test_filters_hide_by_outcome_and_provider_without_a_script(page, varied):
    """Each choice is a radio button, and a style rule hides the replies of other classes."""
    html = page(varied.read())
    rules = dict(re.findall(r"body:has\(#([\w-]+):checked\) article:not\(\.(\w+)\)", html))

    assert {"g-first_try", "g-recovered", "g-failed", "g-cut_short", "g-unknown"} < set(rules)
    assert {"p0", "p1"} == {rules["p-0"], rules["p-1"]}
    assert set(rules) == set(re.findall(r'<input type="radio" name="\w+" id="([\w-]+)">', html))
    for kind in rules.values():
        assert re.search(rf'<article class="[^"]*\b{kind}\b', html)


def test_choice_with_one_option_is_left_out(page, varied):
    """One reply has one outcome and one provider."""
    assert "<input" not in page(varied.read()[:1])


def test_seconds_of_the_table_have_a_unit(page, varied):
    """The columns of the added silence are in seconds."""
    text = Tags(page(varied.read())).text

    assert "added p50 (s)" in text
    assert "added p95 (s)" in text


def test_page_counts_replies_that_it_does_not_show(page, varied):
    """A page of a large store shows the newest replies."""
    replies = varied.read()
    text = Tags(page(replies[-2:], summary=Summary(replies))).text

    assert "5 replies, " in text
    assert "Shown: the newest 2." in text
    assert replies[0].trace_id not in text


def test_no_replies(page):
    """A page that says so."""
    assert "No replies." in page([])
