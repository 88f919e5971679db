from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.evaluator import (
    Policy,
    PolicyEvaluator,
    PolicyRequest,
    build_policy,
    weights_digest,
)
from tamiyo_svc.policy.network import NetworkConfig, untrained
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.taxonomy import PolicyAction

_SMALL = NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4, attention_heads=2)
_BLUEPRINT = Blueprint(leyline.BlueprintDescriptor(blueprint_id="bp", risk=0.1, stage=3))


def _policy(**changes: float) -> Policy:
    network = untrained(_SMALL)
    with torch.no_grad():
        for head, value in changes.items():
            network.get_parameter(f"heads.{head}.bias")[0] = value
    return Policy("p", "1", weights_digest(network), False, network)


def _request(
    stage: leyline.SeedLifecycleStage = leyline.SEED_STAGE_TRAINING,
    *blueprints: Blueprint,
    **fields: Any,
) -> PolicyRequest:
    seed = leyline.SeedState(seed_id="seed-0", stage=stage, risk_score=0.2)
    packet = leyline.SystemStatePacket(packet_id="p", seed_states=[seed], **fields)
    return PolicyRequest(packet, blueprints, {})


def _evaluator(policy: Policy) -> PolicyEvaluator:
    ticks = itertools.count()
    builder = GraphBuilder(GraphLimits(), Vocabularies())
    return PolicyEvaluator(builder, policy, clock=lambda: next(ticks) / 1e3)


def _decided(results: list[Proposal | InferenceError]) -> list[Proposal]:
    assert all(isinstance(result, Proposal) for result in results)
    return [result for result in results if isinstance(result, Proposal)]


@pytest.mark.parametrize("blueprints", [(), (_BLUEPRINT,)])
def test_the_untrained_policy_pauses_and_adjusts_nothing(blueprints: tuple[Blueprint, ...]) -> None:
    policy = build_policy("untrained", _SMALL)

    (proposal,) = _decided(
        _evaluator(policy).evaluate([_request(leyline.SEED_STAGE_TRAINING, *blueprints)])
    )

    assert policy.untrained
    assert proposal.action is PolicyAction.PAUSE
    assert proposal.parameters == (0.0, 0.0, 0.0, 0.0)
    assert proposal.risk_score < 0.1


@pytest.mark.parametrize(
    ("stage", "blueprints", "action"),
    [
        (leyline.SEED_STAGE_TRAINING, (_BLUEPRINT,), PolicyAction.SEED),
        (leyline.SEED_STAGE_TRAINING, (), PolicyAction.OPTIMIZER),
        (leyline.SEED_STAGE_FOSSILIZED, (_BLUEPRINT,), PolicyAction.OPTIMIZER),
    ],
)
def test_the_bootstrap_policy_prefers_the_seed_wherever_there_is_a_candidate(
    stage: leyline.SeedLifecycleStage, blueprints: tuple[Blueprint, ...], action: PolicyAction
) -> None:
    evaluator = _evaluator(build_policy("bootstrap"))

    (proposal,) = _decided(evaluator.evaluate([_request(stage, *blueprints)]))

    assert proposal.action is action
    assert proposal.param_delta == proposal.value_estimate == 0.0


def test_a_batch_decides_each_request_as_if_it_were_alone() -> None:
    evaluator = _evaluator(build_policy("bootstrap", _SMALL))
    requests = [
        _request(leyline.SEED_STAGE_TRAINING, _BLUEPRINT, validation_loss=0.5),
        _request(leyline.SEED_STAGE_CULLED),
        _request(leyline.SEED_STAGE_DORMANT, _BLUEPRINT, _BLUEPRINT),
    ]

    together = _decided(evaluator.evaluate(requests))
    alone = [_decided(evaluator.evaluate([request]))[0] for request in requests]

    for joint, single in zip(together, alone, strict=True):
        assert joint.action is single.action
        assert joint.action_probabilities == pytest.approx(single.action_probabilities)
        assert joint.blueprint_index == single.blueprint_index


def test_no_requests_are_no_proposals() -> None:
    assert _evaluator(_policy()).evaluate([]) == []


def test_a_network_that_yields_no_number_fails_the_inference() -> None:
    (result,) = _evaluator(_policy(value=math.nan)).evaluate([_request()])

    assert isinstance(result, InferenceError)
    assert "value" in str(result)


def test_one_bad_request_spares_the_others() -> None:
    broken = PolicyRequest(_request().packet, [object()], {})  # type: ignore[list-item]

    first, second, third = _evaluator(_policy()).evaluate([_request(), broken, _request()])

    assert isinstance(first, Proposal)
    assert isinstance(second, InferenceError)
    assert isinstance(third, Proposal)


def test_times_are_taken_from_the_clock_in_milliseconds() -> None:
    (proposal,) = _decided(_evaluator(_policy()).evaluate([_request()]))

    assert proposal.build_ms == pytest.approx(1.0)
    assert proposal.inference_ms == pytest.approx(1.0)


def test_a_swapped_policy_serves_from_the_next_call() -> None:
    evaluator = _evaluator(_policy(value=1.0))
    evaluator.evaluate([_request()])

    evaluator.swap(_policy(value=2.0))

    assert _decided(evaluator.evaluate([_request()]))[0].value_estimate == 2.0


def test_warming_up_a_broken_candidate_raises_and_leaves_the_serving_one() -> None:
    serving = _policy()
    evaluator = _evaluator(serving)
    evaluator.warm_up()

    with pytest.raises(InferenceError):
        evaluator.warm_up(_policy(value=math.nan))

    assert evaluator.policy is serving


def test_digests_tell_weights_apart() -> None:
    assert _policy().digest == _policy().digest
    assert _policy().digest != _policy(value=1.0).digest
