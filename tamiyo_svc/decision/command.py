"""A decision to the one command that answers its packet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Final

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.blend import BlendOptions, blend_annotations
from tamiyo_svc.decision.record import SOURCE, Decision, timestamp
from tamiyo_svc.errors import CommandError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.events import number
from tamiyo_svc.risk.safety_sheet import (
    HANDLING_CLASSES,
    HAZARD_BANDS,
    PROVENANCES,
    RESOURCE_PROFILES,
    UNKNOWN,
)
from tamiyo_svc.taxonomy import (
    BLENDING_METHODS,
    NEXT_SEED_OPERATIONS,
    OPTIMIZER_FAMILIES,
    CommandAction,
    InferenceStatus,
    PolicyAction,
    SeedOperations,
)

UNKNOWN_OPTIMIZER: Final = "unknown"
"""Optimizer id for a run that did not say which family it uses."""

_BASE_ALPHA: Final = 0.1
_COVERAGE_MAP_BYTES: Final = 1024
_TIMEOUTS: Final = (InferenceStatus.TIMED_OUT, InferenceStatus.LANE_BUSY)

_NO_PROPOSAL: Final[Mapping[str, str]] = {
    "policy_param_delta": "0.0",
    "policy_value_estimate": "0.0",
    "policy_risk_score": "0.0",
    "policy_risk_index": "0",
    "feature_coverage": "0.0",
    "coverage_types": "{}",
    "blending_method": BLENDING_METHODS[0],
    "blending_schedule_start": "0.0",
    "blending_schedule_end": "1.0",
}


@dataclass(frozen=True, slots=True)
class CommandOptions:
    """What an operator chose for commands; the deadline is in milliseconds."""

    seed_operations: SeedOperations = SeedOperations.BY_STAGE
    max_lr_delta: float = 0.1
    execution_deadline_ms: int = 50
    blend: BlendOptions = field(default_factory=BlendOptions)


def build_command(decision: Decision, options: CommandOptions) -> leyline.AdaptationCommand:
    """The command for a decision, complete but for its signature.

    Raises:
        CommandError: the action needs a seed, a blueprint or a proposal that is not there.
    """
    command = leyline.AdaptationCommand(
        version=1,
        command_id=decision.command_id,
        execution_deadline_ms=options.execution_deadline_ms,
        issued_at=timestamp(decision.now_ns),
        issued_by=SOURCE,
    )
    annotations = _annotations(decision)
    match decision.verdict.action:
        case CommandAction.SEED:
            annotations |= _fill_seed(command, decision, options)
        case CommandAction.OPTIMIZER:
            _fill_optimizer(command, decision, options)
        case CommandAction.BREAKER:
            _fill_breaker(command, decision)
        case CommandAction.PAUSE:
            command.command_type = leyline.COMMAND_PAUSE
    command.annotations.update(annotations)
    return command


def optimizer_id(metrics: Mapping[str, float]) -> str:
    """The run's optimizer family by name, `unknown` when it did not say."""
    index = metrics.get("optimizer_family_index", 0.0)
    if not isfinite(index) or index != int(index) or not 1 <= index <= len(OPTIMIZER_FAMILIES):
        return UNKNOWN_OPTIMIZER
    return OPTIMIZER_FAMILIES[int(index) - 1]


def blend_alpha(param_delta: float, descriptor: leyline.BlueprintDescriptor) -> float:
    """Start of the blend, within the blueprint's bounds for `alpha` and within [0, 1]."""
    alpha = _BASE_ALPHA + param_delta
    if "alpha" in descriptor.allowed_parameters:
        bounds = descriptor.allowed_parameters["alpha"]
        if bounds.min_value <= bounds.max_value:
            alpha = min(max(alpha, bounds.min_value), bounds.max_value)
    return min(max(alpha, 0.0), 1.0)


def _fill_seed(
    command: leyline.AdaptationCommand, decision: Decision, options: CommandOptions
) -> dict[str, str]:
    proposal = decision.proposal
    if proposal is None or proposal.seed_index is None or proposal.blueprint is None:
        raise CommandError("a seed command without a seed or without a blueprint")
    stage = decision.packet.seed_states[proposal.seed_index].stage
    operation = NEXT_SEED_OPERATIONS.get(stage)
    if operation is None:
        raise CommandError(f"nothing comes after seed stage {int(stage)}")
    if options.seed_operations is SeedOperations.GERMINATE_ONLY:
        operation = leyline.SEED_OP_GERMINATE
    alpha = blend_alpha(proposal.param_delta, proposal.blueprint.descriptor)
    command.command_type = leyline.COMMAND_SEED
    command.target_seed_id = proposal.seed_id
    command.seed_operation.operation = operation
    command.seed_operation.blueprint_id = proposal.blueprint.blueprint_id
    command.seed_operation.parameters.update(
        {
            "alpha": alpha,
            "blending_method_index": float(proposal.blending_method_index),
            "blending_schedule_start": proposal.schedule_start,
            "blending_schedule_end": proposal.schedule_end,
        }
    )
    return blend_annotations(options.blend, alpha, proposal.blueprint)


