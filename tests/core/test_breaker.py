# SPDX-License-Identifier: Apache-2.0
"""The circuit breaker: its rule, its file, its statistics, and its effect on a reply."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter

import pytest
from support.brownout import live_through, open_circuit, seen_by
from support.scripted import HANG, ProviderError, Scripted

from traced_retry import CircuitOpenError, PolicyError, RetryPolicy
from traced_retry.core import breaker
from traced_retry.core.breaker import COUNTED, FAILURES, INTERVAL, SPAN, WINDOW, circuit
from traced_retry.core.failure import RECOVERABLE, failure
from traced_retry.core.loop import Reply
from traced_retry.core.request import CallRequest, Delivery
from traced_retry.core.telemetry import Target, Telemetry

NOW = 1000.0
KEY = Target("openai").key
ERROR = failure(ProviderError("server_error"), "server_error")


@pytest.fixture
def path(tmp_path):
    """Return the path of a new file. It is closed after the test."""
    yield tmp_path / "breaker"
    breaker.forget()


@pytest.fixture
def processes(path):
    """Return the circuit as three processes see it."""
    return [circuit(seen_by(path, number), *KEY) for number in range(3)]


def outage(processes, *, began=NOW, count=FAILURES, seconds=SPAN):
    """Have the processes fail in turn, evenly over the time; return the time of the last one."""
    for number, each in zip(range(count), itertools.cycle(processes)):
        ends = began + seconds * number / max(count - 1, 1)
        each.fail(ERROR, min(began, ends), ends)
    return began + seconds


class TestRule:
    def test_new_circuit_is_closed(self, processes):
        """A new file refuses no reply."""
        assert [True] * 3 == [each.admits(NOW) for each in processes]

    def test_all_processes_refuse_once_it_is_open(self, processes, caplog):
        """Failures in a row open the circuit for all processes, and one log record says so."""
        now = outage(processes)

        assert [False] * 3 == [each.admits(now) for each in processes]
        assert [True] * 3 == [each.is_open(now) for each in processes]
        (record,) = caplog.records
        assert (
            f"openai failed {FAILURES} times in a row in 8.0 s for all processes"
            in record.getMessage()
        )

    def test_failures_before_the_window_do_not_open_it(self, processes):
        """The next reply opens the circuit if the first failure is recent enough."""
        outage(processes, seconds=SPAN - 0.1)

        assert processes[0].admits(NOW + WINDOW + 0.01)
        assert not processes[0].is_open(NOW + WINDOW + 0.01)
        assert processes[0].admits(NOW + WINDOW)
        assert processes[0].is_open(NOW + WINDOW)

    @pytest.mark.parametrize("less", [{"count": FAILURES - 1}, {"seconds": SPAN - 0.1}])
    def test_fewer_or_faster_failures_do_not_open_it(self, processes, less):
        """A short fault is left to the retries."""
        now = outage(processes, **less)

        assert not processes[0].is_open(now)

    def test_one_process_alone_does_not_open_it(self, processes):
        """The cause may be the process itself."""
        now = outage(processes[:1], count=10 * FAILURES, seconds=50.0)

        assert not processes[1].is_open(now)
        processes[1].fail(ERROR, now, now)
        assert processes[1].is_open(now)

    def test_success_starts_the_count_again(self, processes):
        """One success of any process shows that the provider works."""
        now = outage(processes, count=FAILURES - 1)
        processes[2].succeed(now)
        processes[0].fail(ERROR, now, now + 0.1)

        assert not processes[0].is_open(now + 0.1)
        outage(processes, began=now + 0.1, count=FAILURES - 1)
        assert processes[0].is_open(now + 0.1 + SPAN)

    def test_attempt_from_before_the_success_counts_from_the_success(self, processes):
        """An attempt that began before the last success does not show how long all have failed."""
        processes[0].succeed(NOW + 9)
        for each in itertools.islice(itertools.cycle(processes), 2 * FAILURES):
            each.fail(ERROR, NOW, NOW + 10)

        assert not processes[0].is_open(NOW + 10)

    def test_silent_attempts_count_from_their_start(self, processes):
        """A time-out shows that the provider has failed since the attempt began."""
        for each in itertools.islice(itertools.cycle(processes), FAILURES):
            each.fail(ERROR, NOW, NOW + 10)

        assert processes[0].is_open(NOW + 10)

    def test_new_reply_finds_a_silent_provider_down(self, processes):
        """All others wait for an answer, so the next new reply is the first probe."""
        for each in itertools.islice(itertools.cycle(processes), FAILURES):
            each.fail(ERROR, NOW, NOW + 2.5)

        assert [True] * 3 == [each.admits(NOW + SPAN - 0.1) for each in processes]
        assert [True, False, False] == [each.admits(NOW + SPAN) for each in processes]

    def test_old_failures_do_not_count(self, processes):
        """A failure at night and one in the morning are no outage."""
        outage(processes, count=FAILURES - 1)
        processes[0].fail(ERROR, NOW + WINDOW + 1, NOW + WINDOW + 1)

        assert not processes[0].is_open(NOW + WINDOW + 1)

    @pytest.mark.parametrize("kind", sorted(set(RECOVERABLE) - COUNTED))
    def test_failures_of_one_customer_or_request_do_not_count(self, processes, kind):
        """A refused key, a rate limit or an invalid request does not open the circuit."""
        why = failure(ProviderError(), kind)
        for number, each in zip(range(3 * FAILURES), itertools.cycle(processes)):
            each.fail(why, NOW, NOW + number)

        assert not processes[0].is_open(NOW + 3 * FAILURES)

    def test_circuit_is_that_of_provider_model_and_server(self, path, processes):
        """Another model may work, and then it can be used."""
        now = outage(processes)
        others = [
            Target("google"),
            Target("openai", "other"),
            Target("openai", server_address="localhost"),
            Target("openai", server_address="localhost", server_port=443),
        ]

        assert [True] * 4 == [circuit(seen_by(path, 0), *other.key).admits(now) for other in others]
        assert processes[0].is_open(now)


class TestProbe:
    def test_one_probe_per_interval(self, processes):
        """All processes ask all the time, and one reply per interval is sent."""
        began = outage(processes)
        steps = [began + step * 0.1 for step in range(200)]
        sent = [now for now in steps for each in processes if each.admits(now)]

        assert [INTERVAL] * len(sent) == pytest.approx(
            [b - a for a, b in itertools.pairwise([began, *sent])], abs=0.11
        )
        assert 4 == len(sent)

    def test_success_closes_it_for_all(self, processes):
        """The answer to a probe lets every process send again, at once."""
        now = outage(processes) + INTERVAL
        assert processes[1].admits(now)
        processes[1].succeed(now + 0.5)

        assert [True] * 3 == [each.admits(now + 0.5) for each in processes]

    def test_failed_probe_keeps_it_open(self, processes):
        """The next probe is sent one interval after the last one, which may take longer to fail."""
        now = outage(processes) + INTERVAL
        assert processes[1].admits(now)
        processes[1].fail(ERROR, now, now + 10)

        assert [True, False, False] == [each.admits(now + 10) for each in processes]

    @pytest.mark.parametrize("later", [-900.0, WINDOW + INTERVAL + 1])
    def test_open_state_of_another_time_is_ignored(self, processes, later):
        """A state of an earlier boot, or of an outage long ago, refuses no reply."""
        now = outage(processes) + later

        assert [True] * 3 == [each.admits(now) for each in processes]

    def test_machine_that_has_run_for_a_decade_refuses_no_reply(self, processes):
        """A time that needs more bits than its field leaves the circuit closed."""
        now = outage(processes, began=2**38 / 1e3)

        assert [True] * 3 == [each.admits(now) for each in processes]

    @pytest.mark.parametrize("later", [-900.0, SPAN, SPAN + WINDOW + INTERVAL + 1])
    def test_outage_opens_it_again(self, processes, later):
        """Old successes and an old open state do not prevent a new one."""
        processes[0].succeed(outage(processes))
        now = outage(processes, began=NOW + later)

        assert processes[0].is_open(now)


class TestFile:
    def test_default_file_is_of_this_user_only(self, tmp_path, monkeypatch, path):
        """The folder and the file are not accessible to others."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert circuit("auto", *KEY).admits(NOW)
        folder = tmp_path / f"traced-retry-{os.getuid()}"

        assert 0o700 == folder.stat().st_mode & 0o777
        assert 0o600 == (folder / "breaker").stat().st_mode & 0o777

    @pytest.mark.parametrize("runtime", ["", "/nowhere/at/all", "relative"])
    def test_missing_runtime_folder_is_replaced(self, runtime, tmp_path, monkeypatch):
        """Without a usable runtime folder, the shared memory or the temporary folder is used."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        found = breaker._default_path().parent

        assert found.is_dir()
        assert str(found).startswith(("/dev/shm", breaker.tempfile.gettempdir()))

    def test_file_has_no_holes(self, path, processes):
        """A store into a hole would kill the process if the disk is full."""
        found = path.stat()

        assert found.st_size <= found.st_blocks * 512
        assert found.st_size == breaker._SIZE

    @pytest.mark.parametrize("size", [0, 8, 100])
    def test_short_file_is_completed(self, path, size):
        """A process may die while it creates the file."""
        path.write_bytes(breaker._MAGIC.ljust(100, b"\0")[:size])

        assert circuit(str(path), *KEY).admits(NOW)
        assert breaker._SIZE == path.stat().st_size

    def _refused(self, setting, caplog):
        assert circuit(str(setting), *KEY) is None
        assert circuit(str(setting), *KEY) is None
        (record,) = caplog.records
        assert record.getMessage().startswith("opening the circuit breaker's file raised ")
        return record.getMessage().split()[6]

    def test_file_of_another_program_is_left_alone(self, path, caplog):
        """A mistaken path must not overwrite a file."""
        path.write_text("all my notes")

        assert "FileExistsError" == self._refused(path, caplog)
        assert "all my notes" == path.read_text()

    def test_link_is_refused(self, path, tmp_path, caplog):
        """Another user could have the link point to a file of this user."""
        path.symlink_to(tmp_path / "other")

        assert "OSError" == self._refused(path, caplog)

    def test_file_that_others_may_write_is_refused(self, path, caplog):
        """Another user could open the circuit."""
        path.touch()
        path.chmod(0o622)

        assert "PermissionError" == self._refused(path, caplog)

    @pytest.mark.parametrize("setting", ["/nowhere/at/all", "/", "/with\0zero"])
    def test_impossible_path_is_logged_once(self, setting, caplog):
        """The breaker stays off, and replies are sent."""
        assert self._refused(setting, caplog).endswith("Error")
        breaker.forget()

    def test_folder_of_default_file_that_others_may_write_is_refused(
        self, tmp_path, monkeypatch, caplog, path
    ):
        """Another user could replace the file."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        folder = tmp_path / f"traced-retry-{os.getuid()}"
        folder.mkdir()
        folder.chmod(0o777)

        assert "PermissionError" == self._refused("auto", caplog)

    def test_system_without_flock_has_no_breaker(self, path, monkeypatch, caplog):
        """Windows has no flock, and replies are sent there."""
        monkeypatch.setattr(breaker, "fcntl", None)

        assert circuit(str(path), *KEY) is None
        assert "lacks" in caplog.text

    def test_full_file_has_no_circuit_for_further_providers(self, path, caplog):
        """Circuits are never shared, and the ones that exist work on."""
        found = [circuit(str(path), f"provider {number}") for number in range(breaker._SLOTS + 1)]

        assert len({each._at for each in found[:-1]}) == breaker._SLOTS
        assert found[-1] is None
        assert "no free slot" in caplog.text


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "value"), [("auto", "auto"), ("AUTO", "auto"), ("off", None), ("/a/b", "/a/b")]
    )
    def test_variable(self, text, value):
        """The variable takes two words or a path."""
        assert value == RetryPolicy.from_env({"TRACED_RETRY_BREAKER": text}).breaker

    @pytest.mark.parametrize("text", ["on", "true", "breaker", "./breaker"])
    def test_invalid_variable_is_refused(self, text):
        """The error names the variable, its value and the values allowed."""
        with pytest.raises(
            PolicyError, match=f"TRACED_RETRY_BREAKER is '{text}'; it must be auto, the absolute"
        ):
            RetryPolicy.from_env({"TRACED_RETRY_BREAKER": text})

    @pytest.mark.parametrize("value", ["off", 1, True, "relative", b"/a"])
    def test_invalid_setting_is_refused(self, value):
        """A policy takes None, ``auto`` or an absolute path."""
        with pytest.raises(PolicyError, match=r"breaker is .*absolute path"):
            RetryPolicy(breaker=value)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
    def test_copy_shares_the_file(self, duplicate):
        """A policy that is sent to a job process uses the same circuits."""
        assert "/a/b" == duplicate(RetryPolicy(breaker="/a/b")).breaker


