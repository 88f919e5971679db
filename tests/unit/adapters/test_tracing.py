"""Spans that leave for a collector: whose trace they join, and when they do not leave."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan

from tamiyo_svc.adapters.tracing import is_sampled, keep_spans, open_tracing
from tamiyo_svc.decision.trace import Span, build_spans
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import Stage

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"
START_NS = 1_760_000_000_000_000_000


class Collector:
    """An OTLP endpoint that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"

    def spans(self) -> list[OtlpSpan]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, args=(0.01,))
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


def telemetry(traceparent: str) -> leyline.TelemetryPacket:
    spans = [
        Span(Stage.BUILD, START_NS, START_NS + 1_000_000, "command-1"),
        Span(Stage.INFER, START_NS + 1_000_000, START_NS + 4_000_000, "command-1"),
    ]
    packet = leyline.TelemetryPacket(packet_id="p-1", spans=build_spans(spans, traceparent))
    packet.system_health.indicators["reason"] = "policy"
    return packet


async def test_spans_join_the_trainers_trace(collector: Collector) -> None:
    async with open_tracing(collector.url, "replica-1") as export:
        export(telemetry(SAMPLED), SAMPLED)
    build, infer = collector.spans()
    assert [build.name, infer.name] == ["tamiyo.build", "tamiyo.infer"]
    assert {span.trace_id.hex() for span in (build, infer)} == {TRACE_ID}
    assert {span.parent_span_id.hex() for span in (build, infer)} == {PARENT_ID}
    assert infer.end_time_unix_nano - infer.start_time_unix_nano == 3_000_000
    attributes = {pair.key: pair.value.string_value for pair in infer.attributes}
    assert attributes == {"command_id": "command-1", "packet_id": "p-1", "reason": "policy"}
    (request,) = collector.requests
    resource = request.resource_spans[0].resource.attributes
    described = {pair.key: pair.value.string_value for pair in resource}
    assert described["service.name"] == "tamiyo"
    assert described["service.instance.id"] == "replica-1"


async def test_without_a_trace_the_spans_of_a_decision_share_one_of_their_own(
    collector: Collector,
) -> None:
    async with open_tracing(collector.url, "replica-1") as export:
        export(telemetry(""), "")
    build, infer = collector.spans()
    assert build.trace_id == infer.trace_id != bytes(16)
    assert build.parent_span_id == infer.parent_span_id == b""


async def test_a_step_the_trainer_does_not_sample_is_not_exported(collector: Collector) -> None:
    async with open_tracing(collector.url, "replica-1") as export:
        export(telemetry(NOT_SAMPLED), NOT_SAMPLED)
    assert collector.spans() == []


@pytest.mark.parametrize(
    ("traceparent", "sampled"),
    [(SAMPLED, True), (NOT_SAMPLED, False), ("", True), ("nonsense", True)],
)
def test_the_flags_decide_about_sampling(traceparent: str, sampled: bool) -> None:
    assert is_sampled(traceparent) is sampled


async def test_without_an_endpoint_nothing_is_exported() -> None:
    async with open_tracing(None, "replica-1") as export:
        assert export is keep_spans
        export(telemetry(SAMPLED), SAMPLED)


async def test_an_endpoint_without_the_extra_names_the_setting_and_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match=r"TAMIYO_OTLP_ENDPOINT: .*tamiyo-svc\[otel\]"):
        async with open_tracing("http://127.0.0.1:1/v1/traces", "replica-1"):
            pass
