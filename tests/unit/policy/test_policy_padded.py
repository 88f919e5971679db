from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import random_graph, random_network
from support.recording import ReplayingDevice
from torch._dynamo.testing import CompileCounter

from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.policy.cuda import compiled
from tamiyo_svc.policy.folded import FoldedNetwork, fold
from tamiyo_svc.policy.folding import Outputs, fold_weights
from tamiyo_svc.policy.layout import Bucket
from tamiyo_svc.policy.network import NetworkConfig
from tamiyo_svc.policy.padded import BUCKETS, Forward, PaddedNetwork

_NETWORK = random_network(NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4), 1)
_FOLDED = fold(_NETWORK)
_GRAPHS = [random_graph((1, seeds, 1, 4, 2, 2), 0.5, seeds) for seeds in (0, 1, 4, 8)]


def clock(direct_s: float, recorded_s: float) -> Callable[[], float]:
    """What passes between two readings is by turns a direct and a recorded run."""
    steps = itertools.cycle([0.0, direct_s, 0.0, recorded_s])
    times = itertools.accumulate(steps)
    return lambda: next(times)


FASTER, SLOWER = partial(clock, 2.0, 1.0), partial(clock, 1.0, 2.0)


class Counted:
    """A forward pass that counts how often its Python runs."""

    def __init__(self, forward: Forward) -> None:
        self.forward, self.runs = forward, 0

    def __call__(self, *inputs: object) -> object:
        self.runs += 1
        return self.forward(*inputs)  # type: ignore[arg-type]


def padded(
    device: ReplayingDevice | None = None, times: Callable[[], float] | None = None
) -> tuple[PaddedNetwork, Counted]:
    counted: list[Counted] = []

    def count(forward: Forward) -> Forward:
        counted.append(Counted(forward))
        return counted[0]  # type: ignore[return-value]

    network = PaddedNetwork(
        _FOLDED, device or ReplayingDevice(), times or FASTER(), compile_forward=count
    )
    counted[0].runs = 0
    return network, counted[0]


def evaluated(network: PaddedNetwork | FoldedNetwork, graphs: list[Graph]) -> list[Outputs]:
    with torch.inference_mode():
        return network.evaluate(graphs)


def assert_same(mine: list[Outputs], expected: list[Outputs]) -> None:
    for outputs, others in zip(mine, expected, strict=True):
        assert outputs.keys() == others.keys()
        for head, values in outputs.items():
            assert values == pytest.approx(others[head], abs=1e-5)


@pytest.fixture(scope="module")
def replayed() -> PaddedNetwork:
    return padded()[0]


_counts = st.tuples(
    st.just(1), st.integers(0, 12), st.integers(0, 6), *(st.integers(1, 20) for _ in range(3))
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_counts, st.sampled_from([0.0, 0.1, 0.6])), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_padding_and_replaying_change_nothing(
    replayed: PaddedNetwork, shapes: list[tuple[tuple[int, ...], float]], seed: int
) -> None:
    graphs = [
        random_graph(counts, density, seed + place)
        for place, (counts, density) in enumerate(shapes)
    ]

    assert_same(evaluated(replayed, graphs), evaluated(_FOLDED, graphs))


def test_a_recording_that_is_faster_serves_without_running_the_forward_pass_again() -> None:
    network, forward = padded()

    for graph in _GRAPHS:
        assert_same(evaluated(network, [graph]), evaluated(_FOLDED, [graph]))
    assert_same(evaluated(network, _GRAPHS), evaluated(_FOLDED, _GRAPHS))

    assert forward.runs == 0
    assert [choice.is_recorded for choice in network.choices.values()] == [True] * len(BUCKETS)


def test_a_recording_that_is_slower_is_not_used() -> None:
    network, forward = padded(times=SLOWER())

    assert_same(evaluated(network, _GRAPHS[:1]), evaluated(_FOLDED, _GRAPHS[:1]))

    assert forward.runs == 1
    choice = network.choices[BUCKETS[0]]
    assert (choice.is_recorded, choice.direct_ms, choice.recorded_ms) == (False, 1e3, 2e3)


def test_a_device_that_cannot_record_is_served_directly_and_says_why() -> None:
    network, forward = padded(ReplayingDevice(RuntimeError("cannot capture\nfor some reason")))

    assert_same(evaluated(network, _GRAPHS[:1]), evaluated(_FOLDED, _GRAPHS[:1]))

    assert forward.runs == 1
    for choice in network.choices.values():
        assert (choice.is_recorded, choice.recorded_ms) == (False, None)
        assert choice.reason == "RuntimeError: cannot capture"


@pytest.mark.parametrize(
    ("bucket", "is_held"),
    [
        (Bucket(counts=(1, 4, 1, 4, 2, 2), edges=400, degree=16), True),
        (Bucket(counts=(1, 4, 1, 3, 2, 2), edges=400, degree=8), False),
        (Bucket(counts=(1, 4, 1, 4, 2, 2), edges=20, degree=8), False),
        (Bucket(counts=(1, 4, 1, 4, 2, 2), edges=400, degree=1), False),
    ],
)
def test_a_bucket_holds_what_has_no_more_nodes_edges_and_neighbours(
    bucket: Bucket, is_held: bool
) -> None:
    graph = random_graph((1, 4, 1, 4, 2, 2), 0.5, 4)

    assert bucket.holds([graph.topology]) is is_held
    assert not bucket.holds([graph.topology, graph.topology])


def test_a_graph_beyond_every_bucket_is_answered_all_the_same() -> None:
    network, forward = padded()
    large = random_graph((1, 40, 2, 80, 4, 4), 0.1, 1)

    assert evaluated(network, [large]) == evaluated(_FOLDED, [large])
    assert forward.runs == 0


def test_a_graph_leaves_nothing_behind_for_the_next_one(replayed: PaddedNetwork) -> None:
    spoilt = random_graph((1, 8, 4, 16, 8, 8), 0.2, 1)
    spoilt.features[:] = float("nan")
    spoilt.attributes[:] = float("inf")

    evaluated(replayed, [spoilt])

    assert_same(evaluated(replayed, _GRAPHS[1:2]), evaluated(_FOLDED, _GRAPHS[1:2]))


def test_a_topology_is_laid_out_once_and_read_with_the_present_values(
    replayed: PaddedNetwork,
) -> None:
    graph = random_graph((1, 3, 1, 4, 2, 2), 0.5, 7)
    evaluated(replayed, [graph])
    graph.features[:] *= 2.0
    graph.attributes[:] -= 1.0

    assert_same(evaluated(replayed, [graph]), evaluated(fold(_NETWORK), [graph]))


def test_every_bucket_is_compiled_once_for_all_graphs_and_all_policies() -> None:
    counter = CompileCounter()
    for seed in range(4):
        policy = random_network(_NETWORK.config, seed)
        network = PaddedNetwork(
            FoldedNetwork(fold_weights(policy), is_mixed=True),
            ReplayingDevice(RuntimeError("records nothing that is compiled")),
            SLOWER(),
            compile_forward=partial(compiled, backend=counter),
        )
        for graphs in (*([graph] for graph in _GRAPHS), _GRAPHS):
            expected = evaluated(fold(policy), graphs)
            for outputs, others in zip(evaluated(network, graphs), expected, strict=True):
                for head, values in outputs.items():
                    assert values == pytest.approx(others[head], abs=0.05)
        assert counter.frame_count == len(BUCKETS)
