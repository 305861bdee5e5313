# SPDX-License-Identifier: Apache-2.0
"""The retry budget: tokens, who pays, what it does to a reply, and what the gauge tells."""

from __future__ import annotations

import asyncio
import copy
import math
import os
from concurrent.futures import ThreadPoolExecutor

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
    def test_new_budget_allows_as_many_retries_as_its_capacity(self, clock):
        """A new budget allows its capacity of retries at once, and no more."""
        bucket = RetryBudget(3)

        assert [True, True, True, False] == [bucket.spend("openai", clock) for _ in range(4)]

    def test_opened_bucket_is_full_before_its_first_reply(self, clock):
        """The gauge shows a provider that nothing was asked of, and its clock goes on."""
        bucket = RetryBudget(3, per_second=1)
        bucket.open("openai", clock)
        assert {"openai": 3} == bucket.remaining()
        bucket.spend("openai", clock)
        bucket.spend("openai", clock)
        clock.now += 1

        assert {"openai": 2} == bucket.remaining()

    def test_outage_of_one_provider_leaves_budget_of_others(self, clock):
        """One provider's outage leaves the other providers their retries."""
        bucket = RetryBudget(1)
        bucket.spend("openai", clock)

        assert not bucket.spend("openai", clock)
        assert bucket.spend("phonic", clock)

    def test_ten_replies_earn_one_retry(self, clock):
        """Ten replies earn one retry."""
        bucket = RetryBudget(1, per_reply=0.125, per_second=0)
        bucket.spend("openai", clock)
        for _ in range(7):
            bucket.earn("openai", clock)
        assert not bucket.spend("openai", clock)
        bucket.earn("openai", clock)

        assert bucket.spend("openai", clock)

    def test_budget_refills_with_time_up_to_capacity(self, clock):
        """An empty budget is full after capacity / per_second seconds, and never exceeds it."""
        bucket = RetryBudget(4, per_second=0.5)
        for _ in range(4):
            bucket.spend("openai", clock)
        clock.now += 4
        assert {"openai": 2.0} == bucket.remaining()
        clock.now += 400

        assert {"openai": 4.0} == bucket.remaining()

    def test_clock_that_goes_back_changes_nothing(self, clock):
        """A clock that goes back earns no retry and takes none."""
        bucket = RetryBudget(4)
        bucket.spend("openai", clock)
        clock.now -= 500

        assert {"openai": 3.0} == bucket.remaining()

    @given(st.lists(st.sampled_from(["earn", "spend", "wait"]), max_size=200))
    def test_retries_never_exceed_tokens_earned(self, steps):
        """The tokens stay between zero and the capacity, and pay for every retry."""
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

    @pytest.mark.parametrize("value", [0, 0.5, -1, math.nan, math.inf, "10", 10**400, True])
    def test_invalid_capacity_is_refused(self, value):
        """A capacity below one retry is refused, because max_retries=0 means that."""
        with pytest.raises(ValueError, match=r"capacity is .*finite number >= 1"):
            RetryBudget(value)

    @pytest.mark.parametrize("name", ["per_reply", "per_second"])
    def test_negative_income_is_refused(self, name):
        """A budget cannot lose tokens by replies or time."""
        with pytest.raises(ValueError, match=rf"{name} is -1; .*>= 0"):
            RetryBudget(**{name: -1})


class TestProcessBudget:
    @pytest.fixture(autouse=True)
    def no_budget_yet(self, monkeypatch):
        """Start without a budget, as a new process does."""
        monkeypatch.setattr(budget, "_process_budgets", {})

    def test_equal_capacities_share_one_budget(self):
        """The default, the same number given and the same number as an int are one budget."""
        assert budget.process_budget() is budget.process_budget(10.0)
        assert budget.process_budget() is budget.process_budget(capacity=10)
        assert budget.process_budget() is not budget.process_budget(11)

    @pytest.mark.parametrize("capacity", [0, math.nan, 10**400])
    def test_invalid_capacity_is_refused(self, capacity):
        """The error is that of the budget, and no budget is kept."""
        with pytest.raises(ValueError, match="capacity is"):
            budget.process_budget(capacity)
        assert {} == budget._process_budgets

    def test_threads_get_one_budget(self):
        """Two threads that ask at once share the budget."""
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda _: id(budget.process_budget(7)), range(64)))

        assert {id(budget.process_budget(7))} == found


