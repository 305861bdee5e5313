# SPDX-License-Identifier: Apache-2.0
"""Test ``traced_retry.enable``: the SDK's setup, the target of spans, and their arrival."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from support.fresh import fresh
from support.receiver import receiver
from support.run_conversation import SECRET

from traced_retry import semconv, shipped_files

CONVERSATION = """
import asyncio, traced_retry
from support.run_conversation import run_conversation
"""


@pytest.fixture
def state(tmp_path):
    """Return the state directory of a test's processes as an environment variable."""
    return {"XDG_STATE_HOME": tmp_path / "state"}


def stored(state):
    """Return all spans in the local stores, each with its resource's attributes."""
    found = []
    for path in (state["XDG_STATE_HOME"] / "traced-retry" / "spans").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                told = {a["key"]: a["value"] for a in resource["resource"]["attributes"]}
                found += [(told, s) for scope in resource["scopeSpans"] for s in scope["spans"]]
    return found


def names(spans):
    """Return the names of spans, each with its resource."""
    return [span["name"] for _, span in spans]


def attribute(span, name):
    """Return an attribute of a span as text."""
    (value,) = [a["value"] for a in span["attributes"] if a["key"] == name]
    return value["stringValue"]


class TestNothingSaid:
    def test_the_local_store(self, state):
        """LiveKit's and our spans are stored, and the path is returned and logged once."""
        ended = fresh(
            CONVERSATION
            + """
first = traced_retry.enable()
done = asyncio.run(run_conversation("rate_limit:0.1,ok"))
result = first.destination, traced_retry.enable().destination, first.flush(), done
""",
            **state,
        )
        (first, second, flushed, done) = ended.result
        told, reply = next(found for found in stored(state) if found[1]["name"] == "generate_reply")

        assert {"requests": 2, "completed": 1} == done
        assert (first, True) == (second, flushed)
        assert Path(first).is_file()
        assert [f"INFO traced_retry: spans go to {first}"] == [
            line for line in ended.log if "spans go" in line
        ]
        assert 2 == names(stored(state)).count("generate_reply.attempt")
        assert "agent_session" in names(stored(state))
        assert "recovered" == attribute(reply, semconv.OUTCOME)
        assert {"stringValue": "livekit-agent"} == told["service.name"]

    def test_nothing_that_was_said(self, state):
        """LiveKit's spans are stored without the words of the conversation."""
        ended = fresh(
            CONVERSATION + "traced_retry.enable(); result = asyncio.run(run_conversation())",
            **state,
        )

        assert {"requests": 1, "completed": 1} == ended.result
        assert SECRET not in json.dumps(stored(state))
        assert "reply 1" not in json.dumps(stored(state))

    def test_unless_it_is_wanted(self, state):
        """LiveKit's variable includes the words."""
        fresh(
            CONVERSATION + "traced_retry.enable(); result = asyncio.run(run_conversation())",
            LIVEKIT_TELEMETRY_ALLOW_PII="true",
            **state,
        )

        assert "reply 1" in json.dumps(stored(state))

    def test_a_store_that_cannot_be_written(self, tmp_path):
        """Replies continue, and one warning has the remedy."""
        (tmp_path / "file").touch()
        ended = fresh(
            CONVERSATION + "at = traced_retry.enable().destination\n"
            "result = at, asyncio.run(run_conversation())",
            XDG_STATE_HOME=tmp_path / "file",
        )

        assert ended.result[0].startswith("nowhere: ")
        assert {"requests": 1, "completed": 1} == ended.result[1]
        (line,) = [line for line in ended.log if "WARNING traced_retry" in line]
        assert "OTEL_EXPORTER_OTLP_ENDPOINT" in line

    def test_what_is_buffered_is_stored_at_the_end_of_a_process(self, state):
        """Buffered spans are stored, also by a child, which runs no atexit handler before 3.13."""
        ended = fresh(
            """
import traced_retry
from opentelemetry import trace
traced_retry.enable()
trace.get_tracer("t").start_span("the last one").end()
""",
            **state,
        )

        assert ("", 0) == (ended.error, ended.exitcode)
        assert ["the last one"] == names(stored(state))


