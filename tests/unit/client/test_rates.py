"""Learning rates changed by command, with and without a scheduler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tamiyo_svc.client.rates import MAX_LEARNING_RATE, MIN_LEARNING_RATE, OptimizerRate


def make_optimizer(rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


def test_every_group_is_scaled() -> None:
    optimizer = make_optimizer()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2})
    OptimizerRate(optimizer).change_learning_rate(-0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    ],
)
def test_a_change_outlives_the_schedulers_next_steps(make: object) -> None:
    rates = []
    for delta in (0.0, 0.5):
        optimizer = make_optimizer(0.01)
        scheduler = make(optimizer)  # type: ignore[operator]
        optimizer.step()
        scheduler.step()
        OptimizerRate(optimizer, scheduler).change_learning_rate(delta)
        for _ in range(5):
            optimizer.step()
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[1] == pytest.approx(1.5 * rates[0])


def test_rates_stay_within_bounds_unless_the_user_put_them_beyond() -> None:
    for rate, delta, expected in (
        (0.9, 1.0, MAX_LEARNING_RATE),
        (1.5e-8, -0.9, MIN_LEARNING_RATE),
        (5.0, 0.1, 5.0),
        (0.0, 1.0, 0.0),
    ):
        optimizer = make_optimizer(rate)
        OptimizerRate(optimizer).change_learning_rate(delta)
        assert optimizer.param_groups[0]["lr"] == expected


def test_a_change_of_nothing_leaves_each_bit() -> None:
    optimizer = make_optimizer(1 / 3)
    OptimizerRate(optimizer).change_learning_rate(0.0)
    assert optimizer.param_groups[0]["lr"] == 1 / 3


def test_without_an_optimizer_nothing_happens() -> None:
    rate = OptimizerRate()
    rate.change_learning_rate(0.5)
    assert (rate.learning_rate, rate.family) == (0.0, "")
