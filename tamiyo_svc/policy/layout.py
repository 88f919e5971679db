"""Where every node and edge of one or several graphs goes in the folded network's arrays.

Nodes are ordered by type, then by graph, so that each projection reads one block of rows; after
the last node stands one row that is always zero, which absent neighbours point to. A target node
has one slot per relation that reaches its type, in the order of `RELATIONS`, so that its slots are
one row of the concatenated neighbourhoods.

A layout in a bucket has arrays whose sizes the bucket alone decides. Nodes that are not there have
empty slots, and edges that are not there point to the zero row and count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tamiyo_svc.graph.graph import Integers, Topology
from tamiyo_svc.graph.schema import NODE_TYPES, RELATIONS

RELATIONS_INTO: Final[dict[str, tuple[int, ...]]] = {
    kind: tuple(place for place, (_, _, target) in enumerate(RELATIONS) if target == kind)
    for kind in NODE_TYPES
}
"""Indices in `RELATIONS` of those that reach a type."""

MOST_PADDED: Final = 1 << 18
"""Most places of a padded layer; at full width each takes 1 KB."""

_SOURCE_TYPE: Final = np.array([NODE_TYPES.index(source) for source, _, _ in RELATIONS])
_TARGET_TYPE: Final = np.array([NODE_TYPES.index(target) for _, _, target in RELATIONS])
_FAN_IN: Final = np.array([len(RELATIONS_INTO[kind]) for kind in NODE_TYPES])
_PLACE: Final = np.array(
    [RELATIONS_INTO[target].index(place) for place, (_, _, target) in enumerate(RELATIONS)]
)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Room for a batch of graphs in arrays of fixed sizes."""

    counts: tuple[int, ...]
    """Nodes per type over all graphs."""
    edges: int
    """Edges over all graphs."""
    degree: int
    """Edges of one relation into one node."""

    @property
    def nodes(self) -> int:
        """Nodes over all types."""
        return sum(self.counts)

    def holds(self, topologies: Sequence[Topology]) -> bool:
        """Whether a batch fits."""
        totals = np.sum([topology.counts for topology in topologies], axis=0)
        return (
            bool((totals <= self.counts).all())
            and sum(topology.edges.shape[1] for topology in topologies) <= self.edges
            and max(map(_degree, topologies)) <= self.degree
        )


def _degree(topology: Topology) -> int:
    """Most edges of one relation into one node."""
    relation = np.repeat(np.arange(len(RELATIONS)), topology.edge_counts)
    into = relation * (max(topology.counts) + 1) + topology.edges[1]
    return int(np.bincount(into).max(initial=0))


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """The edges of one GAT layer for the types it computes, padded to (slots, degree).

    Where some node has so many neighbours that padding would waste memory, `degree` is 0 and there
    is one place per edge. A row of the score table is a node's scores as source, relation by
    relation, then as target.
    """

    kinds: tuple[str, ...]
    slots: int
    degree: int
    neighbours: Tensor
    """(places): source row of every edge, the zero row where there is none."""
    sources: Tensor
    """(places): row of the score table for every edge's source."""
    targets: Tensor
    """(places): row of the score table for every edge's target."""
    relation: Tensor
    """(edges): relation of every edge."""
    edge: Tensor
    """(edges): place of every edge in the packed attributes of the graphs, one after another.

    In a bucket, edges that are not there read the row after the bucket's last edge.
    """
    place: Tensor
    """(edges): where among the places the edge stands."""
    slot: Tensor
    """(edges): slot of every edge, ascending."""
    offsets: Tensor
    """(slots): first edge of every slot."""


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """A batch as the compiled form reads it: a slot per node and relation into its type."""

    counts: npt.NDArray[np.int32]
    """Nodes per type over all graphs."""
    order: npt.NDArray[np.int32]
    """(nodes): rows of the concatenated features in order of type."""
    starts: npt.NDArray[np.int32]
    """(slots + 1): where a slot's edges begin."""
    sources: npt.NDArray[np.int32]
    """(edges): source row of every edge."""
    edges: npt.NDArray[np.int32]
    """(edges): place of every edge in the packed attributes of the graphs, one after another."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Everything about a batch that its topologies decide."""

    counts: tuple[int, ...]
    """Nodes per type over all graphs."""
    order: Tensor | None
    """Rows of the concatenated features in this order; None when they already are.

    A node that is not there reads the last row, which is zero.
    """
    types: Tensor
    """(nodes + 1): type of every row; a zero row has the type after the last."""
    mean: tuple[Tensor, Tensor, Tensor]
    """Bags of node rows, one per slot and one more per node for itself: rows, offsets, shares.

    A type that has nodes has slots for `padded` of its count; those beyond are empty.
    """
    attention: tuple[Attention, Attention]

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on a device."""
        if device.type == "cpu":
            return self
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The same layout with every tensor changed, in a fixed order."""
        mapped: Layout = _mapped(self, change)
        return mapped

    def rows(self, kind: str) -> slice:
        """Rows of a type."""
        place = NODE_TYPES.index(kind)
        start = sum(self.counts[:place])
        return slice(start, start + self.counts[place])


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or whatever holds tensors, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(part, change) for part in value)
    if isinstance(value, (Layout, Attention)):
        mapped = {
            field.name: _mapped(getattr(value, field.name), change) for field in fields(value)
        }
        return replace(value, **mapped)
    return value


