from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.graph.schema import EDGE_WIDTH, NODE_TYPES, NODE_WIDTHS, RELATIONS
from tamiyo_svc.graph.vocabulary import Vocabularies, id_bucket
from tamiyo_svc.leyline import leyline_pb2 as leyline

_CATALOG = Path(__file__).parents[2] / "data" / "urza_catalog.db"


def _catalogue() -> dict[str, Blueprint]:
    connection = sqlite3.connect(f"file:{_CATALOG}?mode=ro", uri=True)
    rows = connection.execute("SELECT blueprint_id, metadata_json FROM blueprints").fetchall()
    connection.close()
    found = {}
    for blueprint_id, text in rows:
        metadata = json.loads(text)
        extras = metadata.pop("_urza")
        found[blueprint_id] = Blueprint(
            ParseDict(metadata, leyline.BlueprintDescriptor()),
            graph_metadata=extras.get("graph_metadata"),
            guard_spec=extras.get("guard_spec"),
        )
    return found


_BLUEPRINTS = _catalogue()
_SAFE = _BLUEPRINTS["demo-safe"]


def _seed(index: int, **fields: Any) -> leyline.SeedState:
    values = {"stage": leyline.SEED_STAGE_TRAINING, "risk_score": 0.5, **fields}
    return leyline.SeedState(seed_id=f"seed-{index}", **values)


def _packet(*seeds: leyline.SeedState, **fields: Any) -> leyline.SystemStatePacket:
    return leyline.SystemStatePacket(packet_id="p", seed_states=seeds, **fields)


def _builder(**limits: int) -> GraphBuilder:
    return GraphBuilder(GraphLimits(**limits), Vocabularies())


def _build(packet: leyline.SystemStatePacket, *blueprints: Blueprint) -> Graph:
    return _builder().build(packet, blueprints, {})


def _described(**metadata: Any) -> Blueprint:
    descriptor = leyline.BlueprintDescriptor(blueprint_id="bp", risk=0.25, stage=2)
    return Blueprint(descriptor, graph_metadata=metadata)


def _edges(graph: Graph, relation: str) -> list[tuple[int, ...]]:
    key = next(triple for triple in RELATIONS if relation in (triple[1], "__".join(triple)))
    return [tuple(pair) for pair in graph.edge_index[key].T.tolist()]


def _attributes(graph: Graph, relation: str) -> list[list[float]]:
    key = next(triple for triple in RELATIONS if relation in (triple[1], "__".join(triple)))
    return [[round(value, 5) for value in row] for row in graph.edge_attr[key].tolist()]


def _row(graph: Graph, kind: str, index: int = 0) -> list[float]:
    return [round(value, 4) for value in graph.x[kind][index].tolist()]


def _assert_well_formed(graph: Graph) -> None:
    assert set(graph.x) == set(NODE_TYPES)
    assert set(graph.edge_index) == set(graph.edge_attr) == set(RELATIONS)
    for kind, block in graph.x.items():
        assert block.shape[1] == NODE_WIDTHS[kind]
        assert torch.isfinite(block).all()
    for relation, index in graph.edge_index.items():
        source, _, target = relation
        assert graph.edge_attr[relation].shape == (index.shape[1], EDGE_WIDTH)
        assert torch.isfinite(graph.edge_attr[relation]).all()
        if index.numel():
            assert index.min() >= 0
            assert index[0].max() < len(graph.x[source])
            assert index[1].max() < len(graph.x[target])
    assert 0.0 <= graph.coverage.mean <= 1.0
    assert all(0.0 <= share <= 1.0 for share in graph.coverage.by_key.values())


def test_without_a_blueprint_every_described_type_has_one_blank_node() -> None:
    graph = _build(_packet(_seed(0)))

    _assert_well_formed(graph)
    assert [len(graph.x[kind]) for kind in NODE_TYPES] == [1, 1, 0, 1, 1, 1]
    for kind in ("layer", "activation", "parameter"):
        assert not graph.x[kind].any()


