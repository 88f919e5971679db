"""The shape of the graph: node types, their widths, and the relations between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Relation = tuple[str, str, str]
"""(source type, relation, target type)."""

NODE_WIDTHS: Final[Mapping[str, int]] = {
    "global": 16,
    "seed": 14,
    "blueprint": 14,
    "layer": 12,
    "activation": 8,
    "parameter": 10,
}
"""Feature columns per node type."""

NODE_TYPES: Final[tuple[str, ...]] = tuple(NODE_WIDTHS)
"""Node types in the order in which every packed form lays them out."""

RELATIONS: Final[tuple[Relation, ...]] = (
    ("global", "influences", "seed"),
    ("seed", "reports", "global"),
    ("global", "annotates", "blueprint"),
    ("blueprint", "monitored_by", "global"),
    ("seed", "peer", "seed"),
    ("global", "operates", "layer"),
    ("layer", "feedback", "global"),
    ("layer", "activates", "activation"),
    ("activation", "affects", "layer"),
    ("activation", "configures", "parameter"),
    ("parameter", "modulates", "activation"),
    ("seed", "allowed", "parameter"),
    ("parameter", "associated", "seed"),
    ("blueprint", "composes", "layer"),
    ("layer", "belongs_to", "blueprint"),
    ("blueprint", "energizes", "activation"),
    ("parameter", "targets", "blueprint"),
    ("layer", "connects", "layer"),
    ("seed", "monitors", "layer"),
    ("layer", "monitored_by", "seed"),
    ("layer", "feeds", "activation"),
)
"""Every relation, in the order of the network's contract."""

EDGE_WIDTH: Final = 3
"""Attributes per edge."""

STAGE_SCALE: Final = 11.0
"""The last seed lifecycle stage."""

BUCKETS: Final = 1024
"""Scale of identifier buckets and vocabulary indices."""
