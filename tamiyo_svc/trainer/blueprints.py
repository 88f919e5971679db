"""The seed modules this trainer can grow, and the catalogue that describes them to Tamiyo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from tamiyo_svc.catalog_file import Row, catalog_row, write_rows
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.description import ALPHA_BOUNDS, describe_module

_DESCRIBED_CHANNELS: Final = 24


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
    write_rows(path, [_row(blueprint) for blueprint in BLUEPRINTS.values()])


def _row(blueprint: SeedBlueprint) -> Row:
    low, high = ALPHA_BOUNDS
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
    return catalog_row(descriptor, graph_metadata(blueprint), ("cnn", "seed"))


def graph_metadata(blueprint: SeedBlueprint) -> dict[str, Any]:
    """Layers, activations and parameters of a blueprint, read off its module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_seed(blueprint.blueprint_id, _DESCRIBED_CHANNELS)
    return describe_module(blueprint.blueprint_id, module, _DESCRIBED_CHANNELS)
