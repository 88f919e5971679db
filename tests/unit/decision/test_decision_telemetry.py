from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.decisions import BLUEPRINT, NOW_NS, PROPOSAL, RUNTIME, decide, packet, proposal

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.record import Decision
from tamiyo_svc.decision.telemetry import MAX_SCORES, Timings, build_notice, build_telemetry
from tamiyo_svc.decision.trace import Span
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.breaker import Breaker
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.taxonomy import (
    BreakerName,
    BreakerState,
    Event,
    InferenceStatus,
    PolicyAction,
    Severity,
    Stage,
)

TIMINGS = Timings(step_ms=3.5, inference_ms=2.75)
ALWAYS = {
    "tamiyo.validation_loss": "loss",
    "tamiyo.loss_delta": "loss",
    "tamiyo.conservative_mode": "bool",
    "tamiyo.inference.latency_ms": "ms",
    "tamiyo.step.latency_ms": "ms",
    "tamiyo.gnn.compile_enabled": "bool",
    "tamiyo.gnn.feature_coverage": "ratio",
    "tamiyo.breaker.inference_state": "enum",
    "tamiyo.breaker.metadata_state": "enum",
    "tamiyo.breaker.inference_failures": "count",
    "tamiyo.breaker.metadata_failures": "count",
}
WITH_PROPOSAL = ALWAYS | {
    "tamiyo.gnn.inference.latency_ms": "ms",
    "tamiyo.graph.build_ms": "ms",
    "tamiyo.policy.value_estimate": "value",
    "tamiyo.policy.risk_index": "enum",
    "tamiyo.policy.risk_score": "ratio",
    "tamiyo.gnn.feature_coverage.node.seed": "ratio",
    "tamiyo.gnn.bsds_missing": "bool",
    "tamiyo.blending.method_index": "enum",
    "tamiyo.blending.schedule_start": "fraction",
    "tamiyo.blending.schedule_end": "fraction",
    "tamiyo.selection.seed_index": "index",
    "tamiyo.selection.seed_score": "score",
    "tamiyo.selection.blueprint_index": "index",
    "tamiyo.selection.blueprint_score": "score",
    "tamiyo.policy.proposed": "probability",
    "tamiyo.policy.runner_up": "probability",
    "tamiyo.blueprint.risk": "ratio",
}


def built(decision: Decision) -> leyline.TelemetryPacket:
    return build_telemetry(decision, TIMINGS)


def values(telemetry: leyline.TelemetryPacket) -> dict[str, float]:
    return {metric.name: metric.value for metric in telemetry.metrics}


def units(telemetry: leyline.TelemetryPacket) -> dict[str, str]:
    return {metric.name: metric.unit for metric in telemetry.metrics}


def test_metrics_of_an_ordinary_decision() -> None:
    telemetry = built(decide(last_loss=0.5))
    assert units(telemetry) == WITH_PROPOSAL
    found = values(telemetry)
    assert found["tamiyo.validation_loss"] == 0.75
    assert found["tamiyo.loss_delta"] == 0.25
    assert found["tamiyo.inference.latency_ms"] == 2.75
    assert found["tamiyo.gnn.inference.latency_ms"] == 2.5
    assert found["tamiyo.step.latency_ms"] == 3.5
    assert found["tamiyo.gnn.feature_coverage"] == 0.875
    assert found["tamiyo.gnn.bsds_missing"] == 1.0
    assert found["tamiyo.blueprint.risk"] == 0.25
    method = next(m for m in telemetry.metrics if m.name == "tamiyo.blending.method_index")
    assert dict(method.attributes) == {"method": "cosine"}


def test_metrics_without_a_proposal() -> None:
    telemetry = built(decide(status=InferenceStatus.TIMED_OUT))
    assert units(telemetry) == ALWAYS
    assert values(telemetry)["tamiyo.gnn.feature_coverage"] == 0.0


def test_metrics_are_named_once_each() -> None:
    names = [metric.name for metric in built(decide()).metrics]
    assert len(names) == len(set(names))


def test_compile_metrics_appear_when_there_is_something_to_say() -> None:
    runtime = replace(RUNTIME, compile_enabled=True, compile_warm_ms=0.0, compile_fallbacks=2)
    found = values(built(decide(runtime=runtime)))
    assert found["tamiyo.gnn.compile_enabled"] == 1.0
    assert found["tamiyo.gnn.compile_warm_ms"] == 0.0
    assert found["tamiyo.gnn.compile_fallback_total"] == 2.0


