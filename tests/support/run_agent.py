# SPDX-License-Identifier: Apache-2.0
"""Runs an example agent in LiveKit's real worker and job processes, without a room or a server.

``python run_agent.py examples/agent.py --jobs 2 --script ok`` prints, as JSON, what the simulator
heard, how the job processes ended, how long closing took, and what ``/metrics`` says, if served.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import aiohttp
from livekit.agents import JobExecutorType

from traced_retry.simulator import OpenAISimulator


async def run(agent, options):
    """Run the jobs, one after the other."""
    server = agent.server
    # LiveKit's own limits, 10 s each, pass during the imports and the exit of a process on a busy
    # machine.
    server.update_options(
        job_executor_type=JobExecutorType[options.executor.upper()],
        initialize_process_timeout=60,
        shutdown_process_timeout=60,
    )
    server._host = "127.0.0.1"
    server._mp_ctx_str = options.start
    server._mp_ctx = multiprocessing.get_context(options.start)
    if server._prometheus_port is not None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            server._prometheus_port = free.getsockname()[1]
    started = asyncio.Event()
    server.on("worker_started", started.set)
    async with OpenAISimulator(options.script) as simulator:
        os.environ.update(OPENAI_BASE_URL=simulator.url, OPENAI_API_KEY="sk-secret")
        running = asyncio.create_task(server.run(devmode=True, unregistered=True))
        await asyncio.wait_for(started.wait(), 60)
        ended = []
        for number in range(1, options.jobs + 1):
            await server.simulate_job(f"room {number}", fake_job=True)
            (process,) = [p for p in server._proc_pool.processes if p.running_job]
            await asyncio.wait_for(
                simulator.wait_for(lambda n=number: len(simulator.completed) >= n), 60
            )
            if options.kill:
                while 'succeeded"} 1.0' not in await scrape(server):  # noqa: ASYNC110 - HTTP
                    await asyncio.sleep(0.05)
                os.kill(process.pid, 9)
                await process.join()
            else:
                began = time.monotonic()
                await process.aclose()
                ended.append(
                    {
                        "seconds": time.monotonic() - began,
                        "exitcode": getattr(process, "exitcode", 0),
                        "killed": getattr(process, "killed", False),
                    }
                )
        scraped = await scrape(server) if server._prometheus_port is not None else ""
        await server.aclose()
        await running
        return {
            "requests": len(simulator.requests),
            "completed": len(simulator.completed),
            "ended": ended,
            "scraped": scraped,
        }


async def scrape(server):
    """What LiveKit's /metrics says."""
    url = f"http://127.0.0.1:{server._prometheus_port}/metrics"
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        return await response.text()


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("agent", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--script", default="ok")
    parser.add_argument("--executor", default="process")
    parser.add_argument("--start", default="forkserver")
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sys.path.insert(0, str(options.agent.parent.resolve()))
    ran = asyncio.run(run(importlib.import_module(options.agent.stem), options))
    sys.stdout.write(json.dumps(ran) + "\n")


if __name__ == "__main__":
    main()
