# SPDX-License-Identifier: Apache-2.0
"""Test the real plugin against a real server on a socket, with events in any order.

A state machine requests, interrupts and closes on the agent's side. On the server's side it
answers, fails, stalls and closes the connection. It stops the event loop between two turns, so that
simultaneous events happen in every order. After each step the promise must hold, and at the end the
telemetry must agree with the events.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import aiohttp
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from livekit.agents import (
    Agent,
    AgentSession,
    APIConnectOptions,
    APIError,
    function_tool,
    llm,
)
from livekit.plugins import openai
from support.recorder import Recorder
from support.steered import SteeredServer
from support.stepped import FAILED, HEARD, INDEX, Errors, SteppedLoop, effort, play, seen_alike

import traced_retry
from traced_retry import semconv
from traced_retry.core import guard
from traced_retry.livekit import speech

SETTLED = 0.01
"""Seconds in which all that is on its way arrives; no timer of anybody's is as short."""
THEN = st.sampled_from([SETTLED, SETTLED, None, "turn", 0.5, 2.0])
"""What passes before the next step: so many seconds, nothing, or a turn of the event loop."""
ENDS = st.sampled_from(
    ["completed", "server_error", "odd_code", "rate_limit_exceeded", "incomplete", "cancelled"]
)
"""How a response that has begun may end; the fatal code would end the session."""


@dataclass
class Asked:
    """One reply that was requested."""

    name: str
    began: float
    future: asyncio.Future
    cancelled: bool = False
    words: list[str] = field(default_factory=list)
    """The tag of each word heard."""
    silent_after: int | None = None
    """No word may follow after so many."""

    def shut(self):
        """Allow no further word of the reply."""
        if self.silent_after is None:
            self.silent_after = len(self.words)


