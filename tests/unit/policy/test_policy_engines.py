"""Falling from one form to the next, with forms that stand in for devices nobody has here."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import random_graph, random_network

from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.policy.compiled import CompiledNetwork, PackedWeights, pack
from tamiyo_svc.policy.engines import EAGER_CPU, Engines, EngineStatus, Form
from tamiyo_svc.policy.folded import FoldedNetwork, fold
from tamiyo_svc.policy.folding import Outputs, fold_weights
from tamiyo_svc.policy.network import KeptNetwork, NetworkConfig, TamiyoNetwork
from tamiyo_svc.taxonomy import WeightDtype

_CONFIG = NetworkConfig(sage_hidden_dim=4, gat_hidden_dim=2, attention_heads=1)
_NETWORK = random_network(_CONFIG, 1)
_POLICIES = [random_network(_CONFIG, 1) for _ in range(12)]
_GRAPH = random_graph((1, 1, 1, 1, 1, 1), 1.0, 1)


@dataclass
class FakeBackend:
    """A form that fails when it is told to, at building or while it runs."""

    name: str
    is_compiled: bool = False
    fails_to_build: bool = False
    fails_to_run: bool = False
    wrong: Callable[[float], float] = lambda value: value
    runs: int = 0
    touched: list[tuple[int, int]] = field(default_factory=list)

    @property
    def form(self) -> Form:
        return Form(self.name, self.is_compiled, self.build)

    def build(self, network: TamiyoNetwork) -> FakeEngine:
        if self.fails_to_build:
            raise RuntimeError(f"{self.name} does not build\nbecause of this and that")
        return FakeEngine(self, fold(network))


@dataclass
class FakeEngine:
    backend: FakeBackend
    folded: FoldedNetwork

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        if self.backend.fails_to_run:
            raise RuntimeError(f"{self.backend.name} does not run")
        self.backend.runs += 1
        return [
            {head: [self.backend.wrong(value) for value in values] for head, values in one.items()}
            for one in self.folded.evaluate(graphs)
        ]

    def touch(self, part: int, parts: int) -> None:
        self.backend.touched.append((part, parts))


def chain(*backends: FakeBackend) -> tuple[Engines, list[EngineStatus]]:
    heard: list[EngineStatus] = []
    return Engines([backend.form for backend in backends], heard.append), heard


def ticking() -> Callable[[], float]:
    seconds = iter(range(1000))
    return lambda: next(seconds) / 10


def test_the_first_form_serves_while_it_works() -> None:
    compiled, eager = FakeBackend("cuda", is_compiled=True), FakeBackend("cuda")
    engines, heard = chain(compiled, eager)

    engines.evaluate(_NETWORK, [_GRAPH])

    assert (compiled.runs, eager.runs) == (1, 0)
    assert engines.status == EngineStatus("cuda", is_compiled=True)
    assert heard == []


def test_a_compiled_form_is_warmed_up_once_and_timed() -> None:
    compiled, eager = FakeBackend("cuda", is_compiled=True), FakeBackend("cuda")
    engines, heard = chain(compiled, eager)

    engines.warm_up(_NETWORK, [[_GRAPH]], ticking())

    assert compiled.runs == 1
    assert [status.warm_ms for status in heard] == [pytest.approx(100.0)]


def test_an_eager_form_has_no_compile_warm_up_time() -> None:
    engines, heard = chain(FakeBackend("cuda"))

    engines.warm_up(_NETWORK, [[_GRAPH]], ticking())

    assert heard == []
    assert engines.status.warm_ms is None


def test_a_failure_at_start_falls_to_the_same_device_then_to_the_cpu() -> None:
    compiled = FakeBackend("cuda", is_compiled=True, fails_to_build=True)
    eager, cpu = FakeBackend("cuda", fails_to_run=True), FakeBackend("cpu")
    engines, heard = chain(compiled, eager, cpu)

    engines.warm_up(_NETWORK, [[_GRAPH]], ticking())

    assert [(status.device, status.is_compiled, status.fallbacks) for status in heard] == [
        ("cuda", False, 1),
        ("cpu", False, 2),
    ]
    assert heard[0].reason == "RuntimeError: cuda does not build"


def test_a_failure_at_run_time_is_answered_by_the_next_form_and_counted() -> None:
    compiled, eager = FakeBackend("cuda", is_compiled=True), FakeBackend("cuda")
    engines, heard = chain(compiled, eager)
    engines.warm_up(_NETWORK, [[_GRAPH]], ticking())
    compiled.fails_to_run = True

    outputs = engines.evaluate(_NETWORK, [_GRAPH])
    compiled.fails_to_run = False
    engines.evaluate(_NETWORK, [_GRAPH])

    assert outputs == fold(_NETWORK).evaluate([_GRAPH])
    assert eager.runs == 2
    assert heard[-1] == EngineStatus(
        "cuda",
        is_compiled=False,
        warm_ms=heard[0].warm_ms,
        fallbacks=1,
        reason="RuntimeError: cuda does not run",
    )


def test_graphs_that_no_form_can_answer_cost_no_form() -> None:
    first, last = FakeBackend("cuda", fails_to_run=True), FakeBackend("cpu", fails_to_run=True)
    engines, heard = chain(first, last)

    with pytest.raises(RuntimeError, match="cpu does not run"):
        engines.evaluate(_NETWORK, [_GRAPH])
    first.fails_to_run = False
    engines.evaluate(_NETWORK, [_GRAPH])

    assert heard == []
    assert first.runs == 1


@pytest.mark.parametrize("wrong", [lambda value: value + 1.0, lambda value: math.nan])
def test_a_form_that_disagrees_with_the_folded_network_is_given_up(
    wrong: Callable[[float], float],
) -> None:
    engines, heard = chain(FakeBackend("cpu", is_compiled=True, wrong=wrong), FakeBackend("cpu"))

    engines.warm_up(_NETWORK, [[_GRAPH]], ticking())

    assert [status.is_compiled for status in heard] == [False]
    assert "the folded network gives" in heard[0].reason


def test_a_form_given_up_is_given_up_for_later_policies_too() -> None:
    compiled = FakeBackend("cuda", is_compiled=True, fails_to_build=True)
    eager = FakeBackend("cuda")
    engines, heard = chain(compiled, eager)
    engines.evaluate(_NETWORK, [_GRAPH])
    compiled.fails_to_build = False

    engines.warm_up(random_network(_CONFIG, 2), [[_GRAPH]], ticking())

    assert len(heard) == 1
    assert compiled.runs == 0


def test_an_engine_goes_with_its_policy() -> None:
    for engines in (chain(FakeBackend("cpu"))[0], Engines([EAGER_CPU])):
        network = random_network(_CONFIG, 1)
        engine = weakref.ref(engines.engine(network))
        assert engine() is engines.engine(network)

        del network
        gc.collect()

        assert engine() is None


def test_only_the_engine_that_serves_is_kept() -> None:
    def folded_networks() -> int:
        gc.collect()
        return sum(type(found) is FoldedNetwork for found in gc.get_objects())

    engines, _ = chain(FakeBackend("cuda", is_compiled=True), FakeBackend("cpu"))
    before = folded_networks()

    engines.warm_up(_NETWORK, [[_GRAPH]], ticking())

    assert folded_networks() == before + 1


def test_touching_reaches_a_form_that_can_and_spares_one_that_cannot() -> None:
    backend = FakeBackend("cpu")
    engines, _ = chain(backend)

    engines.touch(_NETWORK, 3, 16)
    Engines([EAGER_CPU]).touch(_NETWORK, 3, 16)

    assert backend.touched == [(3, 16)]


def test_no_form_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no form"):
        Engines([])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("br-"), st.sampled_from("br-")), max_size=12))
def test_whatever_fails_the_last_form_answers_and_every_fall_is_counted_once(
    faults: list[tuple[str, str]],
) -> None:
    first, second, last = (
        FakeBackend("cuda", is_compiled=True),
        FakeBackend("cuda"),
        FakeBackend("cpu"),
    )
    engines, heard = chain(first, second, last)
    level = 0
    for fault, network in zip(faults, _POLICIES, strict=False):
        for backend, kind in zip((first, second), fault, strict=True):
            backend.fails_to_build, backend.fails_to_run = kind == "b", kind == "r"

        outputs = engines.evaluate(network, [_GRAPH])

        while level < 2 and fault[level] != "-":
            level += 1
        assert outputs == fold(_NETWORK).evaluate([_GRAPH])
        assert engines.status.fallbacks == level
        assert engines.status.is_compiled == (level == 0)
        assert engines.status.device == ("cuda", "cuda", "cpu")[level]
    assert [status.fallbacks for status in heard] == sorted({s.fallbacks for s in heard})


def test_weights_that_came_packed_and_checked_need_no_building(
    packed_form: tuple[Form, PackedWeights],
) -> None:
    form, packed = packed_form
    engines = Engines([form, EAGER_CPU])
    network = random_network(_CONFIG, 1)

    assert engines.adopt(network, packed)
    packed.release()
    engines.warm_up(network, [[_GRAPH]], ticking())
    (outputs,) = engines.evaluate(network, [_GRAPH])

    # Building it otherwise fails.
    assert engines.status.fallbacks == 0
    (expected,) = fold(network).evaluate([_GRAPH])
    for head, values in expected.items():
        assert outputs[head] == pytest.approx(values, abs=1e-5)


def test_a_form_that_takes_no_packed_weights_builds_its_own(
    packed_form: tuple[Form, PackedWeights],
) -> None:
    engines = Engines([EAGER_CPU])

    assert not engines.adopt(_NETWORK, packed_form[1])

    assert engines.library is None
    assert isinstance(engines.engine(_NETWORK), FoldedNetwork)


def test_a_network_that_came_packed_is_loaded_once_when_its_form_fails(
    packed_form: tuple[Form, PackedWeights],
) -> None:
    form, packed = packed_form
    loads: list[TamiyoNetwork] = []

    def load() -> TamiyoNetwork:
        loads.append(random_network(_CONFIG, 1))
        return loads[-1]

    fast = FakeBackend("fast")
    engines = Engines(
        [replace(form, build_packed=lambda _: FakeEngine(fast, fold(_NETWORK))), EAGER_CPU]
    )
    kept = KeptNetwork(load)
    assert engines.adopt(kept, packed)
    engines.warm_up(kept, [[_GRAPH]], ticking())
    engines.evaluate(kept, [_GRAPH])
    assert loads == []

    fast.fails_to_run = True
    (outputs,) = engines.evaluate(kept, [_GRAPH])
    engines.evaluate(kept, [_GRAPH])

    assert engines.status.fallbacks == len(loads) == 1
    (expected,) = fold(random_network(_CONFIG, 1)).evaluate([_GRAPH])
    assert outputs == expected
    kept.release()
    assert kept.loaded is None


@pytest.fixture
def packed_form(tmp_path: Path) -> tuple[Form, PackedWeights]:
    try:
        library = load_compiled(tmp_path)
    except CompiledFormUnavailableError as error:
        pytest.skip(str(error))

    def build(network: TamiyoNetwork) -> FakeEngine:
        raise RuntimeError("not to be built")

    form = Form("cpu", True, build, lambda packed: CompiledNetwork(library, packed), library)
    weights = fold_weights(random_network(_CONFIG, 1))
    return form, pack(weights, library.panel, WeightDtype.FP32)
