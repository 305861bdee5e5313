# SPDX-License-Identifier: Apache-2.0
"""Code run in a fresh process, because the SDK's global providers exist once per process.

The processes are forked from one that has imported everything, as LiveKit's job processes are, so
each takes a moment only. :func:`fresh` runs code as a child process and returns a value.
:func:`program` runs code as a main program and returns its output and its status.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing import process
from typing import Any

PRELOADED = [
    "livekit.agents.ipc._preload",
    "livekit.plugins.openai",
    "opentelemetry.instrumentation.auto_instrumentation",
    "traced_retry.cli.main",
    "traced_retry.cli.demo",
    "traced_retry.doctor",
    "traced_retry.export.config_file",
    "traced_retry.export.enable",
    "traced_retry.export.otlp",
    "traced_retry.report.terminal",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)

COMMAND = "from traced_retry.cli.main import main; main()"
"""The code of ``traced-retry``."""
SCRIPT = 'import runpy, sys; runpy.run_path(sys.argv[0], run_name="__main__")'
"""The code of ``python SCRIPT``."""
INSTRUMENTED = f"""
from opentelemetry.instrumentation.auto_instrumentation import initialize
initialize()
{SCRIPT}
"""
"""The code of ``opentelemetry-instrument python SCRIPT``."""


@dataclass
class Ended:
    """The result of a process that has ended."""

    result: Any = None
    error: str = ""
    """The class and text of the exception it raised, or an empty text."""
    log: list[str] = field(default_factory=list)
    exitcode: int | None = None
    exit_seconds: float = 0.0
    """The time from its result to its end."""


def fresh(code: str, **environ: object) -> Ended:
    """Run ``code`` and return the value it bound to ``result``. Warnings are errors there too."""
    here, there = _context.Pipe(duplex=False)
    process = _context.Process(
        target=_run, args=(there, textwrap.dedent(code), {k: str(v) for k, v in environ.items()})
    )
    process.start()
    there.close()
    with here:
        try:
            ended = here.recv() if here.poll(60) else Ended(error="no answer within 60 s")
        except EOFError:
            ended = Ended(error="it died")
    began = time.monotonic()
    process.join(30)
    ended.exit_seconds = time.monotonic() - began
    ended.exitcode = process.exitcode
    if process.exitcode is None:
        process.kill()
    return ended


class Program:
    """A process with a command line, an environment and output of its own.

    It ends as a main program: ``atexit`` handlers run. As in any fork, they can still start
    threads, so tests of the interpreter's last moments start a real interpreter.
    """

    def __init__(self, code, *arguments, environ, cwd="."):
        self.arguments = [str(argument) for argument in arguments]
        pipes = [_context.Pipe(duplex=False) for _ in range(2)]
        self._process = _context.Process(
            target=_main,
            args=([there for _, there in pipes], code, self.arguments, environ, str(cwd)),
        )
        self._process.start()
        for _, there in pipes:
            there.close()
        self.stdout, self._stderr = (os.fdopen(os.dup(here.fileno())) for here, _ in pipes)
        for here, _ in pipes:
            here.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()
        self.stdout.close()
        self._stderr.close()

    def interrupt(self):
        """Press Ctrl-C."""
        os.kill(self._process.pid, signal.SIGINT)

    def communicate(self, timeout):
        """Return the rest of its output and its status once it has ended."""
        errors = []
        reader = threading.Thread(target=lambda: errors.append(self._stderr.read()))
        reader.start()
        killer = threading.Timer(timeout, self._process.kill)
        killer.start()
        try:
            printed = self.stdout.read()
            reader.join()
            self._process.join()
        finally:
            killer.cancel()
            killer.join()
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, printed, *errors)


def program(code, *arguments, environ, cwd=".", timeout=60):
    """Run ``code`` with the command line ``arguments``; return its output and its status."""
    with Program(code, *arguments, environ=environ, cwd=cwd) as running:
        return running.communicate(timeout)


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


def _main(outputs, code, arguments, environ, cwd):
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
        output.close()
    sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    # A main program has no parent in the eyes of multiprocessing.
    process._parent_process = None
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv, sys.orig_argv = arguments, [sys.executable, *arguments]
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)  # noqa: T201
    except BaseException:  # noqa: BLE001 - as the interpreter itself does
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
