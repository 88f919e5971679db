"""Optimization steps: learning, the schedule and what numbers that are none do."""

from __future__ import annotations

import math

import pytest
import torch

from tamiyo_svc.trainer.data import Samples
from tamiyo_svc.trainer.learner import Learner, evaluate
from tamiyo_svc.trainer.network import HostNetwork

BATCH = Samples(
    torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 10
)


def make_learner() -> Learner:
    torch.manual_seed(0)
    return Learner(HostNetwork(), 1e-3, steps=50)


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.network.parameters()])


def test_gradients_that_are_not_finite_change_nothing() -> None:
    learner = make_learner()
    broken = Samples(torch.full_like(BATCH.images, math.nan), BATCH.labels)
    before = weights(learner)
    result = learner.step(broken)
    assert math.isnan(result.loss)
    assert not math.isfinite(result.gradient_norm)
    assert torch.equal(before, weights(learner))


def test_training_lowers_the_loss() -> None:
    learner = make_learner()
    first = learner.step(BATCH).loss
    for _ in range(30):
        last = learner.step(BATCH).loss
    assert last < first
    assert evaluate(learner.network, BATCH)[0] < first


def test_the_learning_rate_falls_to_a_twentieth() -> None:
    learner = make_learner()
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    for _ in range(60):
        learner.step(BATCH)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(5e-5)