class TestWhatIsSaid:
    def test_an_endpoint(self, state):
        """Spans and metrics are sent to the endpoint, and no store is written."""
        with receiver() as server:
            ended = fresh(
                CONVERSATION
                + """
at = traced_retry.enable(service_name="support").destination
result = at, asyncio.run(run_conversation("ok"))
""",
                OTEL_EXPORTER_OTLP_ENDPOINT=server.url,
                **state,
            )

            assert f"otlp, 127.0.0.1:{server.server_port}" == ended.result[0]
            assert "generate_reply" in [span.name for _, span in server.spans]
            assert {"support"} == {told["service.name"] for told, _ in server.spans}
            assert semconv.METRIC_REPLIES.encode() in server.bodies("/v1/metrics")
        assert [] == stored(state)

    def test_the_environment_names_the_service(self, state):
        """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override the code."""
        code = """
import traced_retry
from opentelemetry import trace
traced_retry.enable(service_name="code")
trace.get_tracer("t").start_span("s").end()
"""
        fresh(code, OTEL_SERVICE_NAME="one", **state)
        fresh(code, OTEL_RESOURCE_ATTRIBUTES="service.name=two", **state)
        fresh(code, **state)

        found = [told["service.name"]["stringValue"] for told, _ in stored(state)]
        assert ["code", "one", "two"] == sorted(found)

    @pytest.mark.parametrize(
        ("said", "preset", "where"),
        [
            ({}, None, "STORE"),
            ({}, "console", "preset console"),
            ({"OTEL_TRACES_EXPORTER": "console"}, "local", "console"),
            ({"OTEL_TRACES_EXPORTER": "console,otlp"}, None, "console, otlp"),
            ({"OTEL_TRACES_EXPORTER": "traced_retry_store"}, None, "traced_retry_store"),
            ({"OTEL_TRACES_EXPORTER": "none"}, "local", "nowhere: OTEL_TRACES_EXPORTER"),
            ({"OTEL_METRICS_EXPORTER": "none"}, None, "STORE"),
            (
                {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:pw@127.0.0.1:9"},
                None,
                "otlp, 127.0.0.1:9",
            ),
            ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h"}, "console", "otlp, h"),
            ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9"}, None, "STORE"),
            ({"OTEL_CONFIG_FILE": "FILE", "OTEL_TRACES_EXPORTER": "x"}, "local", "what FILE says"),
            ({"OTEL_SDK_DISABLED": "true"}, "local", "nowhere: OTEL_SDK_DISABLED is true"),
        ],
    )
    def test_the_first_that_says_anything_holds(self, said, preset, where, state):
        """The order is file, variables, preset, local store."""
        file = str(shipped_files.presets()["console"])
        said = {name: value.replace("FILE", file) for name, value in said.items()}
        ended = fresh(
            f"import traced_retry; result = traced_retry.enable(preset={preset!r}).destination",
            **said,
            **state,
        )
        store = str(state["XDG_STATE_HOME"] / "traced-retry" / "spans" / "livekit-agent-")

        assert "" == ended.error
        found = "STORE" if ended.result.startswith(store) else ended.result
        assert where.replace("FILE", file) == found

    @pytest.mark.parametrize(
        ("said", "preset", "words"),
        [
            ({}, "jagger", "ExportError: preset is 'jagger'; it must be one of collector, console"),
            (
                {"OTEL_TRACES_EXPORTER": "oltp"},
                None,
                "ExportError: OTEL_TRACES_EXPORTER is 'oltp'; installed are console, otlp",
            ),
            (
                {"OTEL_METRICS_EXPORTER": "oltp"},
                None,
                "ExportError: OTEL_METRICS_EXPORTER is 'oltp'; installed are console, otlp",
            ),
            (
                {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
                None,
                "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'; it must be 'http/protobuf' or 'grpc'",
            ),
            (
                {"OTEL_CONFIG_FILE": "/no/such.yaml"},
                None,
                "ConfigurationFileError: /no/such.yaml: Configuration file not found",
            ),
            ({}, "vendor", "otlp_http.endpoint is no http:// or https:// URL; is a variable"),
            (
                {"LIVEKIT_REALTIME_MAX_RETRIES": "many"},
                None,
                "PolicyError: LIVEKIT_REALTIME_MAX_RETRIES is 'many'",
            ),
        ],
    )
    def test_what_cannot_be(self, said, preset, words, state):
        """An invalid value is an error at start-up that names it and the allowed values."""
        ended = fresh(
            f"import traced_retry; traced_retry.enable(preset={preset!r})", **said, **state
        )

        assert words in ended.error

    def test_a_preset_in_code(self, state):
        """A preset in code stores spans under the service's name from code."""
        ended = fresh(
            CONVERSATION
            + """
traced_retry.enable(preset="local", service_name="support")
result = asyncio.run(run_conversation("ok"))
""",
            **state,
        )

        assert {"requests": 1, "completed": 1} == ended.result
        assert {"support"} == {told["service.name"]["stringValue"] for told, _ in stored(state)}
        assert "generate_reply" in names(stored(state))


class TestWhatIsThere:
    @pytest.mark.parametrize(
        ("give", "where"),
        [
            ("trace.set_tracer_provider(theirs)", "the global tracer provider"),
            ("telemetry.set_tracer_provider(theirs)", "the tracer provider given to LiveKit"),
        ],
    )
    def test_is_used_and_never_replaced(self, give, where, state):
        """A global provider or LiveKit's own gets the spans, and a preset does not."""
        ended = fresh(
            CONVERSATION
            + f"""
from opentelemetry import metrics, trace
from livekit.agents import telemetry
from support.recorder import Recorder
recorder = Recorder()
theirs = recorder.tracer_provider
{give}
at = traced_retry.enable(preset="local")
asyncio.run(run_conversation("rate_limit:0.1,ok"))
meter_provider = type(metrics.get_meter_provider()).__name__
result = at.destination, at.flush(), [dict(r) for r in recorder.replies], meter_provider
recorder.shutdown()
""",
            **state,
        )
        (destination, flushed, (reply,), meter) = ended.result

        assert (where, True) == (destination, flushed)
        assert "recovered" == reply[semconv.OUTCOME]
        assert "_ProxyMeterProvider" == meter
        assert [] == stored(state)

    def test_what_livekit_made_for_its_cloud(self, state):
        """LiveKit's cloud provider gives way to ours, as to any that an entrypoint sets."""
        ended = fresh(
            CONVERSATION
            + """
from livekit.agents.telemetry import traces
traces._prepare_cloud_tracer(room_id="r", job_id="j", observability_url="http://127.0.0.1:9")
assert type(traces.tracer._tracer_provider).__module__.startswith("opentelemetry.sdk")
traced_retry.enable()
result = asyncio.run(run_conversation())
""",
            LIVEKIT_API_KEY="key",
            LIVEKIT_API_SECRET="a secret of thirty-two characters",
            **state,
        )

        assert {"requests": 1, "completed": 1} == ended.result
        assert {"generate_reply", "agent_session"} <= set(names(stored(state)))

    def test_a_meter_provider(self, state):
        """An existing meter provider is used, and the preset's is not created."""
        ended = fresh(
            """
import traced_retry
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
theirs = MeterProvider()
metrics.set_meter_provider(theirs)
traced_retry.enable(preset="console")
result = metrics.get_meter_provider() is theirs
""",
            **state,
        )

        assert (True, []) == (ended.result, [line for line in ended.log if "Overriding" in line])


class TestAgain:
    def test_what_is_given_later_holds_from_then_on(self, state):
        """A second call replaces the policy and on_exhausted if it passes them."""
        ended = fresh(
            CONVERSATION
            + """
told = []
asyncio_run = lambda: asyncio.run(run_conversation("rate_limit:0.01"))["requests"]
traced_retry.enable(policy=traced_retry.RetryPolicy(max_retries=1, base_delay=0))
one = asyncio_run()
traced_retry.enable()
two = asyncio_run()
never = traced_retry.RetryPolicy(max_retries=0)
traced_retry.enable(policy=never, on_exhausted=lambda failed: told.append(failed.stop_reason))
result = one, two, asyncio_run(), told
""",
            **state,
        )

        assert (2, 2, 1, ["max_attempts"]) == ended.result

    @pytest.mark.parametrize("first", ["", "traced_retry.enable(policy=first)"])
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("policy={'max_retries': 1}", "ArgumentError: policy is a dict; it must be a Retry"),
            ("on_exhausted='nope'", "ArgumentError: on_exhausted is 'nope'; it must be a function"),
            ("on_exhausted=print", "PolicyError: LIVEKIT_REALTIME_MAX_RETRIES is 'lots'"),
        ],
    )
    def test_wrong_argument_changes_nothing(self, first, wrong, message, state):
        """After an error, the providers, store and hook of an earlier call are unchanged."""
        ended = fresh(
            f"""
import os
import traced_retry
from livekit.agents import llm
from opentelemetry import trace
first = traced_retry.RetryPolicy(max_retries=1)
{first}
before = llm.RealtimeSession.__init__, trace.get_tracer_provider()
os.environ["LIVEKIT_REALTIME_MAX_RETRIES"] = "lots"
try:
    traced_retry.enable({wrong})
except ValueError as error:
    said = type(error).__name__ + ": " + str(error)
same = before == (llm.RealtimeSession.__init__, trace.get_tracer_provider())
result = said, same
""",
            **state,
        )

        assert "" == ended.error
        said, same = ended.result
        assert said.startswith(message)
        assert same
        if not first:
            assert [] == list(Path(state["XDG_STATE_HOME"]).rglob("*.jsonl"))

    def test_from_many_threads(self, state):
        """Calls from several threads create one SDK and one store."""
        ended = fresh(
            """
import traced_retry
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: traced_retry.enable().destination, range(32)))
result = len(set(found))
""",
            **state,
        )

        assert 1 == ended.result

    @pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
    def test_in_children_of_a_process_that_has_it(self, method, state):
        """Each child's spans are stored completely, beside its parent's."""
        ended = fresh(
            f"""
import multiprocessing, warnings
import traced_retry
from opentelemetry import trace
from support import spans
warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, on purpose
traced_retry.enable()
trace.get_tracer("t").start_span("parent").end()
context = multiprocessing.get_context("{method}")
children = [context.Process(target=spans.child, args=(n,)) for n in range(2)]
for child in children: child.start()
for child in children: child.join(60)
result = [child.exitcode for child in children]
""",
            **state,
        )

        assert [0, 0] == ended.result
        assert ["child 0", "child 1", "parent"] == sorted(names(stored(state)))


