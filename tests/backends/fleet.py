# SPDX-License-Identifier: Apache-2.0
"""Run many job processes with simulators that record their requests and answers."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from backends.agent import PRELOAD, Job, run
from backends.reading import settle
from backends.servers import SCRAPE, Collector, Jaeger, Prometheus, free_ports

from traced_retry.simulator import simulator

PROVIDER = {
    "openai": "openai",
    "azure-openai": "azure.ai.openai",
    "azure-voicelive": "azure_voicelive",
    "xai": "x_ai",
    "google": "gcp.gemini",
    "ultravox": "ultravox",
    "phonic": "phonic",
    "aws": "aws.bedrock",
}
"""``gen_ai.provider.name`` of each simulator. LiveKit inference speaks OpenAI's protocol, by the
same adapter; NVIDIA's plugin has no ``generate_reply``."""
if sys.version_info < (3, 12):
    del PROVIDER["aws"]  # its client needs 3.12

CODED = ("openai", "azure-openai", "azure-voicelive", "xai")
"""Those that tell a code; of the others nothing is heard."""

NOT_RECOVERABLE = "invalid_request_error"
INCOMPLETE = "incomplete"
"""The fault of a turn whose answer ends before its first word. No request may follow it."""


@dataclass
class Played:
    """One job that has ended."""

    job: Job
    requests: list
    """What its simulator heard: :class:`traced_retry.simulator.Request`."""
    killed_at: float | None = None
    """``time.monotonic()`` of the SIGKILL."""
    texts: int = 0
    """How many texts its simulator was told to speak as they are."""
    turns: list = field(default_factory=list)
    """The turns of the caller, which its simulator answered by itself."""

    def truth(self, until=float("inf")):
        """Return {outcome: replies} of the simulator, for replies requested before ``until``."""
        found = Counter(outcome for at, outcome in _outcomes(self.requests) if at < until)
        return found + Counter(
            "not_recoverable" if turn.fault.name == INCOMPLETE else "succeeded"
            for turn in self.turns
        )


def _outcomes(requests):
    """Yield (time of the request, outcome) of each reply.

    A request that was answered ends a reply. So does the last of those that were not.
    """
    failed, codes = [], []
    for request in requests:
        fault = request.fault
        if fault.name in ("ok", "late"):
            again = failed or fault.name == "late"
            began = failed[0] if failed else request.at
            yield began, "recovered" if again else "succeeded"
            failed, codes = [], []
        else:
            failed.append(request.at)
            codes.append(fault.argument)
    if failed:
        yield failed[0], "not_recoverable" if codes[-1] == NOT_RECOVERABLE else "exhausted"


