# SPDX-License-Identifier: Apache-2.0
"""Run an agent through a table of faults, and name its errors.

Each case is one reply of a new session against a new server, on the virtual clock. The server
counts requests, and the agent's chat history has the replies that were heard.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from livekit.agents import AgentSession, llm
from livekit.agents.utils import http_context
from livekit.agents.voice import SpeechHandle

from traced_retry.core.budget import refill
from traced_retry.simulator import Script, Simulator, simulator
from traced_retry.testing.clock import run

Error = Literal[
    "heard_twice",
    "hung",
    "failure_not_reported",
    "retried_permanent_error",
    "retry_after_ignored",
    "tool_ran_twice",
    "silence_over_deadline",
    "session_lost",
]
"""The errors that a verdict names."""

Start = Callable[[Simulator], Awaitable["AgentSession[Any]"]]
Ask = Callable[["AgentSession[Any]"], Awaitable["BaseException | None"]]

DEADLINE: Final = 20.0
"""The time limit in seconds for a reply to be heard or reported as failed."""
_HUNG: Final = 300.0
"""The time limit in seconds. A reply that is then neither heard nor reported is called hung."""
_SETTLE: Final = 30.0
"""Seconds that are left after a reply for a second one to be heard."""
_TOLERANCE: Final = 0.5
"""Seconds."""
_LOOK: Final = 0.1
"""Seconds between two looks for a reply to the caller."""
_TOOL: Final = "TOOL"


@dataclass(frozen=True)
class Case:
    """One fault, and the rules that apply to it."""

    script: str
    """The fault script of the server. ``TOOL`` stands for the name of the agent's first tool."""
    permanent: bool = False
    """Whether the error cannot pass, so that a second request is useless."""
    retry_after: float = 0.0
    """Seconds that the server asks to wait."""


CASES: Final = (
    Case("ok"),
    Case("error:server_error,ok"),
    Case("rate_limit:3,ok", retry_after=3.0),
    Case("rate_limit"),
    Case("error:model_not_found", permanent=True),
    Case("late:4,ok"),
    Case("late:12,ok"),
    Case("silence"),
    Case("failed_message,ok"),
    Case("drop_before,ok"),
    Case("turn:failed_message"),
    Case("failed_tool:TOOL"),
)
"""The table of faults. The last case is left out if the agent has no tool.

With ``turn:``, the caller speaks, and the provider starts the reply by itself.
"""


@dataclass(frozen=True)
class Finding:
    """One error of the agent."""

    error: Error
    script: str
    """The fault script that showed the error."""
    detail: str

    def __str__(self) -> str:
        """Return the finding in one line."""
        return f"{self.error} ({self.script}): {self.detail}"


class Verdict(tuple[Finding, ...]):
    """The errors of an agent. A correct agent has an empty verdict, which is false."""

    __slots__ = ()

    @property
    def errors(self) -> set[Error]:
        """The names of the errors."""
        return {finding.error for finding in self}

    def __repr__(self) -> str:
        """Return all findings, because pytest shows this text if an assertion fails."""
        return "\n".join(map(str, self)) or "no errors"

    __str__ = __repr__


def check_agent(
    start: Start,
    *,
    ask: Ask | None = None,
    deadline: float = DEADLINE,
    provider: str = "openai",
    cases: Sequence[Case] = CASES,
) -> Verdict:
    """Run an agent through a table of faults, and return its errors.

    Call it from a plain function. It runs an event loop of its own on a virtual clock, so that
    minutes of silence take no time. The retry budget is full at the start of each case.

    Args:
        start: an async function that gets the server and returns a started ``AgentSession``, of
            which the model's ``base_url`` is ``server.url``.
        ask: an async function that gets the session and has your agent give one reply. It returns
            or raises the error that your code learned of. Default: ``session.generate_reply()``,
            then ``SpeechHandle.exception()``.
        deadline: the time limit in seconds for each reply to be heard or reported as failed.
        provider: the protocol of the server, such as ``"openai"`` or ``"xai"``.
        cases: the faults.

    Raises:
        Exception: an error of ``start``, unchanged.
    """

    async def every_case() -> Verdict:
        found: list[Finding] = []
        for case in cases:
            refill()
            trial = _Trial(case, start, ask or _ask, deadline, provider)
            # LiveKit's session leaves its span current, so each case has a task of its own.
            found.extend(await asyncio.create_task(trial.run()))
        return Verdict(found)

    return run(every_case())


async def _ask(session: AgentSession[Any]) -> BaseException | None:
    handle = session.generate_reply()
    await handle
    return handle.exception()


