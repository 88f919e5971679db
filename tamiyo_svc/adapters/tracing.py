"""Spans of decisions, on their way to an OpenTelemetry collector.

The telemetry on the bus carries the same spans; this is for those who look at traces elsewhere.
It needs the extra `otel`. Batches are sent by a thread of the SDK; what its bounded queue does
not take is dropped, so a collector that is slow or away costs the step path nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from tamiyo_svc import __version__
from tamiyo_svc.decision.record import SOURCE
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

ExportSpans = Callable[[leyline.TelemetryPacket, str], None]
"""Takes a committed decision's telemetry and the `traceparent` of its packet."""

_NANOS: Final = 1_000_000_000
_EXPORT_TIMEOUT_S: Final = 5.0
_TRACE_ID_BYTES: Final = 16
_SAMPLED: Final = 1
_FLAGS: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-([0-9a-f]{2})(?:-.*)?")


def keep_spans(telemetry: leyline.TelemetryPacket, traceparent: str) -> None:
    """Export nothing; the spans stay in the telemetry."""


@asynccontextmanager
async def open_tracing(endpoint: str | None, replica: str) -> AsyncIterator[ExportSpans]:
    """What exports spans to an OTLP/HTTP endpoint; leaving the block sends what is queued.

    Raises:
        ConfigurationError: there is an endpoint, but the extra is not installed.
    """
    if endpoint is None:
        yield keep_spans
        return
    processor = _processor(endpoint)
    try:
        yield SpanExport(processor, replica)
    finally:
        await asyncio.to_thread(processor.shutdown)


class SpanExport:
    """Turns the spans of telemetry packets into OpenTelemetry's and hands them to a processor."""

    def __init__(self, processor: SpanProcessor, replica: str) -> None:
        from opentelemetry.sdk.resources import Resource

        self._processor = processor
        self._resource = Resource.create(
            {
                "service.name": SOURCE,
                "service.version": __version__,
                "service.instance.id": replica,
            }
        )

    def __call__(self, telemetry: leyline.TelemetryPacket, traceparent: str) -> None:
        """Queue the packet's spans, unless its trainer decided against sampling."""
        if not is_sampled(traceparent):
            return
        for span in telemetry.spans:
            self._processor.on_end(self._converted(telemetry, span))

    def _converted(
        self, telemetry: leyline.TelemetryPacket, span: leyline.TraceSpan
    ) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

        attributes = dict(span.attributes)
        trace_id = int(attributes.pop("trace_id", "") or _own_trace_id(span), 16)
        sampled = TraceFlags(TraceFlags.SAMPLED)
        parent = None
        if span.parent_span_id:
            parent_id = int(span.parent_span_id, 16)
            parent = SpanContext(trace_id, parent_id, is_remote=True, trace_flags=sampled)
        attributes["packet_id"] = telemetry.packet_id
        attributes["reason"] = telemetry.system_health.indicators["reason"]
        return ReadableSpan(
            name=span.name,
            context=SpanContext(
                trace_id, int(span.span_id, 16), is_remote=False, trace_flags=sampled
            ),
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind.CONSUMER,
            start_time=span.start_time.seconds * _NANOS + span.start_time.nanos,
            end_time=span.end_time.seconds * _NANOS + span.end_time.nanos,
        )


def is_sampled(traceparent: str) -> bool:
    """Whether the trainer wants this step traced; without a word from it, yes."""
    matched = _FLAGS.fullmatch(traceparent)
    return matched is None or bool(int(matched[1], 16) & _SAMPLED)


def _own_trace_id(span: leyline.TraceSpan) -> str:
    """The spans of one decision share a trace even when the trainer started none."""
    command_id = span.attributes["command_id"].encode()
    return blake2b(command_id, digest_size=_TRACE_ID_BYTES).hexdigest()


def _processor(endpoint: str) -> SpanProcessor:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError(
            f"TAMIYO_OTLP_ENDPOINT: got {endpoint!r}, but {error.name} is not installed; "
            "`pip install tamiyo-svc[otel]`"
        ) from None
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S))