def test_an_empty_packet_builds() -> None:
    graph = _build(leyline.SystemStatePacket())

    _assert_well_formed(graph)
    assert graph.seed_count == 0
    assert _row(graph, "global")[:12] == [0.0] * 12


def test_the_global_row_has_values_masks_and_the_clock_of_the_run() -> None:
    packet = _packet(
        _seed(0),
        current_epoch=10,
        global_step=100,
        validation_loss=1.1,
        training_metrics={"loss": 0.5, "samples_per_s": math.nan, "epochs_total": 20.0},
    )

    row = _row(_build(packet), "global")

    assert row[:4] == [-1.0, 1.0, 1.0, 1.0]
    assert row[4:12] == [0.0] * 8
    assert row[12:] == [0.0, 0.0, round(math.tanh(1), 4), 0.0]


def test_the_seed_row_has_values_masks_stage_depth_and_bucket() -> None:
    seed = _seed(3, learning_rate=0.01, risk_score=math.nan, age_epochs=14, layer_depth=32)

    row = _row(_build(_packet(seed)), "seed")

    assert row[:8] == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert row[8:12] == [round(3 / 11, 4), 1.0, 0.5, 1.0]
    assert row[12:] == [round(id_bucket("seed-3") / 1024, 4), 0.0]


def test_statistics_of_the_run_decide_the_scores() -> None:
    packet = _packet(validation_loss=2.0)

    graph = _builder().build(packet, [_SAFE], {"validation_loss": (2.0, 1.0)})

    assert _row(graph, "global")[2:4] == [0.0, 1.0]
    assert _row(graph, "blueprint")[1:5] == [0.0, 1.0, 0.0, 0.0]


def test_the_blueprint_row_describes_its_descriptor() -> None:
    row = _row(_build(_packet(validation_loss=1.1), _SAFE), "blueprint")

    assert row[1:5] == [1.0, 1.0, 0.0, 0.0]
    assert row[5:7] == [0.1, 0.3]
    assert row[7] == pytest.approx(math.log1p(10_000) - math.log1p(2048), abs=1e-4)
    assert row[8:12] == [1.0, 0.1, 0.0, 0.0]
    assert row[13] == 1.0


def test_sample_metadata_gives_its_nodes_and_relations() -> None:
    graph = _build(_packet(*(_seed(index, layer_depth=index) for index in range(3))), _SAFE)

    _assert_well_formed(graph)
    assert [len(graph.x[kind]) for kind in NODE_TYPES] == [1, 3, 1, 4, 2, 2]
    assert graph.skipped == 0
    assert _edges(graph, "connects") == [(0, 1), (1, 2), (2, 3)]
    assert _attributes(graph, "connects")[:2] == [[0.25, 0.5, 0.8], [0.5, 0.75, 0.1]]
    assert _edges(graph, "monitors") == [(0, 0), (0, 1), (0, 3), (1, 2), (2, 2)]
    assert _attributes(graph, "monitors")[1:3] == [
        [round(3 / 11, 5), 0.5, 0.5],
        [round(3 / 11, 5), 0.5, 0.25],
    ]
    assert _edges(graph, "layer__monitored_by__seed")[:1] == [(0, 0)]
    assert _edges(graph, "allowed") == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert _edges(graph, "associated") == [(p, s) for s, p in _edges(graph, "allowed")]
    assert graph.allowed_parameters[0] == {"allowed_param_alpha": 1.0, "allowed_param_lr": 0.0}
    assert _edges(graph, "peer") == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert len(_edges(graph, "activates")) == len(_edges(graph, "affects")) == 8
    assert _attributes(graph, "operates")[3] == [1.0, 1.0, 0.1]
    assert _attributes(graph, "targets") == [[0.5, 0.1, 1.0], [1.0, 0.1, 1.0]]


