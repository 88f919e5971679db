"""Applies a verified command to the training run, or refuses it and says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from torch import nn

from tamiyo_svc.client.seeds.blending import read_mixing, read_schedule
from tamiyo_svc.client.seeds.gates import GateFacts, GateFailure, Impact, check_gate
from tamiyo_svc.client.seeds.lifecycle import (
    BLENDING,
    CULLED,
    DORMANT,
    GERMINATED,
    PROBATIONARY,
    SHADOWING,
    TRAINING,
    TRANSITIONS,
    Seed,
)
from tamiyo_svc.client.seeds.ranks import WORLD
from tamiyo_svc.leyline import leyline_pb2 as leyline

_MEASURE_EVERY_STEPS: Final = 10
"""Evaluations are the caller's and may take long, while commands come at every step."""
_PATIENCE_STEPS: Final = 120
"""A seed that has trained this long and still does not help never will."""
_LR_DELTA: Final = "lr_delta"


class Refusal(StrEnum):
    """Why a command was not applied."""

    GATE = "gate"
    BREAKER_OPEN = "breaker_open"
    ILLEGAL_TRANSITION = "illegal_transition"
    UNKNOWN_SEED = "unknown_seed"
    UNKNOWN_BLUEPRINT = "unknown_blueprint"
    UNKNOWN_OPTIMIZER = "unknown_optimizer"
    LEARNING_RATE = "learning_rate"
    INVALID_PARAMETER = "invalid_parameter"
    UNSUPPORTED = "unsupported"
    FAILED_ON_A_RANK = "failed_on_a_rank"


@dataclass(frozen=True, slots=True)
class Execution:
    """What became of a command: applied when `refusal` is None.

    `gate` says which check failed, `detail` what else there is to say.
    """

    refusal: Refusal | None = None
    gate: GateFailure | None = None
    advances_blend: bool = True
    detail: str = ""

    @property
    def reason(self) -> str:
        """Why it was refused, such as `gate: min_steps`; empty when it was applied."""
        return ": ".join(part for part in (self.refusal, self.gate, self.detail) if part)


APPLIED: Final = Execution()
PAUSED: Final = Execution(advances_blend=False)


class LearningRate(Protocol):
    """The run's learning rate, as far as commands may change it."""

    @property
    def learning_rate(self) -> float:
        """The rate now."""

    def find_obstacle(self) -> str:
        """Why it cannot be changed, as far as that is known without trying; else empty."""

    def change_learning_rate(self, delta: float) -> str:
        """Multiply it by 1 + `delta`, within its bounds; why not, empty when done."""


