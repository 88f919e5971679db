"""The feature columns: what stays the same for given blueprints, and what a packet changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.graph.graph import Floats
from tamiyo_svc.graph.metadata import Description, GraphLimits, Layer
from tamiyo_svc.graph.normalizer import GLOBAL_METRICS, Statistics, normalize, seed_values
from tamiyo_svc.graph.schema import BUCKETS, NODE_WIDTHS, STAGE_SCALE
from tamiyo_svc.graph.vocabulary import Vocabularies, Vocabulary, id_bucket
from tamiyo_svc.leyline import leyline_pb2 as leyline

BLUEPRINT_LOSS_COLUMNS: Final = slice(1, 5)
"""The columns of a `blueprint` row that hold the packet's losses."""

_BLUEPRINT_STAGE_SCALE: Final = 10.0
_TIER_SCALE: Final = 10.0
_SEED_FEATURES: Final[Mapping[str, str]] = {
    "learning_rate": "seed_learning_rate",
    "risk": "seed_risk",
    "gradient_norm": "seed_gradient_norm",
    "age": "seed_age_epochs",
}
_NO_STATISTICS: Final[Statistics] = {}

Counts = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Backdrop:
    """The part of a graph that is constant for the same candidate blueprints.

    `blueprint_risks` in [0, 1] and `blueprint_stages` (stage / 10) go with the `blueprint` rows,
    depths and positions in (0, 1] with the others, 0 for an undescribed node.
    """

    blueprints: tuple[Blueprint, ...]
    description: Description
    rows: Mapping[str, Floats]
    blueprint_risks: tuple[float, ...]
    blueprint_stages: tuple[float, ...]
    depths: tuple[float, ...]
    activation_positions: tuple[float, ...]
    parameter_positions: tuple[float, ...]
    counts: Mapping[str, tuple[int, int]]

    @property
    def risk(self) -> float:
        """Risk of the primary blueprint."""
        return self.blueprint_risks[0] if self.blueprint_risks else 0.0


def build_backdrop(
    blueprints: tuple[Blueprint, ...],
    description: Description,
    vocabularies: Vocabularies,
) -> Backdrop:
    """Compute the constant part; `description` is the primary blueprint's metadata."""
    counts: Counts = {}
    risks = tuple(bounded(blueprint.risk) for blueprint in blueprints)
    stages = tuple(b.descriptor.stage / _BLUEPRINT_STAGE_SCALE for b in blueprints)
    risk, stage = (risks[0], stages[0]) if blueprints else (0.0, 0.0)
    rows = {
        "blueprint": _blueprint_rows(blueprints, risks, description, counts),
        "layer": _layer_rows(description, vocabularies, counts),
        "activation": _activation_rows(description, vocabularies.activation_types, counts),
        "parameter": _parameter_rows(description, risk, stage, counts),
    }
    _count_relations(description, bool(blueprints), counts)
    return Backdrop(
        blueprints=blueprints,
        description=description,
        rows=rows,
        blueprint_risks=risks,
        blueprint_stages=stages,
        depths=_depths(description.layers) or (0.0,),
        activation_positions=_positions(len(description.activations)),
        parameter_positions=_positions(len(description.parameters)),
        counts=counts,
    )


def global_row(values: Mapping[str, float], seed_count: int, statistics: Statistics) -> list[float]:
    """The row of the `global` node; `values` are the run's present metrics."""
    row: list[float] = []
    for metric in GLOBAL_METRICS:
        row += _normalized(values.get(metric), metric, statistics)
    for metric in ("epoch", "log_step"):
        row.append(normalize(values[metric], metric, statistics))
    row.append(math.tanh(seed_count))
    progress = values.get("epoch_progress")
    row.append(0.0 if progress is None else normalize(progress, "epoch_progress", statistics))
    return row


def count_global(values: Mapping[str, float], counts: Counts) -> None:
    """Add what a packet says about its run to the coverage counts."""
    for metric in GLOBAL_METRICS:
        counts[f"global.{metric}"] = (int(metric in values), 1)
    counts["global.epoch_progress"] = (int("epoch_progress" in values), 1)


