# SPDX-License-Identifier: Apache-2.0
"""The retry budget: tokens, who pays, what it does to a reply, and what the gauge tells."""

from __future__ import annotations

import asyncio
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scripted import HANG, ProviderError, Scripted

from traced_retry import PolicyError, RetryBudget, RetryPolicy
from traced_retry.core import budget
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest
from traced_retry.core.telemetry import Target, Telemetry

DOWN = ProviderError("server_error")
GAUGE = "traced_retry.budget.remaining"


class Clock:
    """Seconds as the test says."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """A clock that the test sets."""
    return Clock()


@pytest.fixture
def ask(recorder):
    """``ask(script, policy, provider)`` -> a reply's future; waits are the full bound."""
    telemetry = Telemetry(**recorder.providers)

    def ask(script, policy, provider="openai"):
        request = CallRequest(script.future)
        trace = telemetry.reply(Target(provider))
        return Reply(request, policy, trace, jitter=lambda bound: bound).start()

    return ask


class TestBucket:
    def test_begins_full(self, clock):
        """As many retries at once as it holds, and no more."""
        bucket = RetryBudget(3)

        assert [True, True, True, False] == [bucket.spend("openai", clock) for _ in range(4)]

    def test_one_per_provider(self, clock):
        """One provider's outage leaves the others their retries."""
        bucket = RetryBudget(1)
        bucket.spend("openai", clock)

        assert not bucket.spend("openai", clock)
        assert bucket.spend("phonic", clock)

    def test_replies_earn(self, clock):
        """Ten replies earn one retry."""
        bucket = RetryBudget(1, per_reply=0.125, per_second=0)
        bucket.spend("openai", clock)
        for _ in range(7):
            bucket.earn("openai", clock)
        assert not bucket.spend("openai", clock)
        bucket.earn("openai", clock)

        assert bucket.spend("openai", clock)

    def test_time_earns(self, clock):
        """A full bucket in capacity / per_second seconds, and never more than that."""
        bucket = RetryBudget(4, per_second=0.5)
        for _ in range(4):
            bucket.spend("openai", clock)
        clock.now += 4
        assert {"openai": 2.0} == bucket.remaining()
        clock.now += 400

        assert {"openai": 4.0} == bucket.remaining()

    def test_a_clock_that_goes_back(self, clock):
        """It earns nothing, and takes nothing."""
        bucket = RetryBudget(4)
        bucket.spend("openai", clock)
        clock.now -= 500

        assert {"openai": 3.0} == bucket.remaining()

    @given(st.lists(st.sampled_from(["earn", "spend", "wait"]), max_size=200))
    def test_never_more_than_was_earned(self, steps):
        """However it is used: between nothing and full, and no more retries than tokens."""
        clock, bucket, spent = Clock(), RetryBudget(5, per_reply=0.25, per_second=0.5), 0
        for step in steps:
            if step == "earn":
                bucket.earn("openai", clock)
            elif step == "wait":
                clock.now += 1
            else:
                spent += bucket.spend("openai", clock)
            assert all(0 <= tokens <= 5 for tokens in bucket.remaining().values())

        assert spent <= 5 + 0.25 * steps.count("earn") + 0.5 * steps.count("wait")

    @pytest.mark.parametrize("value", [0, 0.5, -1, math.nan, math.inf, "10"])
    def test_a_capacity_that_cannot_be(self, value):
        """Less than one retry is none: that is max_retries=0."""
        with pytest.raises(ValueError, match=r"capacity is .*finite number >= 1"):
            RetryBudget(value)

    @pytest.mark.parametrize("name", ["per_reply", "per_second"])
    def test_an_income_that_cannot_be(self, name):
        """Nothing is taken back."""
        with pytest.raises(ValueError, match=rf"{name} is -1; .*>= 0"):
            RetryBudget(**{name: -1})


