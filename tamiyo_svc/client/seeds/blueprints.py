"""Ready-made seeds; each starts as a residual of exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import nn

Build = Callable[[int], nn.Module]
"""Makes a seed for features of so many channels; what it returns is added to them."""


def residual_mlp(channels: int) -> nn.Module:
    """A bottleneck of two linear layers, for features whose last dimension is the channels."""
    last = nn.Linear(max(4, channels // 2), channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.LayerNorm(channels), nn.Linear(channels, max(4, channels // 2)), nn.GELU(), last
    )


def residual_conv(channels: int) -> nn.Module:
    """Two 3x3 convolutions, for images (n, channels, y, x)."""
    last = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.GroupNorm(1, channels),
        nn.GELU(),
        last,
    )


BLUEPRINTS: Final[Mapping[str, Build]] = {
    "seed-residual-mlp": residual_mlp,
    "seed-residual-conv3x3": residual_conv,
}
"""What a bank grows unless it is given blueprints of its own."""
