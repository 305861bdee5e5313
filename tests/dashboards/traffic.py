# SPDX-License-Identifier: Apache-2.0
"""Replies that only our telemetry knows of, scraped as a worker's own metrics are."""

from __future__ import annotations

import threading

import prometheus_client
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from support.attempts import record_attempt

from traced_retry.core.failure import failure
from traced_retry.core.telemetry import Target, Telemetry


class Traffic:
    """Tells of replies from a thread, and serves what that makes on a port of 127.0.0.1."""

    def __init__(self):
        self._reader = PrometheusMetricReader()
        self._provider = MeterProvider([self._reader])
        self._telemetry = Telemetry(meter_provider=self._provider)
        self._server, self._thread = prometheus_client.start_http_server(0, "127.0.0.1")
        self.port = self._server.server_port
        self._replies, self._every = {}, 1.0
        self._closed = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def go(self, replies, *, every):
        """From now on one reply of each ``every`` seconds: {provider: (stop, its seconds)}."""
        for provider in replies:
            self._telemetry.initialize_counters(provider)
        self._replies, self._every = replies, every

    def _tell(self):
        failed = failure(RuntimeError(), "timeout")
        while not self._closed.wait(self._every):
            for provider, (stop, seconds) in self._replies.items():
                reply = self._telemetry.reply(Target(provider))
                reply.begin(0.0, 0.0)
                result, why = ("failed", failed) if stop else ("succeeded", None)
                record_attempt(reply, result, seconds, why)
                reply.end(stop, seconds, why)

    def close(self):
        """Stop both."""
        self._closed.set()
        self._teller.join()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._provider.shutdown()
