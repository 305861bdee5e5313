# SPDX-License-Identifier: Apache-2.0
"""What a misbehaving backend costs replies: ``python benchmarks/backends.py``, some five minutes.

Each fault has an agent process: LiveKit's own OpenAI plugin, wrapped by us, exporting to a local
store and by OTLP to a backend that misbehaves. Two more make the same spans and export nothing:
the first is what all are compared with, and how far the second is from it shows how far a ratio can
be trusted. They take turns, a few replies each, so that a busy machine slows all of them alike.

CPU is the whole process's for one reply, the exporters' threads included: what exporting adds there
is the most that it can add to a reply on average. The model answers after a quarter of a second,
which is fast for a real one. Exit status 1 where a promise is broken; 2 where the machine was too
busy to tell.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

REPLIES = 1_000
AT_ONCE = 10
TURNS = 25
ANSWER = 0.25
"""Seconds until the model answers."""
FLOOD = 200_000
"""Spans made at once at a backend that hangs, to see that memory is bounded."""

MOST_RATIO = 1.05
MOST_EXIT = 5.0
MOST_FLOOD = 40
"""MiB: the queue's 2,048 spans, the batch being sent, and what Python's allocator keeps."""


# --- the agent's process ----------------------------------------------------------------------


async def agent(store, url, flood):
    """Told ``go`` on stdin, ask for a turn's replies; at its end leave."""
    from livekit.agents import telemetry  # noqa: PLC0415
    from livekit.plugins import openai  # noqa: PLC0415
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    import traced_retry  # noqa: PLC0415
    from traced_retry.export.setup import store_providers  # noqa: PLC0415

    if store:
        tracer_provider, meter_provider, _ = store_providers(Path(store), "benchmark")
    else:
        tracer_provider, meter_provider = TracerProvider(), MeterProvider()
    telemetry.set_tracer_provider(tracer_provider)
    if flood:
        await asyncio.to_thread(flooded, tracer_provider)
        return
    model = traced_retry.wrap(
        openai.realtime.RealtimeModel(
            api_key="a-key-for-the-simulator", base_url=url, modalities=["text"]
        ),
        meter_provider=meter_provider,
    )
    sessions = [model.session() for _ in range(AT_ONCE)]
    await asyncio.gather(*(timed(session) for session in sessions))  # connected, imported, warm
    tell(spans=2 * AT_ONCE)
    process = psutil.Process()
    before = process.memory_info().rss
    began = cpu(process)
    while await asyncio.to_thread(sys.stdin.readline) == "go\n":
        took = await asyncio.gather(*map(several, range(AT_ONCE), sessions))
        tell(seconds=[one for some in took for one in some], spans=2 * REPLIES // TURNS)
    tell(grown=process.memory_info().rss - before, cpu=cpu(process) - began)
    await asyncio.gather(*(session.aclose() for session in sessions))
    tell()


def cpu(process):
    times = process.cpu_times()
    return times.user + times.system


async def several(number, session):
    await asyncio.sleep(ANSWER * number / AT_ONCE)  # Callers do not speak in chorus.
    return [await timed(session) for _ in range(REPLIES // TURNS // AT_ONCE)]


async def timed(session):
    began = time.perf_counter()
    generation = await session.generate_reply()
    took = time.perf_counter() - began
    async for message in generation.message_stream:
        async for _ in message.text_stream:
            pass
    return took


def flooded(tracer_provider):
    tracer = tracer_provider.get_tracer("flood")
    attributes = {f"key.{n}": "value" * 4 for n in range(12)}
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(FLOOD):
        tracer.start_span("flood", attributes=attributes).end()
    tell(grown=process.memory_info().rss - before, spans=FLOOD)


def tell(**what):
    print(json.dumps(what), flush=True)


async def simulate():
    """The model's process: a server that answers late."""
    from traced_retry.simulator import OpenAISimulator  # noqa: PLC0415

    async with OpenAISimulator(f"late:{ANSWER}") as server:
        tell(url=server.url)
        await asyncio.Event().wait()


# --- the backends -----------------------------------------------------------------------------


class Backend(ThreadingHTTPServer):
    """An OTLP/HTTP backend. ``status`` None: never answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, status=200, *, delay=0.0, headers=None, tls=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.delay, self.headers = status, delay, headers or {}
        self.took = {}
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that goes away is expected."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if server.status is None:
            time.sleep(3600)
        time.sleep(server.delay)
        if server.status == 200 and self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    server.took.update((span.span_id, None) for span in scope.spans)
        self.send_response(server.status)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def refused():
    """A port that is taken, so that nobody else gets it, and where nobody listens."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    _taken.append(taken)
    return f"http://127.0.0.1:{taken.getsockname()[1]}"


_taken = []


# --- the run ----------------------------------------------------------------------------------

broken = []


def judge(what, kept):
    if not kept:
        broken.append(what)
    return "" if kept else "  BROKEN"


@dataclass
class _Agent:
    """One agent process, and what it told."""

    name: str
    store: str = ""
    backend: Backend | None = None
    url: str = ""
    exporter: str = "otlp"
    seconds: list[float] = field(default_factory=list)
    spans: int = 0
    grown: int = 0
    cpu: float = 0.0
    exit: float = 0.0
    said: str = ""

    def start(self, model, *, flood=False):
        env = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
        if endpoint := self.url or (self.backend and self.backend.url):
            env["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read at its end
        words = [sys.executable, __file__, "agent", self.store, model, "flood" if flood else ""]
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            words,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.hear()

    def hear(self):
        if not (line := self.process.stdout.readline()):
            self.process.wait()
            self.errors.seek(0)
            sys.exit(f"{self.name}: ended before its time\n{self.errors.read()}")
        for name, value in json.loads(line).items():
            setattr(self, name, value if name == "grown" else getattr(self, name) + value)

    def turn(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.hear()

    def leave(self):
        if not self.grown:
            self.process.stdin.close()
            self.hear()
            self.hear()
        began = time.perf_counter()
        self.process.wait(60)
        self.exit = time.perf_counter() - began
        self.errors.seek(0)
        self.said = self.errors.read()

    @property
    def p99(self):
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)]

    @property
    def dropped(self):
        """What the process said that it dropped, and why."""
        found = re.search(rf"exporter {self.exporter} dropped (\d+) span\(s\): (.*)", self.said)
        return (int(found[1]), found[2]) if found else (0, "")

    @property
    def delivered(self):
        return len(self.backend.took) if self.backend else 0

    def account(self):
        """Spans made, delivered and dropped, and whether that adds up."""
        count, why = self.dropped
        exact = judge(f"{self.name}: count", self.spans == self.delivered + count)
        sums = f"{self.spans:,} = {self.delivered:,} + {count:,}"
        return f"{sums}{f' ({why})' if why else ''}{exact}"

    def ended_well(self, allowance):
        """No exception, exit status 0, in time."""
        trouble = self.process.returncode != 0 or "Traceback" in self.said
        if trouble:
            print(self.said, file=sys.stderr)
        return judge(f"{self.name}: end", not trouble and self.exit < MOST_EXIT + allowance)


def agents(folder):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)

    def one(name, **backend):
        return _Agent(name, str(folder / f"{name}.jsonl"), Backend(**backend))

    made = [
        _Agent("no exporter"),
        _Agent("none again"),
        one("sound"),
        _Agent("refused", str(folder / "refused.jsonl"), url=refused()),
        one("hanging", status=None),
        one("slow, 1 s", delay=1.0),
        one("429", status=429, headers={"Retry-After": "1"}),
        one("503", status=503),
        one("certificate", tls=tls),
    ]
    if Path("/dev/full").exists():
        made.append(_Agent("disk full", "/dev/full", exporter="local_store"))
    return made


def main():
    print(
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f} when this began"
    )
    with tempfile.TemporaryDirectory() as temporary:
        simulator = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, __file__, "model"], stdout=subprocess.PIPE, text=True
        )
        model = json.loads(simulator.stdout.readline())["url"]
        try:
            quiet, allowance = run(agents(Path(temporary)), model)
            run_flood(Path(temporary), allowance)
        finally:
            simulator.terminate()
            simulator.wait()
    for what in broken:
        print(f"BROKEN: {what}")
    if broken:
        return 1
    return 0 if quiet else 2


