"""A seed has its place's device, number format and memory format at every moment."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.client.seeds import BLUEPRINTS, Mixing, Schedule, SeedBank
from tamiyo_svc.client.seeds.lifecycle import TRAINING, Seed

INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3
MLP = "seed-residual-mlp"
FORMATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, SeedBank, Seed]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)
    bank = SeedBank(model)
    seed = bank.attach("1")
    model(INPUTS.to(dtype))
    return model, bank, seed


def grow(bank: SeedBank, seed: Seed, blueprint_id: str = MLP) -> None:
    seed.germinate(blueprint_id, bank.build(seed, blueprint_id), 1e-2, epoch=1)


def loss_of(model: nn.Module, dtype: torch.dtype) -> Tensor:
    return functional.cross_entropy(model(INPUTS.to(dtype)).float(), LABELS)


def formats(seed: Seed) -> set[torch.dtype]:
    return {parameter.dtype for parameter in seed.parameters}


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_seed_is_planted_in_its_places_number_format(dtype: torch.dtype) -> None:
    _, bank, seed = make(dtype)
    grow(bank, seed)
    assert formats(seed) == {dtype}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("joined", [False, True])
def test_a_seed_moves_with_the_network_and_trains_on(dtype: torch.dtype, joined: bool) -> None:
    model, bank, seed = make()
    grow(bank, seed)
    seed.enter(TRAINING)
    bank.train_isolated(lambda: loss_of(model, torch.float32))
    if joined:
        seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    model.to(dtype)
    assert formats(seed) == {dtype}
    for _ in range(3):
        loss = loss_of(model, dtype)
        loss.backward()  # type: ignore[no-untyped-call]
        bank.step(float(loss.detach()))
        bank.train_isolated(lambda: loss_of(model, dtype))
    assert seed.stage_name == ("BLENDING" if joined else "TRAINING")
    assert formats(seed) == {dtype}
    assert all(p.isfinite().all() for p in seed.parameters)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_run_resumes_in_another_precision(dtype: torch.dtype) -> None:
    model, bank, seed = make()
    grow(bank, seed)
    seed.enter(TRAINING)
    bank.train_isolated(lambda: loss_of(model, torch.float32))
    state = copy.deepcopy(bank.state_dict())
    resumed, resumed_bank, resumed_seed = make(dtype)
    resumed_bank.load_state_dict(state)
    assert formats(resumed_seed) == {dtype}
    resumed_bank.train_isolated(lambda: loss_of(resumed, dtype))
    assert resumed_seed.stage_name == "TRAINING"


def test_a_seed_that_comes_with_the_networks_weights_has_the_networks_format() -> None:
    model, bank, seed = make()
    grow(bank, seed)
    resumed, _, resumed_seed = make(torch.float64)
    resumed.load_state_dict(model.state_dict())
    assert formats(resumed_seed) == {torch.float64}


def test_under_autocast_weights_have_the_parameters_format_and_outputs_the_activations() -> None:
    model, bank, seed = make()
    bank.detach()
    seed = bank.attach("1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(INPUTS)
        grow(bank, seed)
        seed.slot.alpha = 0.5
        assert model(INPUTS).dtype == plain.dtype == torch.bfloat16
    assert formats(seed) == {torch.float32}
    assert model(INPUTS).dtype == torch.float32


def test_a_network_that_casts_for_itself_takes_a_seed_in_its_weights_format() -> None:
    class Casting(nn.Module):
        """Computes in bfloat16 with float32 weights, as sharded mixed precision does."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 12)

        def forward(self, inputs: Tensor) -> Tensor:
            weight, bias = self.linear.weight.bfloat16(), self.linear.bias.bfloat16()
            return functional.linear(inputs.bfloat16(), weight, bias)

    torch.manual_seed(0)
    model = Casting()
    bank = SeedBank(model)
    seed = bank.attach("")
    model(INPUTS)
    grow(bank, seed)
    seed.slot.alpha = 0.5
    assert model(INPUTS).dtype == torch.bfloat16
    assert formats(seed) == {torch.float32}
    assert bank.seeds[0].slot.seed is not None


def test_a_seed_in_a_network_of_channels_last_has_that_layout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    bank = SeedBank(model)
    seed = bank.attach("1")
    last = torch.channels_last
    images = torch.randn(2, 3, 6, 6).to(memory_format=last)
    model.to(memory_format=last)  # type: ignore[call-overload]
    model(images)
    grow(bank, seed, "seed-residual-conv3x3")
    assert all(p.is_contiguous(memory_format=last) for p in seed.parameters if p.ndim == 4)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    assert all(p.is_contiguous() for p in seed.parameters)


def test_a_seed_trains_on_when_moving_replaces_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, bank, seed = make()
    grow(bank, seed)
    seed.enter(TRAINING)
    bank.train_isolated(lambda: loss_of(model, torch.float32))
    monkeypatch.setattr(
        torch.__future__, "_overwrite_module_params_on_conversion", True, raising=True
    )
    model.double()
    before = [p.detach().clone() for p in seed.parameters]
    bank.train_isolated(lambda: loss_of(model, torch.float64))
    assert formats(seed) == {torch.float64}
    assert not all(torch.equal(a, b) for a, b in zip(before, seed.parameters, strict=True))


def test_a_network_of_mixed_formats_gives_a_seed_that_of_its_neighbours() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"low": nn.Linear(6, 12).bfloat16(), "high": nn.Sequential(nn.Tanh(), nn.Linear(12, 3))}
    )
    bank = SeedBank(model)
    seed = bank.attach("high.0")
    model["high"](model["low"](INPUTS.bfloat16()).float())
    grow(bank, seed)
    assert formats(seed) == {torch.float32}


def test_the_seed_is_none_of_the_networks_parameters_buffers_or_modules() -> None:
    model, bank, seed = make()
    parameters, modules = list(model.parameters()), list(model.modules())
    grow(bank, seed)
    seed.slot.alpha = 0.5
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.modules()) == modules
    assert set(BLUEPRINTS) >= {seed.blueprint_id}