def test_breakers_are_reported() -> None:
    opened = Breaker(BreakerState.OPEN, failures=3, cooldown_s=5.0)
    runtime = replace(RUNTIME, breakers={BreakerName.INFERENCE: opened})
    found = values(built(decide(runtime=runtime)))
    assert found["tamiyo.breaker.inference_state"] == 2.0
    assert found["tamiyo.breaker.inference_failures"] == 3.0
    assert found["tamiyo.breaker.metadata_state"] == 1.0


@pytest.mark.parametrize(
    ("band", "risk", "name"),
    [
        (leyline.HAZARD_BAND_CRITICAL, 0.1, "tamiyo.bsds.hazard_critical_signal"),
        (leyline.HAZARD_BAND_HIGH, 0.1, "tamiyo.bsds.hazard_high_signal"),
        (leyline.HAZARD_BAND_LOW, 0.6, "tamiyo.bsds.elevated_risk_flag"),
    ],
)
def test_safety_sheet_signals_appear_when_they_fire(
    band: leyline.HazardBand, risk: float, name: str
) -> None:
    sheet = leyline.BSDS(risk_score=risk, hazard_band=band)
    proposed = proposal(blueprint=Blueprint(BLUEPRINT.descriptor, bsds=sheet))
    found = values(built(decide(proposed=proposed)))
    assert found[name] == 1.0
    assert found["tamiyo.gnn.bsds_missing"] == 0.0
    assert sum(key.startswith("tamiyo.bsds.") for key in found) == 1


@pytest.mark.parametrize(
    ("severity", "level", "priority", "status"),
    [
        (None, "INFO", "NORMAL", leyline.HEALTH_STATUS_HEALTHY),
        (Severity.INFO, "INFO", "NORMAL", leyline.HEALTH_STATUS_HEALTHY),
        (Severity.WARNING, "WARNING", "NORMAL", leyline.HEALTH_STATUS_DEGRADED),
        (Severity.HIGH, "ERROR", "HIGH", leyline.HEALTH_STATUS_DEGRADED),
        (Severity.CRITICAL, "CRITICAL", "CRITICAL", leyline.HEALTH_STATUS_CRITICAL),
    ],
)
def test_the_worst_event_gives_level_priority_and_health(
    severity: Severity | None, level: str, priority: str, status: leyline.HealthStatus
) -> None:
    events = () if severity is None else (FiredEvent(Event.BREAKER_OPENED, severity),)
    telemetry = built(decide(other_events=events))
    health = telemetry.system_health
    assert telemetry.level == getattr(leyline, f"TELEMETRY_LEVEL_{level}")
    assert health.indicators["priority"] == f"MESSAGE_PRIORITY_{priority}"
    assert health.status == status
    assert [event.level for event in telemetry.events] == [telemetry.level] * len(events)


def test_a_pause_is_degraded_health() -> None:
    telemetry = built(decide(proposed=proposal(action=PolicyAction.PAUSE)))
    assert telemetry.system_health.status == leyline.HEALTH_STATUS_DEGRADED
    assert telemetry.system_health.summary == "stable"


def test_indicators() -> None:
    telemetry = built(decide())
    assert dict(telemetry.system_health.indicators) == {
        "reason": "policy",
        "priority": "MESSAGE_PRIORITY_NORMAL",
        "step_index": "12",
        "policy": "policy-1",
        "policy_version": "policy-1@7",
        "policy_arch": "tamiyo_gnn_v1",
        "policy_compile": "0",
        "mode": "0",
        "timeout_budget_ms": "5.0",
        "metadata_timeout_budget_ms": "10.0",
        "blending_method": "cosine",
        "command": "seed",
        "device": "cpu",
        "replica": "replica-a",
    }


def test_identity_and_summary() -> None:
    telemetry = built(decide(status=InferenceStatus.TIMED_OUT))
    assert telemetry.packet_id == "run-1-step-12"
    assert telemetry.source_subsystem == "tamiyo"
    assert telemetry.timestamp.ToNanoseconds() == NOW_NS
    assert telemetry.system_health.summary == "timeout_inference"
    (event,) = telemetry.events
    assert event.description == "timeout_inference"
    assert dict(event.attributes) == {"budget_ms": "5.0"}


@pytest.mark.parametrize(("given", "mode"), [("operator", 1.0), (None, 0.0)])
def test_conservative_mode_is_reported(given: str | None, mode: float) -> None:
    telemetry = built(decide(conservative=given))
    assert values(telemetry)["tamiyo.conservative_mode"] == mode
    assert telemetry.system_health.indicators["mode"] == str(int(mode))


