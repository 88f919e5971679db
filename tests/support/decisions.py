"""Literal decisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.record import PROPOSED_ACTIONS, Decision, PolicyIdentity, Runtime
from tamiyo_svc.graph.coverage import Coverage
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.engine import assess
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.latency import NO_LATENCIES, Latencies
from tamiyo_svc.risk.signals import Inference, Metadata, read_signals
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.taxonomy import CommandAction, InferenceStatus, PolicyAction, TimeoutAction

NOW_NS = 1_760_000_000_123_456_789
BLUEPRINT = Blueprint(
    leyline.BlueprintDescriptor(
        blueprint_id="bp-1",
        tier=leyline.BLUEPRINT_TIER_SAFE,
        risk=0.25,
        stage=3,
        allowed_parameters={
            "alpha": leyline.BlueprintParameterBounds(min_value=0.05, max_value=0.5)
        },
    ),
    graph_metadata={"layers": [{"output_channels": 8}, {"output_channels": 4}]},
)
PROPOSAL = Proposal(
    action=PolicyAction.SEED,
    action_probabilities=(0.6, 0.2, 0.1, 0.05, 0.05),
    runner_up=(PolicyAction.OPTIMIZER, 0.2),
    parameters=(0.15, 0.0, 0.0, 0.0),
    blending_method="cosine",
    blending_method_index=1,
    schedule_start=0.25,
    schedule_end=0.75,
    risk_score=0.25,
    risk_index=1,
    value_estimate=0.5,
    breaker_open_score=0.1,
    breaker_close_score=0.2,
    seed_index=0,
    seed_id="seed-0",
    seed_score=1.5,
    seed_scores=(1.5,),
    blueprint=BLUEPRINT,
    blueprint_index=0,
    blueprint_score=0.7,
    blueprint_scores=(0.7,),
    blueprint_ids=("bp-1",),
    coverage=Coverage(mean=0.875, by_key={"seed.risk": 1.0}, by_family={"node.seed": 0.75}),
    truncated={},
    skipped_metadata=0,
    build_ms=0.2,
    inference_ms=2.5,
)
SLOW_HOOKS = Latencies(hook=(4.0,) * 24 + (51.0,) * 8)
"""Of a run whose hooks took 4 ms and have taken 51 ms in the last eight steps."""
RUNTIME = Runtime(
    policy=PolicyIdentity("policy-1", "policy-1@7"), device="cpu", replica="replica-a"
)


def proposal(**changes: Any) -> Proposal:
    return replace(PROPOSAL, **changes)


def packet(
    stage: leyline.SeedLifecycleStage = leyline.SEED_STAGE_DORMANT,
    *,
    seeds: int = 1,
    loss: float = 0.75,
    violations: float = 0.0,
    **metrics: float,
) -> leyline.SystemStatePacket:
    return leyline.SystemStatePacket(
        version=1,
        packet_id="run-1-step-12",
        training_run_id="run-1",
        global_step=12,
        current_epoch=3,
        validation_loss=loss,
        training_metrics={
            "optimizer_family_index": 3.0,
            "hook_latency_ms": 4.0,
            "kasmina.isolation.violations": violations,
            **metrics,
        },
        seed_states=[leyline.SeedState(seed_id=f"seed-{n}", stage=stage) for n in range(seeds)],
    )


def decide(
    given: leyline.SystemStatePacket | None = None,
    proposed: Proposal | None = PROPOSAL,
    *,
    status: InferenceStatus = InferenceStatus.COMPLETED,
    last_loss: float | None = 0.75,
    latencies: Latencies = NO_LATENCIES,
    runtime: Runtime = RUNTIME,
    metadata: Metadata | None = None,
    conservative: str | None = None,
    other_events: tuple[FiredEvent, ...] = (),
    timeout_action: TimeoutAction = TimeoutAction.PAUSE,
) -> Decision:
    """A decision as the service makes it; without a completed inference there is no proposal."""
    given = given or packet()
    proposed = proposed if status is InferenceStatus.COMPLETED else None
    inference = Inference(status=status, budget_ms=5.0)
    if proposed is not None:
        inference = replace(
            inference,
            coverage_mean=proposed.coverage.mean,
            policy_risk_score=proposed.risk_score,
        )
    signals = read_signals(
        given,
        last_loss,
        inference=inference,
        metadata=metadata or Metadata(),
        latencies=latencies,
        blueprint=proposed.blueprint if proposed is not None else None,
        conservative_reason=conservative,
    )
    action = PROPOSED_ACTIONS[proposed.action] if proposed is not None else CommandAction.PAUSE
    return Decision(
        packet=given,
        packet_digest=b"\x01\x02\x03\x04\x05\x06\x07\x08",
        signals=signals,
        verdict=assess(signals, Thresholds(), action, timeout_action),
        proposal=proposed,
        runtime=runtime,
        now_ns=NOW_NS,
        other_events=other_events,
    )
