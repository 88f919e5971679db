"""Annotations that tell the executor how to join a seed's output with its host's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.risk.events import number
from tamiyo_svc.taxonomy import BlendMode

_ALPHA_VEC_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class BlendOptions:
    """What an operator chose; off, no annotation is written.

    `default_mode` is a `BlendMode` by name; empty or unknown leaves it to the heuristic.
    """

    enabled: bool = False
    default_mode: str = ""
    gate_k: float = 1.0
    gate_tau: float = 1.0
    alpha_lo: float = 0.0
    alpha_hi: float = 1.0
    alpha_vec_max: int = 64


def blend_annotations(
    options: BlendOptions, alpha: float, blueprint: Blueprint | None
) -> dict[str, str]:
    """The annotations of a seed command that starts at `alpha`; empty when switched off."""
    if not options.enabled:
        return {}
    mode, source = _mode(options.default_mode)
    annotations = {"blend_mode": mode.value, "blend_mode_source": source}
    if mode is BlendMode.CONFIDENCE:
        annotations |= _gate(options)
    elif mode is BlendMode.CHANNEL:
        annotations |= _channels(options, alpha, blueprint)
    return annotations


def channel_count(metadata: Mapping[str, Any] | None) -> int | None:
    """Channels that a blueprint puts out: those of its deepest layer; None when not known."""
    layers = metadata.get("layers") if isinstance(metadata, Mapping) else None
    if not isinstance(layers, list) or not layers:
        return None
    count = layers[-1].get("output_channels") if isinstance(layers[-1], Mapping) else None
    return count if type(count) is int and count > 0 else None


def _mode(name: str) -> tuple[BlendMode, str]:
    try:
        return BlendMode(name.strip().upper()), "override"
    except ValueError:
        # No head predicts a mode, so the heuristic keeps what every executor does anyway.
        return BlendMode.CONVEX, "heuristic"


def _gate(options: BlendOptions) -> dict[str, str]:
    lo, hi = sorted((_fraction(options.alpha_lo, 0.0), _fraction(options.alpha_hi, 1.0)))
    return {
        "gate_k": number(options.gate_k if isfinite(options.gate_k) else 1.0),
        "gate_tau": number(options.gate_tau if isfinite(options.gate_tau) else 1.0),
        "alpha_lo": number(lo),
        "alpha_hi": number(hi),
    }


def _channels(options: BlendOptions, alpha: float, blueprint: Blueprint | None) -> dict[str, str]:
    count = channel_count(blueprint.graph_metadata) if blueprint is not None else None
    if count is None or count > options.alpha_vec_max:
        return {}
    vector = json.dumps([round(alpha, 6)] * count, separators=(",", ":"))
    if len(vector) > _ALPHA_VEC_BYTES:
        return {}
    return {"alpha_vec": vector, "alpha_vec_len": str(count)}


def _fraction(value: float, default: float) -> float:
    return min(1.0, max(0.0, value)) if isfinite(value) else default