def test_entering_the_mode_is_reported_with_the_step_that_enters() -> None:
    assert values(built(decide(packet(loss=5.0))))["tamiyo.conservative_mode"] == 1.0


def test_what_the_graph_left_out_is_reported() -> None:
    proposed = replace(PROPOSAL, truncated={"layer": 3, "seed": 0}, skipped_metadata=2)
    events = {e.description: dict(e.attributes) for e in built(decide(proposed=proposed)).events}
    assert events == {"graph_truncated": {"layer": "3"}, "metadata_skipped": {"count": "2"}}


def test_event_ids_are_unique() -> None:
    telemetry = built(decide(packet(loss=5.0, hook_latency_ms=99.0)))
    ids = [event.event_id for event in telemetry.events]
    assert len(ids) > 1
    assert len(ids) == len(set(ids))


SPANS = (
    Span(Stage.INFER, NOW_NS, NOW_NS + 2_000, "c-2"),
    Span(Stage.COMMIT, NOW_NS - 9_000, NOW_NS - 5_000, "c-1"),
)
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_spans_hang_under_the_incoming_trace() -> None:
    telemetry = build_telemetry(decide(), TIMINGS, SPANS, f"00-{TRACE}-{PARENT}-01")
    infer, commit = telemetry.spans
    assert (infer.name, commit.name) == ("tamiyo.infer", "tamiyo.commit")
    assert infer.parent_span_id == commit.parent_span_id == PARENT
    assert infer.attributes["trace_id"] == TRACE
    assert commit.attributes["command_id"] == "c-1"
    assert infer.start_time.ToNanoseconds() == NOW_NS
    assert infer.end_time.ToNanoseconds() == NOW_NS + 2_000
    assert len({infer.span_id, commit.span_id}) == 2
    assert len(infer.span_id) == 16


@pytest.mark.parametrize(
    "traceparent",
    ["", "junk", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01"],
)
def test_a_malformed_traceparent_is_no_parent(traceparent: str) -> None:
    infer, _ = build_telemetry(decide(), TIMINGS, SPANS, traceparent).spans
    assert infer.parent_span_id == ""
    assert "trace_id" not in infer.attributes


def test_same_decision_same_bytes() -> None:
    first, second = (
        build_telemetry(decide(), TIMINGS, SPANS).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert first == second


def test_a_notice_speaks_for_events_without_a_decision() -> None:
    events = (
        FiredEvent(Event.BREAKER_CLOSED, Severity.INFO),
        FiredEvent(Event.POLICY_UPDATE_REJECTED, Severity.WARNING, {"reason": "stale_update"}),
    )
    notice = build_notice("notice-1", events, RUNTIME, NOW_NS)
    assert notice.packet_id == "notice-1"
    assert notice.level == leyline.TELEMETRY_LEVEL_WARNING
    assert notice.system_health.summary == "policy_update_rejected"
    assert notice.system_health.status == leyline.HEALTH_STATUS_DEGRADED
    assert [event.description for event in notice.events] == [
        "breaker_closed",
        "policy_update_rejected",
    ]
    assert dict(notice.events[1].attributes) == {"reason": "stale_update"}


def test_choices_are_told_with_names_and_runner_up() -> None:
    told = {metric.name: metric for metric in built(decide()).metrics}
    proposed, runner_up = told["tamiyo.policy.proposed"], told["tamiyo.policy.runner_up"]
    assert (proposed.attributes["action"], round(proposed.value, 6)) == ("seed", 0.6)
    assert (runner_up.attributes["action"], round(runner_up.value, 6)) == ("optimizer", 0.2)
    seed = told["tamiyo.selection.seed_score"]
    assert dict(seed.attributes) == {"seed_id": "seed-0", "scores": '[["seed-0",1.5]]'}
    blueprint = told["tamiyo.selection.blueprint_score"]
    assert dict(blueprint.attributes) == {"blueprint_id": "bp-1", "scores": '[["bp-1",0.7]]'}


def test_only_the_best_scores_are_told_and_long_names_are_cut() -> None:
    many = packet(seeds=200)
    for seed in many.seed_states:
        seed.seed_id = seed.seed_id.ljust(300, "x")
    scores = tuple(float(index) for index in range(200))
    told = {
        metric.name: metric for metric in built(decide(many, proposal(seed_scores=scores))).metrics
    }
    pairs = json.loads(told["tamiyo.selection.seed_score"].attributes["scores"])
    assert [score for _, score in pairs] == [199.0 - index for index in range(MAX_SCORES)]
    assert all(len(name) == 64 for name, _ in pairs)
