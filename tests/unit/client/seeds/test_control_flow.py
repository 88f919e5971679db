"""What torch raises and inserts to recompute, trace and compile passes through a slot."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tamiyo_svc.client.seeds import Mixing, Schedule, SeedBank
from tamiyo_svc.client.seeds.lifecycle import TRAINING, Seed
from tamiyo_svc.taxonomy import BlendMode

INPUTS = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 4


def dropping(channels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.5), nn.Tanh())


class Failing(nn.Linear):
    """Fails half way on anything but zeros, on which it is tried."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        out = super().forward(features).square()
        if features.any():
            raise RuntimeError("broken")
        return out


class Model(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.2), nn.ReLU())
        self.last = nn.Linear(16, 4)
        self.reentrant = reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.first(inputs)
        if self.reentrant is None:
            features = self.block(features)
        else:
            features = checkpoint(self.block, features, use_reentrant=self.reentrant)
        logits: Tensor = self.last(features)
        return logits


def make(
    reentrant: bool | None, place: str, build: Callable[[int], nn.Module] = dropping
) -> tuple[Model, SeedBank, Seed]:
    torch.manual_seed(0)
    model = Model(reentrant)
    bank = SeedBank(model, {"it": build})
    seed = bank.attach(place)
    with torch.random.fork_rng(devices=[]):
        model(INPUTS)
    seed.germinate("it", bank.build(seed, "it"), 1e-2, epoch=1)
    return model, bank, seed


def gradients(model: Model, seed: Seed) -> list[Tensor]:
    torch.manual_seed(3)
    functional.cross_entropy(model(INPUTS), LABELS).backward()  # type: ignore[no-untyped-call]
    parameters = (*model.parameters(), *seed.parameters)
    return [torch.zeros(1) if p.grad is None else p.grad for p in parameters]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("place", ["block", "block.0", "block.1"])
def test_recomputation_gives_joined_seeds_and_host_the_same_gradients(
    place: str, reentrant: bool
) -> None:
    results = []
    for how in (None, reentrant):
        model, _, seed = make(how, place)
        seed.start_blending(Schedule(first_alpha=0.5), Mixing(BlendMode.CONFIDENCE))
        results.append(gradients(model, seed))
        assert getattr(seed.slot, "failure", None) is None
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(expected, found, atol=1e-6)


@pytest.mark.parametrize("place", ["block", "block.0"])
def test_isolated_training_through_recomputed_blocks_moves_the_seed(place: str) -> None:
    model, bank, seed = make(False, place)
    seed.enter(TRAINING)
    bank.train_isolated(lambda: functional.cross_entropy(model(INPUTS), LABELS))
    assert (seed.stage_name, seed.moved) == ("TRAINING", True)


def test_reentrant_recomputation_gives_an_isolated_seed_nothing_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, bank, seed = make(True, "block.0")
    seed.enter(TRAINING)
    for _ in range(3):
        bank.train_isolated(lambda: functional.cross_entropy(model(INPUTS), LABELS))
    assert (seed.stage_name, seed.moved, str(seed.idle)) == ("TRAINING", False, "no_gradient")
    assert caplog.text.count("gave no gradient") == 1
    assert "use_reentrant=False" in caplog.text
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("place", ["block", "block.0"])
def test_a_seed_that_fails_in_a_recomputed_block_does_not_end_the_backward_pass(
    place: str,
) -> None:
    model, bank, seed = make(False, place, Failing)
    seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    gradients(model, seed)
    bank.step(1.0)
    assert seed.stage_name == "CULLED"


class Stop(Exception):  # noqa: N818
    """What somebody's own hook raises."""


def test_what_others_saved_tensor_hooks_raise_is_not_the_seeds_failure() -> None:
    model, _, seed = make(None, "block")
    seed.start_blending(Schedule(first_alpha=0.5), Mixing())
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        if len(packed) > 2:
            raise Stop
        return tensor

    with (
        pytest.raises(Stop),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(INPUTS)
    assert getattr(seed.slot, "failure", None) is None


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_network_grows_without_breaking_its_graph() -> None:
    with fresh_compiler():
        model, bank, seed = make(None, "block")
        model.eval()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(INPUTS), model(INPUTS))
        seed.start_blending(Schedule(first_alpha=0.3, total_steps=5), Mixing())
        for _ in range(6):
            found, expected = compiled(INPUTS), model(INPUTS)
            assert torch.allclose(found, expected, atol=1e-6)
            functional.cross_entropy(found, LABELS).backward()  # type: ignore[no-untyped-call]
            assert all(p.grad is not None for p in seed.parameters)
            bank.step(1.0)
            bank.advance(blend=True)
        assert seed.slot.alpha == 1.0


def test_a_place_is_known_when_its_network_has_run_compiled_only() -> None:
    with fresh_compiler():
        torch.manual_seed(0)
        model = Model(None)
        bank = SeedBank(model, {"it": dropping})
        seed = bank.attach("block")
        torch.compile(model, backend="aot_eager")(INPUTS)
        assert seed.slot.channels == 16
        assert bank.build(seed, "it") is not None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, features: Tensor) -> Tensor:
        return features + torch.relu(self.inner(features))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("place", ["0.inner", "1.inner", "2"])
def test_blocks_compiled_on_their_own_grow_like_the_network_that_is_not(place: str) -> None:
    with fresh_compiler():
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block(), Block())
        bank = SeedBank(model, {"it": lambda channels: nn.Linear(channels, channels)})
        seed = bank.attach(place)
        twin = copy.deepcopy(model)
        for block in model:
            block.compile(backend="aot_eager")
        assert torch.allclose(model(INPUTS), twin(INPUTS), atol=1e-6)
        without = model(INPUTS)
        seed.germinate("it", bank.build(seed, "it"), learning_rate=1e-3, epoch=1)
        for alpha in (0.5, 1.0):
            seed.slot.alpha = alpha
            bank.average(twin, 1.0)
            assert torch.allclose(model(INPUTS), twin(INPUTS), atol=1e-6)
            assert not torch.allclose(model(INPUTS), without)
        seed.slot.alpha = 0.0
        assert torch.allclose(model(INPUTS), without)


WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "export": lambda model: torch.export.export(model, (INPUTS,), strict=False).module(),
    "trace": lambda model: torch.jit.trace(model, (INPUTS,)),  # type: ignore[no-untyped-call]
    "fx": fx.symbolic_trace,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_traced_or_exported_network_gives_the_same_outputs(way: str, alpha: float) -> None:
    model, _, seed = make(None, "block.0")
    model.eval()
    seed.slot.alpha = alpha
    made = WAYS[way](model)
    assert torch.allclose(made(INPUTS), model(INPUTS), atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_refused_in_words() -> None:
    model, _, _ = make(None, "block.0")
    with pytest.raises(Exception, match="seeds"):
        torch.jit.script(model.block)
