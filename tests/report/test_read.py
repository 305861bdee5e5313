# SPDX-License-Identifier: Apache-2.0
"""Test stored spans as replies: real ones, and the remains of killed processes and other tools."""

from __future__ import annotations

import json

import pytest
from support.scripted import HANG, SUPERSEDED, ProviderError

from traced_retry import semconv
from traced_retry.report import Attempt, as_dict, read

from .conftest import BEGAN, FAILED, HEARD, raw_spans

SERVER_ERROR = ProviderError("server_error")
LIMITED = ProviderError("rate_limit_exceeded", retry_after=5.0)


def ended(reply):
    """Return the outcome and the stop reason."""
    return reply.outcome, reply.stop_reason, reply.attempt_count, reply.codes


class TestRealReplies:
    @pytest.mark.parametrize(
        ("steps", "how", "expected"),
        [
            (["hi"], {}, ("succeeded", None, 1, ())),
            ([SERVER_ERROR, "hi"], {}, ("recovered", None, 2, ("server_error",))),
            (
                [SERVER_ERROR],
                {"max_retries": 1},
                ("exhausted", "max_attempts", 2, ("server_error",) * 2),
            ),
            ([HANG], {}, ("exhausted", "deadline", 1, ("timeout",))),
            (
                [ProviderError("insufficient_quota")],
                {},
                ("not_recoverable", "not_recoverable", 1, ("insufficient_quota",)),
            ),
            ([HANG], {"cancel_at": 1.5}, ("interrupted", "interrupted", 1, ())),
            ([(1.0, SUPERSEDED)], {}, ("superseded", "superseded", 1, ())),
        ],
    )
    async def test_outcomes(self, store, steps, how, expected):
        """The emitted outcomes are read."""
        assert expected == ended(await store.run(*steps, **how))

    async def test_an_unknown_code_is_exact(self, store):
        """The span has the exact code, and only ``error.type`` is bounded."""
        reply = await store.run(ProviderError("odd_code"), "hi")

        assert ("odd_code",) == reply.codes
        assert "_OTHER" == reply.attempts[0].error_type

    async def test_every_field_of_a_retried_attempt(self, store):
        """Planned wait, real wait, decision and recoverability are read."""
        reply = await store.run(LIMITED, "hi", model="gpt-realtime")
        first, second = reply.attempts

        assert ("openai", "gpt-realtime") == (reply.provider, reply.model)
        assert (
            Attempt(
                number=1,
                start=first.start,
                end=first.end,
                action="send",
                delay=0.0,
                result="failed",
                error_code="rate_limit_exceeded",
                error_type="rate_limit_exceeded",
                recoverable=True,
                decision="retry",
                next_delay=first.next_delay,
            )
            == first
        )
        assert "succeeded" == second.result
        assert 5.0 <= first.next_delay == second.delay == reply.delay_total

    async def test_cut_in_the_wait(self, store):
        """A wait that was cut short is reported."""
        reply = await store.run(LIMITED, cancel_at=1.0)

        assert reply.ended_in_wait
        assert 1.0 == reply.delay_total
        assert 1.0 == reply.steps[-1].seconds

    async def test_as_dict(self, store):
        """The form for machines has plain values and fixed keys."""
        reply = await store.run(SERVER_ERROR, HANG, model="gpt-realtime")

        assert {
            "operation": "generate_reply",
            "initiator": "agent",
            "service": reply.service,
            "provider": "openai",
            "model": "gpt-realtime",
            "outcome": "exhausted",
            "stop_reason": "deadline",
            "attempts": 2,
            "seconds": round(reply.seconds, 6),
            "trace_id": reply.trace_id,
            "error_type": "server_error",
            "codes": ["server_error", "timeout"],
        } == json.loads(json.dumps(as_dict(reply)))


class TestTimes:
    def test_seconds(self, varied):
        """Times are Unix seconds, and replies are in the order of their start."""
        replies = varied.read()

        assert [0, 10, 20, 40, 50] == [r.start - BEGAN for r in replies]
        assert [0.25, 2.0, 10.0, 1.25, 1.0] == [r.seconds for r in replies]
        assert [0.5, 1.0, 0.5] == [s.seconds for s in replies[1].steps]

    def test_address(self, store):
        """The address of the request is read."""
        store.timed(
            (0, 1, HEARD),
            seconds=1,
            about={semconv.SERVER_ADDRESS: "api.openai.com", semconv.SERVER_PORT: 443},
            OUTCOME="succeeded",
        )

        (reply,) = store.read()

        assert ("api.openai.com", 443) == (reply.server_address, reply.server_port)


