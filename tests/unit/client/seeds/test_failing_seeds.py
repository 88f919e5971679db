"""Seeds that do not fit, or fail: refused or taken out, while their host trains on."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.client.seeds.bank import SeedBank
from tamiyo_svc.client.seeds.blending import Mixing, Schedule
from tamiyo_svc.client.seeds.blueprints import residual_conv, residual_mlp
from tamiyo_svc.client.seeds.lifecycle import TRAINING, Seed

INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 3


def make_bank() -> tuple[nn.Module, SeedBank, Seed]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3)
    )
    bank = SeedBank(model)
    seed = bank.attach("3")
    model(INPUTS)
    return model, bank, seed


class Breaking(nn.Module):
    """Works for a number of passes."""

    def __init__(self, channels: int, passes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.passes = passes

    def forward(self, features: Tensor) -> Tensor:
        self.passes -= 1
        if self.passes < 0:
            raise RuntimeError("broken")
        out: Tensor = self.linear(features)
        return out


def returns(value: object) -> Callable[[int], nn.Module]:
    """A blueprint of a seed that returns this."""

    class Returning(nn.Linear):
        def forward(self, features: Tensor) -> Any:
            return value

    return lambda channels: Returning(channels, channels)


@pytest.mark.parametrize(
    ("blueprint", "complaint"),
    [
        (residual_conv, "conv2d"),
        (lambda channels: residual_mlp(channels + 1), "13"),
        (lambda channels: nn.Linear(channels, channels - 1), r"\(16, 11\) for .* \(16, 12\)"),
        (lambda channels: nn.Linear(channels, 1), r"\(16, 1\) for .* \(16, 12\)"),
        (returns(None), "NoneType for"),
        (returns((torch.zeros(16, 12),)), "tuple for"),
        (lambda channels: Breaking(channels, passes=0), "broken"),
    ],
)
def test_a_module_that_does_not_fit_its_place_is_refused_before_it_is_planted(
    blueprint: Callable[[int], nn.Module], complaint: str
) -> None:
    _, bank, seed = make_bank()
    bank.blueprints["odd"] = blueprint
    with pytest.raises((ValueError, RuntimeError), match=complaint):
        bank.build(seed, "odd")


def test_trying_a_module_leaves_it_as_it_was_made() -> None:
    _, bank, seed = make_bank()
    bank.blueprints["normed"] = nn.BatchNorm1d
    module = bank.build(seed, "normed")
    assert module.training
    assert torch.equal(module.get_buffer("running_mean"), torch.zeros(12))


def test_a_module_without_parameters_is_refused_and_not_planted() -> None:
    _, bank, seed = make_bank()
    bank.blueprints["empty"] = lambda channels: nn.Identity()
    with pytest.raises(ValueError, match="empty parameter list"):
        seed.germinate("empty", bank.build(seed, "empty"), 1e-2, epoch=1)
    assert (seed.stage_name, seed.slot.seed, seed.blueprint_id) == ("DORMANT", None, "")


def test_a_seed_that_fails_in_isolated_training_is_taken_out_and_the_host_keeps_its_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, bank, seed = make_bank()
    bank.blueprints["breaking"] = lambda channels: Breaking(channels, passes=2)
    seed.germinate("breaking", bank.build(seed, "breaking"), 1e-2, epoch=1)
    seed.enter(TRAINING)
    before = copy.deepcopy(model.state_dict())
    loss = lambda: functional.cross_entropy(model(INPUTS), LABELS)  # noqa: E731
    for _ in range(2):
        bank.train_isolated(loss)
        assert seed.stage_name == "TRAINING"
    bank.train_isolated(loss)
    assert (seed.stage_name, seed.slot.seed) == ("CULLED", None)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "seed seed-0 failed and is taken out: broken" in caplog.text


@pytest.mark.parametrize("joined", [False, True])
def test_a_seed_that_failed_keeps_nothing_of_the_step_alive(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps what is logged, and with it the error.
    monkeypatch.setattr(logging.getLogger("tamiyo.client"), "disabled", True)

    def failing_step() -> weakref.ref[Tensor]:
        model, bank, seed = make_bank()
        bank.blueprints["breaking"] = lambda channels: Breaking(channels, passes=2)
        seed.germinate("breaking", bank.build(seed, "breaking"), 1e-2, epoch=1)
        inputs = INPUTS.clone()

        def loss() -> Tensor:
            return functional.cross_entropy(model(inputs), LABELS)

        if joined:
            seed.start_blending(Schedule(first_alpha=0.5), Mixing())
        else:
            seed.enter(TRAINING)
        for _ in range(3):
            loss()
            bank.step(1.0)
            bank.train_isolated(loss)
        assert seed.stage_name == "CULLED"
        return weakref.ref(inputs)

    gc.disable()
    try:
        kept = failing_step()
        assert kept() is None
    finally:
        gc.enable()


def test_a_seed_that_fails_in_the_networks_own_pass_is_left_out_and_then_taken_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, bank, seed = make_bank()
    model.eval()
    plain = model(INPUTS)
    bank.blueprints["breaking"] = lambda channels: Breaking(channels, passes=2)
    seed.germinate("breaking", bank.build(seed, "breaking"), 1e-2, epoch=1)
    seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    for _ in range(2):
        assert not torch.equal(model(INPUTS), plain)
    for _ in range(2):
        assert torch.equal(model(INPUTS), plain)
    bank.step(1.0)
    assert (seed.stage_name, seed.slot.seed) == ("CULLED", None)
    assert "seed seed-0 failed and is taken out: broken" in caplog.text
    assert torch.equal(model(INPUTS), plain)