@pytest.mark.parametrize("refuses", [None, "traces", "metrics"])
def test_flush_returns_whether_all_was_delivered(refuses, state):
    """A flush returns False if the backend refused the spans or the metrics.

    The ``force_flush`` of the SDK's own providers returns True in each case.
    """
    with receiver() as server:
        endpoints = {
            f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT": f"{server.url}/v1/{signal}"
            for signal in ("traces", "metrics")
            if signal != refuses
        }
        ended = fresh(
            """
import traced_retry
from opentelemetry import metrics, trace
tracing = traced_retry.enable()
trace.get_tracer("t").start_span("s").end()
metrics.get_meter("m").create_counter("c").add(1)
result = tracing.flush(10)
""",
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
            OTEL_EXPORTER_OTLP_TIMEOUT="0.3",
            **endpoints,
            **state,
        )

    assert ("", refuses is None) == (ended.error, ended.result)


def test_a_hanging_server_holds_up_neither_flush_nor_exit(state):
    """Flush gives up after the time given to it, and the process ends.

    Both are timed from the moment the code starts to wait. The start of the fork server, which
    imports LiveKit, takes 8 s on a busy machine.
    """
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        ended = fresh(
            """
import time, traced_retry
from opentelemetry import trace
tracing = traced_retry.enable()
trace.get_tracer("t").start_span("s").end()
began = time.monotonic()
done = tracing.flush(0.5)
result = done, time.monotonic() - began
""",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{hanging.getsockname()[1]}",
            **state,
        )
    (done, flush_seconds) = ended.result

    assert (False, 0) == (done, ended.exitcode)
    assert 0.4 < flush_seconds < 1.0
    assert flush_seconds + ended.exit_seconds < 8


