# SPDX-License-Identifier: Apache-2.0
"""A program that runs lines which create a ``model``, has one reply, and prints what was heard."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import warnings

from livekit.agents import Agent, AgentSession
from livekit.agents.utils import http_context


async def main(lines):
    """Run one conversation on the real clock."""
    warnings.simplefilter("ignore")
    async with http_context.open():
        names = {}
        exec(lines, names)
        session = AgentSession(llm=names["model"])
        await session.start(Agent(instructions="Be brief."))
        await asyncio.sleep(1)  # AWS opens its stream after 0.55 s
        handle = session.generate_reply(instructions="Say hello.")
        await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(wait(handle))), 60)
        await asyncio.sleep(1)  # Ultravox's words come after the handle is done
        said = [i.text_content for i in session.history.items if i.type == "message"]
        sys.stdout.write(f"{said} {handle.exception()!r}\n")
        sys.stdout.flush()
        os._exit(0)  # some plugins leave threads behind


async def wait(handle):
    """Wait for the end of a reply."""
    await handle


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(main(sys.argv[1]))
