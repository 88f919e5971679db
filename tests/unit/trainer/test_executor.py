"""What a command does to the run, for every legal and illegal transition."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tamiyo_svc.client.rates import MAX_LEARNING_RATE, OptimizerRate
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.seeds.blending import Schedule
from tamiyo_svc.client.seeds.executor import CommandExecutor, Execution, Refusal
from tamiyo_svc.client.seeds.gates import GATES, GateFailure
from tamiyo_svc.client.seeds.lifecycle import (
    BLENDING,
    CULLED,
    DORMANT,
    FOSSILIZED,
    GERMINATED,
    JOINED,
    PROBATIONARY,
    SHADOWING,
    TRAINING,
    TRANSITIONS,
)
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.blueprints import BLUEPRINTS, build_seed
from tamiyo_svc.trainer.data import Samples
from tamiyo_svc.trainer.learner import Learner, evaluate
from tamiyo_svc.trainer.network import PLACES, HostNetwork

torch.manual_seed(0)
SAMPLES = Samples(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
BLUEPRINT = next(iter(BLUEPRINTS))
STAGES = (
    DORMANT,
    GERMINATED,
    TRAINING,
    BLENDING,
    SHADOWING,
    PROBATIONARY,
    FOSSILIZED,
    CULLED,
)
OPERATIONS = [leyline.SeedOperation.Value(name) for name in leyline.SeedOperation.keys()]  # noqa: SIM118


class Run:
    """A network with one seed that commands can be applied to."""

    def __init__(self, blend_steps: int = 4) -> None:
        torch.manual_seed(0)
        self.learner = Learner(HostNetwork(), 1e-3, steps=100)
        self.network = self.learner.network
        self.bank = SeedBank(
            self.network,
            {name: partial(build_seed, name) for name in BLUEPRINTS},
            random_seed=1,
            evaluate=lambda: evaluate(self.network, SAMPLES)[0],
        )
        self.seed = self.bank.attach(PLACES[-1], "seed-2")
        self.network(SAMPLES.images)
        self.rate = OptimizerRate(self.learner.optimizer, self.learner.scheduler)
        self.executor = CommandExecutor(
            self.bank.seeds,
            self.rate,
            blueprint_ids=self.bank.blueprints,
            build=self.bank.build,
            impact=self.bank.impact,
            optimizer_ids=("adamw",),
            blend_steps=blend_steps,
        )

    def operate(self, operation: leyline.SeedOperation, **changes: Any) -> Execution:
        return self.executor.apply(seed_command(operation, **changes), epoch=2)

    def bring_to(self, stage: leyline.SeedLifecycleStage) -> None:
        """Reach a stage directly, healthy and with the gate behind it open."""
        if stage != DORMANT:
            self.operate(leyline.SEED_OP_GERMINATE)
        if stage in JOINED:
            self.seed.start_blending(Schedule(total_steps=1), self.seed.slot.mixing)
            self.seed.advance(blend=True)
        if stage == CULLED:
            self.seed.remove(CULLED)
        if stage not in (DORMANT, CULLED):
            self.seed.enter(stage)
            self.seed.steps_in_stage = 1000
            if stage != GERMINATED:
                self.teach(stage)
            self.seed.loss_fast = self.seed.loss_slow = 1.0

    def teach(self, stage: leyline.SeedLifecycleStage) -> None:
        """Train the seed until the network is better with it."""
        self.seed.stage = TRAINING
        self.bank.follow(1e-2)
        for _ in range(8):
            self.bank.train_isolated(lambda: self.learner.loss(SAMPLES))
        self.seed.stage = stage


def seed_command(
    operation: leyline.SeedOperation,
    *,
    seed_id: str = "seed-2",
    blueprint_id: str = BLUEPRINT,
    parameters: dict[str, float] | None = None,
    annotations: dict[str, str] | None = None,
) -> leyline.AdaptationCommand:
    return leyline.AdaptationCommand(
        command_type=leyline.COMMAND_SEED,
        target_seed_id=seed_id,
        seed_operation=leyline.CommandSeedOperation(
            operation=operation, blueprint_id=blueprint_id, parameters=parameters
        ),
        annotations=annotations,
    )


def optimizer_command(delta: float, optimizer_id: str = "adamw") -> leyline.AdaptationCommand:
    return leyline.AdaptationCommand(
        command_type=leyline.COMMAND_OPTIMIZER,
        optimizer_adjustment=leyline.CommandOptimizerAdjustment(
            optimizer_id=optimizer_id, hyperparameters={"lr_delta": delta}
        ),
    )


def breaker_command(state: leyline.CircuitBreakerState) -> leyline.AdaptationCommand:
    return leyline.AdaptationCommand(
        command_type=leyline.COMMAND_CIRCUIT_BREAKER,
        circuit_breaker=leyline.CommandCircuitBreaker(desired_state=state),
    )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_table_decides_what_is_legal(
    stage: leyline.SeedLifecycleStage, operation: leyline.SeedOperation
) -> None:
    run = Run()
    run.bring_to(stage)
    execution = run.operate(operation)
    target = TRANSITIONS.get((stage, operation))
    if target is None:
        assert execution.refusal is Refusal.ILLEGAL_TRANSITION
        assert run.seed.stage == stage
    else:
        assert execution.refusal is None
        assert run.seed.stage == target
        assert run.seed.steps_in_stage == 0


def test_the_operation_of_every_forward_transition_has_a_gate() -> None:
    forward = {
        op
        for (_, op), target in TRANSITIONS.items()
        if op not in (leyline.SEED_OP_CULL, leyline.SEED_OP_CANCEL)
    }
    assert forward == set(GATES)


def test_a_shut_gate_refuses_and_changes_nothing() -> None:
    run = Run()
    run.bring_to(TRAINING)
    run.seed.steps_in_stage = 0
    execution = run.operate(leyline.SEED_OP_START_GRAFTING)
    assert (execution.refusal, execution.gate) == (Refusal.GATE, GateFailure.MIN_STEPS)
    assert run.seed.stage == TRAINING
    assert run.seed.slot.alpha == 0.0


def make_harmful(run: Run) -> None:
    """Behind the last block a large residual makes for large, mostly wrong logits."""
    torch.manual_seed(5)
    for parameter in run.seed.parameters:
        torch.nn.init.normal_(parameter, std=5.0)


@pytest.mark.parametrize(
    ("stage", "operation"),
    [(SHADOWING, leyline.SEED_OP_EVALUATE), (PROBATIONARY, leyline.SEED_OP_FOSSILIZE)],
)
def test_a_seed_that_does_not_help_is_culled_and_the_network_is_as_before(
    stage: leyline.SeedLifecycleStage, operation: leyline.SeedOperation
) -> None:
    run = Run()
    before = run.network(SAMPLES.images)
    run.bring_to(stage)
    make_harmful(run)
    execution = run.operate(operation)
    assert (execution.refusal, execution.gate) == (Refusal.GATE, GateFailure.NOT_HELPING)
    assert run.seed.stage == CULLED
    assert torch.equal(run.network(SAMPLES.images), before)


def test_a_training_seed_that_does_not_help_yet_may_go_on_until_its_patience_ends() -> None:
    run = Run()
    run.bring_to(TRAINING)
    make_harmful(run)
    run.seed.steps_in_stage = 119
    assert run.operate(leyline.SEED_OP_START_GRAFTING).gate is GateFailure.NOT_HELPING
    assert run.seed.stage == TRAINING
    run.seed.steps_in_stage = 120
    assert run.operate(leyline.SEED_OP_START_GRAFTING).gate is GateFailure.NOT_HELPING
    assert run.seed.stage == CULLED


def test_grafting_takes_schedule_and_mixing_from_the_command() -> None:
    run = Run(blend_steps=10)
    run.bring_to(TRAINING)
    run.operate(
        leyline.SEED_OP_START_GRAFTING,
        parameters={"alpha": 0.25, "blending_method_index": 1},
        annotations={"blend_mode": "RESIDUAL"},
    )
    assert run.seed.schedule.method == "cosine"
    assert run.seed.schedule.total_steps == 10
    assert run.seed.slot.alpha == 0.25
    assert run.seed.slot.mixing.mode == "RESIDUAL"


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"seed_id": "seed-9"}, Refusal.UNKNOWN_SEED),
        ({"seed_id": ""}, Refusal.UNKNOWN_SEED),
        ({"blueprint_id": "demo-safe"}, Refusal.UNKNOWN_BLUEPRINT),
    ],
)
def test_refuses_what_it_does_not_know(change: dict[str, str], refusal: Refusal) -> None:
    run = Run()
    assert run.operate(leyline.SEED_OP_GERMINATE, **change).refusal is refusal
    assert run.seed.stage == DORMANT


def test_a_learning_rate_change_is_relative_and_lasts() -> None:
    run = Run()
    assert run.executor.apply(optimizer_command(0.5), 1).refusal is None
    assert run.rate.learning_rate == pytest.approx(1.5e-3)
    assert run.executor.apply(optimizer_command(-0.5, ""), 1).refusal is None
    assert run.rate.learning_rate == pytest.approx(0.75e-3)
    run.learner.step(SAMPLES)
    assert run.rate.learning_rate == pytest.approx(0.75e-3, rel=1e-2)


def test_a_learning_rate_that_stays_as_it_is_is_refused_with_the_reason() -> None:
    run = Run()
    run.executor.apply(optimizer_command(1e6), 1)
    assert run.rate.learning_rate == pytest.approx(MAX_LEARNING_RATE)
    execution = run.executor.apply(optimizer_command(1.0), 1)
    assert (execution.refusal, execution.detail) == (Refusal.LEARNING_RATE, "at_bound")
    assert execution.reason == "learning_rate: at_bound"


@pytest.mark.parametrize("delta", [math.nan, math.inf, -math.inf])
def test_a_learning_rate_that_is_no_number_is_refused(delta: float) -> None:
    run = Run()
    execution = run.executor.apply(optimizer_command(delta), 1)
    assert execution.refusal is Refusal.INVALID_PARAMETER
    assert run.rate.learning_rate == pytest.approx(1e-3)


def test_an_adjustment_for_another_optimizer_is_refused() -> None:
    execution = Run().executor.apply(optimizer_command(0.1, "sgd"), 1)
    assert execution.refusal is Refusal.UNKNOWN_OPTIMIZER


def test_an_open_breaker_blocks_seeds_and_nothing_else() -> None:
    run = Run()
    run.executor.apply(breaker_command(leyline.CIRCUIT_STATE_OPEN), 1)
    assert run.operate(leyline.SEED_OP_GERMINATE).refusal is Refusal.BREAKER_OPEN
    assert run.executor.apply(optimizer_command(0.1), 1).refusal is None
    run.executor.apply(breaker_command(leyline.CIRCUIT_STATE_CLOSED), 1)
    assert run.operate(leyline.SEED_OP_GERMINATE).refusal is None


def test_a_breaker_command_without_a_state_is_refused() -> None:
    execution = Run().executor.apply(breaker_command(leyline.CIRCUIT_STATE_UNKNOWN), 1)
    assert execution.refusal is Refusal.INVALID_PARAMETER


def test_a_pause_holds_alpha() -> None:
    pause = leyline.AdaptationCommand(command_type=leyline.COMMAND_PAUSE)
    execution = Run().executor.apply(pause, 1)
    assert execution.refusal is None
    assert not execution.advances_blend


@pytest.mark.parametrize(
    "command",
    [
        leyline.AdaptationCommand(),
        leyline.AdaptationCommand(command_type=leyline.COMMAND_ROLLBACK),
        leyline.AdaptationCommand(command_type=leyline.COMMAND_SEED),
        leyline.AdaptationCommand(command_type=leyline.COMMAND_OPTIMIZER),
        leyline.AdaptationCommand(command_type=99),  # type: ignore[arg-type]
    ],
)
def test_commands_it_cannot_carry_out_are_refused(command: leyline.AdaptationCommand) -> None:
    assert Run().executor.apply(command, 1).refusal is Refusal.UNSUPPORTED


class SeedLife(RuleBasedStateMachine):
    """Any commands in any order, with steps between them."""

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(blend_steps=2)

    @rule(operation=st.sampled_from(OPERATIONS))
    def command(self, operation: leyline.SeedOperation) -> None:
        before = self.run.seed.stage
        execution = self.run.operate(operation)
        if execution.refusal is None:
            assert self.run.seed.stage == TRANSITIONS[before, operation]
        elif execution.gate is not GateFailure.NOT_HELPING:
            assert self.run.seed.stage == before

    @rule(steps=st.integers(1, 25), blend=st.booleans())
    def pass_time(self, steps: int, blend: bool) -> None:
        alpha = self.run.seed.slot.alpha
        for _ in range(steps):
            self.run.seed.observe(1.0, 0.5)
            self.run.seed.advance(blend=blend)
        if not blend:
            assert self.run.seed.slot.alpha == alpha

    @invariant()
    def the_seed_takes_part_only_when_joined(self) -> None:
        seed = self.run.seed
        empty = seed.slot.seed is None
        assert empty == (seed.stage in (DORMANT, CULLED))
        assert empty == (seed.optimizer is None)
        if seed.stage not in JOINED:
            assert seed.slot.alpha == 0.0
        if seed.stage in JOINED - {BLENDING}:
            assert seed.slot.alpha == 1.0


TestSeedLife = SeedLife.TestCase
TestSeedLife.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
