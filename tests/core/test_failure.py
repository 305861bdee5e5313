# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scripted import ProviderError

from traced_retry.core.failure import (
    CODES,
    KNOWN_ERROR_TYPES,
    MAX_RETRY_AFTER,
    NOTE,
    RECOVERABLE,
    copy_error,
    explain,
    failure,
    finite,
    kind_of,
    plain_code,
    wait_in,
)


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


KINDS = {
    "server_error": "server_error internal_error internal_server_error",
    "overloaded": "engine_overloaded server_overloaded overloaded_error overloaded "
    "service_unavailable 503 529",
    "rate_limit": "rate_limit_exceeded inference_rate_limit_exceeded rate_limit_error "
    "too_many_requests ThrottlingException 429",
    "active_response": "conversation_already_has_active_response 409",
    "quota": "insufficient_quota credit_balance_exhausted billing_hard_limit_reached "
    "ServiceQuotaExceededException 402",
    "authentication": "invalid_api_key account_deactivated authentication_error permission_denied "
    "permission_error AccessDeniedException 401 403",
    "connection_lost": "session_expired 1000 1001 1006 1008 1011",
    "invalid_request": "invalid_request_error invalid_value missing_required_parameter "
    "unknown_parameter model_not_found content_filter max_output_tokens context_length_exceeded "
    "not_found_error ValidationException ResourceNotFoundException 400 404 422 418",
    "timeout": "408",
    "unknown": "1002 new_code 399 600 4000",
}
"""Each kind with the codes that have it."""


class TestKinds:
    @pytest.mark.parametrize(("kind", "codes"), KINDS.items())
    def test_code_has_kind(self, kind, codes):
        """A code has the same kind as a string, as a number and as an HTTP status inside a code."""
        for code in codes.split():
            assert kind == explain(ProviderError(code)).kind
            if code.isdigit():
                assert kind == explain(ProviderError(int(code))).kind
                if 400 <= int(code) < 600:
                    assert kind == explain(ProviderError(f"http_{code}")).kind
                    assert kind == kind_of(None, status=int(code)) == kind_of(None, status=code)

    def test_every_known_code_is_listed_here(self):
        """A new row of the table needs a row in this test."""
        assert set(CODES) <= {code for codes in KINDS.values() for code in codes.split()}

    def test_recoverable_kinds(self):
        """Only failures that may pass by themselves are recoverable."""
        assert {
            "timeout",
            "connection_lost",
            "server_error",
            "overloaded",
            "rate_limit",
            "active_response",
            "empty_response",
            "circuit_open",
            "unknown",
        } == {kind for kind, recoverable in RECOVERABLE.items() if recoverable}

    @pytest.mark.parametrize(
        ("code", "type_", "status", "message", "expected"),
        [
            ("server_error", "invalid_request_error", 401, "rate limit", "server_error"),
            ("new_code", "invalid_request_error", 503, None, "overloaded"),
            ("error_503", "invalid_request_error", None, None, "overloaded"),
            ("error_5031", "invalid_request_error", None, None, "invalid_request"),
            ("new_code", "authentication_error", None, None, "authentication"),
            ("new_code", "new_type", None, "Rate limit reached", "unknown"),
            (None, "new_type", None, "Rate limit reached", "rate_limit"),
            (None, None, None, "Too many requests", "rate_limit"),
            (
                None,
                "invalid_request_error",
                None,
                "Conversation already has an active response",
                "active_response",
            ),
            (None, "authentication_error", None, "too many requests", "authentication"),
            (None, None, True, None, "unknown"),
            (None, None, 200, None, "unknown"),
            (None, None, 600, None, "unknown"),
            (None, None, "٤٢٩", None, "unknown"),
            (None, None, None, ["rate limit"], "unknown"),
        ],
    )
    def test_order(self, code, type_, status, message, expected):
        """The exact code decides first, then a status number, then the type, then the message."""
        assert expected == kind_of(code, type_, status, message)

    def test_exception_is_read_by_code_status_and_type(self):
        """The attributes may hold numbers or strings, and a broken property is ignored."""
        error = ProviderError()
        error.status = "429"
        assert "rate_limit" == explain(error).kind
        error.type = "insufficient_quota"
        assert "rate_limit" == explain(error).kind
        error.status = None
        assert "quota" == explain(error).kind

        class BrokenError(Exception):
            @property
            def code(self):
                raise RuntimeError

        assert ("unknown", None) == (explain(BrokenError()).kind, explain(BrokenError()).code)


