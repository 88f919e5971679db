"""Optimization steps: isolation, determinism and what numbers that are none do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tamiyo_svc.client.seeds.lifecycle import BLENDING, TRAINING, Seed
from tamiyo_svc.trainer.blueprints import build_seed
from tamiyo_svc.trainer.data import Samples
from tamiyo_svc.trainer.learner import Learner, evaluate, measure_impact
from tamiyo_svc.trainer.network import HostNetwork

BATCH = Samples(
    torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 10
)


def make_learner(stage: int | None = None, random_seed: int = 0) -> Learner:
    torch.manual_seed(random_seed)
    network = HostNetwork()
    seed = Seed(1, network.slot(1))
    if stage is not None:
        seed.germinate("seed-residual-conv3x3", build_seed("seed-residual-conv3x3", 24, 3), 1e-3, 1)
        seed.enter(stage)  # type: ignore[arg-type]
        if stage == BLENDING:
            seed.slot.alpha = 0.5
    return Learner(network, [seed], 1e-3, steps=50)


def host_weights(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.network.host_parameters()])


def seed_weights(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.seeds[0].parameters])


def test_a_training_seed_learns_and_the_host_learns_as_if_it_were_not_there() -> None:
    alone, beside = make_learner(), make_learner(TRAINING)
    seed_before = seed_weights(beside)
    for _ in range(3):
        result = beside.step(BATCH)
        assert result == alone.step(BATCH)
        assert result.isolation_violations == 0
    assert torch.equal(host_weights(alone), host_weights(beside))
    assert not torch.equal(seed_before, seed_weights(beside))
    assert beside.seeds[0].gradient_norm > 0.0


def test_a_blending_seed_changes_how_the_host_learns() -> None:
    alone, joined = make_learner(), make_learner(BLENDING)
    for _ in range(3):
        alone.step(BATCH)
        joined.step(BATCH)
    assert not torch.equal(host_weights(alone), host_weights(joined))


class LeakySlotNetwork(HostNetwork):
    """A host whose trials forget to freeze it."""

    def trial(self, images: torch.Tensor, index: int) -> torch.Tensor:
        self.slot(index).alpha = 1.0
        logits: torch.Tensor = self(images)
        self.slot(index).alpha = 0.0
        return logits


def test_a_leak_is_counted_and_does_not_reach_the_host() -> None:
    alone = make_learner()
    torch.manual_seed(0)
    network = LeakySlotNetwork()
    seed = Seed(1, network.slot(1))
    seed.germinate("seed-residual-conv3x3", build_seed("seed-residual-conv3x3", 24, 3), 1e-3, 1)
    seed.enter(TRAINING)
    leaky = Learner(network, [seed], 1e-3, steps=50)
    result = leaky.step(BATCH)
    alone.step(BATCH)
    assert result.isolation_violations == len(network.host_parameters())
    assert torch.equal(host_weights(alone), host_weights(leaky))


def test_gradients_that_are_not_finite_change_nothing() -> None:
    learner = make_learner(TRAINING)
    broken = Samples(torch.full_like(BATCH.images, math.nan), BATCH.labels)
    host, seed = host_weights(learner), seed_weights(learner)
    result = learner.step(broken)
    assert math.isnan(result.loss)
    assert not learner.seeds[0].gradients_finite
    assert torch.equal(host, host_weights(learner))
    assert torch.equal(seed, seed_weights(learner))


def test_training_lowers_the_loss() -> None:
    learner = make_learner()
    first = learner.step(BATCH).loss
    for _ in range(30):
        last = learner.step(BATCH).loss
    assert last < first


def test_the_learning_rate_falls_to_a_twentieth() -> None:
    learner = make_learner()
    assert learner.learning_rate == pytest.approx(1e-3)
    for _ in range(60):
        learner.step(BATCH)
    assert learner.learning_rate == pytest.approx(5e-5)


def test_impact_is_the_loss_a_seed_adds() -> None:
    learner = make_learner(BLENDING)
    seed = learner.seeds[0]
    seed.slot.alpha = 1.0
    for parameter in seed.parameters:
        nn.init.constant_(parameter, 0.5)
    with_seed, _ = evaluate(learner.network, BATCH)
    impact = measure_impact(learner.network, seed, BATCH)
    seed.slot.clear()
    without_seed, _ = evaluate(learner.network, BATCH)
    assert impact.difference == pytest.approx(with_seed - without_seed)
    assert impact.difference != 0.0
