"""Seeds attached to networks by name: what they change, what they leave alone, and removal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.client.seeds.bank import SeedBank
from tamiyo_svc.client.seeds.blending import Mixing, Schedule
from tamiyo_svc.client.seeds.blueprints import residual_conv, residual_mlp
from tamiyo_svc.client.seeds.lifecycle import (
    BLENDING,
    CULLED,
    FOSSILIZED,
    GERMINATED,
    TRAINING,
    Seed,
)
from tamiyo_svc.taxonomy import BlendMode

MIXINGS = [
    Mixing(),
    Mixing(BlendMode.RESIDUAL),
    Mixing(BlendMode.CHANNEL, alpha_vec=tuple(n / 12 for n in range(12)), channel_dim=-1),
    Mixing(BlendMode.CONFIDENCE, gate_k=2.0, gate_tau=0.01, alpha_lo=0.1, alpha_hi=0.9),
]


class Tuples(nn.Module):
    """A layer that returns a tuple, as attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, features: Tensor) -> tuple[Tensor, str]:
        return self.linear(features), "attention"


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3))
        self.second = Tuples()
        self.head = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(inputs))[0].relu())
        return logits


INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 3


def alive(channels: int) -> nn.Module:
    """A seed that changes something from its first step on."""
    return nn.Sequential(nn.Linear(channels, channels), nn.Tanh())


def make_bank(**options: Any) -> tuple[Host, SeedBank, Seed]:
    torch.manual_seed(0)
    model = Host()
    bank = SeedBank(model, {"alive": alive}, **options)
    seed = bank.attach("second")
    model(INPUTS)
    return model, bank, seed


def germinate(bank: SeedBank, seed: Seed) -> None:
    seed.germinate("alive", bank.build(seed, "alive"), 1e-2, epoch=1)


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(INPUTS)
    return result


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: functional.cross_entropy(model(INPUTS), LABELS)


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: str(mixing.mode))
def test_attach_graft_blend_cull_gives_back_the_outputs_from_before(mixing: Mixing) -> None:
    torch.manual_seed(0)
    model = Host()
    before, keys = outputs(model), list(model.state_dict())
    bank = SeedBank(model, {"alive": alive})
    seed = bank.attach("second")
    assert torch.equal(outputs(model), before)
    germinate(bank, seed)
    assert torch.equal(outputs(model), before)
    seed.enter(TRAINING)
    assert torch.equal(outputs(model), before)
    seed.start_blending(Schedule(first_alpha=0.3, total_steps=4), mixing)
    assert not torch.equal(outputs(model), before)
    for _ in range(4):
        bank.advance(blend=True)
    assert seed.slot.alpha == 1.0
    assert not torch.equal(outputs(model), before)
    seed.remove(CULLED)
    assert torch.equal(outputs(model), before)
    assert list(model.state_dict()) == keys
    bank.detach()
    assert torch.equal(outputs(model), before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: str(mixing.mode))
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_what_a_seed_changes_is_its_blend_modes_formula(mixing: Mixing, alpha: float) -> None:
    model, bank, seed = make_bank()
    model.eval()
    germinate(bank, seed)
    with torch.no_grad():
        host = model.second(model.first(INPUTS))[0]
        module = seed.slot.seed
        assert module is not None
        r = module(host)
        seed.slot.alpha, seed.slot.mixing = alpha, mixing
        mixed, rest = model.second(model.first(INPUTS))
    assert rest == "attention"
    for n in range(len(INPUTS)):
        h_norm, r_norm = float(host[n].norm()), float(r[n].norm())
        gate = math.exp(-2.0 * max(r_norm / h_norm - 0.01, 0.0))
        for c in range(12):
            h_c, r_c = float(host[n, c]), float(r[n, c])
            expected = {
                BlendMode.CONVEX: (1 - alpha) * h_c + alpha * (h_c + r_c),
                BlendMode.RESIDUAL: h_c + alpha * r_c,
                BlendMode.CHANNEL: h_c + alpha * (c / 12) * r_c,
                BlendMode.CONFIDENCE: h_c + min(max(alpha * gate, 0.1), 0.9) * r_c,
            }[mixing.mode]
            assert float(mixed[n, c]) == pytest.approx(expected, abs=1e-5)


def train(with_seed: bool) -> tuple[dict[str, Tensor], int, float]:
    model, bank, seed = make_bank()
    if with_seed:
        germinate(bank, seed)
        seed.enter(TRAINING)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(9)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model)().backward()  # type: ignore[no-untyped-call]
        # Between backward and step, where a leak into the host's gradients would count.
        bank.train_isolated(loss_of(model))
        optimizer.step()
    return copy.deepcopy(model.state_dict()), bank.isolation_violations, seed.loss_slow


def test_isolated_training_leaves_the_host_as_it_is_without_the_seed() -> None:
    alone, _, _ = train(with_seed=False)
    beside, violations, seed_loss = train(with_seed=True)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert violations == 0
    assert math.isfinite(seed_loss)


