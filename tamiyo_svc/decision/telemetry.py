"""The telemetry packet of a decision, and the one for events that belong to no packet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Final

from tamiyo_svc.decision.record import SOURCE, Decision, Runtime, severity_of, timestamp
from tamiyo_svc.decision.trace import Span, build_spans
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.breaker import CLOSED
from tamiyo_svc.risk.engine import POLICY_REASON
from tamiyo_svc.risk.events import FiredEvent, number
from tamiyo_svc.taxonomy import BreakerName, CommandAction, Event, Severity

Metric = tuple[str, float, str]
"""Name, value, unit."""

STABLE = "stable"
"""The summary when nothing but the policy had a say."""

MAX_SCORES: Final = 8
"""How many of a graph's seeds and blueprints have their scores told, the best first."""

_ID_CHARS: Final = 64
_COMMAND_NAMES: Final[Mapping[CommandAction, str]] = {
    action: action.name.lower() for action in CommandAction
}


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the step took, in milliseconds.

    `step_ms` runs from packet read to command ready; `inference_ms` is what the step spent
    waiting for the network, also when that gave nothing.
    """

    step_ms: float
    inference_ms: float = 0.0


def build_telemetry(
    decision: Decision,
    timings: Timings,
    spans: Sequence[Span] = (),
    traceparent: str = "",
) -> leyline.TelemetryPacket:
    """Everything there is to say about one decision."""
    reason = decision.verdict.reason
    proposal = decision.proposal
    packet = _packet(
        decision.packet.packet_id, decision.now_ns, decision.events, decision.command_id
    )
    for name, value, unit in _metrics(decision, timings):
        packet.metrics.add(name=name, value=value, unit=unit)
    if proposal is not None:
        _add_choices(packet, decision, proposal)
    packet.spans.extend(build_spans(spans, traceparent))
    packet.system_health.status = _health(
        decision.severity, paused=decision.verdict.action is CommandAction.PAUSE
    )
    packet.system_health.summary = STABLE if reason == POLICY_REASON else reason
    packet.system_health.indicators.update(
        {
            **_indicators(decision.runtime, decision.severity, reason),
            "step_index": str(decision.packet.global_step),
            "mode": str(int(decision.conservative)),
            "blending_method": proposal.blending_method if proposal is not None else "none",
            "command": _COMMAND_NAMES[decision.verdict.action],
        }
    )
    return packet


def build_notice(
    packet_id: str, events: tuple[FiredEvent, ...], runtime: Runtime, now_ns: int
) -> leyline.TelemetryPacket:
    """Telemetry for events outside any decision, such as a rejected policy or expired packets.

    `packet_id` names the notice; the first of the most severe events is its reason.
    """
    severity = severity_of(events)
    reason = next((fired.event.value for fired in events if fired.severity is severity), STABLE)
    packet = _packet(packet_id, now_ns, events, packet_id)
    for name, value, unit in _breaker_metrics(runtime):
        packet.metrics.add(name=name, value=value, unit=unit)
    packet.system_health.status = _health(severity, paused=False)
    packet.system_health.summary = reason
    packet.system_health.indicators.update(_indicators(runtime, severity, reason))
    return packet


def _packet(
    packet_id: str, now_ns: int, events: Sequence[FiredEvent], event_prefix: str
) -> leyline.TelemetryPacket:
    packet = leyline.TelemetryPacket(
        packet_id=packet_id,
        timestamp=timestamp(now_ns),
        source_subsystem=SOURCE,
        level=severity_of(tuple(events)).level,
    )
    for index, fired in enumerate(events):
        packet.events.add(
            event_id=f"{event_prefix}:{index}",
            description=fired.event.value,
            level=fired.severity.level,
            attributes=fired.attributes,
        )
    return packet


def _health(severity: Severity, *, paused: bool) -> leyline.HealthStatus:
    if severity is Severity.CRITICAL:
        return leyline.HEALTH_STATUS_CRITICAL
    if paused or severity >= Severity.WARNING:
        return leyline.HEALTH_STATUS_DEGRADED
    return leyline.HEALTH_STATUS_HEALTHY


def _indicators(runtime: Runtime, severity: Severity, reason: str) -> Mapping[str, str]:
    return {
        "reason": reason,
        "priority": leyline.MessagePriority.Name(severity.priority),
        "policy": runtime.policy.policy_id,
        "policy_version": runtime.policy.version,
        "policy_arch": runtime.policy.architecture,
        "policy_compile": str(int(runtime.compile_enabled)),
        "timeout_budget_ms": number(runtime.step_timeout_ms),
        "metadata_timeout_budget_ms": number(runtime.metadata_timeout_ms),
        "device": runtime.device,
        "replica": runtime.replica,
    }


def _metrics(decision: Decision, timings: Timings) -> Iterator[Metric]:
    """Every metric; as elsewhere in Leyline a loss of 0 is one that was not measured."""
    signals, runtime, proposal = decision.signals, decision.runtime, decision.proposal
    yield "tamiyo.validation_loss", signals.validation_loss or 0.0, "loss"
    yield "tamiyo.loss_delta", signals.loss_delta or 0.0, "loss"
    yield "tamiyo.conservative_mode", float(decision.conservative), "bool"
    yield "tamiyo.inference.latency_ms", timings.inference_ms, "ms"
    yield "tamiyo.step.latency_ms", timings.step_ms, "ms"
    yield "tamiyo.gnn.compile_enabled", float(runtime.compile_enabled), "bool"
    if runtime.compile_warm_ms is not None:
        yield "tamiyo.gnn.compile_warm_ms", max(0.0, runtime.compile_warm_ms), "ms"
    if runtime.compile_fallbacks > 0:
        yield "tamiyo.gnn.compile_fallback_total", float(runtime.compile_fallbacks), "count"
    if proposal is None:
        yield "tamiyo.gnn.feature_coverage", 0.0, "ratio"
    else:
        yield from _proposal_metrics(proposal)
    yield from _breaker_metrics(runtime)
    if signals.blueprint_risk is not None:
        yield "tamiyo.blueprint.risk", signals.blueprint_risk, "ratio"
    yield from _safety_sheet_metrics(decision)


def _proposal_metrics(proposal: Proposal) -> Iterator[Metric]:
    yield "tamiyo.gnn.inference.latency_ms", proposal.inference_ms, "ms"
    yield "tamiyo.graph.build_ms", proposal.build_ms, "ms"
    yield "tamiyo.policy.value_estimate", proposal.value_estimate, "value"
    yield "tamiyo.policy.risk_index", float(proposal.risk_index), "enum"
    yield "tamiyo.policy.risk_score", proposal.risk_score, "ratio"
    yield "tamiyo.gnn.feature_coverage", proposal.coverage.mean, "ratio"
    for family, share in proposal.coverage.by_family.items():
        yield f"tamiyo.gnn.feature_coverage.{family}", share, "ratio"
    missing = proposal.blueprint is None or proposal.blueprint.bsds is None
    yield "tamiyo.gnn.bsds_missing", float(missing), "bool"
    yield "tamiyo.blending.schedule_start", proposal.schedule_start, "fraction"
    yield "tamiyo.blending.schedule_end", proposal.schedule_end, "fraction"
    if proposal.seed_index is not None:
        yield "tamiyo.selection.seed_index", float(proposal.seed_index), "index"
    if proposal.blueprint_index is not None:
        yield "tamiyo.selection.blueprint_index", float(proposal.blueprint_index), "index"


def _add_choices(packet: leyline.TelemetryPacket, decision: Decision, proposal: Proposal) -> None:
    """What was chosen and from what, with names beside the numbers."""
    add = packet.metrics.add
    add(
        name="tamiyo.blending.method_index",
        value=proposal.blending_method_index,
        unit="enum",
        attributes={"method": proposal.blending_method},
    )
    runner_up, probability = proposal.runner_up
    for name, action, value in (
        ("tamiyo.policy.proposed", proposal.action, max(proposal.action_probabilities)),
        ("tamiyo.policy.runner_up", runner_up, probability),
    ):
        attributes = {"action": action.name.lower()}
        add(name=name, value=value, unit="probability", attributes=attributes)
    if proposal.seed_score is not None:
        seeds = (seed.seed_id for seed in decision.packet.seed_states)
        add(
            name="tamiyo.selection.seed_score",
            value=proposal.seed_score,
            unit="score",
            attributes={
                "seed_id": proposal.seed_id[:_ID_CHARS],
                "scores": _best(seeds, proposal.seed_scores),
            },
        )
    if proposal.blueprint is not None and proposal.blueprint_score is not None:
        add(
            name="tamiyo.selection.blueprint_score",
            value=proposal.blueprint_score,
            unit="score",
            attributes={
                "blueprint_id": proposal.blueprint.blueprint_id[:_ID_CHARS],
                "scores": _best(proposal.blueprint_ids, proposal.blueprint_scores),
            },
        )


def _best(names: Iterable[str], scores: Sequence[float]) -> str:
    """The best scores as JSON, a list of [name, score]."""
    best = nlargest(MAX_SCORES, zip(scores, names, strict=False), key=lambda pair: pair[0])
    pairs = [[name[:_ID_CHARS], round(score, 6)] for score, name in best]
    return json.dumps(pairs, separators=(",", ":"))


def _breaker_metrics(runtime: Runtime) -> Iterator[Metric]:
    for name in (BreakerName.INFERENCE, BreakerName.METADATA):
        breaker = runtime.breakers.get(name, CLOSED)
        yield f"tamiyo.breaker.{name}_state", float(breaker.state), "enum"
        yield f"tamiyo.breaker.{name}_failures", float(breaker.failures), "count"


def _safety_sheet_metrics(decision: Decision) -> Iterator[Metric]:
    fired = {event.event for event in decision.verdict.events}
    if Event.BSDS_HAZARD_CRITICAL in fired:
        yield "tamiyo.bsds.hazard_critical_signal", 1.0, "bool"
    if Event.BSDS_HAZARD_HIGH in fired:
        yield "tamiyo.bsds.hazard_high_signal", 1.0, "bool"
    if Event.BLUEPRINT_RISK in fired and decision.signals.bsds is not None:
        yield "tamiyo.bsds.elevated_risk_flag", 1.0, "bool"
