# SPDX-License-Identifier: Apache-2.0
"""Code run in a fresh process, for what there is once per process: the SDK's global providers.

The processes are forked from one that has everything imported, as LiveKit's job processes are, so
that each takes a moment only. They end as job processes end: no ``atexit`` before Python 3.13.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import textwrap
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["livekit.agents.ipc._preload", "livekit.plugins.openai", "traced_retry.export.config_file"]
)


@dataclass
class Ended:
    """What a process gave before it ended."""

    result: Any = None
    error: str = ""
    """The class and text of what it raised; else empty."""
    log: list[str] = field(default_factory=list)
    exitcode: int | None = None


def fresh(code: str, **environ: object) -> Ended:
    """Run ``code`` and return what it bound to ``result``. Warnings are errors there too."""
    here, there = _context.Pipe(duplex=False)
    process = _context.Process(
        target=_run, args=(there, textwrap.dedent(code), {k: str(v) for k, v in environ.items()})
    )
    process.start()
    there.close()
    try:
        ended = here.recv() if here.poll(60) else Ended(error="no answer within 60 s")
    except EOFError:
        ended = Ended(error="it died")
    process.join(30)
    ended.exitcode = process.exitcode
    if process.exitcode is None:
        process.kill()
    return ended


class _Listed(logging.Handler):
    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


def _run(connection, code, environ):
    for name in list(os.environ):
        if name.startswith(("OTEL_", "LIVEKIT_", "TRACED_RETRY_", "PROMETHEUS_")):
            del os.environ[name]
    os.environ.update(environ)
    ended = Ended()
    logging.getLogger().addHandler(_Listed(ended.log))
    logging.getLogger("traced_retry").setLevel(logging.INFO)
    warnings.simplefilter("error")
    names: dict[str, Any] = {}
    try:
        exec(code, names)
        ended.result = names.get("result")
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        ended.error = f"{type(error).__name__}: {error}"
        if not isinstance(error, ValueError):
            traceback.print_exc()
    connection.send(ended)
    connection.close()
