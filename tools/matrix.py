# SPDX-License-Identifier: Apache-2.0
"""Test each fault on each provider: with traced-retry, with the plugin alone, with blind retries.

``make matrix`` prints the tables and writes them to ``docs/providers.md``. Each cell is a real
AgentSession with the real plugin over a real socket to that provider's simulator, on the virtual
clock of the tests. The exit status is 1 if one of these happens with traced-retry: a reply is heard
twice or in the wrong order, a cut reply is not reported, a tool runs twice, a caller waits past the
deadline, a span stays open, or a row has another result than ``Row.must``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
warnings.simplefilter("ignore")

import aiohttp  # noqa: E402
from google.genai import types  # noqa: E402
from livekit.agents import (  # noqa: E402
    Agent,
    AgentSession,
    APIConnectOptions,
    function_tool,
    llm,
)
from livekit.agents.voice import SpeechHandle  # noqa: E402
from livekit.plugins import google, openai, phonic, ultravox  # noqa: E402
from livekit.plugins.nvidia.experimental import realtime as nvidia  # noqa: E402
from support.providers import PROVIDERS  # noqa: E402
from support.recorder import Recorder  # noqa: E402

import traced_retry  # noqa: E402
from traced_retry.core.budget import RetryBudget  # noqa: E402
from traced_retry.simulator.aws import AWSSimulator  # noqa: E402
from traced_retry.simulator.google import GoogleSimulator  # noqa: E402
from traced_retry.simulator.gpt_live import GPTLiveSimulator  # noqa: E402
from traced_retry.simulator.nvidia import PersonaPlexSimulator  # noqa: E402
from traced_retry.simulator.phonic import PhonicSimulator, redirected  # noqa: E402
from traced_retry.simulator.ultravox import UltravoxSimulator  # noqa: E402
from traced_retry.testing.clock import VirtualClockLoop  # noqa: E402

MARK = "SECRET"
"""Part of each key, instruction and question. The telemetry, the log and the output lack it."""
DEADLINE = traced_retry.RetryPolicy().deadline
FAST = APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0)


def _of(provider):
    def make(server, http, stack):
        return provider.model(
            api_key=MARK, base_url=server.url, http_session=http, conn_options=FAST
        )

    return make


def _google(server, http, stack):
    return google.realtime.RealtimeModel(
        api_key=MARK,
        modalities=[types.Modality.TEXT],
        http_options=types.HttpOptions(**server.http_options),
    )


def _ultravox(server, http, stack):
    return ultravox.realtime.RealtimeModel(
        api_key=MARK, base_url=server.url, http_session=http, output_medium="text"
    )


def _phonic(server, http, stack):
    stack.enter_context(redirected(server.url))
    return phonic.realtime.RealtimeModel(api_key=MARK)


def _gpt_live(server, http, stack):
    return openai.realtime.GPTLiveModel(
        api_key=MARK, base_url=server.url, http_session=http, conn_options=FAST
    )


def _nvidia(server, http, stack):
    return nvidia.RealtimeModel(base_url=server.url, http_session=http)


def _aws(server, http, stack):
    from livekit.plugins.aws.experimental.realtime import (  # noqa: PLC0415 - from Python 3.12 on
        realtime_model as aws,
    )

    stack.enter_context(server.redirected())
    return aws.RealtimeModel()


class _Log(logging.Handler):
    """Keep the log records of traced-retry."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


LOG = _Log()

WITH_IDS = {
    # Their replies carry the id of their request.
    "openai": PROVIDERS["openai"],
    "xai": PROVIDERS["xai"],
    "azure-openai": PROVIDERS["azure openai"],
    "inference": PROVIDERS["inference"],
    "azure-voicelive": PROVIDERS["voicelive"],
}

PROVIDERS = {
    **{name: (case.simulator, _of(case)) for name, case in WITH_IDS.items()},
    "google": (GoogleSimulator, _google),
    "ultravox": (UltravoxSimulator, _ultravox),
    "phonic": (PhonicSimulator, _phonic),
    "aws": (AWSSimulator, _aws),
    "gpt-live": (GPTLiveSimulator, _gpt_live),
    "nvidia": (PersonaPlexSimulator, _nvidia),
}


