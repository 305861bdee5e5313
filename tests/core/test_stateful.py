# SPDX-License-Identifier: Apache-2.0
"""The loop, whatever happens in whatever order: a state machine against a provider of the test's.

The provider hears requests, and answers, fails, stalls and dies as the machine says. The machine
acts between two turns of the event loop, so that what happens "at the same time" happens in every
order. After each step the promise holds; at the end the books agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.recorder import Recorder
from support.scripted import ProviderError
from support.stepped import FAILED, HEARD, INDEX, Errors, SteppedLoop, effort, play, seen_alike

from traced_retry import RetryPolicy, semconv
from traced_retry.core import breaker, guard
from traced_retry.core.breaker import circuit
from traced_retry.core.budget import RetryBudget
from traced_retry.core.cooldown import SessionCooldown
from traced_retry.core.failure import explain, failure
from traced_retry.core.loop import Reply
from traced_retry.core.request import Delivery
from traced_retry.core.telemetry import Target, Telemetry

ERRORS = st.sampled_from(
    [
        lambda: ProviderError("server_error"),
        lambda: ProviderError("rate_limit_exceeded", retry_after=1.5),
        lambda: ProviderError("insufficient_quota"),
        lambda: ProviderError("odd_code"),
        lambda: TypeError("a mistake in the code"),
    ]
)
THEN = st.sampled_from([None, "turn", 0.1, 0.5, 1.5])
"""What passes before the next step: nothing, a turn of the event loop, or so many seconds."""


@dataclass
class Sent:
    """One request that went out, and what became of it."""

    asked: Asked
    number: int
    future: object
    """The attempt that waits for its answer."""
    delivery: Delivery | None = None
    answered: bool = False
    over: bool = False
    """The provider is done with it."""
    discarded: bool = False
    """An answer to it reaches nobody."""
    kept: bool = False
    """Its attempt has ended, and an answer to it is still the reply."""

    def say(self):
        """A word of its answer, which the agent hears if it holds the reply."""
        if self.discarded:
            return
        if self.delivery is not None:
            self.delivery.mark_output()
        future = self.asked.future
        if future.done() and not future.cancelled() and future.exception() is None:
            self.asked.heard.append(self.number)


@dataclass
class Asked:
    """One reply that the agent asked for; as a Request, what the loop asks of it."""

    provider: Provider
    began: float
    reply: Reply | None = None
    future: object = None
    sent: list[Sent] = field(default_factory=list)
    attempts: int = 0
    heard: list[int] = field(default_factory=list)
    """The number of the request that each word answered."""
    told: list = field(default_factory=list)
    ended: int = 0
    interrupted: bool = False
    superseded: bool = False
    silent_after: int | None = None
    """No word may follow after so many."""
    problems: list[str] = field(default_factory=list)

    def shut(self):
        """From now on nothing of it may be heard."""
        if self.silent_after is None:
            self.silent_after = len(self.heard)

    # --- the Request protocol ------------------------------------------------------------------

    def attempt(self, action):
        """Send it, or listen on."""
        if self.ended or self.interrupted:
            self.problems.append("an attempt after the end")
        if self.attempts and action != "listen" and not self.provider.ready:
            self.problems.append("an attempt while the provider is not ready")
        self.attempts += 1
        future = self.provider.loop.create_future()
        if action == "listen":
            self.sent[-1].future = future
            return future
        self.sent.append(Sent(self, len(self.sent), future))
        next_time, self.provider.next_time = self.provider.next_time, None
        if next_time == "answer":
            self.provider.answer(self.sent[-1])
        elif next_time is not None:
            self.sent[-1].over = True
            raise next_time()
        return future

    def limit(self, action):
        return self.provider.limit

    def explain(self, error):
        return explain(error)

    def refused(self):
        if self.sent:
            self.problems.append("refused although it was sent")
        return failure(ProviderError(), "circuit_open")

    def timed_out(self, seconds):
        return failure(TimeoutError("ours"), "timeout", ended_locally=True)

    def next_action(self, why):
        actions = self.provider.actions
        action = actions[self.attempts % len(actions)]
        return "send" if action == "listen" and self.sent[-1].over else action

    def ready(self):
        return self.provider.ready

    def can_hedge(self):
        return self.provider.hedges and self.provider.ready

    def can_replace(self):
        return self.provider.hedges

    def has_answer(self):
        return False

    def abandon(self, attempt, then):
        if then == "hedge":
            self.sent[-1].kept = True
            attempt.cancel()
        elif then != "listen":
            self.settle()
            self._discard(attempt)

    def cancel(self, attempt):
        self.settle()
        self._discard(attempt)

    def settle(self):
        """Discard the requests of earlier attempts."""
        for sent in self.sent:
            if sent.kept:
                sent.kept, sent.discarded = False, True

    def delivery(self, result):
        if result.discarded:
            self.problems.append("a discarded answer was handed over")
        return result.delivery

    def _discard(self, attempt):
        for sent in self.sent:
            if sent.future is attempt:  # else the attempt raised, and never had a future
                if sent.discarded:
                    self.problems.append("discarded twice")
                sent.discarded = True
                attempt.cancel()


@dataclass
class Provider:
    """What all replies of one session share."""

    loop: object
    delivers: bool
    """Whether it tells what becomes of a reply that has begun."""
    actions: list
    """What is safe after the first, second... attempt; and again from the start."""
    limit: float | None
    hedges: bool
    """Whether it is safe to send another request while one is open, or begun without a word."""
    ready: bool = True
    next_time: object = None
    """What the next attempt meets at once: "answer", or what makes the error that it raises."""
    dead: tuple | None = None

    def answer(self, sent):
        """Begin the answer; where it tells of nothing further, that was all."""
        if sent.kept:  # The current attempt gets the answer, and nobody the one to its request.
            current = sent.asked.sent[-1]
            sent.kept, sent.future = False, current.future
            current.discarded, current.future = True, asyncio.Future(loop=self.loop)
        if not sent.discarded:
            sent.asked.settle()
        sent.answered, sent.over = True, not self.delivers
        if self.delivers:
            sent.delivery = Delivery()
        if not sent.future.done():
            sent.future.set_result(sent)


class Machine(RuleBasedStateMachine):
    """See the module."""

    seen: ClassVar = Counter()
    """How often each outcome, stop reason and action was met."""

    def __init__(self):
        super().__init__()
        guard._logged.clear()
        self.errors = Errors()
        self.recorder = Recorder()
        self.stepped = SteppedLoop()
        self.folder = tempfile.TemporaryDirectory()
        self.asked = []
        self.in_vain = 0
        """How many were asked of a session that is over."""

    @initialize(
        delivers=st.integers(0, 3),
        actions=st.lists(
            st.sampled_from(["send", "listen", "restart", None]), min_size=1, max_size=4
        ),
        limit=st.sampled_from([1.0, None]),
        hedges=st.booleans(),
        policy=st.fixed_dictionaries(
            {
                "max_retries": st.sampled_from([3, 2, 1, 0]),
                "base_delay": st.sampled_from([0.5, 0]),
                "deadline": st.sampled_from([8.0, 4.0]),
                "attempt_timeout": st.sampled_from([None, 1.5]),
                "hedge_after": st.sampled_from([0.5, None]),
                "first_word_timeout": st.sampled_from([0.5, None]),
            }
        ),
        budget=st.sampled_from([None, None, 2]),
        impatient=st.booleans(),
        mortal=st.booleans(),
    )
    def begin(self, delivers, actions, limit, hedges, policy, budget, impatient, mortal):
        """A provider, and what may be spent on each reply."""
        self.impatient, self.mortal = impatient, mortal
        self.provider = Provider(self.stepped.loop, delivers < 3, actions, limit, hedges)
        budget = None if budget is None else RetryBudget(budget)
        path = f"{self.folder.name}/breaker"
        self.policy = RetryPolicy(**policy, budget=budget, breaker=path)
        self.circuit = circuit(path, *Target("somebody").key)
        self.telemetry = Telemetry(**self.recorder.providers)
        self.retry_after = SessionCooldown()

    # --- what the agent does -------------------------------------------------------------------

    @rule(then=THEN)
    @precondition(lambda self: len(self.open) < 4 and self.in_vain < 2)
    def ask(self, then):
        """Ask for a reply."""
        self.in_vain += self.provider.dead is not None
        asked = Asked(self.provider, self.stepped.now)
        self.asked.append(asked)

        def on_failed(failed):
            asked.told.append(failed)
            asked.shut()

        def on_ended(reply, error):
            asked.ended += 1
            asked.settle()

        with self.stepped.standing():
            asked.reply = Reply(
                asked,
                self.policy,
                self.telemetry.reply(Target("somebody")),
                jitter=lambda bound: bound,
                cooldown=self.retry_after,
                on_failed=on_failed,
                on_ended=on_ended,
            )
            asked.future = asked.reply._future
            if self.provider.dead is not None:
                asked.reply.report_failure(*self.provider.dead)
            with contextlib.suppress(TypeError):  # a programming error passes through
                assert asked.reply.start() is asked.future
        self.stepped.go_on(then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.impatient and self.waiting)
    def cancel(self, which, then):
        """Give up waiting for one."""
        asked = self.waiting[which % len(self.waiting)]
        asked.interrupted = True
        asked.shut()
        with self.stepped.standing():
            asked.future.cancel()
        self.stepped.go_on(then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.impatient and self.waiting)
    def interrupt_one(self, which, then):
        """The same, without a turn of the event loop between."""
        asked = self.waiting[which % len(self.waiting)]
        asked.interrupted = True
        asked.shut()
        with self.stepped.standing():
            asked.reply.interrupt()
        self.stepped.go_on(then)

    @rule(then=THEN)
    @precondition(lambda self: self.impatient and self.resolved)
    def interrupt(self, then):
        """The user starts to speak: what has begun is cut."""
        with self.stepped.standing():
            for asked in self.resolved:
                asked.interrupted = True
                asked.shut()
                for sent in asked.sent:
                    if sent.answered and not sent.discarded:
                        sent.over = sent.discarded = True
                asked.reply.interrupt(cut=True)
        self.stepped.go_on(then)

    # --- what the provider does ----------------------------------------------------------------

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.unanswered)
    def answer(self, which, then):
        """Begin to answer a request, be it wanted or not."""
        with self.stepped.standing():
            self.provider.answer(self.unanswered[which % len(self.unanswered)])
        self.stepped.go_on(then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.unanswered)
    def answer_whole(self, which, then):
        """Answer a request from the first word to the end."""
        sent = self.unanswered[which % len(self.unanswered)]
        with self.stepped.standing():
            self.provider.answer(sent)
            sent.say()
            if sent.delivery is not None:
                sent.delivery.end()
        sent.over = True
        self.stepped.go_on(then)

    @rule(which=INDEX, words=st.integers(1, 2), then=THEN)
    @precondition(lambda self: self.answering)
    def say(self, which, words, then):
        """Some words of an answer."""
        sent = self.answering[which % len(self.answering)]
        with self.stepped.standing():
            for _ in range(words):
                sent.say()
        self.stepped.go_on(then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.answering)
    def finish(self, which, then):
        """The end of an answer, with a word if there was none."""
        sent = self.answering[which % len(self.answering)]
        with self.stepped.standing():
            sent.say()
        self.end(sent, None)
        self.stepped.go_on(then)

    @rule(which=INDEX, words=st.sampled_from([1, 0]), error=ERRORS, then=THEN)
    @precondition(lambda self: self.answering)
    def fail_begun(self, which, words, error, then):
        """An answer fails, before its first word or after."""
        sent = self.answering[which % len(self.answering)]
        with self.stepped.standing():
            for _ in range(words):
                sent.say()
        self.end(sent, explain(error()))
        self.stepped.go_on(then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.answering)
    def cut(self, which, then):
        """The provider cancels an answer: it heard the user."""
        sent = self.answering[which % len(self.answering)]
        sent.over = True
        if not sent.discarded:
            sent.asked.interrupted = True
            sent.asked.shut()
        with self.stepped.standing():
            sent.delivery.end(cancelled=True)
        self.stepped.go_on(then)

    @rule(which=INDEX, error=ERRORS, then=THEN)
    @precondition(lambda self: self.unanswered)
    def reject(self, which, error, then):
        """A request fails."""
        sent = self.unanswered[which % len(self.unanswered)]
        sent.over = True
        with self.stepped.standing():
            if not sent.future.done():
                sent.future.set_exception(error())
        self.stepped.go_on(then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.unanswered)
    def supersede(self, which, then):
        """The provider drops a request for a newer one."""
        sent = self.unanswered[which % len(self.unanswered)]
        sent.over = True
        with self.stepped.standing():
            if not sent.future.done():
                sent.asked.superseded = True
                sent.future.cancel()
        self.stepped.go_on(then)

    @rule(next_time=ERRORS | st.just("answer"))
    @precondition(lambda self: self.open and self.provider.next_time is None)
    def prepare(self, next_time):
        """The next attempt raises, or is answered in the same call."""
        self.provider.next_time = next_time

    @rule(seconds=st.sampled_from([0.2, 1.0, 30.0]), then=THEN)
    @precondition(lambda self: self.open and self.provider.ready)
    def lose_connection(self, seconds, then):
        """All that was asked is lost, and what was begun; it comes back after so many seconds."""
        lost = explain(ConnectionResetError())
        self.provider.ready = False
        self.stepped.loop.call_later(seconds, self.come_back)
        for sent in self.answering:
            self.end(sent, lost)
        for asked in self.open:
            for sent in asked.sent:
                sent.over = True
            with self.stepped.standing():
                asked.reply.report_failure(lost)
        self.stepped.go_on(then)

    def come_back(self):
        """It can be asked again."""
        self.provider.ready = True
        for asked in self.open:
            asked.reply.wake()

    @rule(stop=st.sampled_from(["session_closed", "not_recoverable"]), then=THEN)
    @precondition(lambda self: self.mortal and len(self.asked) > 2 and not self.provider.dead)
    def die(self, stop, then):
        """The session is closed, or says that it cannot go on."""
        if self.provider.dead is None:
            why = failure(ProviderError("gone"), "session_closed", ended_locally=True)
            self.provider.dead = (why, stop)
        with self.stepped.standing():
            for asked in self.open:
                asked.reply.report_failure(*self.provider.dead)
        self.stepped.go_on(then)

    @rule(then=THEN)
    @precondition(lambda self: len(self.asked) > 1)
    def open_circuit(self, then):
        """Other processes have seen the provider fail for all of them."""
        next_probe = round((self.stepped.now + breaker.INTERVAL) * 1e6)
        self.circuit._words[self.circuit._at + breaker._NEXT_PROBE] = next_probe
        self.stepped.go_on(then)

    @rule(seconds=st.sampled_from([1.0, 3.0]))
    @precondition(lambda self: self.open or self.provider.dead)
    def wait(self, seconds):
        """Time passes."""
        self.stepped.wait(seconds)

    # --- what must hold ------------------------------------------------------------------------

    @invariant()
    def promise(self):
        """At most one answer heard; none after an interruption, or after failure was told."""
        for asked in self.asked:
            assert [] == asked.problems
            assert len(set(asked.heard)) <= 1, asked.heard
            if asked.silent_after is not None:
                assert asked.silent_after == len(asked.heard)
            assert asked.ended <= 1
            assert asked.ended >= len(asked.told)
            if asked.ended:  # no request of it can be answered any more
                for sent in asked.sent:
                    assert (
                        sent.over
                        or sent.discarded
                        or (sent.answered and sent.delivery.first_output)
                    )

    @invariant()
    def no_hang(self):
        """By the deadline the agent knows; and all is over, unless it is speaking."""
        for asked in self.asked:
            if self.stepped.now > asked.began + self.policy.deadline:
                assert asked.future.done()
                assert asked.ended or any(
                    s.delivery is not None and s.delivery.first_output for s in asked.sent
                )

    @invariant()
    def books(self):
        """A span is open for each open reply, and for each attempt of it that is under way."""
        assert len(self.open) <= self.recorder.open_spans <= 2 * len(self.open)
        assert [] == self.errors.messages
        assert [] == self.stepped.errors

    def teardown(self):
        """The provider falls silent, but ends what it is saying; then everything is over."""
        try:
            if sys.exc_info()[0] is None and hasattr(self, "policy"):  # no step has failed
                self.come_to_an_end()
                self.check_the_end()
        finally:
            self.recorder.shutdown()
            self.errors.close()
            self.stepped.close()
            breaker.forget()
            self.folder.cleanup()

    def come_to_an_end(self):
        """Words end, and the rest has its time."""
        self.stepped.turn()
        for sent in self.answering:
            if sent.delivery.first_output:
                self.end(sent, None)
        self.stepped.wait(self.policy.deadline + 0.001)

    def check_the_end(self):
        """Each reply has one outcome, the one that is true, and nothing is left."""
        assert [] == self.open
        assert 0 == self.recorder.open_spans
        assert set() == self.stepped.tasks()
        for asked, told in zip(self.asked, self.recorder.replies, strict=True):
            outcome = told[semconv.OUTCOME]
            stop = told.get(semconv.STOP_REASON)
            assert asked.attempts == told[semconv.ATTEMPTS]
            assert semconv.OUTCOME_OF.get(stop, outcome) == outcome
            self.check_outcome(asked, outcome)
            assert [stop] * (outcome in FAILED) == [f.stop_reason for f in asked.told]
        self.seen.update(seen_alike(self.recorder))

    @staticmethod
    def check_outcome(asked, outcome):
        """What was told is what happened."""
        future = asked.future
        given = not future.cancelled() and future.exception() is None
        if outcome in HEARD:
            assert given
            assert (outcome == "recovered") == (asked.attempts > 1)
        elif outcome == "interrupted":
            assert asked.interrupted
        elif outcome == "superseded":
            assert asked.superseded
            assert future.cancelled() or given
        else:
            assert outcome in FAILED
            assert not future.cancelled()

    # --- who is where --------------------------------------------------------------------------

    @property
    def open(self):
        """The replies that are not over."""
        return [asked for asked in self.asked if not asked.ended]

    @property
    def waiting(self):
        """Those whose agent waits."""
        return [asked for asked in self.open if not asked.future.done()]

    @property
    def resolved(self):
        """Those whose agent has one, whether it speaks yet or not."""
        return [asked for asked in self.open if asked.reply.resolved and not asked.interrupted]

    @property
    def unanswered(self):
        """The requests that the provider knows of and has not answered."""
        return [s for asked in self.asked for s in asked.sent if not (s.answered or s.over)]

    @property
    def answering(self):
        """The requests whose answer has begun."""
        return [s for asked in self.asked for s in asked.sent if s.answered and not s.over]

    def end(self, sent, why):
        """The provider is done with an answer; ``why`` it failed, if so."""
        sent.over = True
        with self.stepped.standing():
            sent.delivery.end(why)


def test_loop_keeps_promise_in_any_order():
    """The promise holds for any order of events of provider, agent and clock."""
    Machine.seen.clear()
    run_state_machine_as_test(Machine, settings=effort(examples=200, steps=40))

    everything = {*semconv.OUTCOMES, *semconv.STOP_REASONS, *semconv.ACTIONS}
    assert set() == everything - set(Machine.seen)  # else it proves less than it seems to


class TestFound:
    """What the machine found, each as short as it could be made."""

    @staticmethod
    def begin(**changes):
        """The first step: a provider that tells no more than that a reply has begun."""
        policy = {"max_retries": 0, "base_delay": 0, "deadline": 4.0, "attempt_timeout": None}
        policy.update((name, changes.pop(name)) for name in list(changes) if name in policy)
        arguments = {"delivers": 3, "actions": ["send"], "limit": None, "budget": None}
        ready = {"impatient": True, "mortal": True, "hedges": False, "policy": policy}
        return "begin", {**arguments, **ready, **changes}

    def test_failure_in_turn_of_cancel_counts_as_interrupted(self):
        """The cancel came first, so the reply is interrupted and not exhausted."""
        lost = {"seconds": 1.0, "then": None}
        ask, cancel = ("ask", {"then": None}), ("cancel", {"which": 0, "then": None})
        play(Machine(), self.begin(), ask, cancel, ("lose_connection", lost))

    def test_retry_after_beyond_deadline_during_wait_is_not_waited_for(self):
        """A reply does not wait for a retry-after that ends after its deadline.

        Two replies wait. Then the first receives a longer retry-after than the second may wait.
        """
        limited = {"next_time": lambda: ProviderError("rate_limit_exceeded", retry_after=3.0)}
        ask, prepare = ("ask", {"then": None}), ("prepare", limited)
        wait = ("wait", {"seconds": 4.1})
        play(Machine(), self.begin(), prepare, ask, ask, ask, prepare, wait)

    def test_interrupted_while_about_to_listen(self):
        """A listen needs no connection, so no late answer is missed before it."""
        begin = self.begin(actions=["listen"], limit=1.0, max_retries=3)
        lost = ("lose_connection", {"seconds": 30.0, "then": None})
        ask, interrupt = ("ask", {"then": 1.5}), ("interrupt_one", {"which": 0, "then": None})
        play(Machine(), begin, lost, ask, interrupt)
