"""Grown networks leave the house: baked, saved, copied, averaged, reloaded, exported."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tamiyo_svc.client.seeds import Mixing, Schedule, SeedBank
from tamiyo_svc.client.seeds.lifecycle import FOSSILIZED, TRAINING, Seed
from tamiyo_svc.client.seeds.slot import Slot
from tamiyo_svc.taxonomy import BlendMode

INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
MIXINGS = [
    Mixing(),
    Mixing(BlendMode.RESIDUAL),
    Mixing(BlendMode.CHANNEL, alpha_vec=tuple(n / 12 for n in range(12)), channel_dim=-1),
    Mixing(BlendMode.CONFIDENCE, gate_k=2.0, gate_tau=0.01, alpha_lo=0.1, alpha_hi=0.9),
]


class Pair(NamedTuple):
    features: Tensor
    rest: str


class Keyed(nn.Module):
    """Called with keywords, some of which it only passes on, as transformer blocks are."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.returns = returns

    def forward(self, features: Tensor, shift: float = 0.5, **rest: Any) -> Any:
        out = self.linear(features) + shift + rest["scale"]
        if self.returns == "tuple":
            return out, "rest"
        return Pair(out, "rest") if self.returns == "named" else out


class Host(nn.Module):
    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.second = Keyed(returns)
        self.last = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.second(self.first(inputs), scale=2.0)
        logits: Tensor = self.last(out if isinstance(out, Tensor) else out[0])
        return logits


def alive(channels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, channels), nn.Tanh())


def make(returns: str = "tensor", *places: str) -> tuple[Host, SeedBank, list[Seed]]:
    torch.manual_seed(0)
    model = Host(returns).eval()
    bank = SeedBank(model, {"alive": alive})
    seeds = [bank.attach(place) for place in places or ("second",)]
    model(INPUTS)
    return model, bank, seeds


def grow(bank: SeedBank, seed: Seed, mixing: Mixing | None = None, alpha: float = 1.0) -> None:
    seed.germinate("alive", bank.build(seed, "alive"), 1e-2, epoch=1)
    seed.start_blending(Schedule(), mixing or Mixing())
    seed.slot.alpha = alpha
    seed.enter(FOSSILIZED)


