"""A place for a seed behind any submodule, held by a forward hook and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tamiyo_svc.client.seeds.blending import CONVEX, Mixing


class Slot:
    """The place behind `module`, whose output is a tensor or a tuple that begins with one.

    With alpha 0, and in an empty slot, the output is left alone: the very same object. The
    channels are dimension 1 of images and volumes, else the last, unless `channel_dim` says so.
    The module gains no parameter, buffer or submodule, so that its state dict stays what it was.
    """

    def __init__(self, module: nn.Module, channel_dim: int | None = None) -> None:
        self.channels = 0
        self.channel_dim = -1 if channel_dim is None else channel_dim
        self.alpha = 0.0
        self.mixing: Mixing = CONVEX
        self.seed: nn.Module | None = None
        self.isolated = False
        """Whether the seed takes full part, cut off from what made its input."""
        self.silent = False
        """Whether the seed is left out, to see what it is worth."""
        self.failure: Exception | None = None
        """What the seed raised in the network's own pass; it is left out from then on."""
        self._channel_dim_given = channel_dim is not None
        self._features: Tensor | None = None
        self._shape = torch.Size()
        self._handle = module.register_forward_hook(self._join)

    def plant(self, seed: nn.Module) -> None:
        """Put a seed in, taking no part yet."""
        self.clear()
        if self._features is not None:
            seed.to(device=self._features.device, dtype=self._features.dtype)
        self.seed = seed

    def check(self, seed: nn.Module) -> None:
        """Try a seed on features as they were when first seen here, if they were.

        Raises:
            ValueError: what it returns is not one residual of the same shape.
            Exception: whatever it raises itself.
        """
        if self._features is None:
            return
        features = torch.zeros(self._shape).to(self._features)
        training = seed.training
        with torch.no_grad():
            _residual(seed.to(features).eval(), features)
        seed.train(training)

    def clear(self) -> None:
        """Take the seed out."""
        self.seed = None
        self.failure = None
        self.alpha = 0.0
        self.mixing = CONVEX

    def detach(self) -> None:
        """Take seed and hook away; the module is as it was before."""
        self.clear()
        self._handle.remove()

    def _join(self, module: nn.Module, _: Any, output: Any) -> Any:
        features = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(features, Tensor) or features.ndim == 0:
            return None
        self._note(features)
        if self.seed is None or self.silent:
            return None
        if self.isolated:
            mixed = self._mix(self.seed.train(module.training), features.detach(), 1.0)
        elif self.alpha == 0.0 or self.failure is not None:
            return None
        else:
            try:
                mixed = self._mix(self.seed.train(module.training), features, self.alpha)
            # A seed's error must not end its host's training.
            except Exception as error:
                self.failure = error
                return None
        if not isinstance(output, tuple):
            return mixed
        if hasattr(output, "_replace"):
            return type(output)(mixed, *output[1:])
        return (mixed, *output[1:])

    def _mix(self, seed: nn.Module, host: Tensor, alpha: float) -> Tensor:
        return self.mixing.mix(host, _residual(seed, host), alpha)

    def _note(self, features: Tensor) -> None:
        if self.channels:
            return
        if not self._channel_dim_given:
            self.channel_dim = 1 if features.ndim in (4, 5) else -1
        self.channels = features.shape[self.channel_dim]
        # Remembered for its device and number format; no memory is kept alive.
        self._features = features.new_empty(0)
        self._shape = features.shape


def _residual(seed: nn.Module, host: Tensor) -> Tensor:
    residual = seed(host)
    if not isinstance(residual, Tensor) or residual.shape != host.shape:
        found = tuple(getattr(residual, "shape", ())) or type(residual).__name__
        raise ValueError(f"the seed returns {found} for features of shape {tuple(host.shape)}")
    return residual