class Machine(RuleBasedStateMachine):
    """The state machine for a session of the plugin: see the module."""

    tool = None
    """The only one that there is; else any."""
    seen: ClassVar = Counter()
    """How often each outcome and stop reason was met."""

    def __init__(self):
        super().__init__()
        guard._logged.clear()
        self.errors = Errors()
        self.recorder = Recorder()
        self.stepped = SteppedLoop()
        self.asked = []
        self.told = []
        self.readers = []
        self.sent = 0
        self.interrupted = False
        """Whether anybody ever was: a plain response.cancel may hit another response."""
        self.closing = None
        self.in_vain = 0
        """How many were asked of a session that is over."""

    @initialize(
        policy=st.fixed_dictionaries(
            {
                "max_retries": st.sampled_from([3, 2, 1, 0]),
                "base_delay": st.sampled_from([0.5, 0]),
                "deadline": st.sampled_from([8.0, 20.0, 4.0]),
                "attempt_timeout": st.sampled_from([None, 1.5]),
            }
        ),
        budget=st.sampled_from([None, None, 2]),
        impatient=st.booleans(),
        mortal=st.booleans(),
        settled=st.booleans(),
    )
    def begin(self, policy, budget, impatient, mortal, settled):
        """Start with random limits for each reply, on a session that may be connected."""
        self.impatient = impatient
        self.may_die = mortal
        budget = None if budget is None else traced_retry.RetryBudget(budget)
        self.policy = traced_retry.RetryPolicy(**policy, budget=budget)
        self.stepped.run(self.set_up())
        self.stepped.go_on(SETTLED if settled else None)

    async def set_up(self):
        """Start a server and a session of the plugin."""
        self.server = SteeredServer()
        await self.server.start()
        self.http = aiohttp.ClientSession()
        self.model = openai.realtime.RealtimeModel(
            api_key="x",
            base_url=self.server.url,
            modalities=["text"],
            http_session=self.http,
            conn_options=APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0),
        )
        traced_retry.wrap(
            self.model,
            policy=self.policy,
            on_exhausted=self.told.append,
            **self.recorder.providers,
        )
        self.realtime = await self.open_session()
        send_event = self.realtime.send_event

        def count(event):
            kind = event["type"] if isinstance(event, dict) else event.type
            self.sent += kind == "response.create"
            send_event(event)

        self.realtime.send_event = count

    async def open_session(self):
        """Open the plugin's session."""
        session = self.model.session()
        session.on("generation_created", self.hear_of)
        return session

    # --- what the agent does -------------------------------------------------------------------

    @rule(then=THEN)
    @precondition(lambda self: len(self.waiting) < 3 and self.in_vain < 2)
    def ask(self, then):
        """Request a reply."""
        self.in_vain += self.hook._closed_by is not None
        name = str(len(self.asked))
        with self.stepped.standing():
            future = self.realtime.generate_reply(instructions=name)
            asked = Asked(name, self.stepped.now, future)
            self.asked.append(asked)
            future.add_done_callback(self.take)
        self.stepped.go_on(then)

    def take(self, future):
        """Read the requested reply as the agent does."""
        if not future.cancelled() and future.exception() is None:
            self.readers.append(asyncio.ensure_future(self.read(future.result())))

    def hear_of(self, generation):
        """Read a reply that was not requested, as the agent does."""
        if not generation.user_initiated:
            self.readers.append(asyncio.ensure_future(self.read(generation)))

    async def read(self, generation):
        """Note each word and each tool call."""

        async def listen():
            async for message in generation.message_stream:
                async for word in message.text_stream:
                    self.note(word)

        async def obey():
            async for call in generation.function_stream:
                self.note(call.name)

        await asyncio.gather(listen(), obey())

    def note(self, word):
        """Record a word or a tool call."""
        name, _, number = word.strip().partition(".")
        if number:
            self.asked[int(name)].words.append(number)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.impatient and self.waiting)
    def cancel(self, which, then):
        """Give up a reply that the agent waits for."""
        asked = self.waiting[which % len(self.waiting)]
        self.interrupted = asked.cancelled = True
        asked.shut()
        with self.stepped.standing():
            asked.future.cancel()
        self.stepped.go_on(then)

    @rule(then=THEN)
    @precondition(lambda self: self.impatient and self.busy)
    def interrupt(self, then):
        """Let the caller speak, which cuts each started reply once the server has noticed."""
        self.interrupted = True
        with self.stepped.standing():
            begun = [asked for asked in self.asked if asked.future.done()]
            self.realtime.interrupt()
        self.stepped.wait(SETTLED)
        for asked in begun:
            asked.shut()
        self.stepped.go_on(then)

    @rule(then=THEN)
    @precondition(lambda self: self.mortal and self.closing is None)
    def close(self, then):
        """Close the session."""
        self.closing = self.stepped.loop.create_task(self.realtime.aclose())
        self.stepped.go_on(then)

    # --- what the server does ------------------------------------------------------------------

    @rule(which=INDEX, message=st.booleans(), then=THEN)
    @precondition(lambda self: self.server.waiting)
    def answer(self, which, message, then):
        """Start to answer a request, possibly with a message."""
        self.serve(self.server.connection.begin_to_answer(which, message), then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.server.waiting)
    def answer_whole(self, which, then):
        """Answer a request from the first word to the end."""
        here = self.server.connection
        self.serve(here.begin_to_answer(which, message=True), None)
        self.serve(here.complete(), then)

    @rule(requests=st.integers(1, 3))
    @precondition(lambda self: self.busy and not self.server.willing)
    def be_willing(self, requests):
        """Answer some of the next requests at once and in full."""
        self.server.willing = requests

    @rule(then=THEN)
    @precondition(lambda self: self.busy and self.server.connection and not self.server.active)
    def speak_up(self, then):
        """Start a response that was not requested."""
        self.serve(self.server.connection.begin_its_own(), then)

    @rule(then=THEN)
    @precondition(lambda self: self.server.active)
    def say(self, then):
        """Send a word of the answer."""
        self.serve(self.server.connection.say(), then)

    @rule(then=THEN)
    @precondition(lambda self: self.server.active and not self.server.active.item)
    def call_tool(self, then):
        """Call a tool if there is no word yet."""
        here = self.server.connection
        self.serve(here.call(self.tool or here.tag), then)

    @rule(how=ENDS, word=st.booleans(), cut_in=st.booleans(), then=THEN)
    @precondition(lambda self: self.server.active)
    def end(self, how, word, cut_in, then):
        """End the answer with any status, and let the caller speak at the same time if drawn."""
        self.interrupted |= how == "cancelled"
        here = self.server.connection
        if word:
            self.serve(here.say(), None)
        end = here.complete() if how == "completed" else here.fail(how)
        self.serve(end, SETTLED if cut_in else then)
        if cut_in and self.impatient and self.in_session:
            self.interrupt(then)

    @rule(
        which=INDEX,
        code=st.sampled_from([None, "odd_code", "rate_limit_exceeded", "invalid_value"]),
        then=THEN,
    )
    @precondition(lambda self: self.server.waiting)
    def reject(self, which, code, then):
        """Answer a request with an error."""
        self.serve(self.server.connection.reject_one(which, code), then)

    @rule(code=st.sampled_from(["server_error", "insufficient_quota"]), then=THEN)
    @precondition(lambda self: self.busy and self.server.connection)
    def fail_at_something(self, code, then):
        """Send an error without a request's id. The fatal one ends the session."""
        code = code if self.mortal else "server_error"
        self.serve(self.server.connection.reject(None, code, "It failed.", code), then)

    @rule(down=st.sampled_from([0.0, 0.7, 30.0]), then=THEN)
    @precondition(lambda self: self.busy and self.server.connection)
    def hang_up(self, down, then):
        """Close the connection for some seconds. After 30 s the session ends."""
        self.serve(self.server.drop(down if self.mortal else min(down, 0.7)), then)

    @rule(seconds=st.sampled_from([1.0, 3.0]))
    @precondition(
        lambda self: self.busy or self.waiting or self.hook._closed_by or not self.in_session
    )
    def wait(self, seconds):
        """Let time pass."""
        self.stepped.wait(seconds)

    def serve(self, coroutine, then):
        """Run a step of the server."""
        with contextlib.suppress(ConnectionError):  # the client is about to leave
            self.stepped.run(coroutine)
        self.stepped.go_on(then)

    # --- what must hold ------------------------------------------------------------------------

    @invariant()
    def promise(self):
        """Check that at most one answer is heard, and none after an interruption or a failure."""
        for asked in self.asked:
            assert len(set(asked.words)) <= 1, asked
            future = asked.future
            if future.done() and not future.cancelled() and future.exception() is not None:
                assert isinstance(future.exception(), llm.RealtimeError)
                asked.shut()
            if asked.silent_after is not None:
                assert asked.silent_after == len(asked.words), asked

    @invariant()
    def no_hang(self):
        """Check that the agent knows the result by the deadline."""
        for asked in self.asked:
            if self.stepped.now > asked.began + self.policy.deadline:
                assert asked.future.done(), asked

    @invariant()
    def books(self):
        """Check that a span is open for each open reply and each running attempt."""
        if hasattr(self, "realtime"):
            replies = self.open_requests()
            assert replies == len(self.asked) - len(self.requested())
            assert replies <= self.recorder.open_spans <= 2 * len(self.hook._open)
        assert [] == self.errors.messages
        assert [] == self.unexpected()

    def open_requests(self):
        """Return the number of open replies that the agent requested."""
        return sum(reply._trace.target.initiator == "agent" for reply in self.hook._open)

    def requested(self):
        """Return the ended replies that the agent requested."""
        return [r for r in self.recorder.replies if r[semconv.INITIATOR] == "agent"]

    def unexpected(self):
        """Return the unexpected errors of the event loop.

        The plugin itself leaves two exceptions unread: the reason of a failed response, and the
        reason of a session's end.
        """
        return [
            context
            for context in self.stepped.errors
            if not isinstance(context.get("exception"), (APIError, llm.RealtimeError))
        ]

    # --- the end -------------------------------------------------------------------------------

    def teardown(self):
        """Let the server end its responses and send no more, so that everything ends."""
        failed = sys.exc_info()[0] is not None  # a step has
        try:
            if not failed:
                self.come_to_an_end()
                self.check_the_end()
        finally:
            if hasattr(self, "realtime"):
                self.stepped.run(self.tear_down())
            left = self.stepped.tasks()
            self.recorder.shutdown()
            self.errors.close()
            self.stepped.close()
        if not failed:
            assert set() == left
            assert 0 == self.recorder.open_spans

    def come_to_an_end(self):
        """Wait until the words end and the deadlines are over."""
        self.stepped.wait(SETTLED)
        here = self.server.connection
        if self.server.active and here.spoke:
            self.serve(here.complete(), SETTLED)
        elif self.server.active and here.tag == "own":
            self.serve(here.fail("cancelled"), SETTLED)
        self.stepped.wait(self.policy.deadline + 0.001)
        self.promise()

    def check_the_end(self):
        """Check that each reply has its true outcome and no stream is open."""
        assert all(asked.future.done() for asked in self.asked)
        assert all(reader.done() for reader in self.readers)
        assert self.server.active is None  # what nobody waits for was cancelled there
        for asked, told in zip(self.asked, self.requested(), strict=True):
            self.check_outcome(asked, told[semconv.OUTCOME])
        self.check_the_books(len(self.asked))

    def check_the_books(self, calls):
        """Check that spans, metrics, requests and calls of ``on_exhausted`` agree."""
        replies = self.requested()
        assert calls == len(replies)
        self.seen.update(seen_alike(self.recorder))
        assert self.sent == sum(
            a[semconv.ACTION] in ("send", "hedge") for a in self.recorder.attempts
        )
        assert {} == self.recorder.counted(semconv.METRIC_LATE_REPLIES)
        lost = [r for r in self.recorder.replies if r[semconv.OUTCOME] in FAILED]
        failed = [r[semconv.STOP_REASON] for r in lost]
        assert sorted(failed) == sorted(f.stop_reason for f in self.told)

    def check_outcome(self, asked, outcome):
        """Check that the recorded outcome is the real one."""
        if outcome in HEARD:
            assert asked.words
        elif outcome == "interrupted":
            assert self.interrupted
        else:
            assert outcome in FAILED
            assert not asked.cancelled

    async def tear_down(self):
        """Close everything."""
        closing = self.closing or asyncio.ensure_future(self.close_session())
        await asyncio.wait({closing})
        if not closing.cancelled():
            closing.exception()  # the plugin raises there again what ended the session
        await asyncio.wait([*self.readers, self.stepped.loop.create_future()], timeout=SETTLED)
        for reader in self.readers:
            reader.cancel()
        await self.http.close()
        await self.server.close()

    def close_session(self):
        """Close the plugin's session."""
        return self.realtime.aclose()

    # --- who is where --------------------------------------------------------------------------

    @property
    def in_session(self):
        """Return whether a reply can be requested."""
        return not self.closing

    @property
    def hook(self):
        """Return our hook of the session."""
        return self.realtime._traced_retry

    @property
    def mortal(self):
        """Return whether the session may end, which is drawn and needs a started session."""
        return self.may_die and len(self.asked) > 2

    @property
    def busy(self):
        """Return whether a reply is open. Without one, the only step is to request one."""
        return len(self.hook._open) > 0

    @property
    def waiting(self):
        """Return the replies that the agent waits for."""
        return [asked for asked in self.asked if not asked.future.done()]