HEADS = {"bare": "plugin alone", "blind": "blind retries"}
STARTED = "not_recoverable (output_started)"
REPORTED_BY_HANDLE = ("max_attempts", "deadline", "budget", "unsafe_to_resend", "output_started")
"""Stop reasons after which the session goes on, so that the agent can learn of the failure."""


@dataclass(frozen=True)
class Row:
    """A fault: one line of each table."""

    name: str
    script: str
    at: float | None = None
    """Seconds until ``what`` is done."""
    what: str = ""
    instead: dict[str, str] = field(default_factory=dict)
    """Another script, by provider."""
    at_instead: dict[str, float] = field(default_factory=dict)
    """Another time, by provider."""
    must: str = ""
    """The required outcome with traced-retry, if replies carry the id of their request."""

    @property
    def turn(self) -> bool:
        """Return whether the caller speaks and the provider starts the reply."""
        return self.script.startswith("turn:")


ROWS = (
    Row("ok", "ok"),
    Row("answered after 7 s", "late:7"),
    Row("answered after 12 s", "late:12"),
    Row("first request silently lost, second answered", "silence,ok"),
    Row("every request lost", "silence"),
    Row("answered only after the deadline", "late:25"),
    Row("connection lost before the answer", "drop_before,ok"),
    Row(
        "coded error, then ok",
        "error:server_error,ok",
        instead={"google": "error:503,ok", "aws": "error:validationException,ok"},
    ),
    Row("rate limit, then ok", "rate_limit,ok"),
    Row("used-up quota or refused key", "quota", instead={"aws": "unauthorized"}),
    Row("barge-in during the attempt", "late:4", 2, "interrupt"),
    Row(
        "barge-in during the wait",
        "rate_limit:9,ok",
        7,
        "interrupt",
        instead={"google": "late:9", "ultravox": "late:9", "phonic": "late:14", "aws": "late:14"},
        at_instead={"phonic": 12, "aws": 12},
    ),
    Row("superseded by a second request", "late:3", 1, "supersede"),
    Row("realtime session closed", "late:4", 2, "close"),
    Row("agent session closed", "late:4", 2, "hang up"),
    # In the next rows a response has started when it fails.
    Row("failed before its first word, then ok", "failed_later,ok", must="recovered"),
    Row(
        "failed before its first word, with a message started",
        "failed_message,ok",
        must="recovered",
    ),
    Row(
        "failed while the next reply is queued",
        "failed_later,ok",
        what="queue",
        must="recovered",
    ),
    Row("failed after its first words", "failed_during,ok", must=STARTED),
    Row("connection lost after its first words", "drop_during,ok", must=STARTED),
    Row("tool call, then failure", "failed_tool:look_up,ok", must=STARTED),
    Row("ended incomplete", "incomplete,ok", must="not_recoverable"),
    Row("started, then silent", "stalled", must="exhausted (deadline)"),
    Row(
        "started, then silent, a second request would be answered",
        "stalled,ok",
        must="exhausted (deadline)",
    ),
    Row("completed without output, then ok", "empty,ok", must="recovered"),
    # Answers of servers that only resemble OpenAI's.
    Row("error with a number as code, then ok", "error:429,ok", must="recovered"),
    Row(
        "error of a permanent type with an unknown code",
        "error:authentication_error/odd_code",
        must="not_recoverable",
    ),
    Row(
        "rate limit with a wait of 114 hours, and a second reply",
        "rate_limit:411480,ok",
        what="queue",
    ),
    Row("answer without the id of its request", "unlabelled"),
    Row("the caller speaks", "turn:ok", must="succeeded"),
    Row(
        "the answer to the caller fails before its first word",
        "turn:failed_later",
        must="recovered",
    ),
    Row("the answer to the caller is rate-limited", "turn:rate_limit", must="recovered"),
    Row("the connection is lost before the answer", "turn:drop_before", must="recovered"),
    Row("the answer is cut off after its first words", "turn:drop_during", must=STARTED),
    Row("the answer ends incomplete", "turn:incomplete", must="not_recoverable"),
    Row("the answer is empty", "turn:empty", must="exhausted (unsafe_to_resend)"),
    Row("the caller is never answered", "turn:silence", must="exhausted (unsafe_to_resend)"),
    Row("the caller is answered after 12 s", "turn:late:12", must="exhausted (unsafe_to_resend)"),
    Row("the caller speaks, and a tool is called", "turn:tool:look_up,ok", must="succeeded"),
)