class TestPolicy:
    def test_policies_share_process_budget_by_default(self):
        """Policies share the budget of the process unless they bring their own."""
        assert RetryPolicy().budget is RetryPolicy(max_retries=1).budget
        assert RetryPolicy().budget is RetryPolicy.from_env({}).budget
        assert RetryPolicy().budget is not RetryPolicy(budget=RetryBudget()).budget

    def test_env_variable_sets_budget(self):
        """The variable holds a number of retries, or off."""
        assert 25.0 == RetryPolicy.from_env({"TRACED_RETRY_BUDGET": "25"}).budget.capacity
        assert None is RetryPolicy.from_env({"TRACED_RETRY_BUDGET": "off"}).budget

    @pytest.mark.parametrize("text", ["none", "0", "-3", "nan", "inf"])
    def test_invalid_env_variable_is_refused(self, text):
        """The error names the variable and the values allowed."""
        with pytest.raises(PolicyError, match=r"TRACED_RETRY_BUDGET is .*1 or more, or off"):
            RetryPolicy.from_env({"TRACED_RETRY_BUDGET": text})

    def test_number_as_budget_is_refused(self):
        """A policy takes a budget object and refuses a number."""
        with pytest.raises(PolicyError, match="budget is 10; "):
            RetryPolicy(budget=10)


class TestReply:
    async def test_empty_budget_fails_reply_without_retry(self, ask, recorder):
        """The reply fails after one request with the provider's error and stop reason budget."""
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

    async def test_empty_budget_still_allows_first_request(self, ask):
        """The budget limits retries only, because the provider may have recovered."""
        policy = RetryPolicy(budget=RetryBudget(1, per_reply=0, per_second=0))
        with pytest.raises(ProviderError):
            await ask(Scripted(DOWN), policy)

        assert "hello" == await ask(Scripted("hello"), policy)

    async def test_policy_without_budget_has_no_limit(self, ask, recorder):
        """A policy without a budget retries without that limit."""
        for _ in range(20):
            with pytest.raises(ProviderError):
                await ask(Scripted(DOWN), RetryPolicy(budget=None))

        assert {"max_attempts": 20} == recorder.counted(
            "traced_retry.replies", "traced_retry.stop_reason"
        )

    async def test_listen_takes_no_token(self, recorder):
        """Listening sends no request, so it takes no token."""

        class Listener(CallRequest):
            def next_action(self, why):
                return "listen"

        policy = RetryPolicy(budget=RetryBudget(1), attempt_timeout=2.0)
        trace = Telemetry(**recorder.providers).reply(Target("phonic"))
        with pytest.raises(TimeoutError):
            await Reply(Listener(Scripted(HANG).future), policy, trace).start()

        assert 4 == len(recorder.attempts)
        assert {"phonic": 1.0} == policy.budget.remaining()

    async def test_retry_past_deadline_takes_no_token(self, ask):
        """A retry that is not sent takes no token."""
        policy = RetryPolicy(budget=RetryBudget(5))
        with pytest.raises(ProviderError):
            await ask(Scripted(ProviderError("rate_limit_exceeded", retry_after=30)), policy)

        assert {"openai": 5.0} == policy.budget.remaining()


class TestGauge:
    async def test_gauge_shows_tokens_left_per_provider(self, ask, recorder):
        """The gauge includes the tokens that time has earned since the last reply."""
        policy = RetryPolicy(base_delay=1.0, budget=RetryBudget(4, per_reply=0, per_second=0.25))
        with pytest.raises(ProviderError):
            await ask(Scripted(DOWN), policy, "ultravox")  # three retries, and 1 + 2 + 4 s
        key = frozenset({("gen_ai.provider.name", "ultravox")})
        left = recorder.points(GAUGE)[key]
        await asyncio.sleep(1)

        assert (2.75, 3.0) == (left, recorder.points(GAUGE)[key])

    async def test_gauge_shows_smallest_of_several_budgets(self, recorder, clock):
        """Of two budgets for one provider the gauge shows the one that refuses first."""
        Telemetry(**recorder.providers)
        budgets = RetryBudget(9), RetryBudget(5)
        for one in budgets:
            one.open("aws.bedrock", clock)

        assert {"aws.bedrock": 5.0}.items() <= dict(budget.remaining()).items()
        key = frozenset({("gen_ai.provider.name", "aws.bedrock")})
        assert 5.0 == recorder.points(GAUGE)[key]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_gauge_is_read_does_not_deadlock():
    """A child that is forked while a thread reads the gauge does not wait for its lock."""
    budget = RetryBudget()
    with budget._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if budget._lock.acquire(timeout=5) else 1)

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_copy_of_a_policy_shares_its_budget():
    """Two policies with the same budget must not retry twice as often."""
    budget = RetryBudget()

    assert budget is copy.copy(budget)
