from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import random_graph, random_network

from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.policy.compiled import CompiledNetwork, Library
from tamiyo_svc.policy.folding import fold_weights
from tamiyo_svc.policy.network import NetworkConfig, TamiyoNetwork
from tamiyo_svc.taxonomy import WeightDtype

_SMALL = NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4, attention_heads=2)
_counts = st.tuples(
    st.just(1), *(st.integers(0, 9) for _ in range(2)), *(st.integers(1, 7) for _ in range(3))
)
_configs = st.builds(
    NetworkConfig,
    # Panels that are full, ragged, and wider than one.
    sage_hidden_dim=st.sampled_from([1, 4, 16, 24, 72]),
    gat_hidden_dim=st.sampled_from([1, 4, 24, 72]),
    attention_heads=st.integers(1, 4),
    policy_classes=st.sampled_from([5, 32]),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    try:
        return load_compiled(tmp_path_factory.mktemp("compiled"))
    except CompiledFormUnavailableError as error:
        pytest.skip(str(error))


def assert_equal(
    library: Library, network: TamiyoNetwork, graphs: list[Graph], tolerance: float = 1e-5
) -> None:
    compiled = CompiledNetwork(library, fold_weights(network)).evaluate(graphs)
    with torch.inference_mode():
        for graph, outputs in zip(graphs, compiled, strict=True):
            expected = network(graph.x, graph.edge_index, graph.edge_attr)
            for head, values in outputs.items():
                assert values == pytest.approx(expected[head].flatten().tolist(), abs=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    config=_configs,
    shapes=st.lists(st.tuples(_counts, st.sampled_from([0.0, 0.3, 1.0])), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_the_compiled_form_is_the_network(
    library: Library,
    config: NetworkConfig,
    shapes: list[tuple[tuple[int, ...], float]],
    seed: int,
) -> None:
    graphs = [random_graph(counts, d, seed + place) for place, (counts, d) in enumerate(shapes)]

    assert_equal(library, random_network(config, seed), graphs)


def test_the_compiled_form_is_the_network_at_full_size(library: Library) -> None:
    graphs = [random_graph((1, 4, 8, 5, 2, 3), 0.7, 1), random_graph((1, 0, 0, 1, 1, 1), 1.0, 2)]

    assert_equal(library, random_network(NetworkConfig(), 3), graphs)


def test_more_nodes_than_are_gathered_at_once_change_nothing(library: Library) -> None:
    assert_equal(library, random_network(_SMALL, 1), [random_graph((1, 150, 9, 70, 3, 4), 0.1, 5)])


def test_strong_attention_does_not_overflow(library: Library) -> None:
    network = random_network(_SMALL, 1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("att_src"):
                weight.mul_(1e3)

    assert_equal(library, network, [random_graph((1, 4, 2, 4, 2, 2), 1.0, 3)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_comes_out_as_none(library: Library, bad: float) -> None:
    network = random_network(_SMALL, 1)
    compiled = CompiledNetwork(library, fold_weights(network))
    graph = random_graph((1, 2, 2, 2, 2, 2), 1.0, 3)
    graph.features[0, 0] = bad

    (outputs,) = compiled.evaluate([graph])

    assert not np.isfinite(outputs["policy_logits"]).any()
    assert not np.isfinite(outputs["policy_params"]).any()


def test_float16_weights_err_by_their_rounding(library: Library) -> None:
    network = random_network(NetworkConfig(), 3)
    graph = random_graph((1, 4, 8, 5, 2, 3), 0.7, 1)
    weights = fold_weights(network)

    exact, rounded = (
        CompiledNetwork(library, weights, dtype) for dtype in (WeightDtype.FP32, WeightDtype.FP16)
    )

    assert rounded.weight_bytes * 2 == exact.weight_bytes
    for head, values in exact.evaluate([graph])[0].items():
        other = rounded.evaluate([graph])[0][head]
        assert other == pytest.approx(values, abs=0.0025)
    assert rounded.evaluate([graph]) != exact.evaluate([graph])


@settings(max_examples=20, deadline=None)
@given(config=_configs, seed=st.integers(0, 2**31), exponent=st.integers(-8, 8))
def test_float16_weights_are_read_as_they_were_rounded(
    library: Library, config: NetworkConfig, seed: int, exponent: int
) -> None:
    weights = fold_weights(random_network(config, seed))
    wide = [*weights.sage, *(layer.projections for layer in weights.gat)]
    for affine in (affine for layer in wide for affine in layer.values()):
        # Down to where float16 loses digits, and signs of both kinds.
        affine.weight.mul_(10.0 ** (exponent / 2)).copy_(affine.weight.half().float())
    graph = random_graph((1, 4, 3, 5, 2, 3), 0.7, seed)

    rounded = CompiledNetwork(library, weights, WeightDtype.FP16).evaluate([graph])
    exact = CompiledNetwork(library, weights, WeightDtype.FP32).evaluate([graph])

    assert rounded == exact


def test_a_matrix_beyond_the_range_of_float16_stays_as_it_is(library: Library) -> None:
    weights = fold_weights(random_network(_SMALL, 1))
    with torch.no_grad():
        weights.sage[1]["seed"].weight[0, 0] = 1e5
    graph = random_graph((1, 2, 2, 2, 2, 2), 1.0, 3)

    half = CompiledNetwork(library, weights, WeightDtype.FP16)
    full = CompiledNetwork(library, weights, WeightDtype.FP32)

    assert full.weight_bytes / 2 < half.weight_bytes < full.weight_bytes
    assert np.isfinite(half.evaluate([graph])[0]["policy_logits"]).all()


def test_later_changes_to_the_network_do_not_reach_the_compiled_form(library: Library) -> None:
    network = random_network(_SMALL, 1)
    compiled = CompiledNetwork(library, fold_weights(network))
    graph = random_graph((1, 2, 2, 2, 2, 2), 1.0, 1)

    before = compiled.evaluate([graph])
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()

    assert compiled.evaluate([graph]) == before


def test_touching_every_part_of_the_weights_changes_nothing(library: Library) -> None:
    compiled = CompiledNetwork(library, fold_weights(random_network(_SMALL, 1)))
    graph = random_graph((1, 2, 2, 2, 2, 2), 1.0, 1)
    before = compiled.evaluate([graph])

    for part in range(7):
        compiled.touch(part, 7)

    assert compiled.evaluate([graph]) == before


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compiled.so"
    path.write_bytes(b"not a library")

    with pytest.raises(OSError, match=r"compiled\.so"):
        Library(path)
