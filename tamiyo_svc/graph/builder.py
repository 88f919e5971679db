"""From a state packet and its candidate blueprints to a graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.graph.coverage import Tally
from tamiyo_svc.graph.features import (
    BLUEPRINT_LOSS_COLUMNS,
    Backdrop,
    Counts,
    blueprint_losses,
    bounded,
    build_backdrop,
    count_global,
    global_row,
    seed_rows,
    seed_stage,
)
from tamiyo_svc.graph.graph import (
    COLUMNS,
    PACKED_WIDTH,
    TYPE_COLUMNS,
    Floats,
    Graph,
)
from tamiyo_svc.graph.metadata import Description, GraphLimits, read_description
from tamiyo_svc.graph.normalizer import Statistics, run_values
from tamiyo_svc.graph.relations import SeedPlace, Wiring, wire
from tamiyo_svc.graph.schema import NODE_TYPES
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline

K = TypeVar("K")
V = TypeVar("V")

__all__ = ["GraphBuilder", "GraphLimits"]

# A run keeps one wiring until a seed changes stage; a catalogue has tens of blueprints.
_MAX_BACKDROPS: Final = 64
_MAX_WIRINGS: Final = 128
_MAX_DESCRIPTIONS: Final = 256

_BLENDING_STAGES: Final = range(leyline.SEED_STAGE_BLENDING, leyline.SEED_STAGE_PROBATIONARY + 1)


class GraphBuilder:
    """Builds graphs, keeping what recurs: metadata, backdrops and wirings, each bounded.

    The caches make it unfit for two threads at once.
    """

    def __init__(self, limits: GraphLimits, vocabularies: Vocabularies) -> None:
        self.limits = limits
        self.vocabularies = vocabularies
        self._descriptions: OrderedDict[Blueprint, Description] = OrderedDict()
        self._backdrops: OrderedDict[tuple[Blueprint, ...], Backdrop] = OrderedDict()
        self._wirings: OrderedDict[
            tuple[Backdrop, tuple[SeedPlace, ...]], tuple[Wiring, Floats]
        ] = OrderedDict()

    def prepare(self, blueprint: Blueprint) -> None:
        """Read a blueprint's metadata now, so that the first packet need not."""
        self._description(blueprint)

    def build(
        self,
        packet: leyline.SystemStatePacket,
        blueprints: Sequence[Blueprint],
        statistics: Statistics,
    ) -> Graph:
        """Build a packet's graph; `statistics` are those from before the packet.

        The first blueprint is the primary one: layers, activations and parameters are its.
        """
        limits = self.limits
        kept = tuple(blueprints[: limits.blueprints])
        backdrop = self._backdrop(kept)
        description = backdrop.description
        seeds = packet.seed_states[: limits.seeds]
        places = tuple(_place(seed, description) for seed in seeds)
        wiring, features = self._wiring(backdrop, places)
        blend_allowed = tuple(place.blend_allowed for place in places)

        values = run_values(packet)
        counts: Counts = {}
        count_global(values, counts)
        features = features.copy()
        features[0, COLUMNS["global"]] = global_row(values, len(packet.seed_states), statistics)
        if kept:
            start = 1 + len(seeds)
            column = COLUMNS["blueprint"].start
            features[
                start : start + len(kept),
                column + BLUEPRINT_LOSS_COLUMNS.start : column + BLUEPRINT_LOSS_COLUMNS.stop,
            ] = blueprint_losses(values, statistics)
        attributes = wiring.attributes.copy()
        if seeds:
            features[1 : 1 + len(seeds), COLUMNS["seed"]] = seed_rows(
                seeds, blend_allowed, statistics, limits, counts
            )
            known = np.array(
                [(seed_stage(seed), bounded(seed.risk_score)) for seed in seeds], dtype=np.float32
            )
            attributes.reshape(-1)[wiring.filled] = known.reshape(-1)[wiring.source]
        for key, there in (
            ("edges.global_influences", len(seeds)),
            ("edges.seed_reports", len(seeds)),
            ("edges.seed_monitors", wiring.monitored),
        ):
            counts[key] = (there, len(seeds))

        return Graph(
            topology=wiring.topology,
            features=features,
            attributes=attributes,
            coverage=Tally({**backdrop.counts, **counts}).coverage(),
            seed_ids=tuple(place.seed_id for place in places),
            blueprints=kept,
            blend_allowed=blend_allowed,
            allowed_parameters=wiring.allowed_parameters,
            truncated=self._truncated(
                description, len(packet.seed_states) - len(seeds), len(blueprints) - len(kept)
            ),
            skipped=description.skipped,
        )

    def _description(self, blueprint: Blueprint) -> Description:
        return _remembered(
            self._descriptions,
            blueprint,
            lambda: read_description(blueprint, self.limits),
            _MAX_DESCRIPTIONS,
        )

    def _backdrop(self, blueprints: tuple[Blueprint, ...]) -> Backdrop:
        def build() -> Backdrop:
            description = self._description(blueprints[0]) if blueprints else Description()
            return build_backdrop(blueprints, description, self.vocabularies)

        return _remembered(self._backdrops, blueprints, build, _MAX_BACKDROPS)

    def _wiring(self, backdrop: Backdrop, places: tuple[SeedPlace, ...]) -> tuple[Wiring, Floats]:
        def build() -> tuple[Wiring, Floats]:
            wiring = wire(backdrop, places)
            return wiring, _template(backdrop, wiring)

        return _remembered(self._wirings, (backdrop, places), build, _MAX_WIRINGS)

    def _truncated(self, description: Description, seeds: int, blueprints: int) -> dict[str, int]:
        truncated = dict(description.truncated)
        if seeds > 0:
            truncated["seed"] = seeds
        if blueprints > 0:
            truncated["blueprint"] = blueprints
        return truncated


def _place(seed: leyline.SeedState, description: Description) -> SeedPlace:
    stage, risk = seed.stage, seed.risk_score
    return SeedPlace(
        seed_id=seed.seed_id,
        depth=seed.layer_depth,
        blend_allowed=(
            description.may_blend
            or stage in _BLENDING_STAGES
            or seed.metrics.get("blend_allowed", 0.0) > 0.0
        ),
        observed=(description.risk_max is None or risk <= description.risk_max)
        and (description.stage_min is None or stage >= description.stage_min),
    )


def _template(backdrop: Backdrop, wiring: Wiring) -> Floats:
    topology = wiring.topology
    features = np.zeros((sum(topology.counts), PACKED_WIDTH), dtype=np.float32)
    for place, kind in enumerate(NODE_TYPES):
        rows = topology.rows(kind)
        if kind in backdrop.rows:
            features[rows, COLUMNS[kind]] = backdrop.rows[kind]
        features[rows, TYPE_COLUMNS.start + place] = 1.0
    return features


def _remembered(cache: OrderedDict[K, V], key: K, build: Callable[[], V], limit: int) -> V:
    value = cache.get(key)
    if value is None:
        value = cache[key] = build()
        if len(cache) > limit:
            cache.popitem(last=False)
    else:
        cache.move_to_end(key)
    return value
