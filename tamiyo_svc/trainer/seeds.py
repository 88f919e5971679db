"""A seed's life: the table of its transitions and what it carries from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import nn

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.blending import Mixing, Schedule
from tamiyo_svc.trainer.network import SeedSlot

DORMANT: Final = leyline.SEED_STAGE_DORMANT
GERMINATED: Final = leyline.SEED_STAGE_GERMINATED
TRAINING: Final = leyline.SEED_STAGE_TRAINING
BLENDING: Final = leyline.SEED_STAGE_BLENDING
SHADOWING: Final = leyline.SEED_STAGE_SHADOWING
PROBATIONARY: Final = leyline.SEED_STAGE_PROBATIONARY
FOSSILIZED: Final = leyline.SEED_STAGE_FOSSILIZED
CULLED: Final = leyline.SEED_STAGE_CULLED

TRANSITIONS: Final[
    Mapping[tuple[leyline.SeedLifecycleStage, leyline.SeedOperation], leyline.SeedLifecycleStage]
] = {
    (DORMANT, leyline.SEED_OP_GERMINATE): GERMINATED,
    (GERMINATED, leyline.SEED_OP_START_TRAINING): TRAINING,
    (TRAINING, leyline.SEED_OP_START_GRAFTING): BLENDING,
    (BLENDING, leyline.SEED_OP_STABILIZE): SHADOWING,
    (SHADOWING, leyline.SEED_OP_EVALUATE): PROBATIONARY,
    (PROBATIONARY, leyline.SEED_OP_FOSSILIZE): FOSSILIZED,
    (GERMINATED, leyline.SEED_OP_CULL): CULLED,
    (TRAINING, leyline.SEED_OP_CULL): CULLED,
    (BLENDING, leyline.SEED_OP_CULL): CULLED,
    (SHADOWING, leyline.SEED_OP_CULL): CULLED,
    (PROBATIONARY, leyline.SEED_OP_CULL): CULLED,
    (GERMINATED, leyline.SEED_OP_CANCEL): DORMANT,
    (TRAINING, leyline.SEED_OP_CANCEL): DORMANT,
    (BLENDING, leyline.SEED_OP_CANCEL): TRAINING,
}
"""What a command may do to a seed in each stage; anything else is refused. A cancelled blend goes
back to isolated training, where the host is as it was without the seed."""

JOINED: Final = frozenset({BLENDING, SHADOWING, PROBATIONARY, FOSSILIZED})
"""Stages in which the seed is part of the network."""

_FAST: Final = 0.3
_SLOW: Final = 0.1
_WEIGHT_DECAY: Final = 1e-3


class Seed:
    """One seed, its slot, and what its gates are judged by.

    `impact` is the validation loss with the seed minus that without it when last measured.
    """

    def __init__(self, index: int, slot: SeedSlot) -> None:
        self.index = index
        self.seed_id = f"seed-{index}"
        self.slot = slot
        self.stage: leyline.SeedLifecycleStage = DORMANT
        self.blueprint_id = ""
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule = Schedule()
        self.blend_steps = 0
        self.steps_in_stage = 0
        self.germinated_epoch = 0
        self.gradient_norm = 0.0
        self.loss_fast = math.nan
        self.loss_slow = math.nan
        self.impact = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The seed module's parameters, none while the slot is empty."""
        return [] if self.slot.seed is None else list(self.slot.seed.parameters())

    @property
    def learning_rate(self) -> float:
        """Learning rate of the seed, 0 while it has no optimizer."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else 0.0

    def age_epochs(self, epoch: int) -> int:
        """Epochs since it germinated, counting the one it did; 0 while dormant."""
        return 0 if self.stage == DORMANT else epoch - self.germinated_epoch + 1

    def germinate(
        self, blueprint_id: str, module: nn.Module, learning_rate: float, epoch: int
    ) -> None:
        """Plant a module in the slot, without effect on the network."""
        self.blueprint_id = blueprint_id
        self.slot.plant(module)
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY
        )
        self.germinated_epoch = epoch
        self.enter(GERMINATED)

    def start_blending(self, schedule: Schedule, mixing: Mixing) -> None:
        """Begin to take part in the network, with the schedule's first alpha."""
        self.schedule = schedule
        self.blend_steps = 0
        self.slot.mixing = mixing
        self.slot.alpha = schedule.alpha(0)
        self.enter(BLENDING)

    def stop_blending(self) -> None:
        """Go back to isolated training."""
        self.slot.alpha = 0.0
        self.blend_steps = 0
        self.enter(TRAINING)

    def remove(self, stage: leyline.SeedLifecycleStage) -> None:
        """Take the module out of the network for good, leaving the seed in `stage`."""
        self.slot.clear()
        self.optimizer = None
        self.gradient_norm = 0.0
        if stage == DORMANT:
            self.blueprint_id = ""
        self.enter(stage)

    def enter(self, stage: leyline.SeedLifecycleStage) -> None:
        """Note the stage reached."""
        self.stage = stage
        self.steps_in_stage = 0
        if stage == TRAINING:
            self.loss_fast = self.loss_slow = math.nan

    def advance(self, *, blend: bool) -> None:
        """Count one training step; while blending, and if `blend`, alpha follows its schedule."""
        self.steps_in_stage += 1
        if blend and self.stage == BLENDING:
            self.blend_steps += 1
            self.slot.alpha = self.schedule.alpha(self.blend_steps)

    def observe(self, loss: float, gradient_norm: float) -> None:
        """Note a step's loss with the seed in full, and its gradient norm."""
        self.gradient_norm = gradient_norm
        self.loss_fast = _ewma(self.loss_fast, loss, _FAST)
        self.loss_slow = _ewma(self.loss_slow, loss, _SLOW)


def _ewma(mean: float, value: float, weight: float) -> float:
    return value if math.isnan(mean) else mean + weight * (value - mean)
