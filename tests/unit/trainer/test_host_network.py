"""Slots, exact removal and gradient isolation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tamiyo_svc.client.seeds.blending import Mixing
from tamiyo_svc.taxonomy import BlendMode
from tamiyo_svc.trainer.blueprints import BLUEPRINTS, build_seed
from tamiyo_svc.trainer.network import CHANNELS, HostNetwork

SLOTS = range(len(CHANNELS))


@pytest.fixture
def network() -> HostNetwork:
    torch.manual_seed(0)
    return HostNetwork()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def plant_live_seed(network: HostNetwork, index: int, blueprint_id: str) -> None:
    """A seed whose last layer is not zero, so that it changes what it joins."""
    seed = build_seed(blueprint_id, network.slot(index).channels, random_seed=3)
    for parameter in seed.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.slot(index).plant(seed)


@pytest.mark.parametrize("index", SLOTS)
@pytest.mark.parametrize("blueprint_id", BLUEPRINTS)
@pytest.mark.parametrize("mode", [BlendMode.CONVEX, BlendMode.RESIDUAL, BlendMode.CONFIDENCE])
def test_a_culled_seed_leaves_the_network_bit_for_bit_as_it_was(
    network: HostNetwork, images: torch.Tensor, index: int, blueprint_id: str, mode: BlendMode
) -> None:
    before = network(images)
    plant_live_seed(network, index, blueprint_id)
    assert torch.equal(network(images), before)
    network.slot(index).mixing = Mixing(mode)
    network.slot(index).alpha = 0.5
    assert not torch.equal(network(images), before)
    assert torch.equal(network(images, without=index), before)
    network.slot(index).clear()
    assert torch.equal(network(images), before)


@pytest.mark.parametrize("blueprint_id", BLUEPRINTS)
def test_a_fresh_seed_changes_nothing_even_in_full(
    network: HostNetwork, images: torch.Tensor, blueprint_id: str
) -> None:
    before = network(images)
    network.slot(1).plant(build_seed(blueprint_id, network.slot(1).channels, random_seed=3))
    network.slot(1).mixing = Mixing(BlendMode.RESIDUAL)
    network.slot(1).alpha = 1.0
    assert torch.equal(network(images), before)


@pytest.mark.parametrize("index", SLOTS)
def test_a_trial_equals_full_participation_and_reaches_the_seed_alone(
    network: HostNetwork, images: torch.Tensor, index: int
) -> None:
    other = (index + 1) % len(CHANNELS)
    for slot in (index, other):
        plant_live_seed(network, slot, "seed-residual-conv3x3")
    network.slot(other).alpha = 0.5
    logits = network.trial(images, index)
    functional.cross_entropy(logits, torch.arange(5)).backward()  # type: ignore[no-untyped-call]
    seed = network.slot(index).seed
    assert seed is not None
    own = set(seed.parameters())
    assert all(parameter.grad is not None for parameter in own)
    assert all(p.grad is None for p in network.parameters() if p not in own)
    assert all(p.requires_grad for p in network.parameters())
    network.slot(index).alpha = 1.0
    assert torch.equal(network(images), logits)


def test_parameters_thaw_when_a_trial_fails(network: HostNetwork) -> None:
    plant_live_seed(network, 0, "seed-residual-conv3x3")
    network.slot(1).seed = torch.nn.Linear(3, 3)
    network.slot(1).alpha = 1.0
    with pytest.raises(RuntimeError):
        network.trial(torch.rand(2, 1, 8, 8), 0)
    assert all(p.requires_grad for p in network.parameters())


def test_a_trial_needs_a_seed(network: HostNetwork, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="slot 2 is empty"):
        network.trial(images, 2)
