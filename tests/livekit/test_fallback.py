from __future__ import annotations
import asyncio, contextlib
import aiohttp, pytest
from livekit.agents import APIConnectOptions, llm, Agent, AgentSession
from livekit.plugins import openai
from livekit.plugins.azure import realtime as azure
import traced_retry
from traced_retry.livekit import registry
from traced_retry.simulator import OpenAISimulator
from traced_retry.simulator.azure import VoiceLiveSimulator

OPTIONS = APIConnectOptions(max_retry=3, retry_interval=0.5, timeout=5.0)

def heard(session):
    return [i.text_content for i in session.history.items if i.type=="message" and i.role=="assistant"]

@pytest.mark.parametrize("how", ["bare","wrap","instrument"])
@pytest.mark.parametrize("order", ["oa","ao"])
@pytest.mark.parametrize("script", ["ok","quota","unauthorized","error:invalid_value","rate_limit,ok","drop_before","silence", "ok,drop_queued:60", "rate_limit:10"])
async def test_x(script, how, order, recorder, monkeypatch):
    monkeypatch.setitem(registry.ADAPTERS, azure.realtime_model.__name__, "traced_retry.livekit.azure:VoiceLiveAdapter")
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        a = await stack.enter_async_context((OpenAISimulator if order=="oa" else VoiceLiveSimulator)(script))
        b = await stack.enter_async_context((VoiceLiveSimulator if order=="oa" else OpenAISimulator)("ok"))
        def make(s):
            if isinstance(s, VoiceLiveSimulator):
                return azure.RealtimeModel(api_key="sk", endpoint=s.url, modalities=["text"], conn_options=OPTIONS)
            return openai.realtime.RealtimeModel(api_key="sk", base_url=s.url, modalities=["text"], http_session=http, conn_options=OPTIONS)
        adapter = llm.RealtimeModelFallbackAdapter([make(a), make(b)])
        if how=="wrap": traced_retry.wrap(adapter, policy=traced_retry.RetryPolicy(), **recorder.providers)
        if how=="instrument": traced_retry.instrument(policy=traced_retry.RetryPolicy(), **recorder.providers)
        try:
            session = await stack.enter_async_context(AgentSession(llm=adapter))
            await session.start(Agent(instructions="SECRET"))
            loop=asyncio.get_running_loop()
            if "queued" in script:
                await session.generate_reply(); await a.wait_for("connection_lost")
            t=loop.time()
            h=session.generate_reply()
            st=None
            if script in ("silence","rate_limit:10"):
                await a.wait_for(lambda: a.requests); await asyncio.sleep(1); st=session.agent_state
                await adapter.restart_session(switch_model=True)
            await h
            t=loop.time()-t
            await asyncio.sleep(30)
            print("ROW|", script, order, how, heard(session), "done", a.completed, b.completed, "req", len(a.requests), len(b.requests), [(r["gen_ai.provider.name"], r.get("traced_retry.outcome"),r.get("traced_retry.stop_reason")) for r in recorder.replies], [(x["gen_ai.provider.name"], x.get("traced_retry.error_code", x.get("error.type"))) for x in recorder.attempts], round(t,3), repr(h.exception())[:60], recorder.open_spans, st)
        finally:
            if how=="instrument": traced_retry.uninstrument()
