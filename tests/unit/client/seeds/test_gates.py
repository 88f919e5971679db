"""When a seed may take its next step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tamiyo_svc.client.seeds.gates import GATES, GateFacts, GateFailure, check_gate
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
    impact=lambda: -0.1,
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
        (GRAFT, {"impact": lambda: 0.06}, GateFailure.NOT_HELPING),
        (GRAFT, {"impact": lambda: 0.04}, None),
        (STABILIZE, {"alpha": 0.99}, GateFailure.ALPHA_INCOMPLETE),
        (STABILIZE, {"gradient_norm_finite": False}, GateFailure.GRADIENTS_NOT_FINITE),
        (EVALUATE, {"impact": lambda: 0.011}, GateFailure.NOT_HELPING),
        (EVALUATE, {"impact": lambda: math.nan}, GateFailure.NOT_HELPING),
        (FOSSILIZE, {"impact": lambda: 0.011}, GateFailure.NOT_HELPING),
        (FOSSILIZE, {"impact": lambda: 0.01}, None),
    ],
)
def test_what_shuts_a_gate(
    operation: leyline.SeedOperation, change: dict[str, Any], failure: GateFailure | None
) -> None:
    assert check_gate(operation, dataclasses.replace(GOOD, **change)) is failure


def test_the_costly_measurement_is_made_last() -> None:
    def impact() -> float:
        raise AssertionError("measured although the gate was shut already")

    facts = dataclasses.replace(GOOD, loss_fast=9.0, impact=impact)
    assert check_gate(GRAFT, facts) is GateFailure.LOSS_RISING


@pytest.mark.parametrize("operation", [leyline.SEED_OP_CULL, leyline.SEED_OP_CANCEL])
def test_culling_and_cancelling_have_no_gate(operation: leyline.SeedOperation) -> None:
    sick = GateFacts(0, False, math.nan, math.nan, 0.0, lambda: math.inf)
    assert check_gate(operation, sick) is None