def test_described_nodes_carry_their_columns() -> None:
    graph = _build(_packet(), _SAFE)

    layer, activation, parameter = (
        _row(graph, kind) for kind in ("layer", "activation", "parameter")
    )
    assert layer[:4] == [0.25, 1.0, -2.0, 1.0]
    assert layer[6:9] == [0.1, round(1 / 1024, 4), round(1 / 1024, 4)]
    assert layer[9:] == [0.25, -0.25, 1.0]
    assert activation[1:5] == [1.0, -1.5, 1.0, 0.5]
    assert activation[-1] == 0.5
    assert parameter == [0.1, 1.0, -0.1, 1.0, 1.0, 1.0, 0.0, 1.0, 0.1, 0.3]


def test_layers_connect_in_a_chain_when_no_adjacency_is_given() -> None:
    graph = _build(_packet(), _described(layers=[{"type": "a"}, {"type": "b"}, {"type": "c"}]))

    assert _edges(graph, "connects") == [(0, 1), (1, 2)]
    assert graph.coverage.by_key["edges.layer_connects"] == 0.0
    assert _attributes(graph, "connects")[0][2] == 0.25


def test_a_guard_spec_stands_in_for_missing_metadata() -> None:
    graph = _build(_packet(), _BLUEPRINTS["demo-guard-spec"])

    assert [len(graph.x[kind]) for kind in ("layer", "activation", "parameter")] == [2, 2, 1]
    assert _row(graph, "layer")[-1] == 1.0


def test_malformed_sample_metadata_is_skipped_and_counted() -> None:
    graph = _build(_packet(_seed(0)), _BLUEPRINTS["demo-odd-metadata"])

    _assert_well_formed(graph)
    assert len(graph.x["layer"]) == 1
    assert graph.skipped == 6
    assert _edges(graph, "connects") == []


def test_a_skipped_layer_does_not_shift_what_refers_to_the_others() -> None:
    graph = _build(
        _packet(),
        _described(layers=["bad", {"type": "a"}, {"type": "b"}], adjacency={"layer": [[2, 1]]}),
    )

    assert _edges(graph, "connects") == [(1, 0)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"metrics": {"blend_allowed": 0.5}}, True),
        ({"metrics": {"blend_allowed": math.nan}}, False),
        ({"stage": leyline.SEED_STAGE_BLENDING}, True),
        ({"stage": leyline.SEED_STAGE_PROBATIONARY}, True),
        ({"stage": leyline.SEED_STAGE_FOSSILIZED}, False),
    ],
)
def test_who_may_blend(fields: dict[str, Any], expected: bool) -> None:
    blueprint = _described(parameters=[{"name": "alpha"}])

    graph = _build(_packet(_seed(0, **fields)), blueprint)

    assert graph.blend_allowed == (expected,)
    assert _edges(graph, "allowed") == [(0, 0)] * expected


def test_thresholds_keep_seeds_from_monitoring() -> None:
    blueprint = _described(
        layers=[{}, {}],
        monitored_layers=[0],
        monitors={"thresholds": {"risk_max": 0.5, "stage_min": 3}},
    )
    seeds = (_seed(0), _seed(1, risk_score=0.75), _seed(2, stage=leyline.SEED_STAGE_DORMANT))

    assert _edges(_build(_packet(*seeds), blueprint), "monitors") == [(0, 0)]


def test_a_seed_without_named_layers_monitors_its_own_depth() -> None:
    graph = _build(
        _packet(_seed(0, layer_depth=1), _seed(1, layer_depth=99)), _described(layers=[{}] * 3)
    )

    assert _edges(graph, "monitors") == [(0, 1), (1, 2)]


def test_what_exceeds_a_limit_is_cut_from_the_end_and_reported() -> None:
    builder = _builder(layers=2, activations=1, parameters=1, seeds=2, blueprints=1)
    blueprint = _described(
        layers=[{}] * 5, activations=[{}] * 3, parameters=[{"name": "a"}, {"name": "b"}]
    )

    graph = builder.build(_packet(*map(_seed, range(5))), [blueprint, _SAFE, _SAFE], {})

    _assert_well_formed(graph)
    assert graph.seed_ids == ("seed-0", "seed-1")
    assert graph.blueprints == (blueprint,)
    assert graph.truncated == {
        "layer": 3,
        "activation": 2,
        "parameter": 1,
        "seed": 3,
        "blueprint": 2,
    }


