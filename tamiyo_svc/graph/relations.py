"""The edges: which nodes are joined, and which attributes a packet still has to fill in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tamiyo_svc.graph.features import Backdrop
from tamiyo_svc.graph.graph import Floats, Integers, Topology
from tamiyo_svc.graph.metadata import Description
from tamiyo_svc.graph.schema import EDGE_WIDTH, RELATIONS, Relation

_STAGE, _RISK = 0, 1


class SeedPlace(NamedTuple):
    """What of a seed decides which edges it has."""

    seed_id: str
    depth: int
    blend_allowed: bool
    observed: bool
    """Whether the blueprint's thresholds let this seed monitor what its metadata names."""


@dataclass(frozen=True, slots=True, eq=False)
class Wiring:
    """The edges for one backdrop and one row of seeds.

    `attributes` holds what is constant; the flat positions `filled` take the seeds' values at the
    flat positions `source` of an array (seeds, 2) of stage and risk.
    """

    topology: Topology
    attributes: Floats
    filled: Integers
    source: Integers
    allowed_parameters: tuple[Mapping[str, float], ...]
    monitored: int
    """Seeds that monitor a layer for a reason, not for want of a depth."""


@dataclass(slots=True)
class _Edge:
    source: int
    target: int
    constant: tuple[float, float, float]
    seed: int = -1
    stage_at: int = -1
    risk_at: int = -1


def wire(backdrop: Backdrop, seeds: Sequence[SeedPlace]) -> Wiring:
    """Lay out every relation."""
    allowed = [_allowed(backdrop.description, index, seed) for index, seed in enumerate(seeds)]
    monitors, monitored = _monitors(backdrop, seeds)
    edges = {
        **_constant_edges(backdrop),
        ("global", "influences", "seed"): [
            _Edge(0, index, (1.0, 0.0, 0.0), index, 1, 2) for index in range(len(seeds))
        ],
        ("seed", "reports", "global"): [
            _Edge(index, 0, (1.0, 0.0, 0.0), index, 1, 2) for index in range(len(seeds))
        ],
        ("seed", "peer", "seed"): [
            _Edge(source, target, (0.5, 0.0, 0.0))
            for one, other in pairwise(range(len(seeds)))
            for source, target in ((one, other), (other, one))
        ],
        ("seed", "allowed", "parameter"): [
            _Edge(index, parameter, (1.0, 1.0, 0.0), index, stage_at=2)
            for index, parameters in enumerate(allowed)
            for parameter in parameters
        ],
        ("seed", "monitors", "layer"): monitors,
    }
    edges["parameter", "associated", "seed"] = _reversed(edges["seed", "allowed", "parameter"])
    edges["layer", "monitored_by", "seed"] = _reversed(monitors)
    names = [parameter.name for parameter in backdrop.description.parameters]
    return _packed(
        edges,
        counts=(
            1,
            len(seeds),
            *(
                len(backdrop.rows[kind])
                for kind in ("blueprint", "layer", "activation", "parameter")
            ),
        ),
        allowed_parameters=tuple(
            {
                f"allowed_param_{name}": float(place in parameters)
                for place, name in enumerate(names)
                if name
            }
            for parameters in allowed
        ),
        monitored=monitored,
    )


