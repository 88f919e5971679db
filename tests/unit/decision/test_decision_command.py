from __future__ import annotations

import json
import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.decisions import BLUEPRINT, NOW_NS, RUNTIME, decide, packet, proposal

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.blend import BlendOptions
from tamiyo_svc.decision.command import CommandOptions, blend_alpha, build_command, optimizer_id
from tamiyo_svc.decision.record import abort, command_id_for
from tamiyo_svc.errors import CommandError
from tamiyo_svc.graph.coverage import Coverage
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import InferenceStatus, PolicyAction, SeedOperations, TimeoutAction

OPTIONS = CommandOptions()
ALWAYS = {
    "risk_reason",
    "policy_version",
    "policy_action",
    "policy_param_delta",
    "policy_value_estimate",
    "policy_risk_score",
    "policy_risk_index",
    "feature_coverage",
    "coverage_types",
    "blending_method",
    "blending_schedule_units",
    "blending_schedule_start",
    "blending_schedule_end",
    "training_run_id",
    "packet_id",
    "step_index",
}
STAGES = [
    (leyline.SEED_STAGE_UNKNOWN, leyline.SEED_OP_GERMINATE),
    (leyline.SEED_STAGE_DORMANT, leyline.SEED_OP_GERMINATE),
    (leyline.SEED_STAGE_GERMINATED, leyline.SEED_OP_START_TRAINING),
    (leyline.SEED_STAGE_TRAINING, leyline.SEED_OP_START_GRAFTING),
    (leyline.SEED_STAGE_BLENDING, leyline.SEED_OP_STABILIZE),
    (leyline.SEED_STAGE_SHADOWING, leyline.SEED_OP_EVALUATE),
    (leyline.SEED_STAGE_PROBATIONARY, leyline.SEED_OP_FOSSILIZE),
]


@pytest.mark.parametrize(("stage", "operation"), STAGES)
def test_seed_operation_follows_the_stage(
    stage: leyline.SeedLifecycleStage, operation: leyline.SeedOperation
) -> None:
    command = build_command(decide(packet(stage)), OPTIONS)
    assert command.command_type == leyline.COMMAND_SEED
    assert command.seed_operation.operation == operation


@pytest.mark.parametrize(("stage", "_"), STAGES)
def test_germinate_only_knows_one_operation(
    stage: leyline.SeedLifecycleStage, _: leyline.SeedOperation
) -> None:
    options = CommandOptions(seed_operations=SeedOperations.GERMINATE_ONLY)
    command = build_command(decide(packet(stage)), options)
    assert command.seed_operation.operation == leyline.SEED_OP_GERMINATE


@pytest.mark.parametrize(
    "stage",
    [
        leyline.SEED_STAGE_FOSSILIZED,
        leyline.SEED_STAGE_CULLED,
        leyline.SEED_STAGE_EMBARGOED,
        leyline.SEED_STAGE_RESETTING,
        leyline.SEED_STAGE_TERMINATED,
    ],
)
@pytest.mark.parametrize("operations", list(SeedOperations))
def test_a_seed_that_is_no_candidate_gets_no_command(
    stage: leyline.SeedLifecycleStage, operations: SeedOperations
) -> None:
    with pytest.raises(CommandError):
        build_command(decide(packet(stage)), CommandOptions(seed_operations=operations))


def test_seed_command_carries_target_blueprint_and_blend() -> None:
    command = build_command(decide(), OPTIONS)
    assert command.target_seed_id == "seed-0"
    assert command.seed_operation.blueprint_id == "bp-1"
    assert dict(command.seed_operation.parameters) == {
        "alpha": 0.25,
        "blending_method_index": 1.0,
        "blending_schedule_start": 0.25,
        "blending_schedule_end": 0.75,
    }


@pytest.mark.parametrize(
    ("delta", "bounds", "alpha"),
    [
        (0.15, (0.05, 0.5), 0.25),
        (0.9, (0.05, 0.5), 0.5),
        (-0.9, (0.05, 0.5), 0.05),
        (-0.9, None, 0.0),
        (1.0, None, 1.0),
        (0.9, (2.0, 3.0), 1.0),
        (0.0, (-3.0, -2.0), 0.0),
        (0.0, (0.9, 0.1), 0.1),
        (0.0, (float("nan"), 0.1), 0.1),
    ],
)
def test_alpha_stays_within_the_blueprint_and_within_one(
    delta: float, bounds: tuple[float, float] | None, alpha: float
) -> None:
    descriptor = leyline.BlueprintDescriptor()
    if bounds is not None:
        descriptor.allowed_parameters["alpha"].min_value = bounds[0]
        descriptor.allowed_parameters["alpha"].max_value = bounds[1]
    assert blend_alpha(delta, descriptor) == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (1.0, "sgd"),
        (2.0, "adam"),
        (3.0, "adamw"),
        (4.0, "rmsprop"),
        (5.0, "adagrad"),
        (0.0, "unknown"),
        (6.0, "unknown"),
        (-1.0, "unknown"),
        (1.5, "unknown"),
        (float("nan"), "unknown"),
        (float("inf"), "unknown"),
    ],
)
def test_optimizer_id_is_the_runs_family(index: float, name: str) -> None:
    assert optimizer_id({"optimizer_family_index": index}) == name