def outputs(model: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return model(INPUTS)


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: str(mixing.mode))
@pytest.mark.parametrize("returns", ["tensor", "tuple", "named"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_baked_network_gives_the_same_outputs_bit_for_bit(
    mixing: Mixing, returns: str, alpha: float
) -> None:
    model, bank, seeds = make(returns)
    grow(bank, seeds[0], mixing, alpha)
    baked = bank.bake()
    assert torch.equal(outputs(baked), outputs(model))
    assert all(not type(module).__module__.startswith("tamiyo_svc") for module in baked.modules())
    assert isinstance(baked.get_submodule("second"), Keyed)


def test_only_what_joined_is_baked_in_and_the_original_grows_on() -> None:
    model, bank, seeds = make("tensor", "first", "second", "last")
    keys = list(bank.bake().state_dict())
    assert keys == list(Host().state_dict())
    grow(bank, seeds[0])
    seeds[1].germinate("alive", bank.build(seeds[1], "alive"), 1e-2, epoch=1)
    seeds[1].enter(TRAINING)
    baked = bank.bake()
    expected = outputs(model)
    assert torch.equal(outputs(baked), expected)
    grown = [key for key in baked.state_dict() if key not in keys]
    assert set(baked.state_dict()) == {*keys, *grown}
    assert all(key.startswith("first.2.grown.seed.") for key in grown)
    seeds[0].slot.alpha = 0.0
    assert torch.equal(outputs(baked), expected)
    assert not torch.equal(outputs(model), expected)


def test_places_within_places_are_baked() -> None:
    model, bank, seeds = make("tensor", "", "first", "first.0", "first")
    for seed in seeds:
        grow(bank, seed)
    assert torch.equal(outputs(bank.bake()), outputs(model))


LOADER = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tamiyo_svc":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Wall())
import torch
inputs, expected = torch.load(sys.argv[2])
network = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(network(inputs), expected)
network.load_state_dict(torch.load(sys.argv[3], weights_only=True))
assert torch.equal(network(inputs), expected)
assert torch.equal(torch.export.load(sys.argv[4]).module()(inputs), expected)
assert "tamiyo_svc" not in sys.modules
"""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_process_without_tamiyo_loads_what_was_baked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Sequential(nn.Linear(12, 12), nn.ReLU()))
    bank = SeedBank(model)
    seed = bank.attach("1")
    model(INPUTS)
    seed.germinate(
        "seed-residual-mlp", bank.build(seed, "seed-residual-mlp"), learning_rate=1e-2, epoch=1
    )
    for parameter in seed.parameters:
        nn.init.normal_(parameter)
    seed.slot.alpha = 1.0
    baked = bank.bake().eval()
    files = [tmp_path / name for name in ("network", "values", "weights", "program.pt2")]
    torch.save(baked, files[0])
    torch.save((INPUTS, outputs(model)), files[1])
    torch.save(baked.state_dict(), files[2])
    torch.export.save(torch.export.export(baked, (INPUTS,)), files[3])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("baking", [False, True])
def test_onnx_gives_the_networks_outputs(baking: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, bank, seeds = make()
    grow(bank, seeds[0], alpha=0.7)
    file = tmp_path / "network.onnx"
    torch.onnx.export(
        bank.bake() if baking else model, (INPUTS,), str(file), dynamo=True, verbose=False
    )
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    (found,) = session.run(None, {name: INPUTS.numpy()})
    assert torch.allclose(torch.from_numpy(found), outputs(model), atol=1e-5)


def test_a_copy_is_a_snapshot_with_seeds_of_its_own() -> None:
    model, bank, seeds = make()
    grow(bank, seeds[0], alpha=0.5)
    for way in ("copied", "pickled"):
        twin = copy.deepcopy(model) if way == "copied" else pickle.loads(pickle.dumps(model))
        expected = outputs(model)
        assert torch.equal(outputs(twin), expected)
        with torch.no_grad():
            for parameter in seeds[0].parameters:
                parameter.add_(1.0)
        seeds[0].slot.alpha += 0.2
        assert torch.equal(outputs(twin), expected)
        assert not torch.equal(outputs(model), expected)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(outputs(twin), outputs(model))


def test_a_state_dict_brings_a_seed_to_a_network_with_its_place_and_a_bank() -> None:
    model, bank, seeds = make()
    grow(bank, seeds[0], MIXINGS[3], alpha=0.4)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other, other_bank, (seed,) = make()
    grow(other_bank, seed)
    fresh, fresh_bank, _ = make()
    for resumed in (fresh, other):
        buffer.seek(0)
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(outputs(resumed), outputs(model))
    assert (seed.stage_name, seed.slot.alpha) == ("FOSSILIZED", 0.4)
    assert fresh_bank.seeds[0].stage_name == "FOSSILIZED"


def test_what_a_state_dict_holds_and_a_network_cannot_take_is_refused_in_words() -> None:
    model, bank, seeds = make()
    grow(bank, seeds[0])
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*second\.tamiyo"):
        Host().load_state_dict(state)
    resumed, other, _ = make()
    other.blueprints.clear()
    with pytest.raises(RuntimeError, match="cannot be restored: 'alive'"):
        resumed.load_state_dict(state)
    state["second.tamiyo.about"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"the seed at second\.tamiyo cannot be restored"):
        resumed.load_state_dict(state)


def test_weights_from_before_a_seed_give_the_network_from_before_it_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, bank, seeds = make()
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    grow(bank, seeds[0])
    assert not torch.equal(outputs(model), before)
    model.load_state_dict(state)
    assert torch.equal(outputs(model), before)
    assert (seeds[0].stage_name, "seed alive is taken out" in caplog.text) == ("DORMANT", True)
    grow(bank, seeds[0])
    model.load_state_dict({"last.weight": state["last.weight"]}, strict=False)
    assert seeds[0].stage_name == "FOSSILIZED"


def test_an_average_made_before_or_after_a_seed_grew_takes_it_in_when_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, bank, (seed,) = make()
    early = AveragedModel(model, avg_fn=lambda old, new, count: new)
    grow(bank, seed, alpha=0.5)
    late = AveragedModel(model, avg_fn=lambda old, new, count: new)
    seed.slot.alpha = 1.0
    with torch.no_grad():
        for parameter in (*model.parameters(), *seed.parameters):
            parameter.add_(0.1)
    for averaged in (early, late):
        averaged.update_parameters(model)
        caplog.clear()
        for _ in range(2):
            assert not torch.allclose(outputs(averaged), outputs(model))
        assert caplog.text.count("call bank.average") == 1
        bank.average(averaged, weight=1.0)
        assert torch.equal(outputs(averaged), outputs(model))


def test_seeds_are_averaged_with_their_weight() -> None:
    model, bank, (seed,) = make()
    grow(bank, seed, alpha=0.5)
    averaged = AveragedModel(model)
    first = torch.cat([p.detach().flatten() for p in seed.parameters])
    with torch.no_grad():
        for parameter in seed.parameters:
            parameter.add_(1.0)
    seed.slot.alpha = 1.0
    bank.average(averaged, weight=0.25)
    (slot,) = (module for module in averaged.modules() if isinstance(module, Slot))
    module = slot.seed
    assert module is not None
    found = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert torch.allclose(found, first + 0.25)
    assert slot.alpha == pytest.approx(0.625)


def test_a_copy_that_stays_as_it_is_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, bank, seeds = make()
    teacher = copy.deepcopy(model)
    grow(bank, seeds[0])
    outputs(teacher)
    assert not caplog.text


def test_a_run_with_its_network_crosses_to_another_process() -> None:
    model, bank, seeds = make()
    grow(bank, seeds[0], alpha=0.5)
    twin = pickle.loads(pickle.dumps(SeedBankHolder(model, bank)))
    assert torch.equal(outputs(twin.model), outputs(model))
    twin.bank.seeds[0].slot.alpha = 0.0
    assert not torch.equal(outputs(twin.model), outputs(model))
    twin.model.double()
    assert {p.dtype for p in twin.bank.seeds[0].parameters} == {torch.float64}
    twin.bank.detach()
    assert not twin.model.second._forward_hooks


class SeedBankHolder:
    """What a callback holds."""

    def __init__(self, model: nn.Module, bank: SeedBank) -> None:
        self.model = model
        self.bank = bank
