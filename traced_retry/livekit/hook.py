# SPDX-License-Identifier: Apache-2.0
"""``wrap`` one model or ``instrument`` all, so that ``generate_reply`` of their sessions retries.

Only methods of the session's instance are replaced: ``generate_reply``, ``interrupt``, ``aclose``,
``say`` if the plugin has one, and ``emit`` by the adapter. Identity, ``isinstance``, labels,
events and private state of the plugin stay unchanged. LiveKit creates the session of a duplex model
itself. For these models ``DuplexRealtimeAdapter.session`` is replaced, too.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from livekit.agents import SpeechCreatedEvent, llm
from livekit.agents import telemetry as livekit_telemetry
from livekit.agents.voice import SpeechHandle
from opentelemetry import metrics
from opentelemetry import trace as otel_trace

from traced_retry import semconv
from traced_retry.core import supported, switch
from traced_retry.core.cooldown import SessionCooldown
from traced_retry.core.failure import Failure, copy_error
from traced_retry.core.guard import log_once, suppress_and_log
from traced_retry.core.loop import FailedReply, Reply
from traced_retry.core.policy import RetryPolicy, check_policy
from traced_retry.core.request import Request
from traced_retry.core.sanitize import shown
from traced_retry.core.telemetry import ReplyTrace, Target, Telemetry
from traced_retry.core.variables import warn_about_misspelt
from traced_retry.core.waiting import Wait, WaitingReply
from traced_retry.errors import ArgumentError
from traced_retry.livekit.adapter import Adapter, failure_from_event
from traced_retry.livekit.registry import adapter_class
from traced_retry.livekit.request import Generation, PassthroughRequest, timeout_failure
from traced_retry.livekit.say import SayRequest, observed
from traced_retry.livekit.speech import (
    agent_activity,
    current_speech,
    fail_speech,
    is_closing,
    note_request,
    pending_speeches,
    record_error,
    watch_shutdown,
    when_interrupted,
)

logger = logging.getLogger(semconv.SCOPE)

M = TypeVar("M", bound="llm.RealtimeModel | llm.DuplexModel")
"""A LiveKit model whose sessions get retries."""

OnExhausted = Callable[[FailedReply], "Awaitable[None] | None"]
OnWaiting = Callable[[WaitingReply], "Awaitable[None] | None"]

DRAIN_WITHIN: Final = 9.0
"""Seconds after ``AgentSession.shutdown(drain=True)`` in which retries are allowed.