def _fill_optimizer(
    command: leyline.AdaptationCommand, decision: Decision, options: CommandOptions
) -> None:
    proposed = decision.proposal.param_delta if decision.proposal is not None else 0.0
    limit = options.max_lr_delta
    command.command_type = leyline.COMMAND_OPTIMIZER
    adjustment = command.optimizer_adjustment
    adjustment.optimizer_id = optimizer_id(decision.packet.training_metrics)
    adjustment.hyperparameters["lr_delta"] = min(max(proposed, -limit), limit)


def _fill_breaker(command: leyline.AdaptationCommand, decision: Decision) -> None:
    action = decision.proposal.action if decision.proposal is not None else None
    if action is PolicyAction.BREAKER_OPEN:
        state = leyline.CIRCUIT_STATE_OPEN
    elif action is PolicyAction.BREAKER_CLOSE:
        state = leyline.CIRCUIT_STATE_CLOSED
    else:
        raise CommandError("a breaker command that no proposal asked for")
    command.command_type = leyline.COMMAND_CIRCUIT_BREAKER
    command.circuit_breaker.desired_state = state
    command.circuit_breaker.rationale = "policy_action"


def _annotations(decision: Decision) -> dict[str, str]:
    packet, proposal = decision.packet, decision.proposal
    annotations = {
        "risk_reason": decision.verdict.reason,
        "policy_version": decision.runtime.policy.version,
        "policy_action": _policy_action(decision),
        "blending_schedule_units": "fraction_0_1",
        "training_run_id": packet.training_run_id,
        "packet_id": packet.packet_id,
        "step_index": str(packet.global_step),
    }
    if decision.runtime.compile_reason:
        annotations["policy_compile_reason"] = decision.runtime.compile_reason
    annotations |= _NO_PROPOSAL if proposal is None else _proposal_annotations(proposal)
    return annotations


def _policy_action(decision: Decision) -> str:
    if decision.proposal is not None:
        return decision.proposal.action.name.lower()
    return "timeout" if decision.signals.inference.status in _TIMEOUTS else "none"


def _proposal_annotations(proposal: Proposal) -> dict[str, str]:
    annotations = {
        "policy_param_delta": number(proposal.param_delta),
        "policy_value_estimate": number(proposal.value_estimate),
        "policy_risk_score": number(proposal.risk_score),
        "policy_risk_index": str(proposal.risk_index),
        "feature_coverage": number(proposal.coverage.mean),
        "coverage_types": _shares(proposal.coverage.by_family),
        "blending_method": proposal.blending_method,
        "blending_schedule_start": number(proposal.schedule_start),
        "blending_schedule_end": number(proposal.schedule_end),
        "breaker_open_score": number(proposal.breaker_open_score),
        "breaker_close_score": number(proposal.breaker_close_score),
    }
    coverage_map = _bounded_shares(proposal.coverage.by_key)
    if coverage_map:
        annotations["coverage_map"] = coverage_map
    if proposal.seed_index is not None:
        annotations["selected_seed"] = proposal.seed_id
    if proposal.blueprint is not None:
        annotations |= _blueprint_annotations(proposal.blueprint)
    return annotations


def _blueprint_annotations(blueprint: Blueprint) -> dict[str, str]:
    descriptor, bsds = blueprint.descriptor, blueprint.bsds
    annotations = {
        "selected_blueprint": descriptor.blueprint_id,
        "blueprint_tier": _tier(descriptor),
        "blueprint_stage": str(descriptor.stage),
        "blueprint_risk": number(blueprint.risk),
    }
    if bsds is not None:
        annotations |= {
            "bsds_hazard_band": HAZARD_BANDS.get(bsds.hazard_band, UNKNOWN),
            "bsds_handling_class": HANDLING_CLASSES.get(bsds.handling_class, UNKNOWN),
            "bsds_resource_profile": RESOURCE_PROFILES.get(bsds.resource_profile, UNKNOWN),
            "bsds_provenance": PROVENANCES.get(bsds.provenance, UNKNOWN),
            "bsds_risk": number(bsds.risk_score),
            "risk_provenance": "bsds",
        }
    return annotations


def _tier(descriptor: leyline.BlueprintDescriptor) -> str:
    try:
        return leyline.BlueprintTier.Name(descriptor.tier)
    except ValueError:
        return UNKNOWN


def _shares(shares: Mapping[str, float]) -> str:
    rounded = {key: round(value, 3) for key, value in shares.items()}
    return json.dumps(rounded, sort_keys=True, separators=(",", ":"))


def _bounded_shares(shares: Mapping[str, float]) -> str:
    """The shares as JSON; empty where there are none or they do not fit."""
    # `"key":0.0,` is the shortest entry; where even that is too long, nothing need be encoded.
    shortest = sum(map(len, shares)) + 7 * len(shares)
    if not shares or shortest > _COVERAGE_MAP_BYTES:
        return ""
    text = _shares(shares)
    return text if len(text) <= _COVERAGE_MAP_BYTES else ""