class Ear(Agent):
    """An agent with a tool that notes each word before it is spoken."""

    def __init__(self, note):
        super().__init__(instructions="")
        self.note = note

    async def transcription_node(self, text, model_settings):
        """Note the words and pass them on."""
        async for word in text:
            self.note(word)
            yield word

    @function_tool
    async def lookup(self):
        """Look it up."""
        return "found"


class AgentMachine(Machine):
    """The state machine for an AgentSession, which queues, interrupts and calls tools."""

    tool = "lookup"
    seen: ClassVar = Counter()

    async def open_session(self):
        """Open an AgentSession with a session of the plugin."""
        self.agent = AgentSession(llm=self.model)
        self.agent.on("close", self.on_close)
        await self.agent.start(Ear(self.note))
        realtime = self.agent._activity._rt_session
        hook = realtime._traced_retry
        generate_reply, fail_speech = realtime.generate_reply, hook._fail_speech

        def count(**kwargs):
            self.calls += speech.current_speech() not in speech._failed
            return generate_reply(**kwargs)

        def count_failed(handle):  # a reply that is reported, because it will not be requested
            self.calls += 1
            fail_speech(handle)

        realtime.generate_reply, hook._fail_speech = count, count_failed
        return realtime

    calls = 0
    closed = False

    def on_close(self, event):
        """Note that the AgentSession closed by itself after errors."""
        self.closed = True

    @property
    def in_session(self):
        """Return whether the AgentSession takes requests."""
        return not (self.closed or self.closing)

    # --- what the user does --------------------------------------------------------------------

    @rule(then=THEN)
    @precondition(lambda self: len(self.waiting) < 3 and self.in_session)
    def ask(self, then):
        """Request a reply. The AgentSession requests one after the other from the plugin."""
        name = str(len(self.asked))
        with self.stepped.standing(), contextlib.suppress(RuntimeError):  # it closes by itself
            handle = self.agent.generate_reply(instructions=name)
            self.asked.append(Asked(name, self.stepped.now, handle))
        self.stepped.go_on(then)

    @rule(which=INDEX, then=THEN)
    @precondition(lambda self: self.impatient and self.waiting)
    def cancel(self, which, then):
        """Interrupt a reply that is queued, awaited or speaking."""
        asked = self.waiting[which % len(self.waiting)]
        self.interrupted = asked.cancelled = True
        with self.stepped.standing():
            asked.future.interrupt()
        self.stepped.wait(SETTLED)
        asked.shut()
        self.stepped.go_on(then)

    @rule(then=THEN)
    @precondition(lambda self: self.impatient and self.waiting and self.in_session)
    def interrupt(self, then):
        """Let the caller speak, which cuts all requested replies."""
        self.interrupted = True
        all_that = self.waiting
        with self.stepped.standing(), contextlib.suppress(RuntimeError):  # it closes by itself
            self.agent.interrupt()
        self.stepped.wait(SETTLED)
        for asked in all_that:
            asked.shut()
        self.stepped.go_on(then)

    @rule(then=THEN)
    @precondition(lambda self: self.mortal and not self.closing)
    def close(self, then):
        """Close the AgentSession."""
        self.interrupted = True
        self.closing = self.stepped.loop.create_task(self.agent.aclose())
        self.stepped.go_on(then)

    # --- what must hold ------------------------------------------------------------------------

    @invariant()
    def promise(self):
        """Check that at most one answer is heard, and none after an interruption or a failure."""
        for asked in self.asked:
            assert len(set(asked.words)) <= 1, asked
            if asked.future.done() and asked.future.exception() is not None:
                assert isinstance(asked.future.exception(), llm.RealtimeError)
                asked.shut()
            if asked.silent_after is not None:
                assert asked.silent_after == len(asked.words), asked

    @invariant()
    def no_hang(self):
        """Check that a reply speaks or has ended by its deadline, so that the queue continues."""
        if hasattr(self, "realtime"):
            for reply in self.hook._open:
                if self.stepped.now > reply._deadline:
                    assert reply.resolved
                    assert reply._attempt.delivery.first_output

    @invariant()
    def books(self):
        """Check that a span is open for each open reply and each running attempt."""
        if hasattr(self, "realtime"):
            replies = self.open_requests()
            assert replies == self.calls - len(self.requested())
            assert replies <= self.recorder.open_spans <= 2 * len(self.hook._open)
        assert [] == self.errors.messages
        assert [] == self.unexpected()

    def come_to_an_end(self):
        """Wait for the words, for each queued reply, and for each reply after a tool call."""
        calls = -1
        while self.busy or self.waiting or calls < self.calls:
            calls = self.calls
            super().come_to_an_end()
            assert self.stepped.now < 3600  # else a speech hangs

    def check_the_end(self):
        """Check that each requested reply has one outcome and each speech is done."""
        assert all(asked.future.done() for asked in self.asked)
        self.check_the_books(self.calls)

    def close_session(self):
        """Close the AgentSession and with it the plugin's session."""
        return self.agent.aclose()


