from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.graph.coverage import EMPTY_COVERAGE
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.proposal import Proposal, propose
from tamiyo_svc.taxonomy import PolicyAction

_HEADS: dict[str, list[float]] = {
    "policy_logits": [0.0] * 32,
    "policy_params": [0.5, 0.0, 0.0, 0.0],
    "blending_logits": [0.0, 0.0, 0.0],
    "schedule_params": [0.0, 0.0],
    "risk_logits": [0.0] * 5,
    "value": [1.5],
    "breaker_logits": [0.0, 0.0],
}
_REQUIRED = sorted(_HEADS)


def _seed(stage: leyline.SeedLifecycleStage, risk: float = 0.0) -> leyline.SeedState:
    return leyline.SeedState(seed_id=f"seed-{stage}", stage=stage, risk_score=risk)


def _blueprint(risk: float = 0.5) -> Blueprint:
    return Blueprint(leyline.BlueprintDescriptor(blueprint_id=f"bp-{risk}", risk=risk))


def _propose(
    seeds: list[leyline.SeedState] | None = None,
    blueprints: list[Blueprint] | None = None,
    blend_allowed: list[bool] | None = None,
    **heads: Any,
) -> Proposal:
    seeds = [_seed(leyline.SEED_STAGE_TRAINING)] if seeds is None else seeds
    blueprints = [_blueprint()] if blueprints is None else blueprints
    scores = {"seed_scores": [0.0] * len(seeds), "blueprint_scores": [0.0] * len(blueprints)}
    return propose(
        {**_HEADS, **scores, **heads},
        seeds=seeds,
        blend_allowed=blend_allowed or [False] * len(seeds),
        blueprints=blueprints,
        coverage=EMPTY_COVERAGE,
        truncated={},
        skipped_metadata=0,
        build_ms=0.0,
        inference_ms=0.0,
    )


def _logits(**by_name: float) -> list[float]:
    logits = [0.0] * 32
    for name, value in by_name.items():
        logits[PolicyAction[name]] = value
    return logits


@pytest.mark.parametrize("action", list(PolicyAction))
def test_the_most_probable_action_is_proposed(action: PolicyAction) -> None:
    proposal = _propose(policy_logits=_logits(**{action.name: 5.0, "PAUSE": 4.0}))

    assert proposal.action is action
    assert sum(proposal.action_probabilities) == pytest.approx(1.0)


def test_the_runner_up_is_the_second_most_probable_action() -> None:
    proposal = _propose(policy_logits=_logits(PAUSE=5.0, OPTIMIZER=4.0))

    assert proposal.runner_up == (
        PolicyAction.OPTIMIZER,
        proposal.action_probabilities[PolicyAction.OPTIMIZER],
    )


def test_reserved_actions_take_no_probability() -> None:
    logits = _logits(PAUSE=1.0)
    logits[5:] = [100.0] * 27

    assert _propose(policy_logits=logits).action is PolicyAction.PAUSE


@pytest.mark.parametrize(
    ("seeds", "blueprints"),
    [
        ([], [_blueprint()]),
        ([_seed(leyline.SEED_STAGE_TRAINING)], []),
        ([_seed(leyline.SEED_STAGE_CULLED)], [_blueprint()]),
    ],
)
def test_seed_is_masked_without_a_candidate_or_a_blueprint(
    seeds: list[leyline.SeedState], blueprints: list[Blueprint]
) -> None:
    proposal = _propose(seeds, blueprints, policy_logits=_logits(SEED=50.0))

    assert proposal.action is not PolicyAction.SEED
    assert proposal.action_probabilities[PolicyAction.SEED] == 0.0


@pytest.mark.parametrize("stage", range(12))
def test_finished_stages_are_no_candidates(stage: leyline.SeedLifecycleStage) -> None:
    assert (_propose([_seed(stage)]).seed_index is None) == (stage >= 7)


def test_the_best_candidate_is_chosen_and_ties_go_to_the_lower_index() -> None:
    stages = [leyline.SEED_STAGE_FOSSILIZED, *[leyline.SEED_STAGE_TRAINING] * 3]
    proposal = _propose(
        [_seed(stage) for stage in stages],
        [_blueprint(), _blueprint(0.25), _blueprint(0.125)],
        seed_scores=[9.0, 1.0, 2.0, 2.0],
        blueprint_scores=[-1.0, 3.0, 3.0],
    )

    assert (proposal.seed_index, proposal.seed_score) == (2, 2.0)
    assert (proposal.blueprint_index, proposal.blueprint_score) == (1, 3.0)
    assert proposal.blueprint is not None
    assert proposal.blueprint.blueprint_id == "bp-0.25"


def test_scores_that_are_not_finite_give_way_to_what_is_known() -> None:
    seeds = [_seed(leyline.SEED_STAGE_TRAINING, 0.25), _seed(leyline.SEED_STAGE_GERMINATED, 0.5)]
    proposal = _propose(
        seeds,
        [_blueprint(0.75), _blueprint(0.25)],
        blend_allowed=[False, True],
        seed_scores=[math.nan, 0.0],
        blueprint_scores=[math.inf, 0.0],
    )

    assert proposal.seed_scores == pytest.approx([0.75 + 3 / 11, 2.5 + 2 / 11])
    assert proposal.seed_index == 1
    assert proposal.blueprint_scores == pytest.approx([0.25, 0.75])
    assert proposal.blueprint_index == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("head", _REQUIRED)
def test_any_other_output_that_is_not_finite_is_a_failed_inference(head: str, value: float) -> None:
    broken: dict[str, Any] = {head: [*_HEADS[head][:-1], value]}

    with pytest.raises(InferenceError, match=head):
        _propose(**broken)


def test_risk_is_the_mean_of_the_ordered_classes() -> None:
    proposal = _propose(risk_logits=[-100.0, -100.0, -100.0, 0.0, 0.0])

    assert proposal.risk_score == pytest.approx(0.875)
    assert proposal.risk_index == 3


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_the_schedule_is_ordered_and_bounded(values: list[float]) -> None:
    proposal = _propose(schedule_params=values)

    assert 0.0 <= proposal.schedule_start <= proposal.schedule_end <= 1.0


def test_the_schedule_maps_from_the_hyperbolic_range() -> None:
    proposal = _propose(schedule_params=[0.5, -1.0])

    assert (proposal.schedule_start, proposal.schedule_end) == (0.0, 0.75)


def test_the_rest_is_passed_on() -> None:
    proposal = _propose(blending_logits=[0.0, 3.0, 1.0], breaker_logits=[800.0, -800.0])

    assert proposal.param_delta == 0.5
    assert (proposal.blending_method, proposal.blending_method_index) == ("cosine", 1)
    assert proposal.value_estimate == 1.5
    assert (proposal.breaker_open_score, proposal.breaker_close_score) == (1.0, 0.0)