def run(all_agents, model):
    for one in all_agents:
        one.start(model)
    for turn in range(TURNS):
        for one in all_agents[turn % 2 :: 1] + all_agents[: turn % 2]:
            one.turn()
    for one in all_agents:
        one.leave()
    print(
        f"{REPLIES:,} replies each, {AT_ONCE} at once, the model answers after {ANSWER:g} s.\n"
        f"Promised: p99 at most {MOST_RATIO:g} of no exporter's, exit below {MOST_EXIT:g} s, "
        "made = delivered + dropped.\n"
        f"  {'backend':<12}{'p99, ms':>9}{'ratio':>7}{'CPU, ms':>9}"
        f"{'memory, MiB':>13}{'exit, s':>9}"
        "  spans: made = delivered + dropped"
    )
    base, again = all_agents[0].p99, all_agents[1].p99
    quiet = max(base, again) / min(base, again) <= MOST_RATIO
    allowance = 0.0 if quiet else max(one.exit for one in all_agents[:2])
    for one in all_agents:
        ratio = one.p99 / base
        late = judge(f"{one.name}: p99", ratio <= MOST_RATIO or not quiet)
        account = one.account() if one.store else ""
        print(
            f"  {one.name:<12}{one.p99 * 1000:9.1f}{ratio:7.3f}"
            f"{one.cpu / REPLIES * 1000:9.2f}{one.grown / 2**20:+13.1f}"
            f"{one.exit:9.2f}  {account}{late}{one.ended_well(allowance)}"
        )

    if not quiet:
        print(
            "  The two without an exporter differ by more than 5 %: the machine was too busy,\n"
            "  and no ratio here tells anything. Exits were given what one without took besides."
        )
    return quiet, allowance


def run_flood(folder, allowance):
    one = _Agent("flood", str(folder / "flood.jsonl"), Backend(None))
    one.start("", flood=True)
    one.leave()
    grown = one.grown / 2**20
    bounded = judge("flood: memory", grown < MOST_FLOOD)
    print(f"{FLOOD:,} spans as fast as they can be made, at a hanging backend")
    print(f"  memory, MiB: {grown:+.1f}, at most {MOST_FLOOD}{bounded}")
    print(f"  exit, s: {one.exit:.2f}{one.ended_well(allowance)}")
    print(f"  {one.account()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["agent"]:
        asyncio.run(agent(*sys.argv[2:]))
        sys.exit()
    if sys.argv[1:2] == ["model"]:
        asyncio.run(simulate())
    sys.exit(main())