def test_isolated_training_improves_the_network_with_the_seed_in_it() -> None:
    models: list[Host] = []
    model, bank, seed = make_bank(evaluate=lambda: float(loss_of(models[0])().detach()))
    models.append(model)
    germinate(bank, seed)
    seed.enter(TRAINING)
    model.eval()
    at_first = bank.impact(seed)
    for _ in range(60):
        bank.train_isolated(loss_of(model))
    taught = bank.impact(seed)
    assert at_first is not None
    assert taught is not None
    assert taught.helps
    assert taught.difference < at_first.difference
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_reaches_the_host_is_counted() -> None:
    model, bank, seed = make_bank()
    germinate(bank, seed)
    seed.enter(TRAINING)

    def leaking() -> Tensor:
        model.head.bias.grad = torch.ones_like(model.head.bias)
        return loss_of(model)()

    bank.train_isolated(leaking)
    assert bank.isolation_violations == 1


def test_a_joined_seed_trains_on_the_hosts_own_backward_pass() -> None:
    model, bank, seed = make_bank()
    germinate(bank, seed)
    seed.start_blending(Schedule(total_steps=1, first_alpha=1.0), Mixing())
    before = [p.detach().clone() for p in seed.parameters]
    loss_of(model)().backward()  # type: ignore[no-untyped-call]
    bank.step(1.0)
    assert not all(torch.equal(a, b) for a, b in zip(before, seed.parameters, strict=True))
    assert all(p.grad is None for p in seed.parameters)
    assert seed.gradient_norm > 0.0


def test_a_bank_is_restored_with_its_seeds_weights_stages_and_alphas() -> None:
    model, bank, seed = make_bank()
    germinate(bank, seed)
    seed.start_blending(Schedule("cosine", 0.2, total_steps=8), MIXINGS[2])
    bank.advance(blend=True)
    loss_of(model)().backward()  # type: ignore[no-untyped-call]
    bank.step(1.0)
    expected = outputs(model)
    saved = copy.deepcopy(bank.state_dict())
    other, restored, again = make_bank()
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(saved)
    assert torch.equal(outputs(other), expected)
    assert (again.stage, again.slot.alpha) == (BLENDING, seed.slot.alpha)
    bank.advance(blend=True)
    restored.advance(blend=True)
    assert again.slot.alpha == seed.slot.alpha
    assert restored.state_dict()["seed-0"]["schedule"] == bank.state_dict()["seed-0"]["schedule"]


def test_seeds_describe_themselves_for_a_packet() -> None:
    _, bank, seed = make_bank()
    germinate(bank, seed)
    (state,) = bank.states(epoch=3, risks={"alive": 0.4})
    assert (state.seed_id, state.stage, state.age_epochs) == ("seed-0", GERMINATED, 3)
    assert state.risk_score == pytest.approx(0.4)
    assert state.learning_rate == pytest.approx(1e-2)


def test_the_same_random_seed_grows_the_same_module_and_draws_nothing() -> None:
    _, bank, seed = make_bank(random_seed=4)
    state = torch.get_rng_state()
    one, two = bank.build(seed, "alive"), bank.build(seed, "alive")
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("build", "shape"), [(residual_mlp, (2, 5, 8)), (residual_conv, (2, 8, 4, 4))]
)
def test_ready_made_blueprints_start_as_exactly_nothing(
    build: Callable[[int], nn.Module], shape: tuple[int, ...]
) -> None:
    assert torch.equal(build(8)(torch.randn(shape)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("module", "shape", "dim", "channels"),
    [
        (nn.Conv2d(3, 8, 1), (2, 3, 4, 4), 1, 8),
        (nn.Linear(3, 8), (2, 5, 3), -1, 8),
        (nn.Linear(3, 8), (2, 3), -1, 8),
    ],
)
def test_a_slot_finds_out_where_the_channels_are(
    module: nn.Module, shape: tuple[int, ...], dim: int, channels: int
) -> None:
    model = nn.Sequential(module)
    seed = SeedBank(model).attach("0")
    model(torch.randn(shape))
    assert (seed.slot.channel_dim, seed.slot.channels) == (dim, channels)


def test_unusable_names_and_places_are_refused() -> None:
    model = Host()
    bank = SeedBank(model, {"alive": alive})
    with pytest.raises(AttributeError):
        bank.attach("third")
    seed = bank.attach("second")
    with pytest.raises(ValueError, match="seed-0"):
        bank.attach("head", seed_id="seed-0")
    with pytest.raises(ValueError, match="passed"):
        bank.build(seed, "alive")


def test_a_seed_follows_its_hosts_mode_and_number_format() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    bank = SeedBank(model, {"alive": alive})
    seed = bank.attach("0")
    model(torch.randn(2, 4, dtype=torch.bfloat16))
    germinate(bank, seed)
    seed.enter(FOSSILIZED)
    seed.slot.alpha = 1.0
    model.eval()
    assert model(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seed.slot.seed is not None
    assert not seed.slot.seed.training
