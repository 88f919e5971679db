"""A tiny network and what it learns; the same for a plain loop and for Lightning."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INPUTS: Final = 8
CLASSES: Final = 4
_WIDTH: Final = 24
PLACE: Final = "1.inner"
"""Behind which there is a seed: in what is recomputed, where anything is."""
ROWS: Final = 16
"""Of a micro-batch."""


class Block(nn.Module):
    """A residual block, whose inner part can be recomputed in the backward pass."""

    def __init__(self, *, recomputed: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(_WIDTH, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)
        self.recomputed = recomputed

    def forward(self, features: Tensor) -> Tensor:
        """Features of the same shape."""
        if self.recomputed:
            added: Tensor = checkpoint(self._inner, features, use_reentrant=False)
        else:
            added = self._inner(features)
        normed: Tensor = self.norm(features + added)
        return normed

    def _inner(self, features: Tensor) -> Tensor:
        return torch.relu(self.inner(features))


def build_network(*, recomputed: bool) -> nn.Sequential:
    """Some thousand parameters, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUTS, _WIDTH),
        Block(recomputed=recomputed),
        Block(recomputed=recomputed),
        nn.Linear(_WIDTH, CLASSES),
    )


def rows(count: int, random_seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and the classes that a fixed linear map gives them."""
    generator = torch.Generator().manual_seed(random_seed)
    inputs = torch.randn(count, INPUTS, generator=generator)
    teacher = torch.randn(INPUTS, CLASSES, generator=torch.Generator().manual_seed(1))
    return inputs, (inputs @ teacher).argmax(1)


def batch_of(rank: int, index: int) -> tuple[Tensor, Tensor]:
    """A micro-batch of a rank."""
    return rows(ROWS, 2 * index + rank + 2)


def probe() -> Tensor:
    """Inputs to compare outputs by."""
    return rows(ROWS, 0)[0]
