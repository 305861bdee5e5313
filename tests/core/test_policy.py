# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traced_retry import Failure, PolicyError, RetryBudget, RetryPolicy
from traced_retry.core.failure import failure
from traced_retry.core.policy import ENV

FAILURE = failure(Exception(), "unknown")


def waits(policy, count, *, jitter=lambda bound: bound, why=FAILURE):
    """The first waits of a reply."""
    delays = policy.delays(jitter)
    return [delays.next(why) for _ in range(count)]


class TestRetryPolicy:
    def test_defaults_are_those_of_upstream(self):
        """The defaults are those of the upstream proposal, with a deadline."""
        policy = RetryPolicy()

        assert (3, 1.0, 10.0, 20.0) == (
            policy.max_retries,
            policy.base_delay,
            policy.max_delay,
            policy.deadline,
        )
        assert (None, True, None, None) == (
            policy.attempt_timeout,
            policy.retry_rate_limits,
            policy.on_silence,
            policy.classify,
        )

    def test_policy_is_frozen(self):
        """A policy cannot change while a reply uses it."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            RetryPolicy().deadline = 5.0

    @pytest.mark.parametrize("value", ["3", -1, 1.5, True, None, math.nan])
    def test_invalid_max_retries_is_refused(self, value):
        """max_retries takes only a whole number from zero."""
        with pytest.raises(PolicyError, match=r"max_retries is .*whole number, 0 or more"):
            RetryPolicy(max_retries=value)

    @pytest.mark.parametrize(
        "name", ["base_delay", "max_delay", "deadline", "attempt_timeout", "waiting_after"]
    )
    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, "2", True])
    def test_invalid_seconds_are_refused(self, name, value):
        """Seconds have to be finite and not negative."""
        with pytest.raises(PolicyError, match=rf"{name} is .*finite number"):
            RetryPolicy(**{name: value})

    @pytest.mark.parametrize("name", ["base_delay", "max_delay", "deadline", "attempt_timeout"])
    @pytest.mark.parametrize("digits", [400, 5000])
    def test_number_that_is_no_float_is_refused(self, name, digits):
        """The message is short, also for a number that Python refuses to print."""
        with pytest.raises(PolicyError, match=rf"{name} is .*finite number") as caught:
            RetryPolicy(**{name: 10**digits})
        assert len(str(caught.value)) < 200

    def test_attempt_timeout_above_deadline_is_refused(self):
        """An attempt cannot take longer than its reply."""
        with pytest.raises(PolicyError, match=r"attempt_timeout is 8, above deadline, 5; lower"):
            RetryPolicy(deadline=5, attempt_timeout=8)
        assert 5 == RetryPolicy(deadline=5, attempt_timeout=5).attempt_timeout

    @pytest.mark.parametrize("name", ["deadline", "attempt_timeout"])
    def test_limit_of_zero_seconds_is_refused(self, name):
        """A limit of zero would fail each reply before it is requested."""
        with pytest.raises(PolicyError, match=f"{name} is 0"):
            RetryPolicy(**{name: 0})

    def test_base_delay_above_max_delay_is_refused(self):
        """The first wait cannot be longer than the longest wait."""
        with pytest.raises(PolicyError, match=r"base_delay is 5, above max_delay, 2"):
            RetryPolicy(base_delay=5, max_delay=2)

    def test_unknown_on_silence_is_refused(self):
        """on_silence takes three words, and the error lists them."""
        with pytest.raises(PolicyError, match=r"on_silence is 'maybe'.*restart, listen, resend"):
            RetryPolicy(on_silence="maybe")

    def test_classify_that_is_not_callable_is_refused(self):
        """A classify that is not callable is refused at once, not at the first failure."""
        with pytest.raises(PolicyError, match="classify is 'x'"):
            RetryPolicy(classify="x")


def double(failed):
    """A classify function that can be pickled."""
    return dataclasses.replace(failed, recoverable=True)


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, dataclasses.replace, lambda p: pickle.loads(pickle.dumps(p))],
        ids=["copy", "deepcopy", "replace", "pickle"],
    )
    def test_copy_is_equal_and_shares_process_budget(self, duplicate):
        """A policy can be sent to another process, as LiveKit's spawned jobs need."""
        policy = RetryPolicy(5, 0.5, deadline=9, on_silence="listen", classify=double)

        assert policy == duplicate(policy)
        assert policy.budget is duplicate(policy).budget
        assert dataclasses.asdict(policy) == dataclasses.asdict(duplicate(policy))

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
    def test_copy_in_the_process_shares_own_budget(self, duplicate):
        """Copies of one policy cannot spend more than the policy."""
        policy = RetryPolicy(budget=RetryBudget(3))

        assert policy.budget is duplicate(policy).budget

    def test_pickled_own_budget_keeps_its_settings(self):
        """Another process has buckets of its own, of the same size."""
        budget = RetryBudget(3, per_reply=0.5, per_second=0)
        budget.spend("openai", lambda: 0.0)
        loaded = pickle.loads(pickle.dumps(RetryPolicy(budget=budget))).budget

        assert budget is not loaded
        assert (3, 0.5, 0) == (loaded.capacity, loaded.per_reply, loaded.per_second)
        assert {} == loaded.remaining()

    def test_copied_policy_is_checked_like_any_other(self):
        """A change of one field is checked with the others."""
        with pytest.raises(PolicyError, match="attempt_timeout is 8"):
            dataclasses.replace(RetryPolicy(attempt_timeout=8), deadline=5)


