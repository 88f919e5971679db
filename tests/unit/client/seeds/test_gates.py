"""When a seed may take its next step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tamiyo_svc.client.seeds.gates import GATES, GateFacts, GateFailure, Impact, check_gate
from tamiyo_svc.leyline import leyline_pb2 as leyline

GRAFT = leyline.SEED_OP_START_GRAFTING
STABILIZE = leyline.SEED_OP_STABILIZE
EVALUATE = leyline.SEED_OP_EVALUATE
FOSSILIZE = leyline.SEED_OP_FOSSILIZE

GOOD = GateFacts(
    steps_in_stage=100,
    gradient_norm_finite=True,
    loss_fast=0.5,
    loss_slow=0.5,
    alpha=1.0,
    impact=lambda: Impact(-0.1, noise=0.01, loss=1.0),
)


@pytest.mark.parametrize("operation", list(GATES))
def test_every_gate_opens_for_a_healthy_seed(operation: leyline.SeedOperation) -> None:
    assert check_gate(operation, GOOD) is None


@pytest.mark.parametrize("operation", [op for op, gate in GATES.items() if gate.min_steps])
def test_every_gate_waits_for_its_steps(operation: leyline.SeedOperation) -> None:
    steps = GATES[operation].min_steps
    early = dataclasses.replace(GOOD, steps_in_stage=steps - 1)
    assert check_gate(operation, early) is GateFailure.MIN_STEPS
    assert check_gate(operation, dataclasses.replace(GOOD, steps_in_stage=steps)) is None


@pytest.mark.parametrize(
    ("operation", "change", "failure"),
    [
        (GRAFT, {"gradient_norm_finite": False}, GateFailure.GRADIENTS_NOT_FINITE),
        (GRAFT, {"loss_fast": 0.6}, GateFailure.LOSS_RISING),
        (GRAFT, {"loss_fast": 0.569}, None),
        (GRAFT, {"loss_fast": math.nan}, GateFailure.LOSS_RISING),
        (GRAFT, {"impact": lambda: Impact(0.06, loss=1.0)}, GateFailure.NOT_HELPING),
        (GRAFT, {"impact": lambda: Impact(0.06, loss=2.0)}, None),
        (GRAFT, {"impact": lambda: Impact(0.06, noise=0.02, loss=1.0)}, None),
        (GRAFT, {"impact": lambda: None}, None),
        (GRAFT, {"idle": GateFailure.NO_GRADIENT}, GateFailure.NO_GRADIENT),
        (GRAFT, {"idle": GateFailure.WEIGHTS_UNMOVED}, GateFailure.WEIGHTS_UNMOVED),
        (GRAFT, {"idle": GateFailure.LEARNING_RATE_ZERO}, GateFailure.LEARNING_RATE_ZERO),
        (STABILIZE, {"alpha": 0.99}, GateFailure.ALPHA_INCOMPLETE),
        (STABILIZE, {"gradient_norm_finite": False}, GateFailure.GRADIENTS_NOT_FINITE),
        (EVALUATE, {"impact": lambda: Impact(0.0, loss=1.0)}, GateFailure.NOT_HELPING),
        (EVALUATE, {"impact": lambda: Impact(math.nan)}, GateFailure.NOT_HELPING),
        (EVALUATE, {"impact": lambda: Impact(-0.1, 0.11, 1.0)}, GateFailure.NOT_HELPING),
        (EVALUATE, {"impact": lambda: Impact(-1e-7, 0.0, 1.0)}, GateFailure.NOT_HELPING),
        (EVALUATE, {"impact": lambda: None}, None),
        (FOSSILIZE, {"impact": lambda: Impact(0.0, loss=1.0)}, GateFailure.NOT_HELPING),
        (FOSSILIZE, {"impact": lambda: Impact(-0.1, 0.09, 1.0)}, None),
    ],
)
def test_what_shuts_a_gate(
    operation: leyline.SeedOperation, change: dict[str, Any], failure: GateFailure | None
) -> None:
    assert check_gate(operation, dataclasses.replace(GOOD, **change)) is failure


def test_the_costly_measurement_is_made_last() -> None:
    def impact() -> Impact:
        raise AssertionError("measured although the gate was shut already")

    facts = dataclasses.replace(GOOD, loss_fast=9.0, impact=impact)
    assert check_gate(GRAFT, facts) is GateFailure.LOSS_RISING


@pytest.mark.parametrize("operation", [leyline.SEED_OP_CULL, leyline.SEED_OP_CANCEL])
def test_culling_and_cancelling_have_no_gate(operation: leyline.SeedOperation) -> None:
    sick = GateFacts(0, False, math.nan, math.nan, 0.0, lambda: Impact(math.inf))
    assert check_gate(operation, sick) is None


def test_a_measurement_that_is_never_the_same_is_told_apart_from_its_noise() -> None:
    assert Impact.of([-0.5], 1.0) == Impact(-0.5, 0.0, 1.0)
    assert Impact.of([-0.52, -0.48, -0.5, -0.5], 1.0).helps
    assert not Impact.of([-0.5, 0.4, -0.6, 0.5], 1.0).helps