class Simulators(threading.Thread):
    """One simulator per job, all on one event loop, in a thread of the test's process."""

    def __init__(self):
        super().__init__(daemon=True)
        self._loop = asyncio.new_event_loop()
        self._servers = []

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        for server in self._servers:
            self._do(server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()
        self._loop.close()

    def run(self):
        """Run the event loop of the thread."""
        self._loop.run_forever()

    def serve(self, provider, script):
        """Start a simulator."""

        async def start():
            server = simulator(provider)(script)
            await server.start()
            return server

        server = self._do(start())
        self._servers.append(server)
        return server

    def speak(self, server):
        """Have the caller speak once."""
        self._do(server.caller_speaks())

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


def play(jobs, *, at_once=8, kill=()):
    """Run jobs, ``(Job, script)``, each in its own process, and return them as :class:`Played`.

    ``kill`` is {position: requests}. Such a job gets a SIGKILL when its simulator has received that
    many requests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with Simulators() as simulators:
        servers = [simulators.serve(job.provider, script) for job, script in jobs]
        waiting = [
            (place, replace(job, url=server.url, ca=getattr(server, "ca", b"")), server)
            for place, ((job, _), server) in enumerate(zip(jobs, servers, strict=True))
        ]
        running, killed = {}, {}
        while waiting or running:
            while waiting and len(running) < at_once:
                place, job, server = waiting.pop(0)
                caller = context.Semaphore(0)
                process = context.Process(target=run, args=(job, caller))
                process.start()
                running[place] = (process, server, caller)
            for place, (process, server, caller) in list(running.items()):
                if caller.acquire(block=False):
                    simulators.speak(server)
                wanted = dict(kill).get(place)
                if wanted is not None and len(server.requests) >= wanted:
                    process.kill()
                    killed[place] = time.monotonic()
                if process.exitcode is None and place not in killed:
                    continue
                process.join()
                expected = -signal.SIGKILL if place in killed else 0
                assert process.exitcode == expected, f"job {place} ended with {process.exitcode}"
                del running[place]
            time.sleep(0.02)
        return [
            Played(job, list(server.requests), killed.get(place), _told(server), list(server.turns))
            for place, ((job, _), server) in enumerate(zip(jobs, servers, strict=True))
        ]


def _told(server):
    return len(server.say.heard) if hasattr(server, "say") else 0


EXPORT = 1.0
"""Seconds between two exports of a process, of spans and of metrics."""
SERVICES, KILLED = ("fleet", "fleet-2"), "fleet-killed"
"""``service.name`` of the jobs that end by themselves, and of those that are killed."""
ENDED = "|".join(SERVICES)
"""Selects both services of the jobs that end by themselves."""
ENVIRONMENTS = ("production", "staging")
ENGINES = ("prometheus", "prometheus3")
"""Each version of Prometheus that counts."""


def plan():
    """Return 66 jobs with their scripts, and {position: requests} of the jobs to kill.

    Each provider has five jobs that request one reply and hear it, and then hear the answers to two
    turns of the caller. One job requests three times and hears the second late, and one has a
    second reply that is lost. Two jobs get a permanent error, and hear the answer to one turn. So
    the provider starts half of the replies of these jobs, which belong to two services in two
    environments. The last eight are killed in the middle of a long call.
    """
    slow, quick = [], []
    for provider in PROVIDER:
        if provider in CODED:
            late, lost, patience = "error:server_error,ok", "error:server_error", 8.0
        else:
            late, lost, patience = "late:4", "silence", 3.0
        slow.append((Job(provider, 2, patience=patience), f"ok,{lost}"))
        slow.append((Job(provider, 3, pause=0.1, patience=patience), f"ok,{late},ok"))
        quick += [(Job(provider, turns=2), "ok")] * 5
    quick += [(Job("openai", turns=1), f"error:{NOT_RECOVERABLE}")] * 2
    killed = [(Job(provider, 1000, pause=0.15), "ok") for provider in PROVIDER]
    ended = []
    for place, (job, script) in enumerate(slow + quick):
        environment = f"deployment.environment.name={ENVIRONMENTS[place // 2 % 2]}"
        of = {"OTEL_SERVICE_NAME": SERVICES[place % 2], "OTEL_RESOURCE_ATTRIBUTES": environment}
        ended.append((replace(job, environment=of), script))
    kill = {len(ended) + n: 10 + n for n in range(len(killed))}
    return ended + killed, kill


@dataclass
class Fleet:
    """The running servers, and the jobs that ran."""

    jaeger: Jaeger
    prometheus: Prometheus
    played: list[Played]
    engines: dict[str, Prometheus]
    """Every Prometheus, by its command."""

    @property
    def ended(self):
        """Return the jobs that ended by themselves."""
        return [played for played in self.played if played.killed_at is None]

    @property
    def killed(self):
        """Return the jobs that were killed."""
        return [played for played in self.played if played.killed_at is not None]


@contextlib.contextmanager
def measure(folder, plan=plan, idle=0.0, programs=("prometheus",), evaluation=SCRAPE):
    """Run the plan with real servers: processes -> Collector -> Jaeger and Prometheus.

    Prometheus scrapes for ``idle`` seconds before the first job. Each of ``programs`` is a command
    of Prometheus, and all of them count the same jobs. They evaluate the rules every ``evaluation``
    seconds.
    """
    ports = free_ports(len(programs))
    url, *others = (f"http://127.0.0.1:{port}" for port in ports)
    with contextlib.ExitStack() as stack:
        jaeger = stack.enter_context(Jaeger(folder))
        collector = stack.enter_context(
            Collector(folder, traces=jaeger.grpc, prometheus=url, others=others)
        )
        same = {"counts": collector.counts, "itself": collector.itself, "evaluation": evaluation}
        engines = {}
        for program, port in zip(programs, ports, strict=True):
            (folder / program).mkdir()
            server = Prometheus(folder / program, port=port, program=program, **same)
            engines[program] = stack.enter_context(server)
        prometheus = engines[programs[0]]
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": f"{EXPORT * 1000:.0f}",
            "OTEL_METRIC_EXPORT_INTERVAL": f"{EXPORT * 1000:.0f}",
        }
        time.sleep(idle)
        planned, kill = plan()
        jobs = []
        for place, (job, script) in enumerate(planned):
            service = {"OTEL_SERVICE_NAME": KILLED if place in kill else SERVICES[0]}
            all_of_it = {**environment, **service, **job.environment}
            jobs.append((replace(job, environment=all_of_it), script))
        played = play(jobs, kill=kill)
        for each in engines.values():
            settle(each, ENDED)
        yield Fleet(jaeger, prometheus, played, engines)


def truth(jobs, before=None):
    """{(provider, outcome): replies} of the jobs, as their simulators counted them.

    Args:
        jobs: :class:`Played`.
        before: only what was asked for that many seconds before the job was killed.
    """
    counted = Counter()
    for played in jobs:
        until = float("inf") if before is None else played.killed_at - before
        for outcome, count in played.truth(until).items():
            counted[PROVIDER[played.job.provider], outcome] += count
    return counted