@pytest.fixture
def ask(recorder, path):
    """``ask(script, **policy)`` -> the future of a reply that uses the breaker."""
    telemetry = Telemetry(**recorder.providers)

    def ask(script, *, request=CallRequest, began=None, **policy):
        policy = RetryPolicy(breaker=str(path), **policy)
        reply = Reply(
            request(script.future),
            policy,
            telemetry.reply(Target("openai")),
            jitter=lambda bound: bound,
        )
        return reply.start(began=began)

    return ask


def now():
    """Return the virtual time in seconds."""
    return asyncio.get_running_loop().time()


class TestReply:
    @pytest.fixture(autouse=True)
    async def _a_while(self):
        await asyncio.sleep(2 * SPAN)  # so that failures can be in the past

    async def test_new_reply_fails_at_once_while_open(self, ask, path, recorder):
        """No request is sent, no time passes, and the span names the reason."""
        open_circuit(path, KEY, now())
        began, script = now(), Scripted("hello")
        with pytest.raises(CircuitOpenError):
            await ask(script)

        assert (0, began) == (script.calls, now())
        (reply,) = recorder.replies
        assert [] == recorder.attempts
        assert ("exhausted", "circuit_open", "circuit_open", 0) == tuple(
            reply[name]
            for name in (
                "traced_retry.outcome",
                "traced_retry.stop_reason",
                "error.type",
                "traced_retry.attempts",
            )
        )

    async def test_probe_that_is_answered_closes_it(self, ask, path):
        """The probe is an ordinary reply, and the next one needs no probe."""
        open_circuit(path, KEY, now())
        await asyncio.sleep(INTERVAL)

        assert ["a", "b"] == [await ask(Scripted(word)) for word in "ab"]

    async def test_probe_has_one_attempt(self, ask, path, recorder):
        """A probe that fails is not retried, and raises the provider's error."""
        open_circuit(path, KEY, now())
        await asyncio.sleep(INTERVAL)
        script = Scripted(ProviderError("server_error"), "hello")
        with pytest.raises(ProviderError):
            await ask(script)

        assert 1 == script.calls
        assert "circuit_open" == recorder.replies[0]["traced_retry.stop_reason"]

    async def test_retry_is_refused_and_costs_no_token(self, ask, path, recorder):
        """A reply that failed before the circuit opened does not try again afterwards."""
        reply = ask(Scripted((1.0, ProviderError("server_error"))))
        open_circuit(path, KEY, now())
        left = RetryPolicy().budget.remaining()["openai"]
        with pytest.raises(ProviderError):
            await reply

        assert left <= RetryPolicy().budget.remaining()["openai"]
        assert [1] == [r["traced_retry.attempts"] for r in recorder.replies]
        assert "circuit_open" == recorder.replies[0]["traced_retry.stop_reason"]

    async def test_circuit_that_opens_in_the_wait_ends_it(self, ask, path, recorder):
        """The next attempt of a reply that waits is not sent."""
        script = Scripted(ProviderError("server_error"), "hello")
        reply = ask(script, base_delay=3.0)
        await asyncio.sleep(1.0)
        open_circuit(path, KEY, now())
        with pytest.raises(ProviderError):
            await reply

        assert 1 == script.calls
        assert ["circuit_open"] == [r["traced_retry.stop_reason"] for r in recorder.replies]

    async def test_listen_is_not_refused(self, ask, path):
        """A listen sends no request, and the answer may still come."""

        class Listener(CallRequest):
            def next_action(self, why):
                return "listen"

        reply = ask(Scripted(HANG, "late"), request=Listener, attempt_timeout=1.0)
        open_circuit(path, KEY, now())

        assert "late" == await reply

    async def test_reply_that_the_provider_started_is_not_refused(self, ask, path):
        """The provider answers the caller, so it works."""
        open_circuit(path, KEY, now())

        assert "hello" == await ask(Scripted("hello"), began=now())
        assert "next" == await ask(Scripted("next"))

    async def test_first_output_closes_it_before_the_end_of_the_reply(self, ask, path):
        """Other calls do not wait until the probe has been spoken."""
        delivery = Delivery()

        class Spoken(CallRequest):
            def delivery(self, result):
                return delivery

        open_circuit(path, KEY, now())
        await asyncio.sleep(INTERVAL)
        await ask(Scripted("probe"), request=Spoken)
        with pytest.raises(CircuitOpenError):
            await ask(Scripted("too early"))
        delivery.mark_output()

        assert "hello" == await ask(Scripted("hello"))
        delivery.end()

    async def test_retry_after_of_the_session_is_waited_for_first(self, path, recorder, ask):
        """A reply that is held back asks the breaker when its wait has ended."""
        cooldown = breaker_cooldown(now() + 1.0)
        trace = Telemetry(**recorder.providers).reply(Target("openai"))
        script = Scripted("hello")
        policy = RetryPolicy(breaker=str(path))
        reply = Reply(CallRequest(script.future), policy, trace, cooldown=cooldown).start()
        open_circuit(path, KEY, now())
        with pytest.raises(CircuitOpenError):
            await reply

        assert 0 == script.calls

    async def test_broken_breaker_changes_no_reply(self, ask, monkeypatch, caplog):
        """An exception of the breaker is logged, and the reply is heard."""

        def fail(*_):
            raise RuntimeError("SECRET")

        for name in ("admits", "is_open", "succeed", "fail"):
            monkeypatch.setattr(breaker.Circuit, name, fail)

        assert "hello" == await ask(Scripted(ProviderError("server_error"), "hello"))
        for part in ("asking", "reporting a failure to", "closing"):
            assert f"{part} the circuit breaker raised RuntimeError" in caplog.text
        assert "SECRET" not in caplog.text


