"""What was timed in a decision, as Leyline spans under the trainer's own trace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from tamiyo_svc.decision.record import timestamp
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import Stage

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
_SPAN_ID_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Span:
    """One timed stage in wall-clock nanoseconds; `command_id` names the decision it belongs to.

    That is another one for the commit, whose span travels with the next packet.
    """

    stage: Stage
    start_ns: int
    end_ns: int
    command_id: str


def build_spans(spans: Sequence[Span], traceparent: str) -> list[leyline.TraceSpan]:
    """Leyline spans; a `traceparent` that is missing or malformed leaves them without a parent."""
    matched = _TRACEPARENT.fullmatch(traceparent)
    trace_id, parent_id = matched.groups() if matched else ("", "")
    if not (trace_id.strip("0") and parent_id.strip("0")):
        trace_id = parent_id = ""
    return [_build(span, trace_id, parent_id) for span in spans]


def _build(span: Span, trace_id: str, parent_id: str) -> leyline.TraceSpan:
    seed = f"{span.command_id}/{span.stage}".encode()
    attributes = {"command_id": span.command_id}
    if trace_id:
        attributes["trace_id"] = trace_id
    return leyline.TraceSpan(
        span_id=blake2b(seed, digest_size=_SPAN_ID_BYTES).hexdigest(),
        parent_span_id=parent_id,
        name=f"tamiyo.{span.stage}",
        start_time=timestamp(span.start_ns),
        end_time=timestamp(span.end_ns),
        attributes=attributes,
    )