class TestFromEnv:
    def test_empty_environment_gives_defaults(self):
        """Without variables the defaults apply, and a blank variable counts as unset."""
        assert RetryPolicy() == RetryPolicy.from_env({})
        assert RetryPolicy() == RetryPolicy.from_env({"TRACED_RETRY_DEADLINE": "  "})

    def test_from_env_reads_os_environ_by_default(self, monkeypatch):
        """Without an argument from_env reads os.environ."""
        monkeypatch.setenv("LIVEKIT_REALTIME_MAX_RETRIES", "7")

        assert 7 == RetryPolicy.from_env().max_retries

    @pytest.mark.parametrize("name", ["HEDGE_AFTER", "FIRST_WORD_TIMEOUT"])
    def test_variable_switches_limit_off(self, name):
        """The word ``off`` means None."""
        policy = RetryPolicy.from_env({f"TRACED_RETRY_{name}": "off"})

        assert getattr(policy, name.lower()) is None

    def test_each_variable_sets_its_field(self):
        """Each variable reaches its field."""
        policy = RetryPolicy.from_env(
            {
                "LIVEKIT_REALTIME_MAX_RETRIES": "5",
                "LIVEKIT_REALTIME_RETRY_BASE_DELAY": "0.5",
                "LIVEKIT_REALTIME_RETRY_MAX_DELAY": "4",
                "TRACED_RETRY_DEADLINE": "12",
                "TRACED_RETRY_ATTEMPT_TIMEOUT": "3",
                "TRACED_RETRY_RETRY_RATE_LIMITS": "No",
                "TRACED_RETRY_ON_SILENCE": "listen",
                "TRACED_RETRY_HEDGE_AFTER": "off",
                "TRACED_RETRY_FIRST_WORD_TIMEOUT": "5.5",
            }
        )

        assert policy == RetryPolicy(
            5, 0.5, 4.0, 12.0, 3.0, False, "listen", hedge_after=None, first_word_timeout=5.5
        )

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            *((text, True) for text in ("1", "true", "yes", "on", "YES", " True ")),
            *((text, False) for text in ("0", "false", "no", "off", "OFF")),
        ],
    )
    def test_usual_words_are_booleans(self, text, value):
        """The words that people write for true and false are accepted in any case."""
        policy = RetryPolicy.from_env({"TRACED_RETRY_RETRY_RATE_LIMITS": text})

        assert value is policy.retry_rate_limits

    @pytest.mark.parametrize(
        ("variable", "value", "allowed"),
        [
            ("LIVEKIT_REALTIME_MAX_RETRIES", "many", "whole number"),
            ("LIVEKIT_REALTIME_MAX_RETRIES", "2.5", "whole number"),
            ("LIVEKIT_REALTIME_MAX_RETRIES", "-1", "whole number"),
            ("LIVEKIT_REALTIME_RETRY_BASE_DELAY", "1s", "finite number"),
            ("LIVEKIT_REALTIME_RETRY_BASE_DELAY", "nan", "finite number"),
            ("LIVEKIT_REALTIME_RETRY_MAX_DELAY", "inf", "finite number"),
            ("TRACED_RETRY_DEADLINE", "-3", "above 0"),
            ("TRACED_RETRY_DEADLINE", "0", "above 0"),
            ("TRACED_RETRY_ATTEMPT_TIMEOUT", "soon", "above 0"),
            ("TRACED_RETRY_RETRY_RATE_LIMITS", "perhaps", "true or false"),
            ("TRACED_RETRY_ON_SILENCE", "Restart!", "restart, listen, resend"),
        ],
    )
    def test_invalid_variable_is_refused(self, variable, value, allowed):
        """The error names the variable, its value and the values allowed."""
        with pytest.raises(PolicyError, match=f"{variable} is '{value}'.*{allowed}"):
            RetryPolicy.from_env({variable: value})

    def test_conflicting_variables_are_both_named(self):
        """Two values that contradict each other are refused, with both names."""
        with pytest.raises(PolicyError, match=r"BASE_DELAY and .*MAX_DELAY.*base_delay is 30"):
            RetryPolicy.from_env({"LIVEKIT_REALTIME_RETRY_BASE_DELAY": "30"})
        with pytest.raises(
            PolicyError, match=r"DEADLINE and TRACED_RETRY_ATTEMPT_TIMEOUT: attempt_timeout is 30"
        ):
            RetryPolicy.from_env({"TRACED_RETRY_ATTEMPT_TIMEOUT": "30"})

    @pytest.mark.parametrize("variable", [name for name in ENV if "SILENCE" not in name])
    def test_number_of_5000_digits_is_refused(self, variable):
        """The message is short."""
        with pytest.raises(PolicyError, match=f"^{variable} is '9999") as caught:
            RetryPolicy.from_env({variable: "9" * 5000})
        assert len(str(caught.value)) < 250