class TestSwitchedOff:
    def test_variable_leaves_the_process_as_it_is(self, state):
        """The reply fails as with the plugin alone, no provider is set, and one line warns."""
        ended = fresh(
            CONVERSATION
            + """
from opentelemetry import trace
at = traced_retry.enable().destination
done = asyncio.run(run_conversation("error:server_error,ok"))
result = at, done, type(trace.get_tracer_provider()).__name__
""",
            TRACED_RETRY_DISABLED="true",
            **state,
        )

        assert [
            "nowhere: TRACED_RETRY_DISABLED is true",
            {"requests": 1, "completed": 0},
            "ProxyTracerProvider",
        ] == list(ended.result)
        assert [] == stored(state)
        assert 1 == len([line for line in ended.log if "neither retried nor traced" in line])

    def test_enable_switches_on_again(self, state):
        """disable() acts on the replies after it, and enable() undoes it."""
        ended = fresh(
            CONVERSATION
            + """
traced_retry.enable()
traced_retry.disable()
off = asyncio.run(run_conversation("error:server_error,ok"))
traced_retry.enable().flush()
on = asyncio.run(run_conversation("error:server_error,ok"))
result = off, on
""",
            **state,
        )

        assert [1, 2] == [done["requests"] for done in ended.result]
        assert 1 == names(stored(state)).count("generate_reply")