def seed_rows(
    seeds: Sequence[leyline.SeedState],
    blend_allowed: Sequence[bool],
    statistics: Statistics,
    limits: GraphLimits,
    counts: Counts,
) -> list[list[float]]:
    """Rows of the `seed` nodes; adds what is there to the coverage counts."""
    present = dict.fromkeys((*_SEED_FEATURES, "depth", "stage"), 0)
    rows = []
    for seed, allowed in zip(seeds, blend_allowed, strict=True):
        values = seed_values(seed)
        row: list[float] = []
        for feature, metric in _SEED_FEATURES.items():
            value = values.get(metric)
            row += _normalized(value, metric, statistics)
            present[feature] += value is not None
        stage, depth = seed_stage(seed), seed.layer_depth
        present["depth"] += depth > 0
        present["stage"] += stage > 0.0
        row += (
            stage,
            1.0,
            min(1.0, depth / limits.layers),
            float(depth > 0),
            id_bucket(seed.seed_id) / BUCKETS,
            float(allowed),
        )
        rows.append(row)
    for feature, there in present.items():
        counts[f"seed.{feature}"] = (there, len(rows))
    return rows


def blueprint_losses(values: Mapping[str, float], statistics: Statistics) -> list[float]:
    """The packet's columns of every `blueprint` row."""
    return [
        entry
        for metric in ("validation_loss", "training_loss")
        for entry in _normalized(values.get(metric), metric, statistics)
    ]


def seed_stage(seed: leyline.SeedState) -> float:
    """Lifecycle stage in [0, 1]; a number the contract does not name is unknown."""
    stage = seed.stage / STAGE_SCALE
    return stage if 0.0 <= stage <= 1.0 else 0.0


def bounded(value: float) -> float:
    """A risk forced into [0, 1]; 0 when it is not finite."""
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0


def _blueprint_rows(
    blueprints: Sequence[Blueprint],
    risks: Sequence[float],
    description: Description,
    counts: Counts,
) -> Floats:
    rows = np.zeros((len(blueprints), NODE_WIDTHS["blueprint"]), dtype=np.float32)
    sized = scored = tiered = risky = 0
    for place, blueprint in enumerate(blueprints):
        descriptor = blueprint.descriptor
        sizes = [layer.parameters for layer in description.layers] if place == 0 else []
        known = [size for size in sizes if size is not None]
        size = math.log1p(math.fsum(known)) if known else None
        score = blueprint.candidate_score if math.isfinite(blueprint.candidate_score) else None
        rows[place] = (
            id_bucket(blueprint.blueprint_id) / BUCKETS,
            *(0.0, 0.0, 0.0, 0.0),
            risks[place],
            descriptor.stage / _BLUEPRINT_STAGE_SCALE,
            *_constant(size, "log_blueprint_parameters"),
            descriptor.tier / _TIER_SCALE,
            descriptor.quarantine_only,
            descriptor.approval_required,
            *_constant(score, "candidate_score"),
        )
        sized += size is not None
        scored += score is not None
        tiered += descriptor.tier != leyline.BLUEPRINT_TIER_UNSPECIFIED
        risky += math.isfinite(blueprint.risk)
    for feature, there in (
        ("risk", risky),
        ("tier", tiered),
        ("parameters", sized),
        ("candidate_score", scored),
    ):
        counts[f"blueprint.{feature}"] = (there, len(blueprints))
    return rows


def _layer_rows(description: Description, vocabularies: Vocabularies, counts: Counts) -> Floats:
    layers = description.layers
    rows = _undescribed("layer", len(layers))
    depths = _depths(layers)
    for place, layer in enumerate(layers):
        rows[place] = (
            depths[place],
            layer.depth is not None,
            *_constant(layer.latency_ms, "layer_latency_ms"),
            *_constant(_log1p(layer.parameters), "log_layer_parameters"),
            layer.dropout or 0.0,
            _word(layer.type, vocabularies.layer_types),
            _word(layer.activation, vocabularies.activation_types),
            _constant(layer.weight_norm, "weight_norm")[0],
            _constant(layer.gradient_norm, "layer_gradient_norm")[0],
            1.0,
        )
    _count(counts, "layer.depth", [layer.depth for layer in layers])
    _count(counts, "layer.latency", [layer.latency_ms for layer in layers])
    _count(counts, "layer.parameters", [layer.parameters for layer in layers])
    _count(counts, "layer.dropout", [layer.dropout for layer in layers])
    _count(counts, "layer.type", [layer.type for layer in layers])
    _count(counts, "layer.activation", [layer.activation for layer in layers])
    _count(counts, "layer.weight_norm", [layer.weight_norm for layer in layers])
    _count(counts, "layer.gradient_norm", [layer.gradient_norm for layer in layers])
    return rows


