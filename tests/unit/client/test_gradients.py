"""Norm, turning and scale of a step's gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tamiyo_svc.client.gradients import ConflictMeter, LossScale, total_norm


def test_the_norm_is_that_of_all_of_them_together() -> None:
    gradients = [torch.full((2, 2), 1.0), torch.full((5,), 2.0), torch.tensor(3.0)]
    assert total_norm(gradients) == pytest.approx(math.sqrt(4 + 20 + 9))


@pytest.mark.parametrize(
    "other",
    [
        torch.full((4,), 3e4, dtype=torch.float16),
        torch.full((4,), 3e4, dtype=torch.bfloat16),
        torch.full((4,), 3e4, dtype=torch.float64),
        torch.full((2,), 3e4 * (1 + 1j), dtype=torch.complex64),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_number_formats_may_differ(other: torch.Tensor) -> None:
    assert total_norm([torch.full((4,), 4e4), other]) == pytest.approx(1e5, rel=2e-2)


def test_a_sparse_gradient_counts_by_its_sums() -> None:
    embedding = nn.Embedding(9, 4, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert total_norm([gradient]) == pytest.approx(math.sqrt(4 * (4.0 + 1.0)))


def test_gradients_that_are_gone_have_no_norm() -> None:
    assert total_norm([]) is None
    assert total_norm([torch.zeros(3), torch.zeros(2)]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_element_shows(bad: float) -> None:
    norm = total_norm([torch.ones(3), torch.tensor([bad])])
    assert norm is not None
    assert not math.isfinite(norm)


def turned(meter: ConflictMeter, gradients: list[torch.Tensor], looks: int = 1) -> float | None:
    for _ in range(4 * looks):
        meter.observe(gradients)
    return meter.rate


def test_a_gradient_that_turns_round_is_in_conflict_with_its_mean() -> None:
    meter = ConflictMeter()
    gradients = [torch.arange(1.0, 5000.0), torch.ones(3, 7)]
    assert turned(meter, gradients) is None
    assert turned(meter, gradients) == 0.0
    assert turned(meter, [gradients[0], -gradients[1]]) == 0.5
    assert turned(meter, [-gradients[0], -gradients[1]]) == 1.0
    assert turned(meter, gradients, looks=3) == 0.0


def test_noise_is_no_conflict() -> None:
    generator = torch.Generator().manual_seed(1)
    meter = ConflictMeter()
    for _ in range(10):
        turned(meter, [torch.randn(2000, generator=generator) for _ in range(8)])
    assert meter.rate == 0.0


def test_a_bad_gradient_leaves_the_mean_as_it_was() -> None:
    meter = ConflictMeter()
    good = torch.ones(10)
    turned(meter, [good], looks=2)
    assert turned(meter, [torch.full((10,), math.nan)]) == 0.0
    assert turned(meter, [-good]) == 1.0


def test_it_begins_anew_when_other_parameters_train() -> None:
    meter = ConflictMeter()
    turned(meter, [torch.ones(10)], looks=2)
    turned(meter, [-torch.ones(12), -torch.ones(4)])
    assert turned(meter, [-torch.ones(12), -torch.ones(4)]) == 0.0


def test_it_keeps_no_more_than_a_sample_however_large_the_model() -> None:
    meter = ConflictMeter()
    turned(meter, [torch.ones(300, 300) for _ in range(100)])
    assert meter._mean is not None
    assert meter._mean.numel() <= 32 * 1024


def test_sparse_gradients_do_not_keep_the_others_from_being_compared() -> None:
    meter = ConflictMeter()
    embedding = nn.Embedding(12, 4, sparse=True)
    for row in range(12):
        embedding.weight.grad = None
        embedding(torch.arange(row + 1)).sum().backward()
        gradients = [p.grad for p in embedding.parameters() if p.grad is not None]
        meter.observe([*gradients, torch.ones(5)])
    assert meter.rate == 0.0


def test_gradients_themselves_stay_as_they_are() -> None:
    gradients = [torch.randn(100), torch.randn(3, 3, dtype=torch.complex64)]
    before = [(g.clone(), g._version) for g in gradients]
    turned(ConflictMeter(), gradients, looks=2)
    total_norm(gradients)
    for gradient, (value, version) in zip(gradients, before, strict=True):
        assert torch.equal(gradient, value)
        assert gradient._version == version


def make_scaler(**settings: Any) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, **settings)


def backward(weight: nn.Parameter, scaler: Any, value: float = 3.0) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler.scale(weight * value).sum().backward()
    return optimizer


def test_before_the_optimizers_step_gradients_are_scaled_until_they_are_unscaled() -> None:
    weight, scaler = nn.Parameter(torch.ones(1)), make_scaler()
    scale = LossScale(scaler)
    optimizer = backward(weight, scaler)
    assert scale.of_gradients(optimizer) == 1024.0
    scaler.unscale_(optimizer)
    assert scale.of_gradients(optimizer) == 1.0
    scaler.step(optimizer)
    assert scale.of_gradients(optimizer) == 1.0


def test_a_step_had_the_scale_of_its_backward_pass_not_the_one_after_it() -> None:
    weight, scaler = nn.Parameter(torch.ones(1)), make_scaler(growth_interval=1)
    scale = LossScale(scaler)
    for expected in (1024.0, 2048.0):
        scaler.step(backward(weight, scaler))
        scaler.update()
        weight.grad = None
        assert scale.end_step() == (expected, False)


def test_a_step_that_overflowed_is_known() -> None:
    weight, scaler = nn.Parameter(torch.ones(1)), make_scaler()
    scale = LossScale(scaler)
    scaler.step(backward(weight, scaler, math.inf))
    scaler.update()
    assert scale.end_step() == (1024.0, True)
    assert scale.end_step() == (512.0, False)


@pytest.mark.parametrize("scaler", [None, object(), torch.amp.GradScaler("cpu", enabled=False)])
def test_without_a_scaler_nothing_is_scaled(scaler: Any) -> None:
    scale = LossScale(scaler)
    assert scale.of_gradients(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)) == 1.0
    assert scale.end_step() == (1.0, False)
