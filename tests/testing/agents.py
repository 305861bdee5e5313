# SPDX-License-Identifier: Apache-2.0
"""Small agents with one planted error each, and a correct one.

Each is a pair of functions for ``check_agent``: ``start`` returns a session, and ``ask`` has it
give one reply. The agents with errors of their own do not retry by traced-retry.
"""

from __future__ import annotations

import asyncio
import dataclasses

from livekit.agents import Agent, AgentSession, function_tool
from livekit.plugins import openai

import traced_retry

PERMANENT = "model_not_found"


class Waiter(Agent):
    """An agent with a tool."""

    def __init__(self):
        super().__init__(instructions="Be brief.")

    @function_tool
    async def look_up(self) -> str:
        """Look a table up."""
        return "table 4"


async def start(server, **policy):
    """Start a session."""
    model = openai.realtime.RealtimeModel(api_key="a-key", base_url=server.url, modalities=["text"])
    traced_retry.wrap(model, policy=traced_retry.RetryPolicy(**policy))
    session = AgentSession(llm=model)
    await session.start(Waiter())
    return session


async def start_bare(server):
    """Start a session with the plugin alone."""
    model = openai.realtime.RealtimeModel(api_key="a-key", base_url=server.url, modalities=["text"])
    session = AgentSession(llm=model)
    await session.start(Waiter())
    return session


async def start_without_retries(server):
    """Start a session that reports each failure, and retries none."""
    return await start(server, max_retries=0)


async def start_patient(server):
    """Start a session with a deadline that is too long."""
    return await start(server, deadline=60.0)


async def start_hasty(server):
    """Start a session that forgets the wait that a provider asks for."""
    return await start(server, classify=lambda f: dataclasses.replace(f, retry_after=None))


async def ask(session):
    """Ask once, and return the error."""
    handle = session.generate_reply()
    await handle
    return handle.exception()


def code_of(error):
    """Return the provider's code of an error."""
    return getattr(error, "code", None)


async def ask_impatiently(session):
    """Ask again after 3 s, and do not cancel the first request: both replies are heard."""
    handle = session.generate_reply()
    done, _ = await asyncio.wait([asyncio.ensure_future(_wait(handle))], timeout=3.0)
    if done:
        return handle.exception()
    return await ask(session)


async def _wait(handle):
    await handle


async def ask_and_hang(session):
    """Wait for a reply that was lost."""
    error = await ask(session)
    if error is not None:
        await asyncio.Event().wait()


async def ask_and_swallow(session):
    """Lose the error."""
    await ask(session)


async def ask_stubbornly(session):
    """Ask again after an error that cannot pass."""
    error = await ask(session)
    if code_of(error) == PERMANENT:
        error = await ask(session)
    return error


async def ask_after_a_tool(session):
    """Ask again after a failure, although a tool has run."""
    handle = session.generate_reply()
    await handle
    error = handle.exception()
    if error is not None and any(i.type == "function_call" for i in session.history.items):
        error = await ask(session)
    return error


async def ask_and_close(session):
    """Close the session after a failure."""
    error = await ask(session)
    if error is not None:
        await session.aclose()
    return error


AGENTS = {
    "heard_twice": (start_without_retries, ask_impatiently),
    "hung": (start_without_retries, ask_and_hang),
    "failure_not_reported": (start_without_retries, ask_and_swallow),
    "retried_permanent_error": (start_without_retries, ask_stubbornly),
    "retry_after_ignored": (start_hasty, ask),
    "tool_ran_twice": (start_without_retries, ask_after_a_tool),
    "silence_over_deadline": (start_patient, ask),
    "session_lost": (start_without_retries, ask_and_close),
}
"""By the error of the agent."""
