# SPDX-License-Identifier: Apache-2.0
"""Values from outside, made safe for a path, and for a terminal, a page or a log."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from traced_retry.core.sanitize import file_name, host_and_port, is_url, printable, redact_url

KEY = "k3y-5ecret"


class TestFileName:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("my-agent_2.0", "my-agent_2.0"),
            ("équipe", "équipe"),
            ("team/agent", "team-agent"),
            ("../../../x", "x"),
            ("/etc/cron.d/x", "etc-cron.d-x"),
            ("C:\\x", "C--x"),
            ("..", "unnamed"),
            ("", "unnamed"),
            (".hidden", "hidden"),
            ("a\nb\0c d", "a-b-c-d"),
            ("x" * 300, "x" * 100),
        ],
    )
    def test_name_becomes_one_component(self, text, expected):
        """Separators are replaced, and dots at the start are removed."""
        assert expected == file_name(text)

    @given(st.text(st.characters()))
    @example("ß" * 300)
    @example("\udce9")
    def test_any_text_can_be_a_file(self, text):
        """The name is short, has no separator, and means neither this folder nor its parent."""
        name = file_name(text)

        assert 0 < len(name.encode()) <= 100
        assert not set(name) & set("/\\:\0")
        assert not name.startswith((".", "-"))


class TestPrintable:
    def test_control_characters_are_replaced(self):
        """An escape sequence or a line break from a server does not reach a terminal."""
        assert "a?[31mb?c?" == printable("a\x1b[31mb\nc\u202e")

    def test_long_text_is_cut(self):
        """A value has at most 200 characters, unless the caller wants all of it."""
        assert 200 == len(printable("x" * 300))
        assert 300 == len(printable("x" * 300, None))


class TestRedactUrl:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            (f"https://user:{KEY}@otel.example:4318/v1", "https://otel.example:4318"),
            (f"https://otel.example/{KEY}?token={KEY}#{KEY}", "https://otel.example"),
            (f"http://{KEY}@[::1]:4318/", "http://[::1]:4318"),
            (f"http://otel.example:{KEY}/", "(hidden)"),
            (KEY, "(hidden)"),
            (f"http://[{KEY}/", "(hidden)"),
        ],
    )
    def test_only_scheme_host_and_port_remain(self, url, expected):
        """User, password, path, query and fragment may hold a key."""
        assert expected == redact_url(url)

    @given(st.text())
    def test_any_text_is_accepted(self, text):
        """A URL is recognized or hidden, and never an error."""
        assert "(hidden)" == redact_url(text) or not is_url(text) or "://" in redact_url(text)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.openai.com/v1", ("api.openai.com", 443)),
        ("wss://api.x.ai/v1/realtime", ("api.x.ai", 443)),
        ("http://speaches:8000/v1", ("speaches", 8000)),
        ("http://speaches/v1", ("speaches", 80)),
        ("ws://localhost", ("localhost", 80)),
        ("http://[::1]:8080/v1", ("::1", 8080)),
        (f"wss://user:{KEY}@[2001:db8::1]/v1", ("2001:db8::1", 443)),
        ("http://host:99999/v1", (None, None)),
        ("http://host:0/v1", (None, None)),
        ("nonsense", (None, None)),
        ("", (None, None)),
        (None, (None, None)),
        (7, (None, None)),
    ],
)
def test_host_and_port_have_defaults_and_no_password(url, expected):
    """An IPv6 literal and a one-word host are hosts, and the scheme gives the default port."""
    assert expected == host_and_port(url)