def test_refusal_is_recoverable():
    """The circuit closes again, so a later request can succeed."""
    refused = CallRequest(Scripted("hello").future).refused()

    assert ("circuit_open", True) == (refused.kind, refused.recoverable)


def breaker_cooldown(until):
    """Return a session's cooldown until a time."""
    from traced_retry.core.cooldown import SessionCooldown

    cooldown = SessionCooldown()
    cooldown.until, cooldown.failure = until, failure(ProviderError(), "rate_limit")
    return cooldown


class TestStatistics:
    """The rule, in calls that talk to a provider of the simulation. `make bench` prints more."""

    @pytest.mark.parametrize("calls", [2, 5, 50])
    @pytest.mark.parametrize("failing", [0.3, 0.5, 0.7])
    def test_brown_out_loses_at_most_two_percent(self, path, calls, failing):
        """Retries win most of such replies, so the circuit must stay closed."""
        seconds = 300 * 50 / calls
        without = live_through(None, calls=calls, failing=failing, seconds=seconds, budget=no_limit)
        result = live_through(path, calls=calls, failing=failing, seconds=seconds, budget=no_limit)

        assert result.replies > 700
        assert result.refused <= 0.02 * result.replies
        # The two runs differ by chance, too: one standard deviation is less than 2 %.
        assert result.share >= without.share - 0.06

    @pytest.mark.parametrize("silent", [0.0, 0.5, 1.0])
    def test_outage_of_50_calls(self, path, silent):
        """It opens within 12 s, sends one probe per interval, and closes within 6 s."""
        result = live_through(path, calls=50, failing=1.0, seconds=120, silent=silent)

        assert result.opened <= 12
        assert result.closed <= 6
        later = [at for at in result.requests if at > result.opened + 1]
        assert INTERVAL <= min(b - a for a, b in itertools.pairwise(later))
        assert abs(len(later) - (120 - result.opened) / INTERVAL) <= 3
        assert 0.0 == sorted(result.silence)[len(result.silence) // 2]

    def test_outage_of_one_call_is_left_to_its_retries(self, path):
        """One process never opens the circuit."""
        assert 0 == live_through(path, calls=1, failing=1.0, seconds=300).refused


def no_limit():
    """Return no budget."""


def python(code, *arguments, **options):
    """Start a program."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, **options)


HOLD = """
    import os, signal, sys
    from traced_retry.core import breaker
    held = breaker.circuit(sys.argv[1], "openai", None, None, None)
    assert held._file.try_lock()
    os.kill(os.getpid(), signal.SIGSTOP)
"""
ASK = """
    import os, struct, sys, time
    from traced_retry.core import breaker
    breaker.INTERVAL = 0.05
    held = breaker.circuit(sys.argv[1], "openai", None, None, None)
    while True:
        now = time.monotonic()
        if held.admits(now):
            os.write(1, struct.pack("d", now))
        time.sleep(0.0005)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="the breaker needs a POSIX system")
