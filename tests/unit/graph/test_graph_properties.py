"""What holds of every graph: masks say what was there, and the order of seeds is only an order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.graph.normalizer import GLOBAL_METRICS
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.folded import FoldedNetwork, fold
from tamiyo_svc.policy.network import NetworkConfig, TamiyoNetwork

BLUEPRINT = Blueprint(
    leyline.BlueprintDescriptor(blueprint_id="bp", risk=0.25, stage=2),
    graph_metadata={
        "layers": [{"type": "linear", "depth": depth} for depth in range(4)],
        "activations": [{"type": "relu"}],
        "parameters": [{"name": "alpha", "min": 0.0, "max": 1.0}],
        "capabilities": {"allowed_blending_methods": ["linear"]},
        "monitors": {"by_seed_id": {"seed-1": [2, 3]}},
    },
)
SEED_VALUES = ("learning_rate", "risk_score", "gradient_norm", "age_epochs")
ANY = st.floats(width=32) | st.just(0.0)


def build(packet: leyline.SystemStatePacket, *blueprints: Blueprint) -> Graph:
    return GraphBuilder(GraphLimits(), Vocabularies()).build(packet, blueprints, {})


def masked(row: list[float], pairs: int) -> list[float]:
    """The masks of a row that begins with (value, mask) pairs; absent values must be 0."""
    for index in range(pairs):
        value, mask = row[2 * index : 2 * index + 2]
        assert mask in (0.0, 1.0)
        assert mask == 1.0 or value == 0.0
    return row[1 : 2 * pairs : 2]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(GLOBAL_METRICS), ANY), ANY, ANY)
def test_global_masks_are_one_exactly_where_a_finite_value_is(
    metrics: dict[str, float], validation_loss: float, training_loss: float
) -> None:
    packet = leyline.SystemStatePacket(
        training_metrics=metrics, validation_loss=validation_loss, training_loss=training_loss
    )
    own = {"validation_loss": validation_loss, "training_loss": training_loss}
    present = [
        (metric in metrics and math.isfinite(metrics[metric]))
        or (own.get(metric, 0.0) != 0.0 and math.isfinite(own.get(metric, 0.0)))
        for metric in GLOBAL_METRICS
    ]
    graph = build(packet, BLUEPRINT)
    assert masked(graph.x["global"][0].tolist(), len(GLOBAL_METRICS)) == present
    for metric, there in zip(GLOBAL_METRICS, present, strict=True):
        assert graph.coverage.by_key[f"global.{metric}"] == float(there)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ANY, ANY, ANY, st.integers(0, 3)), min_size=1, max_size=4))
def test_seed_masks_are_one_exactly_where_a_finite_value_is(
    seeds: list[tuple[float, float, float, int]],
) -> None:
    packet = leyline.SystemStatePacket()
    for values in seeds:
        packet.seed_states.add(
            learning_rate=values[0],
            risk_score=values[1],
            gradient_norm=values[2],
            age_epochs=values[3],
        )
    rows = build(packet, BLUEPRINT).x["seed"].tolist()
    for row, values in zip(rows, seeds, strict=True):
        present = [value != 0.0 and math.isfinite(value) for value in values]
        assert masked(row, len(SEED_VALUES)) == present


def seed(number: int) -> leyline.SeedState:
    return leyline.SeedState(
        seed_id=f"seed-{number}",
        stage=leyline.SEED_STAGE_DORMANT + number % 6,  # type: ignore[arg-type]
        risk_score=0.1 + 0.1 * number,
        learning_rate=0.01 * (number + 1),
        gradient_norm=1.0 + number,
        layer_depth=number,
        age_epochs=number + 1,
    )


def edges_by_seed(graph: Graph, order: list[int]) -> set[Any]:
    """Every edge that touches a seed, by the seed's number instead of its place."""
    found = set()
    for relation, index in graph.edge_index.items():
        source, name, target = relation
        if name == "peer" or "seed" not in (source, target):
            continue
        pairs = zip(index.T.tolist(), graph.edge_attr[relation].tolist(), strict=True)
        for (one, other), attributes in pairs:
            named = (order[one], other) if source == "seed" else (one, order[other])
            found.add((name, named, tuple(attributes)))
    return found


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(5)))
def test_permuted_seeds_are_the_same_rows_and_edges_in_another_order(order: list[int]) -> None:
    straight = build(leyline.SystemStatePacket(seed_states=map(seed, range(5))), BLUEPRINT)
    permuted = build(leyline.SystemStatePacket(seed_states=map(seed, order)), BLUEPRINT)
    assert torch.equal(permuted.x["seed"], straight.x["seed"][list(order)])
    for kind in ("global", "blueprint", "layer", "activation", "parameter"):
        assert torch.equal(permuted.x[kind], straight.x[kind])
    assert permuted.coverage == straight.coverage
    assert edges_by_seed(permuted, list(order)) == edges_by_seed(straight, list(range(5)))


@pytest.fixture(scope="module")
def network() -> FoldedNetwork:
    """A small network whose heads, unlike untrained ones, tell nodes apart."""
    torch.manual_seed(3)
    config = NetworkConfig(sage_hidden_dim=32, gat_hidden_dim=16, attention_heads=2)
    return fold(TamiyoNetwork(config).eval())


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_reversed_seeds_reverse_their_scores_and_change_nothing_else(
    network: FoldedNetwork, seeds: int
) -> None:
    """A chain of peers read backwards is the same chain, so the graphs are isomorphic."""
    numbers = list(range(seeds))
    straight = build(leyline.SystemStatePacket(seed_states=map(seed, numbers)), BLUEPRINT)
    turned = build(leyline.SystemStatePacket(seed_states=map(seed, numbers[::-1])), BLUEPRINT)
    with torch.inference_mode():
        one, other = network.evaluate([straight])[0], network.evaluate([turned])[0]
    assert other["seed_scores"][::-1] == pytest.approx(one["seed_scores"], abs=1e-5)
    for head in ("policy_logits", "risk_logits", "value", "blueprint_scores"):
        assert other[head] == pytest.approx(one[head], abs=1e-5)
    if seeds > 1:
        assert other["seed_scores"] != pytest.approx(one["seed_scores"], abs=1e-3)
