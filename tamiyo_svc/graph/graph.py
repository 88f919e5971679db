"""A built graph in packed form, with the per-type views training and tests read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.graph.coverage import Coverage
from tamiyo_svc.graph.schema import EDGE_WIDTH, NODE_TYPES, NODE_WIDTHS, RELATIONS, Relation

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

COLUMNS: Final[Mapping[str, slice]] = {
    kind: slice(start := sum(list(NODE_WIDTHS.values())[:place]), start + width)
    for place, (kind, width) in enumerate(NODE_WIDTHS.items())
}
"""Where a type's features stand in a packed row; all other columns of the row are 0."""

TYPE_COLUMNS: Final = slice(sum(NODE_WIDTHS.values()), sum(NODE_WIDTHS.values()) + len(NODE_TYPES))
"""One column per type after the features, 1 in the rows of that type."""

PACKED_WIDTH: Final = TYPE_COLUMNS.stop


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """Which nodes and edges there are; graphs that agree in it have the same one.

    Identity is a cache key for what is derived from it.
    """

    counts: tuple[int, ...]
    """Nodes per type, in the order of `NODE_TYPES`."""
    edges: Integers
    """(2, edges): source and target, each counted within its type; ordered by relation."""
    edge_counts: tuple[int, ...]
    """Edges per relation, in the order of `RELATIONS`."""

    def rows(self, kind: str) -> slice:
        """Rows of a type in the packed features."""
        place = NODE_TYPES.index(kind)
        start = sum(self.counts[:place])
        return slice(start, start + self.counts[place])


@dataclass(frozen=True, eq=False)
class Graph:
    """One packet's graph.

    `blueprints` are the candidates kept, the first of them the primary one; `seed_ids` and
    `blend_allowed` go with the `seed` nodes; `truncated` counts by type what did not fit, `skipped`
    the malformed metadata entries. `allowed_parameters` has `allowed_param_<name>` -> 0 or 1 for
    every seed.
    """

    topology: Topology
    features: Floats
    """(nodes, `PACKED_WIDTH`)."""
    attributes: Floats
    """(edges, 3)."""
    coverage: Coverage
    seed_ids: tuple[str, ...]
    blueprints: tuple[Blueprint, ...]
    blend_allowed: tuple[bool, ...]
    allowed_parameters: tuple[Mapping[str, float], ...]
    truncated: Mapping[str, int]
    skipped: int

    @property
    def seed_count(self) -> int:
        """Number of `seed` nodes."""
        return len(self.seed_ids)

    @cached_property
    def x(self) -> dict[str, Tensor]:
        """Features per type, float32 (nodes, width)."""
        return {
            kind: torch.from_numpy(self.features[self.topology.rows(kind), COLUMNS[kind]])
            for kind in NODE_TYPES
        }

    @cached_property
    def edge_index(self) -> dict[Relation, Tensor]:
        """Edges of every relation, int64 (2, edges)."""
        return self._by_relation(self.topology.edges, axis=1)

    @cached_property
    def edge_attr(self) -> dict[Relation, Tensor]:
        """Edge attributes of every relation, float32 (edges, 3)."""
        return self._by_relation(self.attributes, axis=0)

    def _by_relation(self, packed: npt.NDArray[Any], axis: int) -> dict[Relation, Tensor]:
        bounds = np.cumsum(self.topology.edge_counts)[:-1]
        parts = np.split(packed, bounds, axis=axis)
        return dict(zip(RELATIONS, map(torch.from_numpy, parts), strict=True))


def pack(
    x: Mapping[str, npt.ArrayLike],
    edge_index: Mapping[Relation, npt.ArrayLike],
    edge_attr: Mapping[Relation, npt.ArrayLike],
) -> tuple[Topology, Floats, Floats]:
    """Topology, packed features and packed edge attributes of a graph given per type."""
    blocks = {kind: np.asarray(x[kind], dtype=np.float32) for kind in NODE_TYPES}
    topology = Topology(
        counts=tuple(len(block) for block in blocks.values()),
        edges=np.concatenate(
            [np.asarray(edge_index[r], dtype=np.int64).reshape(2, -1) for r in RELATIONS], axis=1
        ),
        edge_counts=tuple(np.asarray(edge_index[r]).reshape(2, -1).shape[1] for r in RELATIONS),
    )
    features = np.zeros((sum(topology.counts), PACKED_WIDTH), dtype=np.float32)
    for place, (kind, block) in enumerate(blocks.items()):
        rows = topology.rows(kind)
        features[rows, COLUMNS[kind]] = block
        features[rows, TYPE_COLUMNS.start + place] = 1.0
    attributes = [np.asarray(edge_attr[r], np.float32).reshape(-1, EDGE_WIDTH) for r in RELATIONS]
    return topology, features, np.concatenate(attributes)
