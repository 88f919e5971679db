"""The host network and the places in it where seeds can grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from tamiyo_svc.client.seeds.blending import CONVEX, Mixing
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.data import CLASSES

CHANNELS: Final = (12, 24, 24)
"""Channels of the host's blocks; behind each is a slot. Small, so that seeds have work to do."""


class SeedSlot(nn.Module):
    """A place behind a host block, empty or with a seed that computes a residual.

    With alpha 0 its output is its input, the very same tensor, so an empty slot and a seed that
    does not take part yet leave the network exactly as it was.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.channel_dim = 1
        self.alpha = 0.0
        self.mixing: Mixing = CONVEX
        self.seed: nn.Module | None = None
        self.stage: leyline.SeedLifecycleStage = leyline.SEED_STAGE_DORMANT
        self.blueprint_id = ""

    def forward(self, host: Tensor) -> Tensor:
        """Features of shape (n, channels, y, x), with the seed's part in them."""
        if self.seed is None or self.alpha == 0.0:
            return host
        residual: Tensor = self.seed(host)
        return self.mixing.mix(host, residual, self.alpha)

    def plant(self, seed: nn.Module) -> None:
        """Put a seed in, taking no part yet."""
        self.seed = seed
        self.alpha = 0.0
        self.mixing = CONVEX

    def clear(self) -> None:
        """Take the seed out."""
        self.seed = None
        self.alpha = 0.0
        self.mixing = CONVEX


class HostNetwork(nn.Module):
    """A small convolutional classifier of images (n, 1, 8, 8) with one slot behind each block.

    Group instead of batch normalization: no running statistics that a pass with another seed
    would change.
    """

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
        self.slots = nn.ModuleList(SeedSlot(channels) for channels in CHANNELS)
        self.head = nn.Linear(width, CLASSES)

    def slot(self, index: int) -> SeedSlot:
        """The slot behind block `index`."""
        slot = self.slots[index]
        if not isinstance(slot, SeedSlot):
            raise TypeError("not a slot")
        return slot

    def host_parameters(self) -> list[nn.Parameter]:
        """The parameters of the host alone."""
        return [*self.blocks.parameters(), *self.head.parameters()]

    def forward(self, images: Tensor, without: int | None = None) -> Tensor:
        """Logits (n, 10); `without` leaves the seed in that slot out."""
        features = images
        for index, block in enumerate(self.blocks):
            features = block(features)
            if index != without:
                features = self.slots[index](features)
        return self._classify(features)

    def trial(self, images: Tensor, index: int) -> Tensor:
        """Logits (n, 10) as if the seed in slot `index` took full part.

        Gradients reach that seed and nothing else: the features it sees are cut off from what
        made them, and all other parameters are frozen while it is computed.
        """
        slot = self.slot(index)
        if slot.seed is None:
            raise ValueError(f"slot {index} is empty")
        with torch.no_grad():
            features = images
            for depth in range(index + 1):
                features = self.blocks[depth](features)
                if depth < index:
                    features = self.slots[depth](features)
        with self._frozen_except(slot.seed):
            features = slot.mixing.mix(features, slot.seed(features), 1.0)
            for depth in range(index + 1, len(self.blocks)):
                features = self.slots[depth](self.blocks[depth](features))
            return self._classify(features)

    def _classify(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits

    @contextmanager
    def _frozen_except(self, seed: nn.Module) -> Iterator[None]:
        own = set(seed.parameters())
        frozen = [p for p in self.parameters() if p.requires_grad and p not in own]
        for parameter in frozen:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad = True