LiveKit then waits for the pending replies. It kills a job's process that does not end within
``shutdown_process_timeout`` of ``AgentServer`` and ``WorkerOptions``, which is 10 s by default
(livekit-agents 1.7.0 to 1.8.9)."""

_LAST = 0.9
"""Seconds after :data:`DRAIN_WITHIN` for the answer to a hedged request to begin."""
_HOOK = "_traced_retry"
"""Name of the attribute that marks a session with our hook, and a wrapped model."""
_HOOKS = "_traced_retry_hooks_duplex_models"
"""Name of the attribute that marks ``DuplexRealtimeAdapter.session`` if it is replaced."""


@dataclass(frozen=True)
class _Config:
    policy: RetryPolicy
    telemetry: Telemetry
    on_exhausted: OnExhausted | None = None
    on_waiting: OnWaiting | None = None
    may_retry: bool = True
    """False if the user does not want retries on this version of LiveKit."""


def _config(
    policy: RetryPolicy | None,
    tracer_provider: otel_trace.TracerProvider | None,
    meter_provider: metrics.MeterProvider | None,
    on_exhausted: OnExhausted | None,
    on_waiting: OnWaiting | None,
) -> _Config:
    # LiveKit's own tracer follows livekit.agents.telemetry.set_tracer_provider, which does not
    # set the global provider. Without that call it follows the global one.
    tracer = livekit_telemetry.tracer if tracer_provider is None else None
    telemetry = Telemetry(tracer_provider, meter_provider, tracer=tracer, in_livekit=True)
    may_retry = supported.check_livekit()
    policy = policy or RetryPolicy.from_env()
    return _Config(policy, telemetry, on_exhausted, on_waiting, may_retry)


def check_arguments(policy: object, on_exhausted: object, on_waiting: object) -> None:
    """Check the arguments of :func:`wrap`, and the variables, before anything is changed.

    Raises:
        PolicyError: if an environment variable is invalid.
        SupportError: likewise.
        ArgumentError: if an argument has a wrong type.
    """
    check_policy(policy)
    if on_exhausted is not None and not callable(on_exhausted):
        raise ArgumentError(
            f"on_exhausted is {shown(on_exhausted)}; it must be a function of one FailedReply, "
            "async or not"
        )
    if on_waiting is not None and not callable(on_waiting):
        raise ArgumentError(
            f"on_waiting is {shown(on_waiting)}; it must be a function of one WaitingReply, "
            "async or not, or a Filler"
        )
    warn_about_misspelt()
    supported.choice()
    if policy is None:
        RetryPolicy.from_env()


class SessionHook:
    """Our state of one session: its adapter, its open replies and their early ends."""

    def __init__(self, session: llm.RealtimeSession[Any], config: _Config) -> None:
        self._config = config
        self._session = session
        # A session that brings a retry of its own around `_do_generate_reply` (the shape of
        # livekit/agents#6242) is called at that inner method, so that only one loop runs.
        inner = getattr(session, "_do_generate_reply", None)
        self._plain_generate_reply = session.generate_reply
        self._generate_reply = session.generate_reply if inner is None else inner
        self._aclose = session.aclose
        self._interrupt = session.interrupt
        self._say = session.say
        self._says = type(session).say is not llm.RealtimeSession.say
        self._open: dict[Reply[Generation], PassthroughRequest] = {}
        self._callbacks: set[asyncio.Future[None]] = set()
        self._closed_by: tuple[Failure, semconv.StopReason] | None = None
        self._cooldown = SessionCooldown()
        self._checked = False
        self._drained = False
        self._stop_listening: Callable[[], object] = lambda: None
        self._adapter = adapter_class(session)(session, self)
        setattr(session, _HOOK, self)
        session.generate_reply = self._generate_reply_unless_off  # type: ignore[method-assign]
        session.aclose = self.aclose  # type: ignore[method-assign]
        session.interrupt = self.interrupt  # type: ignore[method-assign]
        if self._says:
            session.say = self.say  # type: ignore[method-assign]
        session.on("error", self._on_error)
        self._initialize_telemetry()

    def configure(self, config: _Config) -> None:
        """Use ``config`` from the next reply on."""
        self._config = config
        self._initialize_telemetry()

    # --- methods for the session's user ---------------------------------------------------------

    def generate_reply(self, **kwargs: Any) -> asyncio.Future[Generation]:
        """Request a reply, as the plugin's own ``generate_reply``, with retries and a trace."""
        with suppress_and_log("looking for the speech"):
            if (error := note_request()) is not None:
                failed: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
                failed.set_exception(error)
                failed.exception()  # Mark it as retrieved, because LiveKit may not wait for it.
                return failed
        adapter = self._adapter_in_force()
        request = adapter.request(functools.partial(self._generate_reply, **kwargs))
        request.speech = current_speech()
        with suppress_and_log("watching for the agent session's shutdown"):
            if (activity := agent_activity(self._session)) is not None:
                watch_shutdown(activity.session, self)
        return self._start(
            request,
            self._policy_for(adapter),
            self._target,
            cooldown=None if type(adapter) is Adapter else self._cooldown,
        )

    def say(self, *args: Any, **kwargs: Any) -> asyncio.Future[Generation]:
        """Trace the plugin's own ``say``. It is sent once."""
        if switch.is_off():
            return self._say(*args, **kwargs)
        adapter = self._adapter_in_force()
        request = SayRequest(adapter, functools.partial(self._say, *args, **kwargs))
        target = replace(self._target, say=True)
        # The callbacks are not called, because they may themselves call say().
        return self._start(request, observed(self._config.policy), target, quiet=True)

    def _start(
        self,
        request: PassthroughRequest,
        policy: RetryPolicy,
        target: Target,
        *,
        cooldown: SessionCooldown | None = None,
        began: float | None = None,
        quiet: bool = False,
    ) -> asyncio.Future[Generation]:
        """Start a reply. Do not call the user's callbacks for a ``quiet`` one."""
        trace = self._config.telemetry.reply(target)
        request.on_late = trace.late
        request.set_speech_id = functools.partial(setattr, trace, "speech_id")
        reply = Reply(
            request,
            policy,
            trace,
            cooldown=cooldown,
            on_failed=None if quiet else self._on_failed(request),
            on_output=request.end_wait,
            on_ended=self._ended,
        )
        if self._closed_by is not None:
            why, stop = self._closed_by
            reply.report_failure(copy_error(why), stop)
        self._open[reply] = request
        if request.speech is not None:
            request.set_speech_id(getattr(request.speech, "id", None))
        future = reply.start(began=began)
        if reply in self._open:
            if request.speech is not None:
                self._follow_speech(reply, request)
            if self._config.on_waiting is not None and not quiet:
                self._watch_wait(reply, request, trace, began)
        return future

    def _follow_speech(self, reply: Reply[Generation], request: PassthroughRequest) -> None:
        """End the reply if its speech is interrupted."""
        # An agent that has no reply yet cancels its future. One that has a reply cannot.
        request.stop_watching = when_interrupted(
            request.speech, lambda: reply.future.add_done_callback(lambda _: reply.interrupt())
        )

    def interrupt(self) -> None:
        """Cut the current generation. A reply that waits for its first word ends with it."""
        self._interrupt()
        for reply in list(self._open):
            if reply.resolved:  # otherwise the agent cancels the future
                reply.interrupt(cut=True)

    async def aclose(self) -> None:
        """Close the session. Its open replies end as ``session_closed``."""
        closed = failure_from_event(
            "session_closed", "the realtime session was closed", ended_locally=True
        )
        self._close_with(closed, "session_closed")
        self._stop_listening()
        await self._aclose()

    def drain(self) -> None:
        """Allow retries for :data:`DRAIN_WITHIN` more seconds, because the agent session ends.

        Without retries, a pending reply ends with the plugin's own time-out.
        """
        asyncio.get_running_loop().call_later(DRAIN_WITHIN, self._end_retries)

    def _end_retries(self) -> None:
        self._drained = True
        for reply in list(self._open):
            reply.end_retries(timeout_failure(DRAIN_WITHIN), _LAST)

    # --- Replies, for the adapter --------------------------------------------------------------

    @property
    def policy(self) -> RetryPolicy:
        """Return the current policy."""
        return self._config.policy

    def wake(self) -> None:
        """Check each open reply again."""
        for reply in list(self._open):
            reply.wake()

    def report_failure(
        self,
        why: Failure,
        stop: semconv.StopReason | None = None,
        *,
        only: Request[Any] | None = None,
    ) -> None:
        """Report to the open replies that their request is lost."""
        for reply in list(self._open) if only is None else self._replies_to(only):
            reply.report_failure(copy_error(why), stop)

    def request_once(self) -> asyncio.Future[Generation]:
        """Call the plugin's own ``generate_reply``."""
        return self._generate_reply()

    def start(self, adapter: Adapter, turn: PassthroughRequest, began: float) -> None:
        """Trace a reply that the provider starts, and retry it if ``turn`` says how."""
        if switch.is_off() or adapter is not self._adapter_in_force():
            return
        policy = self._policy_for(adapter)
        future = self._start(
            turn,
            policy,
            self._turn_target,
            cooldown=self._cooldown,
            began=began,
        )
        # LiveKit learns of a failure from the streams and the speech, so this future is ours.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def interrupt_reply(self, only: PassthroughRequest) -> None:
        """End the reply of request ``only``, because the caller spoke before it did."""
        for reply in self._replies_to(only):
            reply.interrupt()

    def emit(self, turn: PassthroughRequest, emit: Callable[[], None]) -> None:
        """Call ``emit``, which makes LiveKit speak the reply, and note its ``SpeechHandle``."""
        activity = None
        with suppress_and_log("looking for the agent session"):
            activity = agent_activity(self._session)
        if activity is None:
            emit()
            return

        def note(event: SpeechCreatedEvent) -> None:
            turn.speech = turn.speech or event.speech_handle

        activity.session.on("speech_created", note)
        try:
            emit()
        finally:
            activity.session.off("speech_created", note)
        with suppress_and_log("following the speech of a reply of the provider"):
            turn.set_speech_id(getattr(turn.speech, "id", None))
            for reply in self._replies_to(turn):
                if turn.speech is not None:
                    self._follow_speech(reply, turn)
                else:  # LiveKit speaks nothing while it changes the agent.
                    reply.interrupt()

    # --- inside --------------------------------------------------------------------------------

    def _replies_to(self, only: Request[Any]) -> list[Reply[Generation]]:
        """Return the open reply of that request, if there is one."""
        return [reply for reply, request in self._open.items() if request is only]

    def _policy_for(self, adapter: Adapter) -> RetryPolicy:
        """Return the policy in force for the next reply."""
        policy = self._config.policy
        if type(adapter) is Adapter:
            # Only observed, so neither a deadline nor another reply's retry-after of ours applies.
            return observed(policy)
        return replace(policy, max_retries=0) if self._drained else policy

    def _generate_reply_unless_off(self, **kwargs: Any) -> asyncio.Future[Generation]:
        """Call the plugin's own method while traced-retry is switched off."""
        if switch.is_off():
            return self._plain_generate_reply(**kwargs)
        return self.generate_reply(**kwargs)

    def _initialize_telemetry(self) -> None:
        """Initialize the session's metrics before its first reply."""
        self._identify_target()
        if self._config.policy.budget is not None:
            self._config.policy.budget.open(self._target.provider, time.monotonic)

    def _identify_target(self) -> None:
        """Read the target of the requests, and start its counters at zero."""
        self._target = Target("unknown")
        with suppress_and_log("naming the provider"):
            self._target = self._adapter.target()
        self._turn_target = replace(self._target, initiator="provider")
        self._config.telemetry.initialize_counters(self._target.provider, self._adapter.actions)
        self._config.telemetry.initialize_counters(
            self._target.provider, self._adapter.turn_actions, initiator="provider"
        )
        if self._says:
            self._config.telemetry.initialize_counters(self._target.provider, say=True)

    def _adapter_in_force(self) -> Adapter:
        # Looked at with the first reply, once: when the hook is installed by instrument(), the
        # plugin's own __init__ has not run yet.
        if not self._checked:
            self._checked = True
            if missing := self._adapter.missing_attributes():
                tested = supported.LIVEKIT
                log_once(
                    f"{type(self._session).__module__} has no {', '.join(missing)} any more: its "
                    "replies are traced and not retried. Install a tested version of the plugin, "
                    f"{tested.oldest} to {tested.newest}, or a newer traced-retry."
                )
            if missing or not self._config.may_retry:
                self._adapter = Adapter(self._session, self)
            self._identify_target()
        return self._adapter

    def _on_error(self, event: llm.RealtimeModelError) -> None:
        if not event.recoverable:
            with suppress_and_log("reading an error event"):
                self._close_with(self._adapter.classify_event(event), "not_recoverable")
                # LiveKit's own handler, which closes the agent session, runs after this one.
                asyncio.get_running_loop().call_soon(self._fail_speeches)

    def _fail_speeches(self) -> None:
        """Report the replies that LiveKit does not request any more, because the session died.

        LiveKit interrupts them without an error: it closes the agent session, or a session that
        falls back takes another model.
        """
        with suppress_and_log("reporting a fatal error to the agent"):
            activity = agent_activity(self._session)
            if activity is None:
                return
            for speech in pending_speeches(activity):
                self._fail_speech(speech)
            if is_closing(activity.session):
                # LiveKit accepts further replies until it holds the agent session's lock.
                activity.session.on("speech_created", self._on_speech_created)
                self._stop_listening = functools.partial(
                    activity.session.off, "speech_created", self._on_speech_created
                )

    def _on_speech_created(self, event: SpeechCreatedEvent) -> None:
        if event.source == "generate_reply":
            with suppress_and_log("reporting a fatal error to the agent"):
                self._fail_speech(event.speech_handle)

    def _fail_speech(self, speech: SpeechHandle) -> None:
        assert self._closed_by is not None
        failure, stop = self._closed_by
        failure = copy_error(failure)
        request = PassthroughRequest(self._generate_reply)
        trace = self._config.telemetry.reply(self._target)
        request.speech = speech
        reply = Reply(request, self._config.policy, trace, on_failed=self._on_failed(request))
        reply.fail_unsent(failure, stop)
        fail_speech(speech, failure.error)

    def _close_with(self, why: Failure, stop: semconv.StopReason) -> None:
        if self._closed_by is None:
            self._closed_by = (why, stop)
        self.report_failure(why, stop)

    def _ended(self, reply: Reply[Generation], error: BaseException | None) -> None:
        request = self._open.pop(reply, None)
        if request is None:
            return
        request.stop_watching()
        request.end_wait()
        with suppress_and_log("recording the error on the speech"):
            if error is not None and request.speech is not None:
                record_error(request.speech, error)
        with suppress_and_log("ending a request"):
            request.ended()

    def _on_failed(self, request: PassthroughRequest) -> Callable[[FailedReply], None] | None:
        if self._config.on_exhausted is None:
            return None
        return functools.partial(self._schedule_callback, request)

    def _schedule_callback(self, request: PassthroughRequest, failed: FailedReply) -> None:
        failed = replace(failed, speech=request.speech, session=self._agent_session())
        # In the event loop's next turn the waiting code knows the failure, and may request anew.
        asyncio.get_running_loop().call_soon(self._run_callback, "on_exhausted", failed)

    def _watch_wait(
        self,
        reply: Reply[Generation],
        request: PassthroughRequest,
        trace: ReplyTrace,
        began: float | None,
    ) -> None:
        """Call ``on_waiting`` if the reply has no output in time."""
        loop = asyncio.get_running_loop()
        since = loop.time() if began is None else began

        def report() -> asyncio.Future[None] | None:
            waiting = WaitingReply(
                provider=trace.target.provider,
                model=trace.target.model,
                seconds=loop.time() - since,
                started=reply.resolved,
                trace_id=trace.trace_id,
                initiator=trace.target.initiator,
                speech=request.speech,
                session=self._agent_session(),
            )
            return self._run_callback("on_waiting", waiting)

        request.wait = Wait(report)
        request.wait.begin(since + self._config.policy.waiting_after)

    def _agent_session(self) -> Any:
        """Return LiveKit's ``AgentSession`` that uses this realtime session, or None."""
        with suppress_and_log("looking for the agent session"):
            if (activity := agent_activity(self._session)) is not None:
                return activity.session
        return None

    def _run_callback(self, name: str, reply: object) -> asyncio.Future[None] | None:
        """Call the user's function of that name. Return the task of a coroutine."""
        with suppress_and_log(name):
            result = getattr(self._config, name)(reply)
            if inspect.isawaitable(result):
                task = asyncio.ensure_future(_await_and_log(name, result))
                self._callbacks.add(task)
                task.add_done_callback(self._callbacks.discard)
                return task
        return None