def padded(count: int) -> int:
    """Rows a projection is given for `count` nodes: 0, or a power of two from 4.

    The first call with a new number of rows compiles a kernel (about 0.5 ms on the CPU measured);
    few numbers can all be warmed up, and four rows cost what one costs.
    """
    return 0 if count == 0 else max(4, 1 << (count - 1).bit_length())


def lay_out(
    topologies: Sequence[Topology],
    attended: tuple[tuple[str, ...], tuple[str, ...]],
    bucket: Bucket | None = None,
) -> Layout:
    """Lay out a batch; `attended` are the types each GAT layer computes.

    A bucket must hold the batch.
    """
    joined = _join(topologies, bucket)
    present = joined.counts.sum(axis=0)
    gaps = joined.type_starts - (np.cumsum(present) - present)
    rows = np.arange(present.sum()) + np.repeat(gaps, present)
    types = np.full(joined.totals.sum() + 1, len(NODE_TYPES))
    types[rows] = np.repeat(np.arange(len(NODE_TYPES)), present)
    order = None
    if bucket is not None:
        order = np.full(bucket.nodes, bucket.nodes)
        order[rows] = _order(joined.counts)
    elif len(topologies) > 1:
        order = _order(joined.counts)
    first, last = attended
    return Layout(
        counts=tuple(int(total) for total in joined.totals),
        order=None if order is None else torch.from_numpy(order),
        types=torch.from_numpy(types),
        mean=_mean_bags(joined, bucket),
        attention=(_attention(first, joined, bucket), _attention(last, joined, bucket)),
    )


