from __future__ import annotations

import json
from typing import Any

import pytest
from support.policies import trained

from tamiyo_svc.errors import InferenceError, PolicyRejectedError
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator
from tamiyo_svc.policy.golden import (
    MAX_GOLDEN,
    read_golden,
    record_golden,
    replay_golden,
    sample_requests,
)


def _evaluator(policy: Policy) -> PolicyEvaluator:
    return PolicyEvaluator(GraphBuilder(GraphLimits(), Vocabularies()), policy)


def _recorded(policy: Policy) -> Any:
    """Golden packets as they come out of a checkpoint's metadata."""
    return json.loads(json.dumps(record_golden(_evaluator(policy), sample_requests())))


def test_a_policy_decides_its_own_golden_packets_as_recorded() -> None:
    policy = trained(1.0)

    replay_golden(_evaluator(policy), read_golden(_recorded(policy)))


def test_a_policy_that_decides_otherwise_fails_the_replay() -> None:
    golden = read_golden(_recorded(trained(1.0)))

    with pytest.raises(PolicyRejectedError, match=r"value_estimate is 2\.0") as caught:
        replay_golden(_evaluator(trained(2.0)), golden)
    assert caught.value.reason == "probe_failed"


def test_a_policy_that_fails_on_a_golden_packet_fails_the_replay() -> None:
    golden = read_golden(_recorded(trained(1.0)))
    broken = trained(3e38, heads__value__weight=3e38)

    with pytest.raises(PolicyRejectedError, match="probe_failed: golden packet 0"):
        replay_golden(_evaluator(broken), golden)
    with pytest.raises(InferenceError):
        record_golden(_evaluator(broken), sample_requests())


def test_a_checkpoint_without_golden_packets_has_none() -> None:
    assert read_golden(None) == []


@pytest.mark.parametrize(
    "value",
    [
        {},
        "text",
        [1],
        [{}],
        [{"packet": "?", "blueprints": [], "expected": {}}],
        [{"packet": "", "blueprints": [{}], "expected": {}}],
        [{"packet": "/w==", "blueprints": [], "expected": {}}],
        [{"packet": "", "blueprints": [], "expected": 5}],
        [{"packet": "", "blueprints": [], "expected": {}}] * (MAX_GOLDEN + 1),
    ],
)
def test_what_are_no_golden_packets_is_refused(value: object) -> None:
    with pytest.raises(PolicyRejectedError, match="invalid_payload"):
        read_golden(value)


def test_no_more_golden_packets_are_recorded_than_are_read() -> None:
    with pytest.raises(ValueError, match="at most"):
        record_golden(_evaluator(trained()), sample_requests() * MAX_GOLDEN)


def test_samples_have_blueprints_seeds_and_neither_alone() -> None:
    shapes = {
        (len(request.packet.seed_states), len(request.blueprints)) for request in sample_requests()
    }

    assert shapes == {(1, 1), (2, 2), (3, 0), (4, 1)}