class TestOrder:
    def warnings(self, ended):
        """Return our warnings about the order."""
        return [line for line in ended.log if "after traced_retry.enable()" in line]

    def test_global_provider_after_enable_is_reported_once(self, state):
        """OpenTelemetry refuses the provider, and our warning names the remedy."""
        ended = fresh(
            """
import traced_retry
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
traced_retry.enable()
for _ in range(2):
    trace.set_tracer_provider(TracerProvider())
traced_retry.enable()
""",
            **state,
        )

        (line,) = self.warnings(ended)
        assert "WARNING traced_retry" in line
        assert "Configure it before traced_retry.enable()" in line

    def test_provider_of_livekit_after_enable_is_reported_once(self, state):
        """LiveKit's provider gets the spans, and the store does not."""
        ended = fresh(
            CONVERSATION
            + """
from livekit.agents import telemetry
from opentelemetry.sdk.trace import TracerProvider
traced_retry.enable()
telemetry.set_tracer_provider(TracerProvider())
result = [asyncio.run(run_conversation()) for _ in range(2)]
""",
            **state,
        )

        (line,) = self.warnings(ended)
        assert "only that one gets the spans" in line

    def test_provider_before_enable_is_not_reported(self, state):
        """The order is right."""
        ended = fresh(
            CONVERSATION
            + """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
traced_retry.enable()
result = asyncio.run(run_conversation())
""",
            **state,
        )

        assert [] == self.warnings(ended)
