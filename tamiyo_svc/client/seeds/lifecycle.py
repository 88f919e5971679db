"""A seed's life: the table of its transitions and what it carries from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch
from torch import nn

from tamiyo_svc.client.seeds.blending import Mixing, Schedule
from tamiyo_svc.client.seeds.gates import GateFailure, Impact
from tamiyo_svc.leyline import leyline_pb2 as leyline

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

_MAY_BLEND: Final = frozenset({TRAINING, BLENDING, SHADOWING, PROBATIONARY})
_RISK_TOLERANCE: Final = 0.5
_ALPHA_TEMPERATURE: Final = 1.0

_FAST: Final = 0.3
_SLOW: Final = 0.1
_WEIGHT_DECAY: Final = 1e-3
_HALF_EPSILON: Final = 1e-4
"""Added to the root of the second moment where weights are float16, whose squares underflow."""


class Place(Protocol):
    """Where a seed sits in a network; with alpha 0 it has no effect there.

    `channels` is the width of the features there, 0 while unknown.
    """

    channels: int
    channel_dim: int
    alpha: float
    mixing: Mixing
    stage: leyline.SeedLifecycleStage
    blueprint_id: str

    @property
    def seed(self) -> nn.Module | None:
        """The module planted here."""

    def plant(self, seed: nn.Module) -> None:
        """Put a seed in, taking no part yet."""

    def clear(self) -> None:
        """Take the seed out."""


class Seed:
    """One seed, its slot, and what its gates are judged by.

    `impact` is the validation loss with the seed minus that without it when last measured.
    """

    def __init__(self, index: int, slot: Place, seed_id: str = "") -> None:
        self.index = index
        self.seed_id = seed_id or f"seed-{index}"
        self.slot = slot
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule = Schedule()
        self.blend_steps = 0
        self.steps_in_stage = 0
        self.germinated_epoch = 0
        self.gradient_norm = 0.0
        self.loss_fast = math.nan
        self.loss_slow = math.nan
        self.impact = 0.0
        self.worth: Impact | None = None
        """What it was worth when last measured in this stage, after `worth_since` steps in it."""
        self.worth_since = 0
        self.gradients_finite = True
        self.had_gradient = False
        """Whether any gradient but zero has reached it."""
        self.moved = False
        """Whether a step of its optimizer has changed its weights."""

    @property
    def stage(self) -> leyline.SeedLifecycleStage:
        """Where it is in its life."""
        return self.slot.stage

    @stage.setter
    def stage(self, stage: leyline.SeedLifecycleStage) -> None:
        self.slot.stage = stage

    @property
    def blueprint_id(self) -> str:
        """What it was grown from, empty while nothing is planted."""
        return self.slot.blueprint_id

    @blueprint_id.setter
    def blueprint_id(self, blueprint_id: str) -> None:
        self.slot.blueprint_id = blueprint_id

    @property
    def idle(self) -> GateFailure | None:
        """What kept it from learning anything, None if it learned."""
        # Weight decay moves weights without a gradient.
        if self.moved and self.had_gradient:
            return None
        if self.learning_rate == 0.0:
            return GateFailure.LEARNING_RATE_ZERO
        return GateFailure.WEIGHTS_UNMOVED if self.had_gradient else GateFailure.NO_GRADIENT

    @property
    def stage_name(self) -> str:
        """The stage in words, such as `TRAINING`."""
        return leyline.SeedLifecycleStage.Name(self.stage).removeprefix("SEED_STAGE_")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The seed module's parameters, none while the slot is empty."""
        return [] if self.slot.seed is None else list(self.slot.seed.parameters())

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The seed module's buffers, such as running statistics."""
        return [] if self.slot.seed is None else list(self.slot.seed.buffers())

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters with their names in the module."""
        return [] if self.slot.seed is None else list(self.slot.seed.named_parameters())

    def follow(self, learning_rate: float) -> None:
        """Train with this learning rate from now on."""
        for group in self.optimizer.param_groups if self.optimizer else ():
            group["lr"] = learning_rate

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
        """Plant a module in the slot, without effect on the network.

        Raises:
            ValueError: it has no parameters.
        """
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY
        )
        self.blueprint_id = blueprint_id
        self.slot.plant(module)
        self.optimizer = optimizer
        self.germinated_epoch = epoch
        self.had_gradient = self.moved = False
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
        self.gradients_finite = True
        if stage == DORMANT:
            self.blueprint_id = ""
        self.enter(stage)

    def enter(self, stage: leyline.SeedLifecycleStage) -> None:
        """Note the stage reached."""
        self.stage = stage
        self.steps_in_stage = 0
        self.worth = None
        if stage == TRAINING:
            self.loss_fast = self.loss_slow = math.nan

    def advance(self, *, blend: bool) -> None:
        """Count one training step; while blending, and if `blend`, alpha follows its schedule."""
        self.steps_in_stage += 1
        if blend and self.stage == BLENDING:
            self.blend_steps += 1
            self.slot.alpha = self.schedule.alpha(self.blend_steps)

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Give its optimizer the state that was saved of it."""
        if self.optimizer is not None and state is not None:
            self.optimizer.load_state_dict(dict(state))

    def learn(self) -> None:
        """Take a step with the gradients that are there, wherever the weights are by now."""
        optimizer = self.optimizer
        if optimizer is None:
            return
        _follow_weights(optimizer, self.parameters)
        before = None if self.moved else [p.detach().clone() for p in self.parameters]
        optimizer.step()
        if before is not None:
            pairs = zip(self.parameters, before, strict=True)
            self.moved = any(not torch.equal(now, then) for now, then in pairs)

    def observe(self, loss: float, gradient_norm: float) -> None:
        """Note a step's loss with the seed in full, and its gradient norm.

        A loss that is not finite is left out of the averages.
        """
        self.gradients_finite = math.isfinite(gradient_norm)
        self.had_gradient |= self.gradients_finite and gradient_norm > 0.0
        if self.gradients_finite:
            self.gradient_norm = gradient_norm
        self.loss_fast = _ewma(self.loss_fast, loss, _FAST)
        self.loss_slow = _ewma(self.loss_slow, loss, _SLOW)


