"""How much of what the network reads was really there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tamiyo_svc.graph.schema import NODE_TYPES, Relation

TRACKED_RELATIONS: Final[tuple[Relation, ...]] = (
    ("layer", "connects", "layer"),
    ("seed", "monitors", "layer"),
    ("layer", "feeds", "activation"),
    ("layer", "activates", "activation"),
    ("activation", "configures", "parameter"),
    ("parameter", "modulates", "activation"),
    ("blueprint", "composes", "layer"),
    ("parameter", "targets", "blueprint"),
    ("global", "influences", "seed"),
    ("seed", "reports", "global"),
    ("global", "operates", "layer"),
    ("layer", "feedback", "global"),
)
"""The relations whose coverage is reported, each as `edges.<source>_<relation>`."""

FAMILIES: Final[tuple[str, ...]] = (
    *(f"node.{kind}" for kind in NODE_TYPES),
    *(f"edges.{source}_{relation}" for source, relation, _ in TRACKED_RELATIONS),
)
"""Every coverage family."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Share of observed inputs that were present, each in [0, 1].

    `by_key` has one entry per `<type>.<feature>` and `edges.<source>_<relation>`, `by_family` one
    per entry of `FAMILIES`; `mean` is the average over the keys.
    """

    mean: float
    by_key: Mapping[str, float]
    by_family: Mapping[str, float]


EMPTY_COVERAGE: Final = Coverage(mean=0.0, by_key={}, by_family={})
"""Coverage of an input that was not looked at."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts from which coverage is computed: (present, observed) per key."""

    counts: Mapping[str, tuple[int, int]]

    def coverage(self) -> Coverage:
        """Turn the counts into shares; a key observed zero times counts as absent."""
        by_key: dict[str, float] = {}
        present: dict[str, int] = dict.fromkeys(FAMILIES, 0)
        observed: dict[str, int] = dict.fromkeys(FAMILIES, 0)
        for key, (there, seen) in self.counts.items():
            by_key[key] = there / seen if seen else 0.0
            kind = key.partition(".")[0]
            family = key if kind == "edges" else f"node.{kind}"
            present[family] += there
            observed[family] += seen
        return Coverage(
            mean=sum(by_key.values()) / len(by_key) if by_key else 0.0,
            by_key=by_key,
            by_family={
                family: present[family] / seen if seen else 0.0 for family, seen in observed.items()
            },
        )