async def _await_and_log(name: str, awaitable: Awaitable[None]) -> None:
    with suppress_and_log(name):
        await awaitable


def _install(session: llm.RealtimeSession[Any], config: _Config, *, explicit: bool) -> None:
    """Add the hook to ``session``. An existing hook only gets an explicit config."""
    if isinstance(session.realtime_model, llm.RealtimeModelFallbackAdapter):
        return  # it returns the future of its active child, and the child has the hook
    hook = getattr(session, _HOOK, None)
    if hook is None:
        SessionHook(session, config)
    elif explicit:
        hook.configure(config)


def wrap(
    model: M,
    *,
    policy: RetryPolicy | None = None,
    tracer_provider: otel_trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    on_exhausted: OnExhausted | None = None,
    on_waiting: OnWaiting | None = None,
) -> M:
    """Add retries and traces to every session of ``model``, and return ``model``.

    Args:
        model: any LiveKit realtime or duplex model. One without an adapter is traced and never
            re-sent.
        policy: the retry policy. Default: :meth:`RetryPolicy.from_env`.
        tracer_provider: the target of spans. Default: the provider given to
            ``livekit.agents.telemetry``, else the global one.
        meter_provider: the target of metrics. Default: the global one.
        on_exhausted: called (or awaited) with a :class:`FailedReply` if a reply failed
            permanently, but not for a ``say()``. A function runs on the event loop and must not
            block. Its exceptions are logged once and suppressed.
        on_waiting: called (or awaited) once with a :class:`WaitingReply` for a reply that has no
            output ``policy.waiting_after`` seconds after its request, but not for a ``say()``. A
            coroutine is cancelled at the first output or at the end of the reply. A
            :class:`Filler` plays a sound.

    Raises:
        PolicyError: if an environment variable is invalid.
        TypeError: if ``model`` is not a LiveKit realtime or duplex model, or if another argument
            has a wrong type.
    """
    is_duplex = _is_duplex(model)
    if not (is_duplex or isinstance(model, llm.RealtimeModel)):
        raise TypeError(
            "wrap() takes a livekit.agents.llm.RealtimeModel or DuplexModel, and this is a "
            f"{type(model).__name__}; the pipeline's LLM, STT and TTS retry by themselves"
        )
    check_arguments(policy, on_exhausted, on_waiting)
    if hasattr(model if is_duplex else model.session, _HOOK):
        warnings.warn(
            f"{model.label} is wrapped already; the second wrap() does nothing",
            RuntimeWarning,
            stacklevel=2,
        )
        return model
    if switch.check():
        return model
    config = _config(policy, tracer_provider, meter_provider, on_exhausted, on_waiting)
    if not isinstance(model, llm.RealtimeModel):
        setattr(model, _HOOK, config)
        _hook_duplex_sessions()
        return model
    if isinstance(model, llm.RealtimeModelFallbackAdapter):
        for child in _children(model):
            _wrap_session(child, config)
    _wrap_session(model, config)
    return model