@dataclass
class Cell:
    """The result of one conversation."""

    asked: int = 1
    heard: int = 0
    cut: int = 0
    """The number of these that were heard in part."""
    tools: int = 0
    """The number of tool calls that ran."""
    seconds: float | None = 0.0
    """Seconds until the agent's code knew. None if they were not measured."""
    result: str = ""
    """Outcome and stop reason of the first reply with traced-retry, otherwise the agent's view."""
    known: bool = False
    """Whether the first handle has an exception."""
    announced: int = 0
    """Generations that the plugin announced as requested."""
    actions: str = ""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.asked > 1:
            heard = f"{self.heard} of {self.asked} heard"
        elif self.heard > 1:
            heard = "heard twice" if self.heard == 2 else f"heard {self.heard} times"
        else:
            heard = "heard" if self.heard else "not heard"
        heard += " in part" * bool(self.cut)
        tools = f"{self.tools} tool call" + "s" * (self.tools > 1) if self.tools else ""
        seconds = "" if self.seconds is None else f"{self.seconds:.1f} s"
        return ", ".join(filter(None, (heard, tools, self.result, seconds)))


def blindly(session: Any) -> None:
    """Retry as the upstream proposal does: send again after each RealtimeError."""
    original = session.generate_reply

    def generate_reply(**kwargs: Any) -> asyncio.Future[Any]:
        async def again() -> Any:
            for n in range(4):
                try:
                    return await original(**kwargs)
                except llm.RealtimeError:
                    if n == 3:
                        raise
                    await asyncio.sleep(min(2**n, 10))
            raise AssertionError

        return asyncio.ensure_future(again())

    session.generate_reply = generate_reply


def agent_for(cell: Cell, script: str) -> Agent:
    """Return an agent, with a tool if the script calls one."""

    @function_tool
    async def look_up() -> str:
        """Look it up."""
        cell.tools += 1
        return "found"

    tools = [look_up] if "tool:" in script else []
    return Agent(instructions=f"{MARK} instructions", tools=tools)


def agents_view(cell: Cell, handles: list[SpeechHandle]) -> str:
    """Return what the agent learns from LiveKit about its replies."""
    if not all(handle.done() for handle in handles):
        return "hangs"
    if any(handle.exception() for handle in handles):
        return "error"
    return "no error" if cell.heard < cell.asked or cell.cut else ""


