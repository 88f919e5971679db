"""How a seed's output joins its host's: the schedule of alpha, and the ways to mix."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tamiyo_svc.taxonomy import BLENDING_METHODS, BlendMode

_NARROWEST_WINDOW: Final = 0.1
"""A ramp over less of the blend than this would be a jump; it is spread over all of it."""
_WARMUP: Final = 0.5
"""Share of its window in which `warmup_hold` rises; the rest it holds."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Alpha over the steps of a blend: from `first_alpha` to 1 within a window of fractions."""

    method: str = "linear"
    first_alpha: float = 0.0
    start: float = 0.0
    end: float = 1.0
    total_steps: int = 20

    def alpha(self, steps: int) -> float:
        """Alpha after `steps` steps; exactly 1 from `total_steps` on."""
        if steps >= self.total_steps:
            return 1.0
        span = self.end - self.start
        progress = min(max((steps / self.total_steps - self.start) / span, 0.0), 1.0)
        risen = (1.0 - self.first_alpha) * _shape(self.method, progress)
        return min(self.first_alpha + risen, 1.0)


def _shape(method: str, progress: float) -> float:
    if method == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * progress)
    if method == "warmup_hold":
        return min(progress / _WARMUP, 1.0)
    return progress


def read_schedule(parameters: Mapping[str, float], total_steps: int) -> Schedule:
    """The schedule a seed command asks for; what is absent or makes no sense keeps its default."""
    index = _fraction(parameters.get("blending_method_index"), largest=len(BLENDING_METHODS) - 1.0)
    start = _fraction(parameters.get("blending_schedule_start"))
    end = _fraction(parameters.get("blending_schedule_end"), absent=1.0)
    if end - start < _NARROWEST_WINDOW:
        start, end = 0.0, 1.0
    return Schedule(
        method=BLENDING_METHODS[round(index)],
        first_alpha=_fraction(parameters.get("alpha")),
        start=start,
        end=end,
        total_steps=total_steps,
    )


def _fraction(value: float | None, absent: float = 0.0, largest: float = 1.0) -> float:
    if value is None or not math.isfinite(value):
        return absent
    return min(max(value, 0.0), largest)


@dataclass(frozen=True, slots=True)
class Mixing:
    """A way to mix features h (n, ...) with a seed's residual r of the same shape.

    CONVEX (1 - alpha) h + alpha (h + r). RESIDUAL h + alpha r. CHANNEL h + alpha a_c r with one
    weight a_c for each channel. CONFIDENCE h + clamp(alpha g, lo, hi) r with a gate g for each
    sample: 1 while |r| / |h| is at most tau, exp(-k (|r| / |h| - tau)) beyond. `channel_dim` is
    the dimension of h that holds the channels.
    """

    mode: BlendMode = BlendMode.CONVEX
    gate_k: float = 1.0
    gate_tau: float = 1.0
    alpha_lo: float = 0.0
    alpha_hi: float = 1.0
    alpha_vec: tuple[float, ...] = ()
    channel_dim: int = 1

    def mix(
        self, host: Tensor, residual: Tensor, alpha: float, *, rank: int | None = None
    ) -> Tensor:
        """Host features with the seed's contribution, same shape.

        `rank` is their number of dimensions where they are placeholders that cannot tell.
        """
        rank = host.ndim if rank is None else rank
        if self.mode is BlendMode.RESIDUAL:
            return host + alpha * residual
        if self.mode is BlendMode.CHANNEL:
            shape = [1] * rank
            shape[self.channel_dim] = -1
            weights = host.new_tensor(self.alpha_vec).view(shape)
            return host + alpha * weights * residual
        if self.mode is BlendMode.CONFIDENCE:
            size = host.detach().flatten(1).norm(dim=1).clamp_min(1e-6)
            change = residual.detach().flatten(1).norm(dim=1) / size
            gate = torch.exp(-self.gate_k * (change - self.gate_tau).clamp_min(0.0))
            weight = (alpha * gate).clamp(self.alpha_lo, self.alpha_hi)
            return host + weight.view(-1, *[1] * (rank - 1)) * residual
        return (1.0 - alpha) * host + alpha * (host + residual)


CONVEX: Final = Mixing()


def read_mixing(annotations: Mapping[str, str], channels: int, channel_dim: int = 1) -> Mixing:
    """The way to mix a command's annotations ask for; convex when any of it makes no sense."""
    try:
        mode = BlendMode(annotations.get("blend_mode", BlendMode.CONVEX))
        if mode is BlendMode.CHANNEL:
            return Mixing(
                mode=mode,
                alpha_vec=_channel_weights(annotations, channels),
                channel_dim=channel_dim,
            )
        if mode is BlendMode.CONFIDENCE:
            gate_k, gate_tau = (_finite(annotations[key]) for key in ("gate_k", "gate_tau"))
            lo, hi = (_finite(annotations[key]) for key in ("alpha_lo", "alpha_hi"))
            if gate_k < 0.0 or not 0.0 <= lo <= hi <= 1.0:
                return CONVEX
            return Mixing(mode, gate_k, gate_tau, lo, hi)
    except (KeyError, ValueError, TypeError, RecursionError):
        return CONVEX
    return Mixing(mode=mode)


def _channel_weights(annotations: Mapping[str, str], channels: int) -> tuple[float, ...]:
    weights = tuple(_finite(weight) for weight in json.loads(annotations["alpha_vec"]))
    if len(weights) != channels or int(annotations.get("alpha_vec_len", channels)) != channels:
        raise ValueError("not one weight for each channel")
    if not all(0.0 <= weight <= 1.0 for weight in weights):
        raise ValueError("a weight outside 0 to 1")
    return weights


def _finite(value: str | float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number