def test_graphs_of_one_run_share_their_topology_but_not_their_values() -> None:
    builder = _builder()
    first = builder.build(_packet(_seed(0, risk_score=0.25)), [_SAFE], {})
    second = builder.build(_packet(_seed(0, risk_score=0.75)), [_SAFE], {})

    assert first.topology is second.topology
    assert _attributes(first, "influences") == [[1.0, round(3 / 11, 5), 0.25]]
    assert _attributes(second, "influences") == [[1.0, round(3 / 11, 5), 0.75]]


def test_building_twice_gives_the_same_bytes() -> None:
    packet = _packet(_seed(0), _seed(1), validation_loss=0.5)
    one, other = _builder(), _builder()
    other.build(_packet(_seed(5)), [_SAFE], {})

    first, second = (builder.build(packet, [_SAFE], {}) for builder in (one, other))

    assert first.features.tobytes() == second.features.tobytes()
    assert first.attributes.tobytes() == second.attributes.tobytes()


def test_coverage_tells_described_from_undescribed() -> None:
    seed = _seed(0, learning_rate=0.1, gradient_norm=1.0, age_epochs=1, layer_depth=1)
    packet = _packet(seed, validation_loss=0.5, training_loss=0.5)

    bare, described = _build(_packet()), _build(packet, _SAFE)

    assert bare.coverage.mean == 0.0
    assert described.coverage.mean > 0.7
    assert described.coverage.by_family["node.seed"] == 1.0
    assert described.coverage.by_family["node.global"] == pytest.approx(2 / 7)
    assert described.coverage.by_family["edges.layer_connects"] == 1.0
    assert described.coverage.by_key["activation.cost"] == 0.5


_FIELDS = (
    "layer",
    "type",
    "depth",
    "parameter_count",
    "name",
    "min",
    "span",
    "seed-0",
    "0",
    "by_seed_id",
    "by_seed_index",
    "thresholds",
    "risk_max",
    "latency_ms",
    "allowed_parameters_by_seed_id",
    "allowed_parameters_by_seed_index",
    "allowed_blending_methods",
    "computational_cost",
    "dropout_rate",
)
_SECTIONS = (
    "layers",
    "activations",
    "parameters",
    "capabilities",
    "adjacency",
    "monitors",
    "monitored_layers",
    "schema_version",
)
_junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from(["seed-0", "0", "alpha", "\ud800", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(_FIELDS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
_metadata = st.dictionaries(
    st.sampled_from(_SECTIONS),
    _junk,
)


@settings(max_examples=150, deadline=None)
@given(_metadata | _junk, st.lists(_junk, max_size=3))
def test_no_metadata_can_break_a_graph(metadata: Any, guard_spec: list[Any]) -> None:
    descriptor = leyline.BlueprintDescriptor(blueprint_id="bp", risk=math.nan)
    hostile = Blueprint(descriptor, graph_metadata=metadata, guard_spec=guard_spec)

    _assert_well_formed(_build(_packet(_seed(0), _seed(1)), hostile, _SAFE))


_numbers = st.floats(width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(_numbers, _numbers, _numbers, st.integers(-(2**31), 2**31 - 1)), max_size=4),
    st.lists(_numbers, min_size=5, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_no_packet_can_break_a_graph(
    seeds: list[tuple[float, float, float, int]], values: list[float], number: int
) -> None:
    packet = _packet(
        validation_loss=values[0],
        training_loss=values[1],
        current_epoch=number,
        global_step=number << 31,
        training_metrics={
            "loss": values[2],
            "samples_per_s": values[3],
            "epochs_total": values[4],
        },
    )
    for learning_rate, risk, allowed, stage in seeds:
        seed = packet.seed_states.add(
            learning_rate=learning_rate, risk_score=risk, layer_depth=number, age_epochs=number
        )
        seed.stage = stage  # type: ignore[assignment]
        seed.metrics["blend_allowed"] = allowed

    _assert_well_formed(_build(packet, _SAFE))