async def play(provider: str, row: Row, mode: str) -> Cell:  # noqa: C901, PLR0912, PLR0915 - a script
    """Run one conversation and return its result."""
    simulator, make = PROVIDERS[provider]
    cell, recorder = Cell(), Recorder()
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        script = "ok" if provider == "nvidia" else row.instead.get(provider, row.script)
        server = await stack.enter_async_context(simulator(script))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        model = make(server, http, stack)
        if mode == "ours":
            # A budget of its own: the retries of one cell are not paid by the next.
            policy = traced_retry.RetryPolicy(budget=RetryBudget())
            traced_retry.wrap(model, policy=policy, **recorder.providers)
        session = AgentSession(llm=model)
        await session.start(agent_for(cell, script))
        realtime = session._activity._rt_session
        announced: list[bool] = []
        realtime.on("generation_created", lambda event: announced.append(event.user_initiated))
        if provider == "aws":
            await asyncio.sleep(1)  # the plugin opens its stream after 0.55 s
        if mode == "blind":
            blindly(realtime)
        began, second = loop.time(), None
        cell.asked = 2 if row.what in ("queue", "supersede") else 1
        if row.turn:
            handles = await speak(server, session)
        else:
            handles = [
                session.generate_reply(instructions=f"{MARK} question")
                for _ in range(2 if row.what == "queue" else 1)
            ]
        if row.at is not None:
            await asyncio.sleep(row.at_instead.get(provider, row.at))
            with contextlib.suppress(Exception):
                if row.what == "interrupt":
                    handles[0].interrupt()
                elif row.what == "supersede":
                    second = realtime.generate_reply()
                elif row.what == "close":
                    await realtime.aclose()
                else:
                    await session.aclose()
        playouts = [asyncio.ensure_future(handle.wait_for_playout()) for handle in handles]
        hanging: set[asyncio.Future[None]] = set()
        if playouts:
            _, hanging = await asyncio.wait(playouts, timeout=60)
        cell.seconds = None if row.turn else loop.time() - began
        if hanging:
            cell.problems.append("the caller hangs")
        await asyncio.sleep(40)
        items = session.history.items
        said = [
            i.text_content or "" for i in items if i.type == "message" and i.role == "assistant"
        ]
        cell.heard = sum(text.count("reply") + text.count("answer") for text in said)
        cell.cut = cell.heard - sum(text.count(it) for text in said for it in server.completed)
        cell.announced = sum(announced)
        if said != sorted(said):
            cell.problems.append("heard in the wrong order")
        if second is not None and second.done() and not second.cancelled():
            cell.heard += second.exception() is None and cell.heard == 0
        cell.result = agents_view(cell, handles)
        # A turn without an answer has no handle.
        cell.known = not handles or (handles[0].done() and handles[0].exception() is not None)
        for playout in hanging:
            playout.cancel()
        with contextlib.suppress(Exception):
            await session.aclose()
    if mode == "ours":
        with_ids = provider in WITH_IDS and not (row.turn and provider == "azure-voicelive")
        judge(cell, row, recorder, with_ids=with_ids)
    recorder.shutdown()
    return cell


async def speak(server: Any, session: AgentSession[None]) -> list[SpeechHandle]:
    """Have the caller speak, and return the handles of the provider's replies within 15 s."""
    handles: list[SpeechHandle] = []
    session.on("speech_created", lambda event: handles.append(event.speech_handle))
    await server.wait_for("connected")
    await asyncio.sleep(1)  # the plugin configures its session
    await server.caller_speaks()
    for _ in range(15):
        await asyncio.sleep(1)
        if handles:
            break
    return list(handles)


def judge(cell: Cell, row: Row, recorder: Recorder, *, with_ids: bool) -> None:
    """Add a problem to the cell for each broken promise."""
    replies = recorder.replies
    first = replies[0] if replies else {}
    if row.turn:  # The time until the agent's code knows, without the steps of the script.
        spans = [s for s in recorder.spans() if s.name == "generate_reply"]
        cell.seconds = (spans[0].end_time - spans[0].start_time) / 1e9 if spans else None
    outcome, stop = (first.get(f"traced_retry.{name}") for name in ("outcome", "stop_reason"))
    reason = f" ({stop})" if stop and stop != outcome else ""
    came_to = f"{outcome or ''}{reason}"
    letters = [a["traced_retry.action"][0].upper() for a in recorder.attempts]
    cell.actions = " ".join(letters[: first.get("traced_retry.attempts", 0)])
    late = sum(recorder.points("traced_retry.late_replies").values())
    cell.result = came_to or "not noticed"
    cell.result += f" and {late} late reply counted" if late else ""
    must = row.must if with_ids else ""
    written = (
        repr([s.to_json() for s in recorder.spans()]),
        repr([recorder.points(name) for name in recorder.metric_names()]),
        repr([vars(record) | {"text": record.getMessage()} for record in LOG.records]),
        str(cell),
    )
    LOG.records.clear()
    # Whether a heard answer belongs to the failed reply cannot be known if there were two, or if
    # the answer carries no id.
    known = cell.asked == 1 and row.script != "unlabelled"
    wrong = {
        "heard twice": cell.heard > cell.asked,
        "announced twice": cell.announced > len(replies),
        "the tool ran twice": cell.tools > 1,
        "past the deadline": (cell.seconds or 0.0) > DEADLINE + 0.01,
        "a span stays open": recorder.open_spans,
        "heard after a failure was reported": known
        and cell.heard
        and not late
        and outcome == "exhausted",
        "counted as heard, but not heard": replies and not stop and not cell.heard,
        "heard in part, and not reported": cell.cut and not stop,
        # A late answer to the caller has a handle of its own.
        "the handle has no exception": stop in REPORTED_BY_HANDLE
        and not (cell.known or (row.turn and late)),
        "content in a span, a metric, the log or the output": any(MARK in text for text in written),
        f"the required result is {must}": must and must != came_to,
        "not all were heard": must == "recovered" and cell.heard < cell.asked,
    }
    cell.problems += [what for what, is_so in wrong.items() if is_so]


