"""What must hold before a seed takes its next step in life, whoever commands it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tamiyo_svc.leyline import leyline_pb2 as leyline


class GateFailure(StrEnum):
    """Why a gate did not open."""

    MIN_STEPS = "min_steps"
    GRADIENTS_NOT_FINITE = "gradients_not_finite"
    LOSS_RISING = "loss_rising"
    ALPHA_INCOMPLETE = "alpha_incomplete"
    NOT_HELPING = "not_helping"


@dataclass(frozen=True, slots=True)
class GateFacts:
    """What a gate looks at; `impact` measures validation loss with the seed minus without it."""

    steps_in_stage: int
    gradient_norm_finite: bool
    loss_fast: float
    loss_slow: float
    alpha: float
    impact: Callable[[], float]


Check = Callable[[GateFacts], GateFailure | None]

_RISING_RATIO: Final = 1.1
_RISING_SLACK: Final = 0.02
"""A loss near zero doubles by chance; this much is not a rise."""
_TRIAL_TOLERANCE: Final = 0.05
_JOINED_TOLERANCE: Final = 0.01


def _finite_gradients(facts: GateFacts) -> GateFailure | None:
    return None if facts.gradient_norm_finite else GateFailure.GRADIENTS_NOT_FINITE


def _steady_loss(facts: GateFacts) -> GateFailure | None:
    # Written so that a loss that is not a number does not pass.
    steady = facts.loss_fast <= _RISING_RATIO * facts.loss_slow + _RISING_SLACK
    return None if steady else GateFailure.LOSS_RISING


def _complete_alpha(facts: GateFacts) -> GateFailure | None:
    return None if facts.alpha >= 1.0 else GateFailure.ALPHA_INCOMPLETE


def _helping(tolerance: float) -> Check:
    def check(facts: GateFacts) -> GateFailure | None:
        return None if facts.impact() <= tolerance else GateFailure.NOT_HELPING

    return check


@dataclass(frozen=True, slots=True)
class Gate:
    """A Leyline gate: steps to spend in the stage before it, then checks in order."""

    name: leyline.SeedLifecycleGate
    min_steps: int
    checks: tuple[Check, ...] = ()


GATES: Final[Mapping[leyline.SeedOperation, Gate]] = {
    leyline.SEED_OP_GERMINATE: Gate(leyline.SEED_GATE_G0_SANITY, 0),
    leyline.SEED_OP_START_TRAINING: Gate(leyline.SEED_GATE_G0_SANITY, 2),
    leyline.SEED_OP_START_GRAFTING: Gate(
        leyline.SEED_GATE_G1_GRADIENT_HEALTH,
        20,
        (_finite_gradients, _steady_loss, _helping(_TRIAL_TOLERANCE)),
    ),
    leyline.SEED_OP_STABILIZE: Gate(
        leyline.SEED_GATE_G2_STABILITY, 2, (_complete_alpha, _finite_gradients)
    ),
    leyline.SEED_OP_EVALUATE: Gate(
        leyline.SEED_GATE_G3_INTERFACE, 5, (_finite_gradients, _helping(_JOINED_TOLERANCE))
    ),
    leyline.SEED_OP_FOSSILIZE: Gate(
        leyline.SEED_GATE_G4_SYSTEM_IMPACT, 5, (_finite_gradients, _helping(_JOINED_TOLERANCE))
    ),
}
"""The gate in front of each operation; culling and cancelling have none."""


def check_gate(operation: leyline.SeedOperation, facts: GateFacts) -> GateFailure | None:
    """The first reason for which the operation's gate stays shut, None when it opens."""
    gate = GATES.get(operation)
    if gate is None:
        return None
    if facts.steps_in_stage < gate.min_steps:
        return GateFailure.MIN_STEPS
    return next((failure for check in gate.checks if (failure := check(facts))), None)