def _wrap_session(model: llm.RealtimeModel, config: _Config) -> None:
    original = model.session

    @functools.wraps(original)
    def session(*args: Any, **kwargs: Any) -> llm.RealtimeSession[Any]:
        made = original(*args, **kwargs)
        _install(made, config, explicit=True)
        return made

    setattr(session, _HOOK, config)
    model.session = session  # type: ignore[method-assign]


def _is_duplex(model: object) -> bool:
    """Return whether ``model`` is a duplex model, which LiveKit 1.7.0 does not have."""
    base = getattr(llm, "DuplexModel", None)
    return base is not None and isinstance(model, base)


def _hook_duplex_sessions() -> None:
    """Install the hook in each session of a wrapped duplex model.

    LiveKit itself puts its adapter around such a model, so ``wrap`` cannot replace a method of the
    adapter's instance.
    """
    original = llm.DuplexRealtimeAdapter.session
    if hasattr(original, _HOOKS):
        return

    @functools.wraps(original)
    def session(self: llm.DuplexRealtimeAdapter, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        if (config := getattr(self.duplex_model, _HOOK, None)) is not None:
            with suppress_and_log("hooking a session of a duplex model"):
                _install(made, config, explicit=True)
        return made

    setattr(session, _HOOKS, True)
    llm.DuplexRealtimeAdapter.session = session  # type: ignore[method-assign]


def _children(adapter: llm.RealtimeModelFallbackAdapter) -> list[llm.RealtimeModel]:
    children = getattr(adapter, "_models", None)
    if children is None:
        log_once(
            "this RealtimeModelFallbackAdapter does not tell its models: wrap() each of them "
            "before they are given to it"
        )
    return list(children or ())


_original_init: Callable[..., None] | None = None


def instrument(
    *,
    policy: RetryPolicy | None = None,
    tracer_provider: otel_trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    on_exhausted: OnExhausted | None = None,
    on_waiting: OnWaiting | None = None,
) -> None:
    """Do what :func:`wrap` does for every realtime session created from now on.

    The arguments are those of :func:`wrap`. A second call only logs a warning. A wrapped model
    keeps its own policy.

    Raises:
        PolicyError: if an environment variable is invalid.
        TypeError: if an argument has a wrong type.
    """
    check_arguments(policy, on_exhausted, on_waiting)
    if is_instrumented():
        warnings.warn(
            "LiveKit is instrumented already; the second instrument() does nothing",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if switch.check():
        return
    _replace_init(_config(policy, tracer_provider, meter_provider, on_exhausted, on_waiting))


def reinstrument(
    policy: RetryPolicy | None, on_exhausted: OnExhausted | None, on_waiting: OnWaiting | None
) -> None:
    """Use these arguments for sessions created from now on.

    If an argument is invalid, raise as :func:`instrument` does, and keep the old arguments.
    """
    check_arguments(policy, on_exhausted, on_waiting)
    config = _config(policy, None, None, on_exhausted, on_waiting)
    uninstrument()
    _replace_init(config)


def _replace_init(config: _Config) -> None:
    global _original_init  # noqa: PLW0603 - there is one RealtimeSession class to instrument
    _original_init = original = llm.RealtimeSession.__init__

    @functools.wraps(original)
    def __init__(  # noqa: N807
        self: llm.RealtimeSession[Any], *args: Any, **kwargs: Any
    ) -> None:
        original(self, *args, **kwargs)
        with suppress_and_log("instrumenting a session"):
            _install(self, config, explicit=False)

    llm.RealtimeSession.__init__ = __init__  # type: ignore[method-assign]


def is_instrumented() -> bool:
    """Return whether :func:`instrument` is active."""
    return _original_init is not None


def uninstrument() -> None:
    """Undo :func:`instrument`, and with it :func:`enable`, for sessions created from now on.

    Sessions that exist, and models given to :func:`wrap`, keep retrying. Call
    :func:`traced_retry.disable` to switch them off too. Without an :func:`instrument`, this call
    has no effect.
    """
    global _original_init  # noqa: PLW0603
    if _original_init is not None:
        llm.RealtimeSession.__init__ = _original_init  # type: ignore[method-assign]
        _original_init = None
