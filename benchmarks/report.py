# SPDX-License-Identifier: Apache-2.0
"""Measure ``traced-retry report`` on 100,000 replies, 840 MB of spans.

The data is a week of calls: LiveKit's spans around each reply, 3 % of the replies lost, 5 % of them
recovered. Each command runs in a process of its own. The limits are for CPU seconds, because other
programs may use the cores, and for the largest resident set. The command uses one core, so an idle
machine takes as long. The result is written to ``benchmarks/report.txt``.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPLIES = 100_000
LIMITS = {"--limit 0": (40, 150), "--failed --last 20": (5, 150)}
"""CPU seconds and MB that a command may take."""
RESULT = Path(__file__).with_suffix(".txt")
WEEK = 7 * 24 * 3600
BEGAN = 1_790_000_000
PER_BATCH = 64
PADDING = "x" * 812


def attribute(key, value):
    kind = {str: "stringValue", int: "intValue", float: "doubleValue"}[type(value)]
    return {"key": key, "value": {kind: str(value) if kind == "intValue" else value}}


def span(trace_id, parent, name, start, end, **attributes):
    return {
        "traceId": trace_id,
        "spanId": f"{random.getrandbits(64):016x}",
        "parentSpanId": parent,
        "flags": 256,
        "name": name,
        "kind": 1,
        "startTimeUnixNano": str(int(start * 1e9)),
        "endTimeUnixNano": str(int(end * 1e9)),
        "attributes": [attribute(k.replace("__", "."), v) for k, v in attributes.items()],
        "status": {},
    }


def reply(number):
    """Return the spans of one reply as LiveKit and traced-retry write them."""
    at = BEGAN + number * WEEK / REPLIES
    trace_id = f"{random.getrandbits(128):032x}"
    target = {
        "gen_ai__provider__name": random.choice(("openai", "google", "aws")),
        "gen_ai__request__model": "gpt-realtime",
        "server__address": "api.example.com",
        "server__port": 443,
    }
    kind = random.random()
    failures = 4 if kind < 0.03 else 1 if kind < 0.08 else 0
    outcome = {4: "exhausted", 1: "recovered", 0: "succeeded"}[failures]
    root = span(trace_id, "0" * 16, "generate_reply", at, at + failures + 1, **target)
    root["attributes"] += [
        attribute("traced_retry.outcome", outcome),
        attribute("traced_retry.attempts", failures + (failures < 4)),
        attribute("traced_retry.delay.total", 0.5),
    ]
    if failures == 4:
        root["attributes"].append(attribute("traced_retry.stop_reason", "max_attempts"))
    for turn in range(6):
        name = ("agent_turn", "realtime_inference", "agent_speaking")[turn % 3]
        yield span(trace_id, root["spanId"], name, at, at + 1, lk__response__text=PADDING)
    for attempt in range(1, failures + 1 + (failures < 4)):
        failed = attempt <= failures
        result = {"traced_retry__result": "failed" if failed else "succeeded"}
        if failed:
            result |= {
                "error__type": "server_error",
                "traced_retry__error_code": "server_error",
                "traced_retry__decision": "retry" if attempt < 4 else "stop",
            }
        yield span(
            trace_id,
            root["spanId"],
            "generate_reply.attempt",
            at + attempt - 1,
            at + attempt - 0.5,
            **target,
            traced_retry__attempt=attempt,
            traced_retry__action="send",
            traced_retry__delay=0.5,
            **result,
        )
    yield root


def write(path):
    resource_of = {"attributes": [attribute("service.name", "agent")]}

    def batch(spans):
        scopes = [{"scope": {"name": "livekit-agents"}, "spans": spans}]
        holder = {"resource": resource_of, "scopeSpans": scopes}
        file.write(json.dumps({"resourceSpans": [holder]}, separators=(",", ":")) + "\n")

    with path.open("w") as file:
        spans = []
        for number in range(REPLIES):
            spans.extend(reply(number))
            while len(spans) >= PER_BATCH:
                batch(spans[:PER_BATCH])
                del spans[:PER_BATCH]
        batch(spans)


def measure(path, options):
    """Return seconds by the wall clock and of the CPU, MB and the output of the command."""
    command = [sys.executable, "-m", "traced_retry.cli", "report", str(path), *options.split()]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    assert status == 0, output
    cpu = usage.ru_utime + usage.ru_stime
    return time.monotonic() - started, cpu, usage.ru_maxrss / 1000, output


def main():
    random.seed(1)
    lines = [f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "]
    lines[0] += f"{os.cpu_count()} cores"
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spans.jsonl"
        write(path)
        size = path.stat().st_size / 1e6
        lines.append(f"{REPLIES:,} replies, {size:.0f} MB in one file")
        for options, (seconds, megabytes) in LIMITS.items():
            wall, took, used, output = measure(path, options)
            if "--limit" in options:
                assert f"{REPLIES} replies, " in output
            failed |= took > seconds or used > megabytes
            lines.append(
                f"report {options:<20} {took:5.1f} CPU s (limit {seconds}), {wall:5.1f} s passed, "
                f"{used:4.0f} MB (limit {megabytes})"
            )
    text = "\n".join(lines)
    print(text)
    RESULT.write_text(text + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
