# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scripted import ProviderError

from traced_retry.core.failure import CODES, KNOWN_ERROR_TYPES, RECOVERABLE, explain, failure


class StatusError(Exception):
    def __init__(self, status=None, *, retryable=None):
        self.status_code = status
        self.retryable = retryable


class TestExplain:
    @pytest.mark.parametrize(
        ("code", "kind", "recoverable"),
        [
            ("server_error", "server_error", True),
            ("engine_overloaded", "overloaded", True),
            ("rate_limit_exceeded", "rate_limit", True),
            ("conversation_already_has_active_response", "active_response", True),
            ("insufficient_quota", "quota", False),
            ("billing_hard_limit_reached", "quota", False),
            ("invalid_api_key", "authentication", False),
            ("invalid_value", "invalid_request", False),
            ("never_seen_before", "unknown", True),
        ],
    )
    def test_code_decides_kind(self, code, kind, recoverable):
        """The provider's code decides, and an unknown code is recoverable."""
        why = explain(ProviderError(code))

        assert (code, kind, recoverable) == (why.code, why.kind, why.recoverable)

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (401, "authentication"),
            (403, "authentication"),
            (402, "quota"),
            (429, "rate_limit"),
            (408, "timeout"),
            (404, "invalid_request"),
            (418, "invalid_request"),
            (500, "server_error"),
            (503, "overloaded"),
            (599, "server_error"),
        ],
    )
    def test_http_status_decides_kind(self, status, kind):
        """An HTTP status decides in the same way as a code."""
        assert kind == explain(StatusError(status)).kind

    def test_retryable_false_is_not_recoverable(self):
        """LiveKit's retryable=False is final, and retryable=True changes nothing."""
        assert explain(StatusError(500)).recoverable
        assert not explain(StatusError(500, retryable=False)).recoverable
        assert not explain(StatusError(401, retryable=True)).recoverable

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (TimeoutError(), "timeout"),
            (ConnectionResetError(), "connection_lost"),
            (EOFError(), "connection_lost"),
            (OSError("no route"), "connection_lost"),
            (TypeError(), "bug"),
            (KeyError("x"), "bug"),
            (NotImplementedError(), "bug"),
            (RuntimeError("loop closed"), "bug"),
            (Exception("anything"), "unknown"),
            (ProviderError(), "unknown"),
        ],
    )
    def test_exception_class_decides_kind(self, error, kind):
        """Python's own errors are bugs, except for network errors."""
        why = explain(error)

        assert (kind, RECOVERABLE[kind], error) == (why.kind, why.recoverable, why.error)

    @pytest.mark.parametrize("seconds", ["5", -1, float("nan"), float("inf"), None])
    def test_invalid_retry_after_is_ignored(self, seconds):
        """An invalid retry_after is read as None."""
        assert (
            explain(ProviderError("rate_limit_exceeded", retry_after=seconds)).retry_after is None
        )

    def test_retry_after_is_read_in_seconds(self):
        """The failure holds the seconds that the provider asked for."""
        assert 2.0 == explain(ProviderError("rate_limit_exceeded", retry_after=2)).retry_after


class TestErrorType:
    def test_known_code_is_error_type(self):
        """A known code is its own error.type."""
        assert "rate_limit_exceeded" == explain(ProviderError("rate_limit_exceeded")).error_type

    def test_unknown_code_has_error_type_other(self):
        """An unknown code has error.type _OTHER, and the code itself stays exact."""
        why = explain(ProviderError("weird_new_code"))

        assert ("_OTHER", "weird_new_code") == (why.error_type, why.code)

    def test_bug_has_class_name_as_error_type(self):
        """A programming error has its class as error.type."""
        assert "NotImplementedError" == explain(NotImplementedError()).error_type

    def test_code_that_is_text_is_not_recorded(self):
        """A code that looks like prose may hold a caller's words, so it is not recorded."""
        why = explain(ProviderError("the caller said: my PIN is 1234"))

        assert ("_OTHER", "_OTHER") == (why.error_type, why.code)

    @given(st.one_of(st.none(), st.text(max_size=30), st.sampled_from(sorted(CODES))))
    def test_error_type_is_of_known_set(self, code):
        """Any code that a provider sends has an error.type of the known set."""
        assert explain(ProviderError(code)).error_type in KNOWN_ERROR_TYPES


def test_repr_hides_text_of_exception():
    """The repr of a failure does not hold the text of the exception."""
    assert "SECRET" not in repr(failure(ProviderError(), "unknown"))
