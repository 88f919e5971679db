"""A seed's module as the graph metadata of a catalogue describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from tamiyo_svc.taxonomy import BLENDING_METHODS

ALPHA_BOUNDS: Final = (0.0, 1.0)

_ACTIVATIONS: Final[Mapping[type[nn.Module], tuple[str, float]]] = {
    nn.ReLU: ("relu", 0.5),
    nn.GELU: ("gelu", 0.6),
    nn.Sigmoid: ("sigmoid", 0.8),
}
"""Name and a nominal strength of the nonlinearity."""


def describe_module(blueprint_id: str, module: nn.Module, channels: int) -> dict[str, Any]:
    """Layers, activations and parameters of a blueprint, read off a module for so many channels."""
    leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
    layers: list[dict[str, Any]] = []
    activations: list[dict[str, Any]] = []
    for leaf in leaves:
        if type(leaf) in _ACTIVATIONS:
            name, strength = _ACTIVATIONS[type(leaf)]
            activations.append(
                {
                    "activation_id": f"{blueprint_id}-A{len(activations)}",
                    "type": name,
                    "nonlinearity_strength": strength,
                    "computational_cost": float(channels),
                }
            )
            if layers:
                layers[-1]["activation"] = name
        else:
            layers.append(_layer(blueprint_id, leaf, len(layers)))
    low, high = ALPHA_BOUNDS
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


def _layer(blueprint_id: str, leaf: nn.Module, depth: int) -> dict[str, Any]:
    weights = [parameter.detach() for parameter in leaf.parameters()]
    norms = torch.tensor([float(weight.norm()) for weight in weights])
    described: dict[str, Any] = {
        "layer_id": f"{blueprint_id}-L{depth}",
        "type": _layer_type(leaf),
        "depth": depth,
        "parameter_count": sum(weight.numel() for weight in weights),
        "dropout_rate": leaf.p if isinstance(leaf, nn.Dropout) else 0.0,
        "weight_norm": round(float(norms.norm()), 4),
    }
    if isinstance(leaf, nn.Conv2d):
        described["output_channels"] = leaf.out_channels
    elif isinstance(leaf, nn.Linear):
        described["output_channels"] = leaf.out_features
    return described


def _layer_type(leaf: nn.Module) -> str:
    """The name of its class in small letters: `conv2d`, `group_norm`, `layer_norm`, `linear`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(leaf).__name__).lower()