class TestDelays:
    def test_delay_doubles_up_to_max_delay(self):
        """The bounds are the exponential ones of backoff."""
        assert [1, 2, 4, 5, 5] == waits(RetryPolicy(base_delay=1.0, max_delay=5.0), 5)

    def test_default_delay_fits_the_failure(self):
        """Only a provider that asks for fewer requests gets the longer waits."""
        delays = RetryPolicy().delays(lambda bound: bound)
        limited = failure(TimeoutError(), "rate_limit")
        broken = failure(TimeoutError(), "server_error")
        overloaded = failure(TimeoutError(), "overloaded")

        assert [0.1, 1.0, 0.2, 2.0, 4.0, 0.4] == [
            delays.next(each) for each in (broken, limited, broken, overloaded, limited, broken)
        ]

    @pytest.mark.parametrize(
        "policy",
        [
            RetryPolicy(base_delay=1.0),
            RetryPolicy.from_env({"LIVEKIT_REALTIME_RETRY_BASE_DELAY": "1"}),
        ],
    )
    def test_delay_of_the_user_applies_to_all_failures(self, policy):
        """A value that was set counts for all failures, even if it is the default's value."""
        assert [1.0, 2.0] == waits(policy, 2)

    @pytest.mark.parametrize(
        "of", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
    )
    def test_copy_of_default_delay_is_a_default(self, of):
        """A copied or pickled policy has the delays of the original."""
        assert [0.1, 0.2] == waits(of(RetryPolicy()), 2)
        assert [0.1, 0.2] == waits(dataclasses.replace(RetryPolicy(), max_retries=1), 2)

    def test_max_delay_below_fast_delay(self):
        """The largest delay limits the short delays, too."""
        assert [0.0] == waits(RetryPolicy(base_delay=0, max_delay=0), 1)

    def test_base_delay_of_zero_never_waits(self):
        """A base of zero never waits, not even after a thousand retries (2.2.1 would overflow)."""
        assert {0} == set(waits(RetryPolicy(base_delay=0.0), 2000))
        assert {0} == set(waits(RetryPolicy(base_delay=5e-324), 2000))

    def test_jitter_never_goes_below_retry_after(self):
        """Jitter may lengthen the wait that the provider asked for, and never shortens it."""
        asked = failure(Exception(), "rate_limit", retry_after=3.0)

        assert [3.0] == waits(RetryPolicy(), 1, jitter=lambda _: 0.1, why=asked)
        assert [1, 2, 4.0] == waits(
            RetryPolicy(), 3, why=failure(Exception(), "rate_limit", retry_after=0.5)
        )

    def test_retry_after_may_exceed_max_delay(self):
        """max_delay limits only our own waits."""
        asked = failure(Exception(), "rate_limit", retry_after=15.0)

        assert [15.0] == waits(RetryPolicy(), 1, why=asked)

    @given(
        st.floats(0, 5),
        st.floats(5, 60),
        st.one_of(st.none(), st.floats(0, 100)),
        st.integers(0, 40),
    )
    def test_full_jitter_stays_within_bounds(self, base, top, asked, count):
        """A wait is at least retry_after up to 60 s, and at most the larger of it and the bound."""
        policy = RetryPolicy(base_delay=base, max_delay=top)
        delays = policy.delays()
        why = Failure(Exception(), "rate_limit", recoverable=True, retry_after=asked)
        for n in range(count):
            wait = delays.next(why)

            least = min(asked or 0, 60)
            assert least <= wait <= max(least, min(base * 2**n, top))