class CommandExecutor:
    """Changes seeds and learning rate on command; holds the state of the run's circuit breaker.

    `build` makes the module of a blueprint for a seed's place; `impact` measures what a seed is
    worth, None where nobody can tell; `optimizer_ids` are the names by which an optimizer command
    may mean this run's. `all_agree` tells whether what this rank found is so on all of them: until
    then a command has no effect anywhere.
    """

    def __init__(
        self,
        seeds: Sequence[Seed],
        rate: LearningRate,
        *,
        blueprint_ids: Collection[str],
        build: Callable[[Seed, str], nn.Module],
        impact: Callable[[Seed], Impact | None],
        optimizer_ids: Collection[str],
        blend_steps: int,
        all_agree: Callable[[bool], bool] = WORLD.all_agree,
    ) -> None:
        self._seeds = seeds
        self._rate = rate
        self._blueprint_ids = blueprint_ids
        self._build = build
        self._measure = impact
        self._optimizer_ids = optimizer_ids
        self._blend_steps = blend_steps
        self._all_agree = all_agree
        self.breaker: leyline.CircuitBreakerState = leyline.CIRCUIT_STATE_CLOSED

    def apply(self, command: leyline.AdaptationCommand, epoch: int) -> Execution:
        """Apply one command in the given epoch (from 1)."""
        kind = command.command_type
        payload = command.WhichOneof("payload")
        if kind == leyline.COMMAND_PAUSE:
            return PAUSED
        if kind == leyline.COMMAND_SEED and payload == "seed_operation":
            return self._operate(command, epoch)
        if kind == leyline.COMMAND_OPTIMIZER and payload == "optimizer_adjustment":
            return self._adjust(command.optimizer_adjustment)
        if kind == leyline.COMMAND_CIRCUIT_BREAKER and payload == "circuit_breaker":
            return self._switch(command.circuit_breaker.desired_state)
        return Execution(Refusal.UNSUPPORTED)

    def _switch(self, desired: leyline.CircuitBreakerState) -> Execution:
        if desired == leyline.CIRCUIT_STATE_UNKNOWN:
            return Execution(Refusal.INVALID_PARAMETER)
        self.breaker = desired
        return APPLIED

    def _adjust(self, adjustment: leyline.CommandOptimizerAdjustment) -> Execution:
        if adjustment.optimizer_id and adjustment.optimizer_id not in self._optimizer_ids:
            return Execution(Refusal.UNKNOWN_OPTIMIZER)
        unsupported = sorted(adjustment.hyperparameters.keys() - {_LR_DELTA})
        if unsupported or _LR_DELTA not in adjustment.hyperparameters:
            return Execution(Refusal.UNSUPPORTED, detail=", ".join(unsupported))
        delta = adjustment.hyperparameters[_LR_DELTA]
        if not math.isfinite(delta):
            return Execution(Refusal.INVALID_PARAMETER)
        obstacle = self._rate.find_obstacle() if delta else ""
        if not self._all_agree(not obstacle) and not obstacle:
            return Execution(Refusal.FAILED_ON_A_RANK)
        obstacle = obstacle or self._rate.change_learning_rate(delta)
        return Execution(Refusal.LEARNING_RATE, detail=obstacle) if obstacle else APPLIED

    def _operate(self, command: leyline.AdaptationCommand, epoch: int) -> Execution:
        if self.breaker == leyline.CIRCUIT_STATE_OPEN:
            return Execution(Refusal.BREAKER_OPEN)
        seed = next((s for s in self._seeds if s.seed_id == command.target_seed_id), None)
        if seed is None:
            return Execution(Refusal.UNKNOWN_SEED)
        operation = command.seed_operation.operation
        target = TRANSITIONS.get((seed.stage, operation))
        if target is None:
            return Execution(Refusal.ILLEGAL_TRANSITION)
        blueprint_id = command.seed_operation.blueprint_id
        if target == GERMINATED and blueprint_id not in self._blueprint_ids:
            return Execution(Refusal.UNKNOWN_BLUEPRINT)
        failure = check_gate(operation, self._facts(seed))
        if failure is not None:
            if failure is GateFailure.NOT_HELPING and _is_final(seed):
                seed.remove(CULLED)
            return Execution(Refusal.GATE, failure)
        module = None
        if target == GERMINATED:
            module = self._built(seed, blueprint_id)
            if module is None:
                return Execution(Refusal.FAILED_ON_A_RANK)
        self._move(seed, target, command, epoch, module)
        return APPLIED

    def _built(self, seed: Seed, blueprint_id: str) -> nn.Module | None:
        """The module if every rank has one, None if another has none; raises where it fails."""
        module: nn.Module | None = None
        try:
            module = self._build(seed, blueprint_id)
        finally:
            everywhere = self._all_agree(module is not None)
        return module if everywhere else None

    def _move(
        self,
        seed: Seed,
        target: leyline.SeedLifecycleStage,
        command: leyline.AdaptationCommand,
        epoch: int,
        module: nn.Module | None,
    ) -> None:
        if module is not None:
            blueprint_id = command.seed_operation.blueprint_id
            seed.germinate(blueprint_id, module, self._rate.learning_rate, epoch)
        elif target == BLENDING:
            seed.start_blending(
                read_schedule(command.seed_operation.parameters, self._blend_steps),
                read_mixing(command.annotations, seed.slot.channels, seed.slot.channel_dim),
            )
        elif target in (CULLED, DORMANT):
            seed.remove(target)
        elif target == TRAINING and seed.stage == BLENDING:
            seed.stop_blending()
        else:
            seed.enter(target)

    def _facts(self, seed: Seed) -> GateFacts:
        def impact() -> Impact | None:
            if seed.worth is None or seed.steps_in_stage >= seed.worth_since + _MEASURE_EVERY_STEPS:
                seed.worth, seed.worth_since = self._measure(seed), seed.steps_in_stage
                seed.impact = 0.0 if seed.worth is None else seed.worth.difference
            return seed.worth

        return GateFacts(
            steps_in_stage=seed.steps_in_stage,
            gradient_norm_finite=seed.gradients_finite,
            loss_fast=seed.loss_fast,
            loss_slow=seed.loss_slow,
            alpha=seed.slot.alpha,
            impact=impact,
            idle=seed.idle,
        )


def _is_final(seed: Seed) -> bool:
    return seed.stage in (SHADOWING, PROBATIONARY) or (
        seed.stage == TRAINING and seed.steps_in_stage >= _PATIENCE_STEPS
    )