class _Trial:
    """One case."""

    def __init__(self, case: Case, start: Start, ask: Ask, deadline: float, provider: str) -> None:
        self._case = case
        self._start = start
        self._ask = ask
        self._deadline = deadline
        self._server = simulator(provider)("ok", on_event=self._on_event)
        self._script = case.script
        self._found: list[Finding] = []
        self._tool: str | None = None
        self._outputs = 0
        """The results of the tool that the server received."""
        self._answered = 0
        """The results that a reply of the server has answered."""

    async def run(self) -> list[Finding]:
        """Return the errors in this case."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._server)
            if hasattr(http_context, "open"):  # The plugins share an HTTP session in a job.
                await stack.enter_async_context(http_context.open())
            session = await self._start(self._server)
            stack.push_async_callback(session.aclose)
            if _TOOL in self._script:
                tools = llm.ToolContext(session.current_agent.tools).function_tools
                if not tools:
                    return []
                self._tool = next(iter(tools))
                self._script = self._script.replace(_TOOL, self._tool)
            self._server.script = Script.parse(self._script)
            await self._check(session)
        return self._found

    async def _check(self, session: AgentSession[Any]) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        asked = self._turn(session) if "turn:" in self._script else self._ask(session)
        reply = asyncio.create_task(_outcome(asked))
        done, _ = await asyncio.wait([reply], timeout=_HUNG)
        seconds = now() - began
        if not done:
            reply.cancel()
            self._find("hung", f"the reply had neither words nor an error after {_HUNG:.0f} s")
            return
        if seconds > self._deadline + _TOLERANCE:
            self._find(
                "silence_over_deadline",
                f"the reply took {seconds:.1f} s, the deadline is {self._deadline:g} s",
            )
        await asyncio.sleep(_SETTLE)
        heard = _heard(session)
        # Each result of a tool has a reply of its own.
        if self._tool is None and len(heard) > 1:
            self._find("heard_twice", f"the caller heard {len(heard)} replies to one request")
        if self._tool is None and not heard and reply.result() is None:
            self._find("failure_not_reported", "no reply was heard, and your code got no error")
        if self._outputs > 1:
            self._find("tool_ran_twice", f"{self._tool} ran {self._outputs} times")
        self._check_requests()
        await self._check_session(session, len(heard))

    async def _turn(self, session: AgentSession[Any]) -> BaseException | None:
        """Let the caller speak. Return the error of the reply, or None if there is none in time."""
        handles: list[SpeechHandle] = []
        session.on("speech_created", lambda event: handles.append(event.speech_handle))
        await self._server.wait_for("connected")
        await self._server.caller_speaks()
        now = asyncio.get_running_loop().time
        limit = now() + self._deadline
        while now() < limit and not _heard(session):
            if errors := [e for h in handles if h.done() and (e := h.exception())]:
                return errors[0]
            await asyncio.sleep(_LOOK)
        return None

    def _check_requests(self) -> None:
        requests = self._server.requests
        if self._case.permanent and len(requests) > 1:
            self._find("retried_permanent_error", f"{len(requests)} requests were sent")
        if self._case.retry_after and len(requests) > 1:
            waited = requests[1].at - requests[0].at
            if waited < self._case.retry_after:
                self._find(
                    "retry_after_ignored",
                    f"the next request came after {waited:.1f} s, the server had asked for "
                    f"{self._case.retry_after:g} s",
                )

    async def _check_session(self, session: AgentSession[Any], before: int) -> None:
        """Have the agent give one more reply. The server is well again."""
        self._tool = None
        self._server.script = Script.parse("ok")
        reply = asyncio.create_task(_outcome(self._ask(session)))
        await asyncio.wait([reply], timeout=_HUNG)
        reply.cancel()
        if len(_heard(session)) <= before:
            self._find("session_lost", "the next reply was not heard, although the server was well")

    def _on_event(self, direction: str, event: dict[str, Any]) -> None:
        """Play the tool's case: call the tool until its result is there, then answer the result."""
        if direction != "received" or self._tool is None:
            return
        if (event.get("item") or {}).get("type") == "function_call_output":
            self._outputs += 1
        elif event.get("type") == "response.create":
            pending = self._outputs > self._answered
            self._answered += pending
            self._server.script = Script.parse("ok" if pending else self._script)

    def _find(self, error: Error, detail: str) -> None:
        self._found.append(Finding(error, self._script, detail))


async def _outcome(asked: Awaitable[BaseException | None]) -> BaseException | None:
    """Return the error that the agent's code learned of, returned or raised."""
    try:
        return await asked
    except Exception as error:  # noqa: BLE001 - the agent's own report
        return error


def _heard(session: AgentSession[Any]) -> list[str]:
    """Return the agent's texts in the chat history."""
    said = (i for i in session.history.items if i.type == "message" and i.role == "assistant")
    return [text for message in said if (text := message.text_content)]
