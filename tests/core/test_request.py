# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of a request, and when: listening, restarting, news, readiness, delivery."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest
from support.scripted import HANG, ProviderError, Scripted

from traced_retry import RetryPolicy
from traced_retry.core.cooldown import SessionCooldown
from traced_retry.core.failure import copy_error, failure
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest, Delivery
from traced_retry.core.telemetry import Target, Telemetry


class Request(CallRequest):
    """A request that does as it is told, and notes what it is asked."""

    __slots__ = ("asked", "given", "is_ready", "limits", "next_actions")

    def __init__(self, script, *, next_actions=(), limits=None):
        super().__init__(script.future)
        self.next_actions = list(next_actions)
        self.limits = limits or {}
        self.is_ready = True
        self.given = None
        self.asked = []

    def attempt(self, action):
        self.asked.append(action)
        return super().attempt(action)

    def limit(self, action):
        return self.limits.get(action)

    def next_action(self, why):
        return self.next_actions.pop(0) if self.next_actions else "send"

    def ready(self):
        return self.is_ready

    def abandon(self, attempt, then):
        self.asked.append(f"abandon, then {then}")
        super().abandon(attempt, then)

    def delivery(self, result):
        return self.given


@pytest.fixture
def reply(recorder):
    """``reply(request, **policy)`` -> a Reply that waits the full bound."""

    def make(request, *, on_failed=None, **policy):
        trace = Telemetry(**recorder.providers).reply(Target("somebody"))
        return Reply(
            request,
            RetryPolicy(**{"base_delay": 1.0, **policy}),
            trace,
            jitter=lambda bound: bound,
            on_failed=on_failed,
        )

    return make


def now():
    """The virtual time."""
    return asyncio.get_running_loop().time()


