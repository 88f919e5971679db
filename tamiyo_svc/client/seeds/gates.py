"""What must hold before a seed takes its next step in life, whoever commands it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    NO_GRADIENT = "no_gradient"
    LEARNING_RATE_ZERO = "learning_rate_zero"
    WEIGHTS_UNMOVED = "weights_unmoved"


@dataclass(frozen=True, slots=True)
class Impact:
    """What a seed is worth: `difference` is the validation loss with it minus `loss`, without it.

    `noise` is how far such differences lie apart when measured again; all in the loss's own unit.
    """

    difference: float
    noise: float = 0.0
    loss: float = 0.0

    @classmethod
    def of(cls, differences: Sequence[float], loss: float) -> Impact:
        """From measurements in turn; their mean is within the noise in 19 of 20 cases."""
        count = len(differences)
        mean = sum(differences) / count
        if count == 1:
            return cls(mean, 0.0, loss)
        variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
        return cls(mean, _ONE_IN_TWENTY * math.sqrt(variance / count), loss)

    @property
    def helps(self) -> bool:
        """Whether the loss is lower with the seed, beyond noise and rounding."""
        return self.difference < -(self.noise + _ROUNDING * abs(self.loss))

    def harms(self, tolerance: float) -> bool:
        """Whether the loss is higher by more than this share of it, or is no number."""
        return not self.difference <= tolerance * abs(self.loss) + self.noise


@dataclass(frozen=True, slots=True)
class GateFacts:
    """What a gate looks at; `impact` measures what the seed is worth, None where nobody can tell.

    `idle` says what kept the seed from learning anything in isolated training.
    """

    steps_in_stage: int
    gradient_norm_finite: bool
    loss_fast: float
    loss_slow: float
    alpha: float
    impact: Callable[[], Impact | None]
    idle: GateFailure | None = None


Check = Callable[[GateFacts], GateFailure | None]

_RISING_RATIO: Final = 1.1
_RISING_SLACK: Final = 0.02
"""A loss near zero doubles by chance; this much is not a rise."""
_TRIAL_TOLERANCE: Final = 0.05
"""Share of the loss that a seed in full may cost before the network has adapted to it."""
_ONE_IN_TWENTY: Final = 2.35
"""Student's t for four measurements, one-sided."""
_ROUNDING: Final = 1e-6
"""Share of a loss that is rounding of float32 sums."""


def _finite_gradients(facts: GateFacts) -> GateFailure | None:
    return None if facts.gradient_norm_finite else GateFailure.GRADIENTS_NOT_FINITE


def _steady_loss(facts: GateFacts) -> GateFailure | None:
    # Written so that a loss that is not a number does not pass.
    steady = facts.loss_fast <= _RISING_RATIO * facts.loss_slow + _RISING_SLACK
    return None if steady else GateFailure.LOSS_RISING


def _complete_alpha(facts: GateFacts) -> GateFailure | None:
    return None if facts.alpha >= 1.0 else GateFailure.ALPHA_INCOMPLETE


def _learned(facts: GateFacts) -> GateFailure | None:
    return facts.idle


def _harmless(facts: GateFacts) -> GateFailure | None:
    impact = facts.impact()
    harmful = impact is not None and impact.harms(_TRIAL_TOLERANCE)
    return GateFailure.NOT_HELPING if harmful else None


def _helping(facts: GateFacts) -> GateFailure | None:
    impact = facts.impact()
    return GateFailure.NOT_HELPING if impact is not None and not impact.helps else None


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
        (_finite_gradients, _learned, _steady_loss, _harmless),
    ),
    leyline.SEED_OP_STABILIZE: Gate(
        leyline.SEED_GATE_G2_STABILITY, 2, (_complete_alpha, _finite_gradients)
    ),
    leyline.SEED_OP_EVALUATE: Gate(
        leyline.SEED_GATE_G3_INTERFACE, 5, (_finite_gradients, _helping)
    ),
    leyline.SEED_OP_FOSSILIZE: Gate(
        leyline.SEED_GATE_G4_SYSTEM_IMPACT, 5, (_finite_gradients, _helping)
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