def _follow_weights(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Move the optimizer's state to where its weights have been moved, and to their format."""
    (group,) = optimizer.param_groups
    # Torch can be told to replace parameters that it moves.
    for old, new in zip(group["params"], parameters, strict=True):
        if old is not new and old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
    group["params"] = parameters
    for parameter in parameters:
        if parameter.dtype == torch.float16:
            group["eps"] = _HALF_EPSILON
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if name != "step" and isinstance(value, torch.Tensor):
                state[name] = value.to(parameter)


def _ewma(mean: float, value: float, weight: float) -> float:
    if not math.isfinite(value):
        return mean
    return value if math.isnan(mean) else mean + weight * (value - mean)


def describe_seed(seed: Seed, epoch: int, blueprint_risk: float = 0.0) -> leyline.SeedState:
    """What a packet says about a seed; a dormant one has nothing to measure yet.

    Its risk is that of its blueprint plus the harm it did when last measured, at most 1.
    """
    risk = 0.0
    if seed.stage != DORMANT:
        harm = max(seed.impact, 0.0) if math.isfinite(seed.impact) else 1.0
        risk = min(blueprint_risk + harm, 1.0)
    return leyline.SeedState(
        seed_id=seed.seed_id,
        stage=seed.stage,
        gradient_norm=seed.gradient_norm,
        learning_rate=seed.learning_rate,
        layer_depth=seed.index + 1,
        age_epochs=seed.age_epochs(epoch),
        risk_score=risk,
        metrics={
            "alpha": seed.slot.alpha,
            "alpha_steps": float(seed.blend_steps),
            "alpha_total_steps": float(seed.schedule.total_steps),
            "alpha_temperature": _ALPHA_TEMPERATURE,
            "blend_allowed": float(seed.stage in _MAY_BLEND),
            "risk_tolerance": _RISK_TOLERANCE,
        },
    )