class TestActions:
    async def test_listen_and_restart_start_without_delay(self, reply, recorder):
        """No delay separates two windows of listening, so no reply is missed between them."""
        script = Scripted(HANG, HANG, HANG, "hello")
        request = Request(
            script,
            next_actions=["listen", "restart", "listen"],
            limits={"send": 5, "listen": 5, "restart": 4},
        )

        assert "hello" == await reply(request).start()
        assert [0, 5, 10, 14] == script.times
        assert ["send", "listen", "restart", "listen"] == [
            a["traced_retry.action"] for a in recorder.attempts
        ]
        assert {0.0} == {a["traced_retry.delay"] for a in recorder.attempts}

    async def test_abandon_gets_next_action(self, reply):
        """abandon() receives the next action of each failed attempt, or None."""
        request = Request(Scripted(ProviderError("server_error")), next_actions=["send", None])

        with pytest.raises(ProviderError):
            await reply(request).start()
        assert ["send", "abandon, then send", "send", "abandon, then None"] == request.asked

    async def test_no_safe_action_ends_reply(self, reply, recorder):
        """A recoverable failure ends the reply if no action is safe."""
        request = Request(Scripted(ProviderError("server_error")), next_actions=[None])

        with pytest.raises(ProviderError):
            await reply(request).start()
        assert "unsafe_to_resend" == recorder.replies[0]["traced_retry.stop_reason"]

    async def test_error_of_adapter_reaches_caller(self, reply, recorder):
        """The error of a broken adapter reaches the caller, and nothing stays open."""
        request = Request(Scripted(ProviderError("server_error")))
        request.next_actions = None  # next_action works; ready does not:
        request.is_ready = property()
        type(request).ready = lambda self: 1 / 0
        try:
            with pytest.raises(ZeroDivisionError):
                await reply(request).start()
        finally:
            type(request).ready = lambda self: self.is_ready
        assert 0 == recorder.open_spans
        assert "not_recoverable" == recorder.replies[0]["traced_retry.outcome"]

    @pytest.mark.parametrize("method", ["explain", "next_action", "ready", "limit"])
    async def test_exception_of_adapter_has_no_note(self, method, reply, recorder, caplog):
        """The caller gets the exception as it was raised, and the log names its place once."""
        raised = LookupError("SECRET")

        class Faulty(Request):
            __slots__ = ()

        def fail(*_):
            raise raised

        setattr(Faulty, method, fail)
        request = Faulty(Scripted(ProviderError("server_error")))
        asked = reply(request)
        if method == "limit":
            with pytest.raises(LookupError):
                asked.start()
            return
        with pytest.raises(LookupError) as caught:
            await asked.start()

        assert raised is caught.value
        assert not hasattr(raised, "__notes__")
        (record,) = caplog.records[-2:-1]
        assert "the retry of a reply raised LookupError at " in record.getMessage()
        assert f"{__file__}:{fail.__code__.co_firstlineno + 1}" in record.getMessage()
        assert "SECRET" not in caplog.text
        assert "not_recoverable" == recorder.replies[0]["traced_retry.outcome"]

    @pytest.mark.parametrize("end", ["interrupt", "cancel"])
    async def test_reply_that_ends_in_classify_is_not_retried(self, end, recorder):
        """A policy's function may end the very reply that it classifies."""
        trace = Telemetry(**recorder.providers).reply(Target("somebody"))
        request = Request(Scripted((0.5, ProviderError("server_error"))))

        def classify(_):
            asked.interrupt() if end == "interrupt" else future.cancel()

        asked = Reply(request, RetryPolicy(classify=classify, base_delay=0), trace)
        future = asked.start()
        await asyncio.sleep(5)

        assert future.cancelled()
        assert ["interrupted"] == [r["traced_retry.outcome"] for r in recorder.replies]
        assert 1 == request.asked.count("send")
        assert 0 == recorder.open_spans

    async def test_notes_of_replies_are_separate(self, reply):
        """A failure that ended several replies has the note of each on its own exception."""
        shared = failure(ProviderError("account_deactivated"), "authentication")
        asked = [reply(Request(Scripted(HANG)), max_retries=n) for n in range(2)]
        futures = [each.start() for each in asked]
        for each in asked:
            each.report_failure(copy_error(shared), "not_recoverable")
        errors = [future.exception() for future in futures]

        assert errors[0] is not errors[1]
        for error in errors:
            (note,) = error.__notes__
            assert note.startswith("traced_retry: 1 attempt(s), stopped by not_recoverable, trace")
        assert not hasattr(shared.error, "__notes__")

    @pytest.mark.parametrize(
        ("error", "calls"),
        [(TimeoutError(), 1), (ConnectionResetError(), 1), (ProviderError("server_error"), 2)],
    )
    async def test_unanswered_call_is_not_repeated_if_that_is_unsafe(self, error, calls, recorder):
        """The late answer to a call could still be heard, unless the provider refused the call."""
        script = Scripted(error, "hello")
        request = CallRequest(script.future, resend_after_timeout=False)
        trace = Telemetry(**recorder.providers).reply(Target("somebody"))
        future = Reply(request, RetryPolicy(base_delay=0), trace).start()
        await asyncio.wait([future])

        assert calls == script.calls
        if calls == 1:
            assert error is future.exception()
            assert "unsafe_to_resend" == recorder.replies[0]["traced_retry.stop_reason"]

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    async def test_end_of_program_in_send_ends_reply(self, kind, reply, recorder):
        """Ctrl-C passes unchanged, and the reply is recorded as interrupted."""

        class Ending(Request):
            __slots__ = ()

            def attempt(self, action):
                raise kind

        with pytest.raises(kind):
            reply(Ending(Scripted("hello"))).start()
        assert 0 == recorder.open_spans
        assert ["interrupted"] == [r["traced_retry.outcome"] for r in recorder.replies]
        assert ["interrupted"] == [a["traced_retry.result"] for a in recorder.attempts]

    async def test_cancelled_future_is_noticed_by_wake(self, reply, recorder):
        """An adapter's event ends a cancelled reply before the future's callback runs."""
        asked = reply(Request(Scripted(HANG)))
        future = asked.start()
        future.cancel()
        assert 2 == recorder.open_spans
        asked.wake()

        assert 0 == recorder.open_spans
        assert ["interrupted"] == [r["traced_retry.outcome"] for r in recorder.replies]

    async def test_callback_that_fails_is_logged_by_name(self, reply, caplog):
        """Its failure does not change the error of the reply."""
        request = Request(Scripted(ProviderError("invalid_api_key")))
        asked = reply(request, on_failed=lambda _: 1 / 0)
        await asyncio.wait([asked.start()])

        assert isinstance(asked.future.exception(), ProviderError)
        assert "on_exhausted raised ZeroDivisionError" in caplog.text

    async def test_hedge_follows_at_the_end_of_a_cooldown(self, recorder):
        """A request may be sent at the very time until which the provider wanted none."""

        class Hedging(CallRequest):
            def can_hedge(self):
                return True

        script, cooldown = Scripted(HANG, "hello"), SessionCooldown()
        policy = RetryPolicy(hedge_after=2.5)
        trace = Telemetry(**recorder.providers).reply(Target("somebody"))
        asked = Reply(Hedging(script.future), policy, trace, cooldown=cooldown).start()
        cooldown.until = now() + 2.5

        assert "hello" == await asked
        assert [0.0, 2.5] == script.times

    async def test_failed_reply_has_code_or_type_of_each_attempt(self, reply):
        """An unknown code stays exact, and a failure without a code has its error type."""
        told = []
        script = Scripted(ProviderError("odd_code"), TimeoutError(), ProviderError("quota!"))
        asked = reply(Request(script), on_failed=told.append, max_retries=2)
        await asyncio.wait([asked.start()])
        (failed,) = told

        assert ("odd_code", "timeout", "_OTHER") == failed.codes
        assert ("somebody", None, "exhausted", "max_attempts", 3) == (
            failed.provider,
            failed.model,
            failed.outcome,
            failed.stop_reason,
            failed.attempts,
        )

    async def test_failure_of_attempt_after_end_is_not_logged_by_asyncio(self, reply):
        """A plugin may end the future of an interrupted attempt with an error, much later."""
        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: reported.append(what))

        class Deaf(Request):
            __slots__ = ()

            def cancel(self, attempt):
                pass

        script = Scripted((5.0, ProviderError("server_error")))
        asked = reply(Deaf(script))
        asked.start()
        asked.interrupt()
        await asyncio.sleep(6)
        del asked
        script.futures.clear()
        gc.collect()

        assert [] == reported

    @pytest.mark.parametrize("method", ["cancel", "abandon", "delivery"])
    async def test_fault_of_adapter_beside_the_result_is_logged(
        self, method, reply, recorder, caplog
    ):
        """The log names the method, and the reply ends as it would without the fault."""

        class Faulty(Request):
            __slots__ = ()

        def fail(*_):
            raise LookupError("SECRET")

        setattr(Faulty, method, fail)
        steps = [HANG] if method == "cancel" else [ProviderError("server_error"), "hello"]
        asked = reply(Faulty(Scripted(*steps)), base_delay=0)
        future = asked.start()
        if method == "cancel":
            asked.interrupt()
        await asyncio.wait([future])

        outcome = "interrupted" if method == "cancel" else "recovered"
        assert [outcome] == [r["traced_retry.outcome"] for r in recorder.replies]
        (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
        assert record.getMessage().startswith(f"Request.{method} raised LookupError at ")
        assert "SECRET" not in caplog.text


class TestReadiness:
    async def test_retry_waits_until_request_is_ready(self, reply, recorder):
        """After the delay the retry waits until the request is ready, and no turn longer."""
        script = Scripted(ProviderError("server_error"), "hello")
        request = Request(script)
        request.is_ready = False
        asked = reply(request)
        future = asked.start()
        await asyncio.sleep(4)
        request.is_ready = True
        asked.wake()

        assert "hello" == await future
        assert [0, 4] == script.times
        assert [1.0] == [a["traced_retry.next_delay"] for a in recorder.attempts[:1]]
        assert [0.0, 4.0] == [a["traced_retry.delay"] for a in recorder.attempts]

    async def test_wake_during_a_check_checks_again(self, reply):
        """A request may become ready because of the very question, and nothing else wakes it."""

        class Shy(Request):
            __slots__ = ()

            def ready(self):
                was_ready, self.is_ready = self.is_ready, True
                asked.wake()
                return was_ready

        script = Scripted(ProviderError("server_error"), "hello")
        request = Shy(script)
        request.is_ready = False
        asked = reply(request)

        assert "hello" == await asked.start()
        assert [0, 1] == script.times

    async def test_request_that_is_never_ready_ends_at_deadline(self, reply, recorder):
        """The deadline ends the wait with the provider's error."""
        request = Request(Scripted(ProviderError("server_error")))
        request.is_ready = False

        with pytest.raises(ProviderError):
            await reply(request).start()
        assert 20.0 == now()
        assert "deadline" == recorder.replies[0]["traced_retry.stop_reason"]


class TestNews:
    async def test_reported_failure_ends_attempt_at_once(self, reply, recorder):
        """A reported failure ends the attempt before its timeout."""
        script = Scripted(HANG, "hello")
        asked = reply(Request(script))
        future = asked.start()
        await asyncio.sleep(0.5)
        asked.report_failure(failure(ConnectionResetError(), "connection_lost"))

        assert "hello" == await future
        assert [0, 1.5] == script.times
        assert ["connection_lost", None] == [a.get("error.type") for a in recorder.attempts]

    @pytest.mark.parametrize("after", [0.0, 0.5])
    async def test_reported_failure_with_stop_ends_reply(self, reply, recorder, after):
        """The reply ends within the call, in an attempt as in a wait."""
        asked = reply(Request(Scripted((0.25, ProviderError("server_error")))))
        future = asked.start()
        await asyncio.sleep(after)
        gone = ProviderError("account_deactivated")
        asked.report_failure(failure(gone, "authentication", code=gone.code), "not_recoverable")

        assert future.done()
        assert gone is future.exception()
        assert "not_recoverable" == recorder.replies[0]["traced_retry.stop_reason"]

    async def test_failure_reported_in_wait_does_not_end_next_attempt(self, reply, recorder):
        """News of the attempt before do not belong to the next attempt."""
        script = Scripted(ProviderError("server_error"), (0.5, "hello"))
        asked = reply(Request(script))
        future = asked.start()
        await asyncio.sleep(0.5)
        asked.report_failure(failure(ConnectionResetError(), "connection_lost"))

        assert "hello" == await future
        assert [0, 1] == script.times
        assert ["server_error", None] == [a.get("error.type") for a in recorder.attempts]

    async def test_failure_reported_during_send_is_used(self, reply):
        """A request may itself cause the event that ends it."""

        class Dying(Request):
            __slots__ = ()

            def attempt(self, action):
                asked.report_failure(failure(ProviderError(), "authentication"), "not_recoverable")
                return super().attempt(action)

        asked = reply(Dying(Scripted(HANG)))

        with pytest.raises(ProviderError):
            await asked.start()

    async def test_reply_that_is_interrupted_by_its_own_log_record_ends_once(self, reply, recorder):
        """A log handler may close the session, while the failure is recorded."""

        class Closing(logging.Handler):
            def emit(self, record):
                asked.interrupt()

        asked = reply(Request(Scripted(ProviderError("insufficient_quota"))))
        handler = Closing()
        logging.getLogger("traced_retry").addHandler(handler)
        try:
            with pytest.raises(ProviderError):
                await asked.start()
        finally:
            logging.getLogger("traced_retry").removeHandler(handler)

        assert {"not_recoverable": 1} == recorder.counted(
            "traced_retry.replies", "traced_retry.outcome"
        )

    async def test_failure_reported_after_end_is_ignored(self, reply):
        """A failure that is reported after the reply has ended changes nothing."""
        asked = reply(Request(Scripted("hello")))
        future = asked.start()
        await future
        asked.report_failure(failure(ProviderError(), "unknown"), "session_closed")
        asked.interrupt()

        assert "hello" == await future


class TestEndRetries:
    """The session drains, so no further attempt may begin."""

    LATE = failure(TimeoutError("drained"), "timeout", ended_locally=True)

    async def test_first_attempt_may_still_be_answered(self, reply, recorder):
        """Without retries the caller would wait for it, too."""
        asked = reply(Request(Scripted((3, "hello"))))
        future = asked.start()
        await asyncio.sleep(1)
        asked.end_retries(self.LATE)

        assert "hello" == await future
        assert ["succeeded"] == [r["traced_retry.outcome"] for r in recorder.replies]

    async def test_first_attempt_that_fails_is_the_last(self, reply, recorder):
        """The caller gets its own error."""
        script = Scripted((3, ProviderError("server_error")))
        asked = reply(Request(script))
        future = asked.start()
        await asyncio.sleep(1)
        asked.end_retries(self.LATE)

        with pytest.raises(ProviderError):
            await future
        assert 1 == script.calls
        assert "max_attempts" == recorder.replies[0]["traced_retry.stop_reason"]

    @pytest.mark.parametrize("second", [(30, "hello"), HANG])
    @pytest.mark.parametrize("after", [0.5, 1.5])
    async def test_wait_and_later_attempt_end_at_once(self, second, after, reply, recorder):
        """The agent gets the provider's error, in the wait as in the second attempt."""
        asked = reply(Request(Scripted(ProviderError("server_error"), second)))
        future = asked.start()
        await asyncio.sleep(after)
        asked.end_retries(self.LATE)

        assert isinstance(future.exception(), ProviderError)
        assert "deadline" == recorder.replies[0]["traced_retry.stop_reason"]

    @pytest.mark.parametrize("words", [False, True])
    async def test_only_reply_with_output_goes_on(self, words, reply, recorder):
        """A response without a word ends, and one with words is heard to its end."""
        request = Request(Scripted("hello"))
        request.given = delivery = Delivery()
        asked = reply(request)
        await asked.start()
        if words:
            delivery.mark_output()
        asked.end_retries(self.LATE)
        delivery.end()

        assert ("succeeded" if words else "exhausted") == (
            recorder.replies[0]["traced_retry.outcome"]
        )


class TestDelivery:
    @pytest.fixture
    async def delivered(self, reply):
        """A reply that was handed over, and its delivery."""
        request = Request(Scripted("hello"))
        request.given = Delivery()
        self.told = []
        asked = reply(request, on_failed=self.told.append)
        assert "hello" == await asked.start()
        return asked, request.given

    async def test_reply_stays_open_until_output(self, delivered, recorder):
        """The agent has its result, and the span stays open until the first output."""
        assert 2 == recorder.open_spans

    async def test_first_output_ends_reply(self, delivered, recorder):
        """The reply's time ends with the first word and not with the last."""
        await asyncio.sleep(0.5)
        delivered[1].mark_output()
        await asyncio.sleep(5)
        delivered[1].mark_output()
        delivered[1].end()

        assert "succeeded" == recorder.replies[0]["traced_retry.outcome"]
        assert {(1, 0.5)} == set(recorder.points("traced_retry.reply.duration").values())
        assert {(1, 0.5)} == set(recorder.points("traced_retry.attempt.duration").values())
        assert 0 == recorder.open_spans
        assert [] == self.told

    async def test_failure_after_output_is_recorded(self, delivered, recorder):
        """Span, metric, log and on_exhausted report it, and it does not count as heard."""
        delivered[1].mark_output()
        delivered[1].end(failure(ProviderError("server_error"), "server_error"))

        (told,) = recorder.replies
        assert "output_started" == told["traced_retry.stop_reason"]
        assert {"not_recoverable": 1} == recorder.counted(
            "traced_retry.replies", "traced_retry.outcome"
        )
        assert ["output_started"] == [failed.stop_reason for failed in self.told]

    async def test_failure_before_output_is_retried(self, reply, recorder):
        """The next attempt continues with the result that the agent has."""
        request = Request(Scripted("first", "second"))
        request.given = first = Delivery()
        asked = reply(request)
        assert "first" == await asked.start()
        request.given = second = Delivery()
        first.end(failure(ProviderError("server_error"), "server_error"))
        await asyncio.sleep(1.5)
        second.mark_output()
        second.end()

        assert ["send", "abandon, then send", "send"] == request.asked
        assert "recovered" == recorder.replies[0]["traced_retry.outcome"]
        assert 0 == recorder.open_spans

    async def test_failure_before_result_keeps_future_pending(self, reply):
        """The future waits for the next attempt and then holds the first result."""
        request = Request(Scripted("first", "second"))
        request.given = dead = Delivery()
        dead.end(failure(ProviderError("server_error"), "server_error"))
        asked = reply(request)
        future = asked.start()
        await asyncio.sleep(0.5)
        request.given = Delivery()

        assert not future.done()
        assert "first" == await future
        asked.interrupt()

    async def test_response_without_output_fails_at_deadline(self, delivered, recorder):
        """A response that starts and stays silent fails like one that never starts."""
        await asyncio.sleep(20)

        assert ("exhausted", "deadline") == (
            recorder.replies[0]["traced_retry.outcome"],
            recorder.replies[0]["traced_retry.stop_reason"],
        )
        assert ["deadline"] == [failed.stop_reason for failed in self.told]

    async def test_attempt_timeout_applies_until_output(self, reply, recorder):
        """The attempt timeout limits an attempt until its first word."""
        request = Request(Scripted("first", "second"))
        request.given = Delivery()
        asked = reply(request, attempt_timeout=3.0)
        await asked.start()
        await asyncio.sleep(2.9)
        request.given = second = Delivery()
        await asyncio.sleep(1.2)
        second.mark_output()
        second.end()

        assert ["send", "abandon, then send", "send"] == request.asked
        assert [3.0, 0.1] == [
            round(sum_ / count, 6)
            for count, sum_ in recorder.points("traced_retry.attempt.duration").values()
        ]

    async def test_session_failure_after_output_is_recorded(self, delivered, recorder):
        """The rest of the reply is lost: it is recorded, and does not count as heard."""
        delivered[1].mark_output()
        delivered[0].report_failure(failure(ProviderError(), "quota"), "not_recoverable")

        assert ("not_recoverable", "output_started") == (
            recorder.replies[0]["traced_retry.outcome"],
            recorder.replies[0]["traced_retry.stop_reason"],
        )

    async def test_failure_reported_after_delivery_began_changes_nothing(self, delivered, recorder):
        """Only the delivery says how a reply that has started ends, unless the session is over."""
        delivered[0].report_failure(failure(ProviderError(), "connection_lost"))
        await asyncio.sleep(1)
        assert 2 == recorder.open_spans
        delivered[1].mark_output()
        delivered[1].end()

        assert "succeeded" == recorder.replies[0]["traced_retry.outcome"]

    @pytest.mark.parametrize("first", ["end", "failure", "cancel"])
    async def test_second_end_changes_nothing(self, first, delivered, recorder):
        """An adapter may report the end of a response more than once."""
        ends = {
            "end": {},
            "failure": {"failure": failure(ProviderError("quota"), "quota")},
            "cancel": {"cancelled": True},
        }
        calls = []
        delivery = Delivery()
        delivery.on_end = lambda: calls.append(delivery.failure)
        delivery.end(**ends[first])
        for again in ends.values():
            delivery.end(**again)

        assert [ends[first].get("failure")] == calls
        assert (first == "cancel") == delivery.cancelled
        assert ends[first].get("failure") is delivery.failure

    async def test_cancelled_delivery_with_output_was_heard(self, delivered, recorder):
        """A reply that the caller cuts off after its first word was heard."""
        delivered[1].mark_output()
        delivered[1].end(cancelled=True)

        assert "succeeded" == recorder.replies[0]["traced_retry.outcome"]

    async def test_stalled_reply_fails_60_seconds_after_last_activity(self, delivered, recorder):
        """Each event of the provider starts the minute again."""
        delivery = delivered[1]
        delivery.mark_activity()
        delivery.mark_output()
        await asyncio.sleep(59)
        delivery.mark_activity()
        await asyncio.sleep(59.9)
        assert not delivery.ended
        await asyncio.sleep(0.2)

        assert ("timeout", True) == (delivery.failure.kind, delivery.failure.ended_locally)
        assert "output_started" == recorder.replies[0]["traced_retry.stop_reason"]
        assert "no answer within 60.0 s" == str(delivery.failure.error)

    async def test_deadline_does_not_apply_after_output(self, delivered, recorder):
        """The deadline limits only the time to the first word."""
        delivered[1].mark_output()
        await asyncio.sleep(60)
        delivered[1].end()

        assert "succeeded" == recorder.replies[0]["traced_retry.outcome"]

    async def test_cancel_before_output_interrupts_reply(self, delivered, recorder):
        """A cancel before the first word ends the reply as interrupted."""
        delivered[1].end(cancelled=True)

        assert "interrupted" == recorder.replies[0]["traced_retry.outcome"]

    @pytest.mark.parametrize(
        ("words", "outcome"), [(False, "not_recoverable"), (True, "succeeded")]
    )
    async def test_session_close_after_output_counts_as_heard(
        self, delivered, recorder, words, outcome
    ):
        """A reply that has started counts as heard if the session is closed."""
        if words:
            delivered[1].mark_output()
        closed = failure(ProviderError(), "session_closed", ended_locally=True)
        delivered[0].report_failure(closed, "session_closed")

        assert outcome == recorder.replies[0]["traced_retry.outcome"]
        assert 0 == recorder.open_spans