def test_optimizer_id_is_unknown_when_the_run_did_not_say() -> None:
    assert optimizer_id({}) == "unknown"


@pytest.mark.parametrize(("delta", "sent"), [(0.05, 0.05), (0.9, 0.1), (-0.9, -0.1), (0.0, 0.0)])
def test_lr_delta_is_limited(delta: float, sent: float) -> None:
    proposed = proposal(action=PolicyAction.OPTIMIZER, parameters=(delta, 0.0, 0.0, 0.0))
    command = build_command(decide(proposed=proposed), OPTIONS)
    assert command.command_type == leyline.COMMAND_OPTIMIZER
    assert command.optimizer_adjustment.optimizer_id == "adamw"
    assert command.optimizer_adjustment.hyperparameters["lr_delta"] == pytest.approx(sent)


@pytest.mark.parametrize(
    ("action", "state"),
    [
        (PolicyAction.BREAKER_OPEN, leyline.CIRCUIT_STATE_OPEN),
        (PolicyAction.BREAKER_CLOSE, leyline.CIRCUIT_STATE_CLOSED),
    ],
)
def test_breaker_command_carries_the_desired_state(
    action: PolicyAction, state: leyline.CircuitBreakerState
) -> None:
    command = build_command(decide(proposed=proposal(action=action)), OPTIONS)
    assert command.command_type == leyline.COMMAND_CIRCUIT_BREAKER
    assert command.circuit_breaker.desired_state == state
    assert command.circuit_breaker.rationale


def test_pause_has_no_payload() -> None:
    command = build_command(decide(proposed=proposal(action=PolicyAction.PAUSE)), OPTIONS)
    assert command.command_type == leyline.COMMAND_PAUSE
    assert command.WhichOneof("payload") is None


def test_the_baseline_command_changes_nothing() -> None:
    decision = decide(status=InferenceStatus.TIMED_OUT, timeout_action=TimeoutAction.BASELINE)
    command = build_command(decision, OPTIONS)
    assert command.command_type == leyline.COMMAND_OPTIMIZER
    assert command.optimizer_adjustment.hyperparameters["lr_delta"] == 0.0


def test_always_annotated() -> None:
    for decision in (decide(), decide(status=InferenceStatus.NOT_RUN)):
        assert build_command(decision, OPTIONS).annotations.keys() >= ALWAYS


def test_annotations_of_a_seed_command() -> None:
    annotations = dict(build_command(decide(), OPTIONS).annotations)
    assert annotations == {
        "risk_reason": "policy",
        "policy_version": "policy-1@7",
        "policy_action": "seed",
        "policy_param_delta": "0.15",
        "policy_value_estimate": "0.5",
        "policy_risk_score": "0.25",
        "policy_risk_index": "1",
        "feature_coverage": "0.875",
        "coverage_types": '{"node.seed":0.75}',
        "coverage_map": '{"seed.risk":1.0}',
        "blending_method": "cosine",
        "blending_schedule_units": "fraction_0_1",
        "blending_schedule_start": "0.25",
        "blending_schedule_end": "0.75",
        "training_run_id": "run-1",
        "packet_id": "run-1-step-12",
        "step_index": "12",
        "selected_seed": "seed-0",
        "selected_blueprint": "bp-1",
        "blueprint_tier": "BLUEPRINT_TIER_SAFE",
        "blueprint_stage": "3",
        "blueprint_risk": "0.25",
        "breaker_open_score": "0.1",
        "breaker_close_score": "0.2",
    }


def test_a_safety_sheet_is_annotated() -> None:
    sheet = leyline.BSDS(
        risk_score=0.375,
        hazard_band=leyline.HAZARD_BAND_MEDIUM,
        handling_class=leyline.HANDLING_CLASS_RESTRICTED,
        resource_profile=leyline.RESOURCE_PROFILE_MEMORY_HEAVY,
        provenance=leyline.PROVENANCE_URABRASK,
    )
    proposed = proposal(blueprint=Blueprint(BLUEPRINT.descriptor, bsds=sheet))
    annotations = build_command(decide(proposed=proposed), OPTIONS).annotations
    assert annotations["bsds_hazard_band"] == "MEDIUM"
    assert annotations["bsds_handling_class"] == "restricted"
    assert annotations["bsds_resource_profile"] == "memory_heavy"
    assert annotations["bsds_provenance"] == "URABRASK"
    assert annotations["bsds_risk"] == "0.375"
    assert annotations["blueprint_risk"] == "0.375"
    assert annotations["risk_provenance"] == "bsds"


