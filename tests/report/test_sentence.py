# SPDX-License-Identifier: Apache-2.0
"""One plain sentence for every way a reply can end."""

from __future__ import annotations

import pytest
from support.scripted import SUPERSEDED, ProviderError

from traced_retry import semconv
from traced_retry.report import Attempt, Reply, sentence
from traced_retry.report.sentence import note, overview
from traced_retry.report.summary import Summary

SERVER_ERROR = ProviderError("server_error")


def failed(number, code, *, action="send", error_type=None, decision="retry"):
    """An attempt that failed with the provider's ``code``, or with none."""
    return Attempt(
        number,
        0.0,
        1.0,
        action=action,
        result="failed",
        error_code=code,
        error_type=error_type or code,
        decision=decision,
    )


def heard(number, action="send"):
    """An attempt that succeeded."""
    return Attempt(number, 0.0, 1.0, action=action, result="succeeded")


def timeout_failure(number, **how):
    """An attempt without an answer."""
    return failed(number, None, error_type="timeout", **how)


def say(outcome, *attempts, seconds=3.44, stop=None, **more):
    """The sentence on a reply of these attempts."""
    more = {"attempt_count": len(attempts), **more}
    return sentence(
        Reply("t", "s", "x", 0.0, seconds, attempts, outcome=outcome, stop_reason=stop, **more)
    )


class TestHeard:
    def test_first_try(self):
        """Below a second, hundredths matter."""
        assert "Heard at the first try after 0.21 s." == say("succeeded", heard(1), seconds=0.21)

    def test_retried(self):
        """How often, how long, and why."""
        assert "Heard after 2 retries and 3.4 s: rate_limit_exceeded, then timeout." == say(
            "recovered", failed(1, "rate_limit_exceeded"), timeout_failure(2), heard(3)
        )
        assert "Heard after 1 retry and 3.4 s: server_error." == say(
            "recovered", failed(1, "server_error"), heard(2)
        )

    def test_the_same_again_and_again(self):
        """Repetition is counted, not spelled out."""
        assert (
            "Heard after 6 retries and 3.4 s: "
            "server_error 3 times, then overloaded_error twice, then server_error."
        ) == say(
            "recovered",
            *(failed(n, "server_error") for n in (1, 2, 3)),
            *(failed(n, "overloaded_error") for n in (4, 5)),
            failed(6, "server_error"),
            heard(7),
        )

    def test_listened_on(self):
        """No request was sent again, so it is not called a retry."""
        assert "Heard late, after 3.4 s, without asking again: timeout." == say(
            "recovered", timeout_failure(1), heard(2, "listen")
        )

    def test_restarted(self):
        """A new session is worth knowing."""
        assert "Heard in a new session after 2 retries and 3.4 s: timeout twice." == say(
            "recovered",
            timeout_failure(1),
            timeout_failure(2, action="listen"),
            heard(3, "restart"),
        )

    def test_attempts_not_stored(self):
        """What is known is told."""
        assert "Heard after 2 retries and 3.4 s." == say("recovered", attempt_count=3)


class TestLost:
    @pytest.mark.parametrize(
        ("stop", "why"),
        [
            ("deadline", "deadline"),
            ("max_attempts", "no attempts left"),
            ("budget", "retry budget spent"),
            ("from_the_future", "from_the_future"),
            (None, "no reason stored"),
        ],
    )
    def test_exhausted(self, stop, why):
        """Of what the loop ran out."""
        assert f"Lost after 2 attempts and 20.0 s ({why}): no answer." == say(
            "exhausted",
            timeout_failure(1),
            timeout_failure(2, decision="stop"),
            stop=stop,
            seconds=20.0,
        )

    def test_circuit_open(self):
        """The reply was refused before its first attempt, or after one."""
        why = "the provider failed for all calls of the machine"

        assert f"Not sent, because {why}." == say("exhausted", stop="circuit_open", seconds=0.0)
        assert f"Lost after 1 attempt and 3.4 s ({why}): server_error." == say(
            "exhausted", failed(1, "server_error"), stop="circuit_open"
        )

    def test_unsafe_to_resend(self):
        """Why nothing more was done."""
        assert ("Lost after 3.4 s: connection_lost; asking again might be heard twice.") == say(
            "exhausted", failed(1, "connection_lost"), stop="unsafe_to_resend"
        )

    def test_output_started(self):
        """The caller heard the beginning."""
        assert ("Cut off after 3.4 s, when part of it was already heard: server_error.") == say(
            "not_recoverable", failed(1, "server_error"), stop="output_started"
        )

    def test_session_closed(self):
        """After one attempt or several."""
        only, more = failed(1, None, error_type="session_closed"), failed(2, None, error_type="x")

        assert "Lost after 3.4 s: the session was closed." == say(
            "not_recoverable", only, stop="session_closed"
        )
        assert "Lost after 2 attempts and 3.4 s: the session was closed." == say(
            "not_recoverable", only, more, stop="session_closed"
        )

    @pytest.mark.parametrize(
        ("code", "error_type", "verdict"),
        [
            ("insufficient_quota", "insufficient_quota", "cannot pass by itself"),
            (None, "authentication", "cannot pass by itself"),
            (None, "NotImplementedError", "is a mistake in the code"),
            (
                "rate_limit_exceeded",
                "rate_limit_exceeded",
                "was declared final by the provider or the policy",
            ),
            ("ODD", "_OTHER", "was declared final by the provider or the policy"),
        ],
    )
    def test_not_recoverable(self, code, error_type, verdict):
        """Whose verdict it was that a retry would not help."""
        last = failed(1, code, error_type=error_type, decision="stop")

        assert f"Not retried: {code or error_type} {verdict}." == say(
            "not_recoverable", last, stop="not_recoverable"
        )

    def test_not_recoverable_later(self):
        """It was retried, until an error that is final."""
        assert (
            "Lost after 2 attempts and 3.4 s: server_error, then invalid_api_key, "
            "which cannot pass by itself."
        ) == say(
            "not_recoverable",
            failed(1, "server_error"),
            failed(2, "invalid_api_key", decision="stop"),
            stop="not_recoverable",
        )


