"""The host network in which seeds can grow."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from tamiyo_svc.trainer.data import CLASSES

CHANNELS: Final = (12, 24, 24)
"""Channels of the host's blocks. Small, so that seeds have work to do."""
PLACES: Final = tuple(f"blocks.{index}" for index in range(len(CHANNELS)))
"""The submodules behind which a seed can grow."""


class HostNetwork(nn.Module):
    """A small convolutional classifier of images (n, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        blocks = []
        width = 1
        for depth, channels in enumerate(CHANNELS):
            stride = 2 if depth == 1 else 1
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(width, channels, 3, stride, padding=1, bias=False),
                    nn.GroupNorm(4, channels),
                    nn.ReLU(),
                )
            )
            width = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10)."""
        features = images
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
