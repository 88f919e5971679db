"""What a training run says about itself, step by step and at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class StepOutcome(StrEnum):
    """What became of the command of a step."""

    APPLIED = "applied"
    REJECTED = "rejected"
    MISSED = "missed"


@dataclass(frozen=True, slots=True)
class SeedView:
    """One seed after a step."""

    seed_id: str
    stage: str
    alpha: float
    blueprint_id: str


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. `accuracy` and `validation_loss` are of the validation set; `latency_ms` is from
    publishing the packet to holding the verified command, None without one; `command_type` and
    `reason` are empty without one; `rejection` says why it was not applied, such as
    `gate: min_steps`."""

    step: int
    epoch: int
    loss: float
    validation_loss: float
    accuracy: float
    learning_rate: float
    outcome: StepOutcome
    command_type: str = ""
    operation: str = ""
    target_seed_id: str = ""
    reason: str = ""
    rejection: str = ""
    latency_ms: float | None = None
    seeds: tuple[SeedView, ...] = ()


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A finished run; `accuracy` is of the test set, which training never saw.

    `unverifiable` counts commands refused by the client, `rejected` those refused by the trainer.
    """

    run_id: str
    steps: int
    accuracy: float
    duration_s: float
    published: int
    received: int
    late: int
    missed: int
    unverifiable: int
    applied: int
    rejected: int
    isolation_violations: int
    rejections: Mapping[str, int] = field(default_factory=Counter)
    seeds: tuple[SeedView, ...] = ()
