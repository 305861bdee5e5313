# SPDX-License-Identifier: Apache-2.0
"""An OTLP/HTTP endpoint on 127.0.0.1 that keeps what it is sent."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Receiver(http.server.ThreadingHTTPServer):
    """Its ``url``; and ``posted``: path, headers and body of each request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.posted = []
        self.scheme = "http"

    @property
    def url(self):
        """``http://127.0.0.1:PORT``."""
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def bodies(self, path):
        """What was posted there, decompressed and joined."""
        return b"".join(body for at, _, body in self.posted if at == path)

    @property
    def spans(self):
        """The spans posted, as protobuf messages with ``.resource``'s attributes beside each."""
        found = []
        for at, _, body in self.posted:
            if at == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    told = {a.key: a.value.string_value for a in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        found += [(told, span) for span in scope.spans]
        return found


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.posted.append((self.path, dict(self.headers), body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def receiver(tls=None) -> Iterator[Receiver]:
    """A running receiver; ``tls`` is the server's ssl.SSLContext, if it is to speak TLS."""
    with Receiver() as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
            server.scheme = "https"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