class TestIncomplete:
    def test_the_replys_own_span_is_missing(self, store):
        """The reply is put together from its attempts."""
        store.timed((0, 1, FAILED), (2, 3, HEARD), seconds=5, orphan=True)

        (reply,) = store.read()

        assert not reply.complete
        assert ("unknown", 2, 3.0, "gpt-realtime") == (
            reply.group,
            reply.attempt_count,
            reply.seconds,
            reply.model,
        )

    def test_an_attempt_is_missing(self, store):
        """The reply has the number of its attempts."""
        store.timed((0, 1, {**HEARD, "ATTEMPT": 3}), seconds=1, OUTCOME="recovered", ATTEMPTS=3)

        (reply,) = store.read()

        assert (1, 3, 2) == (len(reply.attempts), reply.attempt_count, reply.retries)

    def test_only_the_replys_span(self, store):
        """Without sampled attempts the waterfall is empty, and the sentence is complete."""
        store.timed(seconds=1, OUTCOME="succeeded", ATTEMPTS=1)

        (reply,) = store.read()

        assert ("succeeded", 1, ()) == (reply.outcome, reply.attempt_count, reply.steps)

    @pytest.mark.parametrize("unfinished", ['{"resourceSpans":[{"resource":{"attr', "\x00\xff[{"])
    def test_a_torn_last_line(self, varied, unfinished):
        """The half line of a killed process is skipped, and counted if it is ours."""
        with varied.path.open("a") as file:
            file.write(unfinished)

        replies = varied.read()

        assert (5, unfinished.startswith("{")) == (
            len(replies),
            bool(replies.unreadable_lines),
        )

    def test_a_torn_line_that_was_written_on(self, varied, tmp_path):
        """A line appended to a half line is read."""
        first, *rest = varied.path.read_text().splitlines()
        path = tmp_path / "torn.jsonl"
        path.write_text("\n".join([first[:-40] + rest[0], *rest[1:]]))

        replies = read(path)

        assert (5, 1) == (len(replies), replies.unreadable_lines)
        assert () == replies[0].attempts

    @pytest.mark.parametrize(
        "spans",
        [
            None,
            "spans",
            [None, 1, []],
            [{}],
            [{"name": ["generate_reply"]}],
            [{"name": "generate_reply", "attributes": {"key": "x"}}],
            [{"name": "generate_reply", "attributes": [{"key": None}, {"value": 1}, 7]}],
            [{"name": "generate_reply", "startTimeUnixNano": "soon", "endTimeUnixNano": []}],
        ],
    )
    def test_nonsense_beside_it(self, varied, spans):
        """Other content is skipped."""
        batch = {"resourceSpans": [{"scopeSpans": [{"spans": spans}, {}]}, None]}
        with varied.path.open("a") as file:
            file.write(f"{json.dumps(batch)} \n[]\n{'[' * 100_000}generate_reply\n")

        assert 5 == len(varied.read())

    @pytest.mark.parametrize("time", ["soon", None, [], 0, "-1", 1e300, "9" * 5000, "9" * 20])
    def test_times_that_cannot_be(self, varied, time):
        """Invalid times count as unknown."""
        lines = [json.loads(line) for line in varied.path.read_text().splitlines()]
        for span in raw_spans(lines):
            span["startTimeUnixNano"] = span["endTimeUnixNano"] = time
        varied.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

        assert [0.0] * 5 == [reply.seconds for reply in varied.read()]

    def test_values_that_cannot_be(self, varied):
        """Values of a wrong type are accepted."""
        lines = [json.loads(line) for line in varied.path.read_text().splitlines()]
        for span in raw_spans(lines):
            for attribute in span["attributes"]:
                number = "stringValue" not in attribute["value"]
                attribute["value"] = {"stringValue": "x"} if number else {"doubleValue": "NaN"}
        varied.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

        assert {("unknown", None)} == {(r.provider, r.outcome) for r in varied.read()}

    def test_names_cannot_steer_the_terminal(self, store):
        """Escape sequences and line breaks are removed, and long names are cut."""
        store.timed(
            (0, 1, HEARD),
            seconds=1,
            about={semconv.PROVIDER: "\x1b[2Jopen\nai\u202e", semconv.MODEL: "m" * 9999},
            OUTCOME="succeeded",
        )

        (reply,) = store.read()

        assert ("?[2Jopen?ai?", "m" * 200) == (reply.provider, reply.model)