def _constant_edges(backdrop: Backdrop) -> dict[Relation, list[_Edge]]:
    risk, depths = backdrop.risk, backdrop.depths
    activations, parameters = backdrop.activation_positions, backdrop.parameter_positions
    blueprints = list(
        enumerate(zip(backdrop.blueprint_stages, backdrop.blueprint_risks, strict=True))
    )
    primary = blueprints[:1]
    layers_activations = [
        _Edge(layer, activation, (depth, position, 1.0))
        for layer, depth in enumerate(depths)
        for activation, position in enumerate(activations)
    ]
    activations_parameters = [
        _Edge(activation, parameter, (position, other, 1.0))
        for activation, position in enumerate(activations)
        for parameter, other in enumerate(parameters)
    ]
    annotates = [_Edge(0, index, (1.0, stage, risk)) for index, (stage, risk) in blueprints]
    operates = [_Edge(0, layer, (1.0, depth, risk)) for layer, depth in enumerate(depths)]
    composes = [
        _Edge(index, layer, (risk, depth, 1.0))
        for index, _ in primary
        for layer, depth in enumerate(depths)
    ]
    chain = [(one, other, None) for one, other in pairwise(range(len(depths)))]
    return {
        ("global", "annotates", "blueprint"): annotates,
        ("blueprint", "monitored_by", "global"): _reversed(annotates),
        ("global", "operates", "layer"): operates,
        ("layer", "feedback", "global"): _reversed(operates),
        ("layer", "activates", "activation"): layers_activations,
        ("activation", "affects", "layer"): _reversed(layers_activations),
        ("layer", "feeds", "activation"): layers_activations,
        ("activation", "configures", "parameter"): activations_parameters,
        ("parameter", "modulates", "activation"): _reversed(activations_parameters),
        ("blueprint", "composes", "layer"): composes,
        ("layer", "belongs_to", "blueprint"): _reversed(composes),
        ("blueprint", "energizes", "activation"): [
            _Edge(index, activation, (risk, position, 1.0))
            for index, _ in primary
            for activation, position in enumerate(activations)
        ],
        ("parameter", "targets", "blueprint"): [
            _Edge(parameter, index, (position, risk, 1.0))
            for index, _ in primary
            for parameter, position in enumerate(parameters)
        ],
        ("layer", "connects", "layer"): [
            _Edge(
                source,
                target,
                (depths[source], depths[target], risk if strength is None else strength),
            )
            for source, target, strength in backdrop.description.adjacency or chain
        ],
    }


def _allowed(description: Description, index: int, seed: SeedPlace) -> tuple[int, ...]:
    if not seed.blend_allowed:
        return ()
    named = description.allowed_by_id.get(seed.seed_id)
    if named is None:
        named = description.allowed_by_index.get(index)
    return tuple(range(max(1, len(description.parameters)))) if named is None else named


def _monitors(backdrop: Backdrop, seeds: Sequence[SeedPlace]) -> tuple[list[_Edge], int]:
    description, depths = backdrop.description, backdrop.depths
    edges, monitored = [], 0
    for index, seed in enumerate(seeds):
        named = (
            *description.monitors_of_all,
            *description.monitors_by_id.get(seed.seed_id, ()),
            *description.monitors_by_index.get(index, ()),
        )
        layers: Iterable[tuple[int, float | None]] = named if seed.observed else ()
        if not named:
            layers = ((min(seed.depth, len(depths) - 1), None),)
        # A layer named twice is one edge; the weight named last holds.
        unique = dict(layers)
        monitored += bool(unique) and bool(named or seed.depth)
        edges += [
            _Edge(
                index, layer, (0.0, 0.0, depths[layer] if weight is None else weight), index, 0, 1
            )
            for layer, weight in unique.items()
        ]
    return edges, monitored


def _reversed(edges: Sequence[_Edge]) -> list[_Edge]:
    return [
        _Edge(edge.target, edge.source, edge.constant, edge.seed, edge.stage_at, edge.risk_at)
        for edge in edges
    ]


def _packed(
    edges: Mapping[Relation, Sequence[_Edge]],
    counts: tuple[int, ...],
    allowed_parameters: tuple[Mapping[str, float], ...],
    monitored: int,
) -> Wiring:
    ordered = [edge for relation in RELATIONS for edge in edges[relation]]
    filled, source = [], []
    for place, edge in enumerate(ordered):
        for column, value in ((edge.stage_at, _STAGE), (edge.risk_at, _RISK)):
            if column >= 0:
                filled.append(place * EDGE_WIDTH + column)
                source.append(edge.seed * 2 + value)
    ends = np.array([(edge.source, edge.target) for edge in ordered], dtype=np.int64)
    constants = np.array([edge.constant for edge in ordered], dtype=np.float32)
    return Wiring(
        topology=Topology(
            counts=counts,
            edges=np.ascontiguousarray(ends.reshape(-1, 2).T),
            edge_counts=tuple(len(edges[relation]) for relation in RELATIONS),
        ),
        attributes=constants.reshape(-1, EDGE_WIDTH),
        filled=np.array(filled, dtype=np.int64),
        source=np.array(source, dtype=np.int64),
        allowed_parameters=allowed_parameters,
        monitored=monitored,
    )
