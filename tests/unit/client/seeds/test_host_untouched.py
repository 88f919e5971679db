"""What Tamiyo runs for its own sake leaves the host's tensors, generators and modes alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.client.seeds import Mixing, Schedule, SeedBank
from tamiyo_svc.client.seeds.lifecycle import TRAINING, Seed

INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 3
Build = Callable[[int], nn.Module]


class Noisy(nn.Linear):
    """Draws from all three global generators, when built and when run."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)
        self.scale = random.random() + float(np.random.rand())

    def forward(self, features: Tensor) -> Tensor:
        factor = self.scale + random.random() + float(np.random.rand())
        return factor * super().forward(features) + torch.rand(features.shape)


def in_place(channels: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(channels, channels))


def in_place_in_training(channels: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(channels, channels))


def make(build: Build, host: nn.Module | None = None) -> tuple[nn.Module, SeedBank, Seed]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), host or nn.Tanh(), nn.Linear(12, 3))
    bank = SeedBank(model, {"it": build})
    seed = bank.attach("1")
    model(INPUTS)
    seed.germinate("it", bank.build(seed, "it"), 1e-2, epoch=1)
    return model, bank, seed


def generators() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def loss_of(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(INPUTS), LABELS)


def test_building_training_judging_and_joining_draw_no_number_the_host_would_draw() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    bank = SeedBank(model, {"it": Noisy}, evaluate=lambda: float(loss_of(model).detach()))
    seed = bank.attach("1")
    model(INPUTS)
    before = generators()
    seed.germinate("it", bank.build(seed, "it"), 1e-2, epoch=1)
    assert generators() == before
    seed.enter(TRAINING)
    bank.train_isolated(lambda: loss_of(model))
    assert generators() == before
    bank.impact(seed)
    assert generators() == before
    seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    loss_of(model)
    assert generators() == before
    assert seed.stage_name == "BLENDING"


@pytest.mark.parametrize("build", [in_place, in_place_in_training])
@pytest.mark.parametrize("host", [nn.Tanh, nn.Sigmoid, nn.Identity])
def test_a_seed_that_writes_in_place_writes_into_a_copy(
    build: Build, host: type[nn.Module]
) -> None:
    model, _, seed = make(build, host())
    expected = host()(model.get_submodule("0")(INPUTS))
    seen: list[Tensor] = []
    model.get_submodule("1").register_forward_hook(
        lambda _, __, output: seen.append(output), prepend=True
    )
    seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    for _ in range(3):
        loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(features, expected) for features in seen)
    assert (len(seen), seed.stage_name) == (3, "BLENDING")


def test_evaluation_may_change_modes_and_leave_them() -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels), nn.BatchNorm1d(12))
    bank._evaluate = lambda: float(loss_of(model.eval()).detach())
    buffers = [buffer.clone() for buffer in model.buffers()]
    bank.impact(seed)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_other_seeds_running_statistics_are_left_alone_in_isolated_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
    bank = SeedBank(model, {"norm": lambda channels: nn.BatchNorm1d(channels)})
    first, second = bank.attach("1"), bank.attach("3")
    model(INPUTS)
    for seed in (first, second):
        seed.germinate("norm", bank.build(seed, "norm"), 1e-2, epoch=1)
    first.start_blending(Schedule(first_alpha=0.5), Mixing())
    second.enter(TRAINING)
    before = [buffer.clone() for buffer in first.buffers]
    own = [buffer.clone() for buffer in second.buffers]
    bank.train_isolated(lambda: model(INPUTS).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before, first.buffers, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(own, second.buffers, strict=True))