class TestCode:
    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("a", "a"),
            ("a" * 100, "a" * 100),
            ("a" * 101, "_OTHER"),
            ("1a", "_OTHER"),
            ("12", "_OTHER"),
            ("123", "123"),
            ("12345", "12345"),
            ("123456", "_OTHER"),
            (1, "1"),
            (99_999, "99999"),
            (100_000, "_OTHER"),
            (0, "_OTHER"),
            (-5, "_OTHER"),
            (10**400, "_OTHER"),
            (True, None),
            (4.5, None),
            ("", None),
            ("None", None),
            ("NULL", None),
            ("sk-abc", "_OTHER"),
            ("skeleton", "skeleton"),
            ("x" * 23 + "1", "_OTHER"),
            (["server_error"], None),
        ],
    )
    def test_only_identifier_is_recorded(self, code, expected):
        """Text, keys, and numbers that are no code do not reach telemetry."""
        assert expected == plain_code(code)


class TestWait:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("Please try again in 6s.", 6),
            ("Please try again in 200ms.", 0.2),
            ("Please try again in 1m26.4s.", 86.4),
            ("try again in 2h0m0s", 7200),
            ("Try again in 1 hr, 2 minutes and more", 3720),
            ("retry after 6 seconds", 6),
            ("Retry-After: 6", 6),
            ("retrying in 500 milliseconds", 0.5),
            ("trying again in 3 secs", 3),
            ("try again in 0s", None),
            ("try again later", None),
            (f"try again in {'9' * 400}s", 1e9),
            (None, None),
            (6, None),
        ],
    )
    def test_wait_is_read_from_words(self, text, seconds):
        """Each wording that providers use gives its seconds."""
        assert seconds == (pytest.approx(wait_in(text)) if wait_in(text) else wait_in(text))

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(1, 1.0), (0.5, 0.5), (True, None), ("1", None), (10**400, None), (float("inf"), None)],
    )
    def test_finite(self, value, expected):
        """Only a number that a float can hold is one."""
        assert expected == finite(value)

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({"Retry-After": "6"}, 6.0),
            ({"Retry-After": "0"}, 0.0),
            ({"Retry-After": "9" * 5000}, 999_999_999.0),
            ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
            ({"Retry-After": 6}, None),
            ({}, None),
            ("Retry-After: 6", None),
        ],
    )
    def test_http_header_gives_wait(self, headers, expected):
        """A header of an HTTP error counts if the exception has no retry_after itself."""
        error = ProviderError("rate_limit_exceeded")
        error.headers = headers
        assert expected == explain(error).retry_after
        error.retry_after = 2
        assert 2.0 == explain(error).retry_after

    def test_fraction_of_second_is_kept(self):
        """A wait between 0 and 1 s is not rounded, and 0 is a wait."""
        assert 0.25 == explain(ProviderError("rate_limit_exceeded", retry_after=0.25)).retry_after
        assert 0.0 == explain(ProviderError("rate_limit_exceeded", retry_after=0)).retry_after
        assert 60.0 == MAX_RETRY_AFTER


class TestCopy:
    def test_copy_has_notes_of_its_own_without_ours(self):
        """The agent of another reply may hold the original, with the note of that reply."""
        original = ProviderError("server_error")
        original.add_note("of the user")
        original.add_note(f"{NOTE}2 attempt(s)")
        copied = copy_error(failure(original, "server_error", code="server_error")).error
        copied.add_note("later")

        assert original is not copied
        assert ("server_error", original.args) == (copied.code, copied.args)
        assert ["of the user", "later"] == copied.__notes__
        assert ["of the user", f"{NOTE}2 attempt(s)"] == original.__notes__

    def test_error_that_cannot_be_copied_is_shared(self):
        """The failure stays as it is."""

        class OnlyError(Exception):
            def __reduce__(self):
                raise TypeError

        why = failure(OnlyError(), "unknown")

        assert why is copy_error(why)


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
        wrapped = ProviderError()
        wrapped.__cause__ = KeyError("x")
        assert "KeyError" == failure(wrapped, "bug").error_type

    def test_failure_without_code_has_kind_as_error_type(self):
        """A time-out or a lost connection has its kind as error.type."""
        assert "timeout" == explain(TimeoutError()).error_type
        assert "connection_lost" == explain(EOFError()).error_type

    def test_code_that_is_text_is_not_recorded(self):
        """A code that looks like prose may hold a caller's words, so it is not recorded."""
        why = explain(ProviderError("the caller said: my PIN is 1234"))

        assert ("_OTHER", "_OTHER") == (why.error_type, why.code)

    @given(st.one_of(st.none(), st.text(max_size=30), st.sampled_from(sorted(CODES))))
    def test_error_type_is_of_known_set(self, code):
        """Any code that a provider sends has an error.type of the known set."""
        assert explain(ProviderError(code)).error_type in KNOWN_ERROR_TYPES


def test_failure_is_frozen():
    """A policy's function returns a changed copy, because several replies may share a failure."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        failure(ProviderError(), "unknown").recoverable = False


def test_repr_hides_text_of_exception():
    """The repr of a failure does not hold the text of the exception."""
    assert "SECRET" not in repr(failure(ProviderError(), "unknown"))