def run(provider: str, row: Row, mode: str) -> Cell:
    """Return one cell, run on its own virtual clock."""
    random.seed(0)  # the same jitter in each run, so that the page does not change by chance
    loop = VirtualClockLoop()
    loop.patience = 0.05 if provider == "aws" else 0.0  # its client uses threads for IO
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(play(provider, row, mode))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def table(provider: str, against: list[str], problems: list[str]) -> str:
    """Run the rows of one provider and return their table. Append its problems to ``problems``."""
    heads = ["fault", "script", "with traced-retry", "attempts", *(HEADS[m] for m in against)]
    lines = [f"### {provider}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    known_faults = PROVIDERS[provider][0].faults
    left_out = []
    for row in ROWS:
        script = row.instead.get(provider, row.script)
        if provider == "nvidia":
            if row.name != "ok":
                continue
        elif {f.removeprefix("turn:").partition(":")[0] for f in script.split(",")} - known_faults:
            left_out.append(row.name)
            continue
        ours = run(provider, row, "ours")
        others = [str(run(provider, row, mode)) for mode in against]
        problems += [f"{provider}, {row.name}: {p}" for p in ours.problems]
        cells = [row.name, f"`{script}`", str(ours), ours.actions, *others]
        lines.append(f"| {' | '.join(cells)} |")
        print(f"{provider:<16}{row.name:<60}", *cells[2:], sep="  | ", flush=True)
    if left_out:
        names = ", ".join(f'"{name}"' for name in left_out)
        lines += ["", f"Not in this protocol: {names}."]
    return "\n".join(lines)


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", default="bare,blind", help="also run: bare, blind")
    parser.add_argument("--only", default="", help="these providers, separated by commas")
    parser.add_argument("--write", type=Path, help="the page to write the tables into")
    arguments = parser.parse_args()
    logging.getLogger().addHandler(logging.NullHandler())  # hides the plugins' log
    logging.getLogger("traced_retry").addHandler(LOG)
    logging.getLogger("traced_retry").setLevel(logging.INFO)
    against = [mode for mode in arguments.against.split(",") if mode]
    names = [n for n in arguments.only.split(",") if n] or list(PROVIDERS)
    if unknown := set(names) - set(PROVIDERS):
        parser.error(f"--only: unknown {', '.join(unknown)}; expected {', '.join(PROVIDERS)}")
    if sys.version_info < (3, 12) and "aws" in names:
        parser.error("the AWS plugin needs Python 3.12; name the other providers with --only")
    problems: list[str] = []
    tables = [table(provider, against, problems) for provider in names]
    if arguments.write is not None:
        page = arguments.write.read_text()
        head, _, _ = page.partition("<!-- matrix -->")
        arguments.write.write_text(f"{head}<!-- matrix -->\n\n" + "\n\n".join(tables) + "\n")
    for problem in problems:
        print("PROBLEM", problem)
    print(f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