def _activation_rows(description: Description, types: Vocabulary, counts: Counts) -> Floats:
    activations = description.activations
    rows = _undescribed("activation", len(activations))
    positions = _positions(len(activations))
    for place, activation in enumerate(activations):
        rows[place] = (
            _word(activation.type, types),
            1.0,
            *_constant(activation.saturation, "saturation"),
            _constant(activation.gradient_flow, "gradient_flow")[0],
            _constant(_log1p(activation.cost), "log_cost")[0],
            _constant(activation.nonlinearity, "nonlinearity")[0],
            positions[place],
        )
    _count(counts, "activation.type", [entry.type for entry in activations])
    _count(counts, "activation.saturation", [entry.saturation for entry in activations])
    _count(counts, "activation.gradient_flow", [entry.gradient_flow for entry in activations])
    _count(counts, "activation.cost", [entry.cost for entry in activations])
    _count(counts, "activation.nonlinearity", [entry.nonlinearity for entry in activations])
    return rows


def _parameter_rows(description: Description, risk: float, stage: float, counts: Counts) -> Floats:
    parameters = description.parameters
    rows = _undescribed("parameter", len(parameters))
    rows[:, -2:] = risk, stage
    for place, parameter in enumerate(parameters):
        rows[place, :-2] = (
            *_constant(parameter.min, "parameter_min"),
            *_constant(parameter.max, "parameter_max"),
            *_constant(parameter.span, "parameter_span"),
            *_constant(parameter.default, "parameter_default"),
        )
    _count(counts, "parameter.min", [entry.min for entry in parameters])
    _count(counts, "parameter.max", [entry.max for entry in parameters])
    _count(counts, "parameter.span", [entry.span for entry in parameters])
    _count(counts, "parameter.default", [entry.default for entry in parameters])
    return rows


def _count_relations(description: Description, known: bool, counts: Counts) -> None:
    """Edges between nodes that were described count as present, the placeholders' as absent."""
    layers, activations, parameters = (
        len(description.layers),
        len(description.activations),
        len(description.parameters),
    )
    for key, there, seen in (
        ("layer_connects", len(description.adjacency), max(1, len(description.adjacency))),
        ("layer_feeds", layers * activations, max(1, layers) * max(1, activations)),
        ("layer_activates", layers * activations, max(1, layers) * max(1, activations)),
        ("activation_configures", activations * parameters, max(1, activations * parameters)),
        ("parameter_modulates", activations * parameters, max(1, activations * parameters)),
        ("blueprint_composes", layers * known, max(1, layers)),
        ("parameter_targets", parameters * known, max(1, parameters)),
        ("global_operates", layers, max(1, layers)),
        ("layer_feedback", layers, max(1, layers)),
    ):
        counts[f"edges.{key}"] = (there, seen)


def _count(counts: Counts, key: str, values: Sequence[object]) -> None:
    counts[key] = (sum(value is not None for value in values), len(values))


def _undescribed(kind: str, described: int) -> Floats:
    return np.zeros((max(1, described), NODE_WIDTHS[kind]), dtype=np.float32)


def _depths(layers: Sequence[Layer]) -> tuple[float, ...]:
    """(depth + 1) / layers, at most 1; a layer without a depth stands where it is listed."""
    return tuple(
        min(1.0, ((place if layer.depth is None else layer.depth) + 1.0) / len(layers))
        for place, layer in enumerate(layers)
    )


def _positions(count: int) -> tuple[float, ...]:
    return tuple((place + 1) / count for place in range(count)) or (0.0,)


def _normalized(value: float | None, metric: str, statistics: Statistics) -> tuple[float, float]:
    return (0.0, 0.0) if value is None else (normalize(value, metric, statistics), 1.0)


def _constant(value: float | None, metric: str) -> tuple[float, float]:
    return _normalized(value, metric, _NO_STATISTICS)


def _log1p(value: float | None) -> float | None:
    return None if value is None else math.log1p(value)


def _word(name: str | None, vocabulary: Vocabulary) -> float:
    return 0.0 if name is None else vocabulary.learn(name) / BUCKETS