class TestPolicy:
    def test_policies_share_the_process_s(self):
        """Unless they bring their own."""
        assert RetryPolicy().budget is RetryPolicy(max_retries=1).budget
        assert RetryPolicy().budget is RetryPolicy.from_env({}).budget
        assert RetryPolicy().budget is not RetryPolicy(budget=RetryBudget()).budget

    def test_from_env(self):
        """A number of retries at once, or off."""
        assert 25.0 == RetryPolicy.from_env({"TRACED_RETRY_BUDGET": "25"}).budget.capacity
        assert None is RetryPolicy.from_env({"TRACED_RETRY_BUDGET": "off"}).budget

    @pytest.mark.parametrize("text", ["none", "0", "-3", "nan", "inf"])
    def test_from_env_refuses(self, text):
        """What cannot be is refused with the variable's name, and what is allowed."""
        with pytest.raises(PolicyError, match=r"TRACED_RETRY_BUDGET is .*1 or more, or off"):
            RetryPolicy.from_env({"TRACED_RETRY_BUDGET": text})

    def test_in_code(self):
        """A number is no budget."""
        with pytest.raises(PolicyError, match="budget is 10; "):
            RetryPolicy(budget=10)


class TestReply:
    async def test_without_a_token_it_fails_at_once(self, ask, recorder):
        """One request, no wait, the provider's own error, stop reason budget."""
        policy = RetryPolicy(budget=RetryBudget(2, per_reply=0, per_second=0))
        with pytest.raises(ProviderError):
            await ask(Scripted(DOWN), policy)
        began = asyncio.get_running_loop().time()
        script = Scripted(DOWN)
        with pytest.raises(ProviderError):
            await ask(script, policy)

        assert 1 == script.calls
        assert began == asyncio.get_running_loop().time()
        assert [("exhausted", "budget")] * 2 == [
            (r["traced_retry.outcome"], r["traced_retry.stop_reason"]) for r in recorder.replies
        ]
        assert [3, 1] == [r["traced_retry.attempts"] for r in recorder.replies]

    async def test_a_first_request_is_always_sent(self, ask):
        """The budget is for retries; the provider may be well again."""
        policy = RetryPolicy(budget=RetryBudget(1, per_reply=0, per_second=0))
        with pytest.raises(ProviderError):
            await ask(Scripted(DOWN), policy)

        assert "hello" == await ask(Scripted("hello"), policy)

    async def test_off(self, ask, recorder):
        """No budget, no limit."""
        for _ in range(20):
            with pytest.raises(ProviderError):
                await ask(Scripted(DOWN), RetryPolicy(budget=None))

        assert {"max_attempts": 20} == recorder.counted(
            "traced_retry.replies", "traced_retry.stop_reason"
        )

    async def test_to_listen_costs_nothing(self, recorder):
        """No request goes out."""

        class Listener(CallRequest):
            def next_action(self, why):
                return "listen"

        policy = RetryPolicy(budget=RetryBudget(1), attempt_timeout=2.0)
        trace = Telemetry(**recorder.providers).reply(Target("phonic"))
        with pytest.raises(TimeoutError):
            await Reply(Listener(Scripted(HANG).future), policy, trace).start()

        assert 4 == len(recorder.attempts)
        assert {"phonic": 1.0} == policy.budget.remaining()

    async def test_a_wait_past_the_deadline_costs_nothing(self, ask):
        """What is not sent is not paid."""
        policy = RetryPolicy(budget=RetryBudget(5))
        with pytest.raises(ProviderError):
            await ask(Scripted(ProviderError("rate_limit_exceeded", retry_after=30)), policy)

        assert {"openai": 5.0} == policy.budget.remaining()


class TestGauge:
    async def test_what_is_left_by_now(self, ask, recorder):
        """Per provider, with what time has earned since."""
        policy = RetryPolicy(budget=RetryBudget(4, per_reply=0, per_second=0.25))
        with pytest.raises(ProviderError):
            await ask(Scripted(DOWN), policy, "ultravox")  # three retries, and 1 + 2 + 4 s
        key = frozenset({("gen_ai.provider.name", "ultravox")})
        left = recorder.points(GAUGE)[key]
        await asyncio.sleep(1)

        assert (2.75, 3.0) == (left, recorder.points(GAUGE)[key])

    async def test_the_smallest_of_several(self, recorder, clock):
        """Two budgets for one provider: the one that will say no first."""
        Telemetry(**recorder.providers)
        budgets = RetryBudget(9), RetryBudget(5)
        for one in budgets:
            one.open("aws.bedrock", clock)

        assert {"aws.bedrock": 5.0}.items() <= dict(budget.remaining()).items()
        key = frozenset({("gen_ai.provider.name", "aws.bedrock")})
        assert 5.0 == recorder.points(GAUGE)[key]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_it_is_read():
    """The gauge is read in a thread; a child forked meanwhile must not wait for that for ever."""
    budget = RetryBudget()
    with budget._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if budget._lock.acquire(timeout=5) else 1)

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