@pytest.mark.parametrize("to_none", [True, False])
def test_clearing_gradients_before_the_isolated_pass_is_no_violation(to_none: bool) -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels))
    seed.enter(TRAINING)
    loss_of(model).backward()  # type: ignore[no-untyped-call]

    def isolated_loss() -> Tensor:
        model.zero_grad(set_to_none=to_none)
        return loss_of(model)

    bank.train_isolated(isolated_loss)
    assert bank.isolation_violations == 0
    assert seed.moved
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_violation_counts_in_its_step_alone_is_named_once_and_undone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels))
    seed.enter(TRAINING)

    def isolated_loss() -> Tensor:
        loss = loss_of(model)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return loss

    for _ in range(2):
        bank.step(1.0)
        bank.train_isolated(isolated_loss)
        assert bank.isolation_violations == 2
        assert all(parameter.grad is None for parameter in model.parameters())
    bank.step(1.0)
    bank.train_isolated(lambda: loss_of(model))
    assert bank.isolation_violations == 0
    assert caplog.text.count("the gradient of 2.weight") == 1


def test_an_evaluation_that_trains_leaves_the_hosts_gradients_alone() -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels))

    def evaluate() -> float:
        with torch.enable_grad():
            loss = loss_of(model)
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    bank._evaluate = evaluate
    bank.impact(seed)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_of_the_callers_isolated_pass_ends_neither_seed_nor_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels))
    seed.enter(TRAINING)

    def isolated_loss() -> Tensor:
        raise RuntimeError("no such batch")

    for _ in range(3):
        bank.train_isolated(isolated_loss)
    assert (seed.stage_name, str(seed.idle)) == ("TRAINING", "no_gradient")
    assert caplog.text.count("no such batch") == 1
    bank.train_isolated(lambda: loss_of(model))
    assert seed.moved


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_scaled_loss_moves_a_seed_as_an_unscaled_one(scale: float) -> None:
    weights = []
    for by in (1.0, scale):
        model, bank, seed = make(lambda channels: nn.Linear(channels, channels))
        seed.start_blending(Schedule(first_alpha=0.5), Mixing())
        (by * loss_of(model)).backward()  # type: ignore[no-untyped-call]
        bank.step(1.0, scale=by)
        weights.append(torch.cat([p.detach().flatten() for p in seed.parameters]))
        norm = seed.gradient_norm
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert 0.0 < norm < 10.0


def test_a_step_whose_scaled_gradients_overflow_leaves_the_seed_as_it_was() -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels))
    seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    bank.step(1.0)
    norm = seed.gradient_norm
    weights = [p.detach().clone() for p in seed.parameters]
    for parameter in seed.parameters:
        parameter.grad = torch.full_like(parameter, float("inf"))
    bank.step(1.0, scale=2.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, seed.parameters, strict=True))
    assert (seed.gradients_finite, seed.gradient_norm) == (False, norm)


@pytest.mark.parametrize(
    ("learning_rate", "isolated", "reason"),
    [
        (0.0, True, "learning_rate_zero"),
        (1e-2, False, "no_gradient"),
        (1e-2, True, "None"),
    ],
)
def test_what_kept_a_seed_from_learning_is_told(
    learning_rate: float, isolated: bool, reason: str
) -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels))
    bank.follow(learning_rate)
    seed.enter(TRAINING)
    for _ in range(3):
        if isolated:
            bank.train_isolated(lambda: loss_of(model))
    assert str(seed.idle) == reason


def test_what_weight_decay_alone_moved_has_learned_nothing() -> None:
    _, bank, seed = make(lambda channels: nn.Linear(channels, channels))
    seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    for parameter in seed.parameters:
        parameter.grad = torch.zeros_like(parameter)
    bank.step(1.0)
    assert (seed.moved, str(seed.idle)) == (True, "no_gradient")


def test_steps_too_small_for_the_weights_format_are_no_learning() -> None:
    model, bank, seed = make(lambda channels: nn.Linear(channels, channels))
    model.bfloat16()
    for parameter in seed.parameters:
        nn.init.ones_(parameter)
    bank.follow(1e-9)
    seed.enter(TRAINING)
    bank.train_isolated(lambda: functional.cross_entropy(model(INPUTS.bfloat16()).float(), LABELS))
    assert str(seed.idle) == "weights_unmoved"