def run(machine, caplog, *, examples):
    """Run the machine, and check that it met each important case."""
    caplog.set_level("CRITICAL")
    machine.seen.clear()
    run_state_machine_as_test(machine, settings=effort(examples=examples, steps=30))

    assert {"succeeded", "recovered", "exhausted", "interrupted"} <= set(machine.seen)


def test_plugin_session_keeps_promise_in_any_order(caplog):
    """A reply is heard at most once and in time, never after its end, and the counts agree."""
    run(Machine, caplog, examples=60)


def test_agent_session_keeps_promise_in_any_order(caplog):
    """The same holds above an AgentSession, which requests one reply after the other."""
    run(AgentMachine, caplog, examples=40)


class TestSeldom:
    """Cases that the machine meets too rarely."""

    BEGIN = (
        "begin",
        {
            "policy": {"max_retries": 3, "base_delay": 0.5, "deadline": 8.0},
            "budget": None,
            "impatient": True,
            "mortal": False,
            "settled": True,
        },
    )
    ASK = ("ask", {"then": SETTLED})
    ANSWER = ("answer", {"which": 0, "message": False, "then": SETTLED})

    @pytest.mark.parametrize("machine", [Machine, AgentMachine])
    def test_silent_response_is_cancelled_by_id_at_deadline(self, machine, caplog):
        """A response without output is cancelled by its id, so that another one can follow."""
        caplog.set_level("CRITICAL")
        play(machine(), self.BEGIN, self.ASK, self.ANSWER, ("wait", {"seconds": 10.0}))

    @pytest.mark.parametrize("machine", [Machine, AgentMachine])
    def test_interruption_between_attempts_sends_nothing(self, machine, caplog):
        """After an interruption no request is sent and no reply is heard."""
        caplog.set_level("CRITICAL")
        how = {"how": "server_error", "word": False, "cut_in": True, "then": None}
        willing = ("be_willing", {"requests": 3})
        wait = ("wait", {"seconds": 10.0})
        play(machine(), self.BEGIN, self.ASK, self.ANSWER, willing, ("end", how), wait)