class TestCutShort:
    def test_in_an_attempt(self):
        """Which one."""
        assert "Interrupted by the caller after 3.4 s, in the second attempt." == say(
            "interrupted", failed(1, "server_error"), Attempt(2, 0, 1, result="interrupted")
        )

    def test_in_a_wait(self):
        """Before which attempt."""
        assert "Interrupted by the caller after 3.4 s, in the wait for the second attempt." == say(
            "interrupted", failed(1, "server_error")
        )

    def test_late(self):
        """Numbers beyond words are written as such, and unknown ones not at all."""
        assert "Interrupted by the caller after 3.4 s, in attempt 12." == say(
            "interrupted", attempt_count=12
        )
        assert "Interrupted by the caller after 3.4 s." == say("interrupted")

    def test_superseded(self):
        """The provider's choice, not a failure."""
        assert "Dropped by the provider for a newer request after 3.4 s." == say(
            "superseded", Attempt(1, 0, 1, result="superseded"), stop="superseded"
        )


class TestUnknown:
    def test_incomplete(self):
        """What is stored, and why there is no more."""
        assert (
            "Its end is not stored (process killed, or span not kept); "
            "2 attempts, failed by server_error twice."
        ) == say(None, failed(1, "server_error"), failed(2, "server_error"))
        assert ("Its end is not stored (process killed, or span not kept); 1 attempt.") == say(
            None, Attempt(1, 0, 1)
        )

    def test_an_outcome_from_the_future(self):
        """It is named."""
        assert "Ended as resolved after 3.4 s." == say("resolved", heard(1))

    @pytest.mark.parametrize("outcome", [*semconv.OUTCOMES, None, "odd"])
    @pytest.mark.parametrize("stop", [*semconv.STOP_REASONS, None, "odd"])
    def test_with_nothing_else_known(self, outcome, stop):
        """Every combination is a sentence."""
        text = say(outcome, stop=stop)

        assert (True, True) == (text[0].isupper(), text.endswith("."))
        assert "None" not in text


class TestRealReplies:
    @pytest.mark.parametrize(
        ("steps", "how", "beginning", "end"),
        [
            (["hi"], {}, "Heard at the first try", "s."),
            ([SERVER_ERROR, "hi"], {}, "Heard after 1 retry", ": server_error."),
            ([SERVER_ERROR], {"max_retries": 0}, "Lost after 1 attempt", "left): server_error."),
            (
                [TimeoutError()],
                {"deadline": 0.5, "base_delay": 1.0},
                "Lost after",
                "(deadline): no answer.",
            ),
            ([KeyError("x")], {}, "Not retried:", "KeyError is a mistake in the code."),
            ([(9, "hi")], {"cancel_at": 1}, "Interrupted by the caller", "in the first attempt."),
            ([(1, SUPERSEDED)], {}, "Dropped by the provider", "s."),
        ],
    )
    async def test_they_fit(self, store, steps, how, beginning, end):
        """What the loop stores is what the sentences are made for."""
        told = sentence(await store.run(*steps, **how))

        assert (beginning, end) == (told[: len(beginning)], told[-len(end) :])


class TestParts:
    @pytest.mark.parametrize(
        ("attempt", "expected"),
        [
            (heard(1), "heard"),
            (failed(1, "server_error"), "server_error -> retry"),
            (failed(1, "server_error", decision=None), "server_error"),
            (timeout_failure(1, decision="stop"), "timeout -> stop"),
            (Attempt(1, 0, 1, result="superseded"), "superseded"),
            (Attempt(1, 0, 1), "no end stored"),
        ],
    )
    def test_note(self, attempt, expected):
        """A few words per attempt."""
        assert expected == note(attempt)

    def test_overview(self, varied):
        """How many and when, and what could not be read."""
        assert (
            "5 replies, 2027-01-15 08:00:00 to 2027-01-15 08:00:51 UTC. "
            "1 torn line left out: a process was killed."
        ) == overview(Summary(varied.read()), unreadable_lines=1)
        assert "No replies." == overview(Summary())