@pytest.mark.parametrize("status", [InferenceStatus.TIMED_OUT, InferenceStatus.LANE_BUSY])
def test_a_timeout_is_annotated_as_one(status: InferenceStatus) -> None:
    annotations = build_command(decide(status=status), OPTIONS).annotations
    assert annotations["policy_action"] == "timeout"
    assert annotations["feature_coverage"] == "0.0"
    assert annotations["coverage_types"] == "{}"
    assert "selected_seed" not in annotations


def test_the_compile_reason_is_annotated_when_there_is_one() -> None:
    runtime = replace(RUNTIME, compile_reason="no kernel")
    assert (
        build_command(decide(runtime=runtime), OPTIONS).annotations["policy_compile_reason"]
        == "no kernel"
    )


@pytest.mark.parametrize(("keys", "kept"), [(28, True), (29, False), (400, False)])
def test_a_coverage_map_above_one_kib_is_left_out(keys: int, kept: bool) -> None:
    by_key = {f"layer.some_long_feature_{n:03}": 1 / 3 for n in range(keys)}
    proposed = proposal(coverage=Coverage(mean=0.5, by_key=by_key, by_family={}))
    annotations = build_command(decide(proposed=proposed), OPTIONS).annotations
    assert ("coverage_map" in annotations) is kept
    if kept:
        assert len(annotations["coverage_map"]) <= 1024
        assert json.loads(annotations["coverage_map"]).keys() == by_key.keys()


def test_identity_and_deadline() -> None:
    command = build_command(decide(), CommandOptions(execution_deadline_ms=70))
    assert command.version == 1
    assert uuid.UUID(command.command_id).version == 5
    assert command.issued_at.ToNanoseconds() == NOW_NS
    assert command.execution_deadline_ms == 70
    assert command.issued_by == "tamiyo"


def test_command_id_depends_on_run_and_bytes_alone() -> None:
    digest = b"12345678"
    assert command_id_for("run-1", digest) == command_id_for("run-1", digest)
    assert command_id_for("run-1", digest) != command_id_for("run-2", digest)
    assert command_id_for("run-1", digest) != command_id_for("run-1", b"12345679")


def test_it_can_be_signed_and_verified() -> None:
    keyring = Keyring(b"a secret of sixteen bytes")
    command = build_command(decide(), OPTIONS)
    keyring.sign_command(command)
    assert keyring.verify_command(command)


def test_same_decision_same_bytes() -> None:
    options = CommandOptions(blend=BlendOptions(enabled=True, default_mode="CHANNEL"))
    first, second = (
        build_command(decide(), options).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_blend_annotations_are_off_by_default_and_on_seed_commands_only() -> None:
    blend = CommandOptions(blend=BlendOptions(enabled=True))
    paused = decide(proposed=proposal(action=PolicyAction.PAUSE))
    assert "blend_mode" in build_command(decide(), blend).annotations
    assert "blend_mode" not in build_command(decide(), OPTIONS).annotations
    assert "blend_mode" not in build_command(paused, blend).annotations


@pytest.mark.parametrize("missing", [{"seed_index": None, "seed_id": ""}, {"blueprint": None}])
def test_a_command_that_cannot_be_built_becomes_a_pause(missing: dict[str, object]) -> None:
    decision = decide(proposed=proposal(**missing))
    with pytest.raises(CommandError) as failed:
        build_command(decision, OPTIONS)
    command = build_command(abort(decision, str(failed.value)), OPTIONS)
    assert command.command_type == leyline.COMMAND_PAUSE
    assert command.annotations["risk_reason"] == "command_failed"


@given(
    st.sampled_from(list(PolicyAction)),
    st.floats(-1.0, 1.0),
    st.sampled_from([stage for stage, _ in STAGES]),
)
def test_every_command_is_within_its_limits(
    action: PolicyAction, delta: float, stage: leyline.SeedLifecycleStage
) -> None:
    proposed = proposal(action=action, parameters=(delta, 0.0, 0.0, 0.0))
    command = build_command(decide(packet(stage), proposed), OPTIONS)
    alpha = command.seed_operation.parameters.get("alpha", 0.1)
    assert 0.05 - 1e-6 <= alpha <= 0.5
    assert abs(command.optimizer_adjustment.hyperparameters.get("lr_delta", 0.0)) <= 0.1 + 1e-6
    assert command.annotations.keys() >= ALWAYS
