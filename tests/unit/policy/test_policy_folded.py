from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import random_graph, random_network

from tamiyo_svc.graph.coverage import EMPTY_COVERAGE
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.policy import layout
from tamiyo_svc.policy.folded import FoldedNetwork, fold
from tamiyo_svc.policy.folding import fold_weights
from tamiyo_svc.policy.layout import padded
from tamiyo_svc.policy.network import NetworkConfig, TamiyoNetwork

_counts = st.tuples(
    st.just(1), *(st.integers(0, 6) for _ in range(2)), *(st.integers(1, 7) for _ in range(3))
)
_configs = st.builds(
    NetworkConfig,
    sage_hidden_dim=st.sampled_from([4, 8, 12]),
    gat_hidden_dim=st.sampled_from([1, 4, 8]),
    attention_heads=st.integers(1, 4),
    policy_classes=st.sampled_from([5, 32]),
)


def _assert_equal(network: TamiyoNetwork, graphs: list[Graph]) -> None:
    with torch.inference_mode():
        folded = fold(network).evaluate(graphs)
        for graph, outputs in zip(graphs, folded, strict=True):
            expected = network(graph.x, graph.edge_index, graph.edge_attr)
            for head, values in outputs.items():
                assert values == pytest.approx(expected[head].flatten().tolist(), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    _configs,
    st.lists(st.tuples(_counts, st.sampled_from([0.0, 0.3, 1.0])), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
def test_folding_changes_nothing(
    config: NetworkConfig, shapes: list[tuple[tuple[int, ...], float]], seed: int
) -> None:
    graphs = [
        random_graph(counts, density, seed + place)
        for place, (counts, density) in enumerate(shapes)
    ]

    _assert_equal(random_network(config, seed), graphs)


def test_folding_changes_nothing_at_full_size() -> None:
    graphs = [random_graph((1, 4, 8, 5, 2, 3), 0.7, 1), random_graph((1, 0, 0, 1, 1, 1), 1.0, 2)]

    _assert_equal(random_network(NetworkConfig(), 3), graphs)


def test_strong_attention_does_not_overflow() -> None:
    network = random_network(NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4), 1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("att_src"):
                weight.mul_(1e3)

    _assert_equal(network, [random_graph((1, 4, 2, 4, 2, 2), 1.0, 3)])


def test_later_changes_to_the_network_do_not_reach_the_folded_form() -> None:
    network = random_network(NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4), 1)
    folded = fold(network)
    graph = random_graph((1, 2, 2, 2, 2, 2), 1.0, 1)

    with torch.inference_mode():
        before = folded.evaluate([graph])
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    with torch.inference_mode():
        assert folded.evaluate([graph]) == before


def test_a_topology_seen_before_gives_the_values_of_the_present_graph() -> None:
    network = random_network(NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4), 1)
    folded = fold(network)
    first, other = (random_graph((1, 3, 1, 2, 2, 2), 1.0, seed) for seed in (1, 2))
    second = Graph(
        first.topology,
        other.features,
        first.attributes + 1.0,
        *(EMPTY_COVERAGE, (), (), (), ()),
        truncated={},
        skipped=0,
    )

    with torch.inference_mode():
        folded.evaluate([first])
        cached, fresh = folded.evaluate([second]), fold(network).evaluate([second])

    assert cached == fresh


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (1, 4), (4, 4), (5, 8), (64, 64), (65, 128)])
def test_projections_see_few_different_heights(count: int, rows: int) -> None:
    assert padded(count) == rows


def test_mixed_precision_errs_by_bfloat16_and_no_more() -> None:
    network = random_network(NetworkConfig(), 3)
    graph = random_graph((1, 4, 8, 5, 2, 3), 0.7, 1)
    mixed = FoldedNetwork(fold_weights(network), is_mixed=True)

    with torch.inference_mode():
        exact, rounded = fold(network).evaluate([graph])[0], mixed.evaluate([graph])[0]

    for head, values in exact.items():
        assert rounded[head] == pytest.approx(values, abs=0.05)
    assert rounded != exact


def test_graphs_too_uneven_to_be_padded_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_PADDED", 0)
    network = random_network(NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4), 1)

    _assert_equal(network, [random_graph((1, 4, 2, 6, 2, 2), density, 3) for density in (0.0, 0.7)])