class TestDeath:
    def test_stopped_or_killed_process_does_not_keep_the_lock(self, path, processes):
        """Others send the probe although the lock is held, without waiting."""
        now = outage(processes) + INTERVAL + 0.25
        with python(HOLD, path) as holder:
            os.waitpid(holder.pid, os.WUNTRACED)
            assert not processes[0]._file.try_lock()
            began = time.perf_counter()
            asked = [processes[0].admits(now + step * 0.05) for step in range(5)]
            took = time.perf_counter() - began
            holder.kill()

        assert [False, False, True, False, False] == asked
        assert took < 1.0
        assert [False] * 3 == [each.admits(now + 1) for each in processes]
        assert processes[0]._file.try_lock()
        processes[0]._file.unlock()

    def test_thread_does_not_wait_for_another_thread_with_the_lock(self, processes):
        """A thread that waited would stop all calls of its event loop."""
        file, found = processes[0]._file, []
        assert file.try_lock()
        thread = threading.Thread(target=lambda: found.append(file.try_lock()), daemon=True)
        thread.start()
        thread.join(10)
        file.unlock()

        assert [False] == found

    def test_killed_and_stopped_processes_leave_a_valid_state(self, path, processes, monkeypatch):
        """Six processes ask all the time, and one after the other is killed or stopped."""
        monkeypatch.setattr(breaker, "INTERVAL", 0.05)
        outage(processes, began=time.monotonic() - SPAN)
        reader, writer = os.pipe()
        asking = [python(ASK, path, stdout=writer) for _ in range(6)]
        probes = b""
        try:
            probes += os.read(reader, 8)
            for number in range(40):
                victim = asking[number % 6]
                if number % 3:
                    victim.send_signal(signal.SIGSTOP)
                    probes += os.read(reader, 8)  # Another process sends the next probe.
                    victim.send_signal(signal.SIGCONT)
                else:
                    victim.kill()
                    victim.wait()
                    probes += os.read(reader, 8)
                    asking[number % 6] = python(ASK, path, stdout=writer)
            assert processes[0].is_open(time.monotonic())
            processes[0].succeed(time.monotonic())
            assert [True] * 3 == [each.admits(time.monotonic()) for each in processes]
        finally:
            for each in asking:
                each.kill()
                each.wait()
            os.close(reader)
            os.close(writer)
        times = sorted(struct.unpack(f"{len(probes) // 8}d", probes))
        assert 41 == len(times)
        assert 0.049 <= min(b - a for a, b in itertools.pairwise(times))

    def test_forked_child_does_not_share_the_lock(self, path):
        """A child opens the file again, because a descriptor of its parent shares the lock."""
        code = """
            import os, sys
            from traced_retry.core import breaker
            held = breaker.circuit(sys.argv[1], "openai")
            assert held._file.try_lock()
            if os.fork() == 0:
                own = breaker.circuit(sys.argv[1], "openai")
                os._exit(own._file.try_lock() or own._process == held._process)
            os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
        """
        with python(code, path) as parent:
            assert 0 == parent.wait()