def lay_out_slots(topologies: Sequence[Topology]) -> Slots:
    """Lay out a batch by slot; every type has slots."""
    joined = _join(topologies)
    totals, relation = joined.totals, joined.relation
    sizes = totals * _FAN_IN
    slot_starts = np.cumsum(sizes) - sizes
    kind = _TARGET_TYPE[relation]
    slot = (
        slot_starts[kind]
        + (joined.target - joined.type_starts[kind]) * _FAN_IN[kind]
        + _PLACE[relation]
    )
    edges = np.argsort(slot, kind="stable")
    fill = np.bincount(slot, minlength=int(sizes.sum()))
    order = np.arange(totals.sum()) if len(topologies) == 1 else _order(joined.counts)
    return Slots(
        *(
            np.ascontiguousarray(array, np.int32)
            for array in (
                totals,
                order,
                np.concatenate([[0], np.cumsum(fill)]),
                joined.source[edges],
                edges,
            )
        )
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """The edges of a batch between rows ordered by type, then by graph."""

    counts: Integers
    """(graphs, types)."""
    totals: Integers
    """Rows per type."""
    type_starts: Integers
    relation: Integers
    source: Integers
    target: Integers


def _join(topologies: Sequence[Topology], bucket: Bucket | None = None) -> _Joined:
    counts = np.array([topology.counts for topology in topologies])
    totals = counts.sum(axis=0) if bucket is None else np.array(bucket.counts)
    type_starts = np.concatenate([[0], np.cumsum(totals)[:-1]])
    starts = type_starts + np.cumsum(counts, axis=0) - counts
    relations = [np.repeat(np.arange(len(RELATIONS)), t.edge_counts) for t in topologies]
    source, target = (
        np.concatenate(
            [
                first[types[which]] + topology.edges[end]
                for first, which, topology in zip(starts, relations, topologies, strict=True)
            ]
        )
        for end, types in enumerate((_SOURCE_TYPE, _TARGET_TYPE))
    )
    return _Joined(counts, totals, type_starts, np.concatenate(relations), source, target)


def _order(counts: Integers) -> Integers:
    """From nodes by graph, then type, to nodes by type, then graph."""
    flat = counts.reshape(-1)
    firsts = (np.cumsum(flat) - flat).reshape(counts.shape)
    runs = [
        np.arange(first, first + count)
        for firsts_of_type, counts_of_type in zip(firsts.T, counts.T, strict=True)
        for first, count in zip(firsts_of_type, counts_of_type, strict=True)
    ]
    return np.concatenate(runs)


def _mean_bags(joined: _Joined, bucket: Bucket | None) -> tuple[Tensor, Tensor, Tensor]:
    totals, type_starts, target = joined.totals, joined.type_starts, joined.target
    width = _FAN_IN + 1
    sizes_of_types = _padded(totals) * width
    slot_starts = np.cumsum(sizes_of_types) - sizes_of_types
    kind = _TARGET_TYPE[joined.relation]
    slot = slot_starts[kind] + (target - type_starts[kind]) * width[kind] + _PLACE[joined.relation]
    nodes = int(totals.sum())
    node = np.arange(nodes)
    node_kind = np.repeat(np.arange(len(totals)), totals)
    own = (
        slot_starts[node_kind]
        + (node - type_starts[node_kind]) * width[node_kind]
        + _FAN_IN[node_kind]
    )
    slots = np.concatenate([slot, own])
    order = np.argsort(slots, kind="stable")
    sizes = np.bincount(slots, minlength=int(sizes_of_types.sum()))
    rows = np.concatenate([joined.source, node])[order]
    shares = (1.0 / sizes[slots[order]]).astype(np.float32)
    if bucket is not None:
        # What follows the last bag's rows is summed into it, as nothing.
        rows = _filled(rows, bucket.edges + nodes, nodes)
        shares = _filled(shares, bucket.edges + nodes, 0.0)
    return (
        torch.from_numpy(rows),
        torch.from_numpy(np.cumsum(sizes) - sizes),
        torch.from_numpy(shares),
    )


def _attention(kinds: tuple[str, ...], joined: _Joined, bucket: Bucket | None) -> Attention:
    totals, type_starts = joined.totals, joined.type_starts
    computed = np.array([kind in kinds for kind in NODE_TYPES])
    sizes = _padded(totals) * _FAN_IN * computed
    slot_starts = np.cumsum(sizes) - sizes
    edge = np.flatnonzero(computed[_TARGET_TYPE[joined.relation]])
    relation, source, target = (
        ends[edge] for ends in (joined.relation, joined.source, joined.target)
    )
    kind = _TARGET_TYPE[relation]
    slot = slot_starts[kind] + (target - type_starts[kind]) * _FAN_IN[kind] + _PLACE[relation]
    order = np.argsort(slot, kind="stable")
    edge, relation, source, target, slot = (
        part[order] for part in (edge, relation, source, target, slot)
    )
    # In a bucket one slot more takes the edges that are not there.
    slots = int(sizes.sum()) + (bucket is not None)
    fill = np.bincount(slot, minlength=slots)
    degree = max(1, int(fill.max(initial=0))) if bucket is None else bucket.degree
    offsets = np.cumsum(fill) - fill
    place = np.arange(len(slot))
    if bucket is None and slots * degree > MOST_PADDED:
        degree = 0
    else:
        place = slot * degree + place - np.repeat(offsets, fill)
    places = slots * degree or len(slot)
    nodes = int(totals.sum())
    neighbours = np.full(places, nodes)
    neighbours[place] = source
    # The zero row scores 0 everywhere.
    sources = np.full(places, nodes * 2 * len(RELATIONS))
    targets = sources.copy()
    sources[place] = source * 2 * len(RELATIONS) + relation
    targets[place] = target * 2 * len(RELATIONS) + len(RELATIONS) + relation
    if bucket is not None:
        edge = _filled(edge, bucket.edges, bucket.edges)
        relation = _filled(relation, bucket.edges, 0)
        place = _filled(place, bucket.edges, (slots - 1) * degree)
        slot = _filled(slot, bucket.edges, slots - 1)
    return Attention(
        kinds=kinds,
        slots=slots,
        degree=degree,
        neighbours=torch.from_numpy(neighbours),
        sources=torch.from_numpy(sources),
        targets=torch.from_numpy(targets),
        relation=torch.from_numpy(relation),
        edge=torch.from_numpy(edge),
        place=torch.from_numpy(place),
        slot=torch.from_numpy(slot),
        offsets=torch.from_numpy(offsets),
    )


def _filled(values: npt.NDArray[Any], length: int, value: float) -> npt.NDArray[Any]:
    """The values and then `value`, up to a length."""
    return np.concatenate([values, np.full(length - len(values), value, values.dtype)])


def _padded(totals: Integers) -> Integers:
    return np.array([padded(int(total)) for total in totals])
