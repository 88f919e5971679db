"""The seed modules this trainer can grow, and the catalogue that describes them to Tamiyo."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from google.protobuf import json_format
from torch import Tensor, nn

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import BLENDING_METHODS

_TABLE: Final = """
CREATE TABLE blueprints (
    blueprint_id VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    tier VARCHAR NOT NULL,
    artifact_path VARCHAR NOT NULL,
    metadata_json TEXT NOT NULL,
    PRIMARY KEY (blueprint_id)
)
"""
_DESCRIBED_CHANNELS: Final = 24
_ALPHA_BOUNDS: Final = (0.0, 1.0)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all of them (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(2, channels // 4))
        self.activation = nn.ReLU()
        self.excite = nn.Linear(max(2, channels // 4), channels)
        self.gate = nn.Sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, channels, y, x), same shape out."""
        pooled = features.mean(dim=(2, 3))
        gate: Tensor = self.gate(self.excite(self.activation(self.squeeze(pooled))))
        return features * gate[:, :, None, None]


def _residual_conv(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.GroupNorm(4, channels),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def _depthwise(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.GroupNorm(4, channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1),
    )


def _bottleneck(channels: int) -> nn.Sequential:
    narrow = max(4, channels // 2)
    return nn.Sequential(
        nn.Conv2d(channels, narrow, 1, bias=False),
        nn.GroupNorm(2, narrow),
        nn.ReLU(),
        nn.Conv2d(narrow, narrow, 3, padding=1),
        SqueezeExcite(narrow),
        nn.Conv2d(narrow, channels, 1),
    )


@dataclass(frozen=True, slots=True)
class SeedBlueprint:
    """One kind of seed; `build` makes its module for a number of channels."""

    blueprint_id: str
    tier: leyline.BlueprintTier
    risk: float
    stage: int
    description: str
    build: Callable[[int], nn.Sequential]


BLUEPRINTS: Final[Mapping[str, SeedBlueprint]] = {
    blueprint.blueprint_id: blueprint
    for blueprint in (
        SeedBlueprint(
            "seed-residual-conv3x3",
            leyline.BLUEPRINT_TIER_SAFE,
            0.1,
            3,
            "two 3x3 convolutions beside the identity",
            _residual_conv,
        ),
        SeedBlueprint(
            "seed-depthwise-conv",
            leyline.BLUEPRINT_TIER_SAFE,
            0.15,
            3,
            "depthwise 3x3 convolution, then 1x1",
            _depthwise,
        ),
        SeedBlueprint(
            "seed-bottleneck-se",
            leyline.BLUEPRINT_TIER_EXPERIMENTAL,
            0.25,
            2,
            "narrow 3x3 convolution with squeeze and excitation",
            _bottleneck,
        ),
    )
}


def build_seed(blueprint_id: str, channels: int) -> nn.Sequential:
    """A fresh module that computes a residual for features (n, channels, y, x).

    Its last layer starts at zero, so joined to its host it first changes nothing.

    Raises:
        KeyError: no such blueprint.
    """
    module = BLUEPRINTS[blueprint_id].build(channels)
    for parameter in module[-1].parameters():
        nn.init.zeros_(parameter)
    return module


def write_catalog(path: Path) -> None:
    """Write the blueprints as an Urza catalogue (SQLite), replacing the file as a whole."""
    staged = path.with_suffix(path.suffix + ".new")
    staged.unlink(missing_ok=True)
    with closing(sqlite3.connect(staged)) as database, database:
        database.execute(_TABLE)
        database.executemany(
            "INSERT INTO blueprints VALUES (?, ?, ?, ?, ?)",
            [_row(blueprint) for blueprint in BLUEPRINTS.values()],
        )
    os.replace(staged, path)


def _row(blueprint: SeedBlueprint) -> tuple[str, str, str, str, str]:
    low, high = _ALPHA_BOUNDS
    descriptor = leyline.BlueprintDescriptor(
        blueprint_id=blueprint.blueprint_id,
        name=blueprint.blueprint_id.upper(),
        tier=blueprint.tier,
        allowed_parameters={
            "alpha": leyline.BlueprintParameterBounds(min_value=low, max_value=high)
        },
        risk=blueprint.risk,
        stage=blueprint.stage,
        description=blueprint.description,
    )
    document = json_format.MessageToDict(descriptor, preserving_proto_field_name=True)
    document["_urza"] = {
        "guard_digest": None,
        "prewarm_samples": [],
        "graph_metadata": graph_metadata(blueprint),
        "tags": ["cnn", "seed"],
    }
    return (
        blueprint.blueprint_id,
        descriptor.name,
        leyline.BlueprintTier.Name(blueprint.tier),
        f"artifacts/{blueprint.blueprint_id}.pt",
        json.dumps(document, separators=(",", ":")),
    )


_LAYER_TYPES: Final[Mapping[type[nn.Module], str]] = {
    nn.Conv2d: "conv2d",
    nn.GroupNorm: "group_norm",
    nn.Linear: "linear",
}
_ACTIVATIONS: Final[Mapping[type[nn.Module], tuple[str, float]]] = {
    nn.ReLU: ("relu", 0.5),
    nn.GELU: ("gelu", 0.6),
    nn.Sigmoid: ("sigmoid", 0.8),
}
"""Name and a nominal strength of the nonlinearity."""


def graph_metadata(blueprint: SeedBlueprint) -> dict[str, Any]:
    """Layers, activations and parameters of a blueprint, read off its module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_seed(blueprint.blueprint_id, _DESCRIBED_CHANNELS)
    leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
    layers: list[dict[str, Any]] = []
    activations: list[dict[str, Any]] = []
    for leaf in leaves:
        if type(leaf) in _ACTIVATIONS:
            name, strength = _ACTIVATIONS[type(leaf)]
            activations.append(
                {
                    "activation_id": f"{blueprint.blueprint_id}-A{len(activations)}",
                    "type": name,
                    "nonlinearity_strength": strength,
                    "computational_cost": float(_DESCRIBED_CHANNELS),
                }
            )
            if layers:
                layers[-1]["activation"] = name
        else:
            layers.append(_layer(blueprint, leaf, len(layers)))
    low, high = _ALPHA_BOUNDS
    return {
        "schema_version": "v1",
        "layers": layers,
        "activations": activations,
        "parameters": [
            {"name": "alpha", "min": low, "max": high, "span": high - low, "default": low}
        ],
        "capabilities": {"allowed_blending_methods": list(BLENDING_METHODS)},
        "adjacency": {"layer": [[depth, depth + 1] for depth in range(len(layers) - 1)]},
    }


def _layer(blueprint: SeedBlueprint, leaf: nn.Module, depth: int) -> dict[str, Any]:
    weights = torch.cat([parameter.detach().flatten() for parameter in leaf.parameters()])
    described: dict[str, Any] = {
        "layer_id": f"{blueprint.blueprint_id}-L{depth}",
        "type": _LAYER_TYPES[type(leaf)],
        "depth": depth,
        "parameter_count": weights.numel(),
        "dropout_rate": 0.0,
        "weight_norm": round(float(weights.norm()), 4),
    }
    if isinstance(leaf, nn.Conv2d):
        described["output_channels"] = leaf.out_channels
    elif isinstance(leaf, nn.Linear):
        described["output_channels"] = leaf.out_features
    return described