REPLIES = """
    import asyncio, os, sys
    from traced_retry import RetryPolicy
    from traced_retry.core.loop import Reply
    from traced_retry.core.request import CallRequest
    from traced_retry.core.telemetry import Target, Telemetry

    async def main(policy):
        loop, trace = asyncio.get_running_loop(), Telemetry().reply(Target("openai"))
        for number in range(101):
            if number == 1:
                os.path.exists("/begin")  # The first reply imports and opens all that is needed.
            future = loop.create_future()
            future.set_result("hello")
            await Reply(CallRequest(lambda: future), policy, trace).start()
        os.path.exists("/end")

    asyncio.run(main(RetryPolicy(breaker=sys.argv[1] if sys.argv[1:] else None)))
"""


class TestCost:
    @pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
    def test_reply_costs_no_system_call(self, path, tmp_path):
        """A hundred replies make no call without the breaker, and none with it."""
        # asyncio of Python 3.11 asks for the process id whenever it looks for the running loop.
        of_python = Counter(getpid=100) if sys.version_info < (3, 12) else Counter()
        for setting in ([], [str(path)]):
            log = tmp_path / "strace"
            command = [
                "strace",
                "-f",
                "-o",
                str(log),
                sys.executable,
                "-c",
                textwrap.dedent(REPLIES),
            ]
            subprocess.run([*command, *setting], check=True, timeout=120)
            lines = log.read_text().splitlines()
            begin, end = (
                next(n for n, line in enumerate(lines) if f'"/{word}"' in line)
                for word in ("begin", "end")
            )
            assert of_python == Counter(
                line.split()[1].split("(")[0] for line in lines[begin + 1 : end]
            )

    def test_reply_without_breaker_opens_no_file(self, tmp_path):
        """Neither the import nor a reply creates or maps a file if the breaker is off."""
        code = """
            import sys
            events = []
            sys.addaudithook(lambda event, _: events.append(event) if "mmap" in event else None)
        """
        code = textwrap.dedent(code) + textwrap.dedent(REPLIES) + "assert not events, events\n"
        folder = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        with subprocess.Popen([sys.executable, "-c", code], env=folder) as program:
            assert 0 == program.wait()
        assert [] == list(tmp_path.iterdir())
