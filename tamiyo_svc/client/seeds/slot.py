"""A place for a seed behind any submodule, held by a forward hook and nothing else."""

from __future__ import annotations

from typing import Any

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
        self._channel_dim_given = channel_dim is not None
        self._features: Tensor | None = None
        self._handle = module.register_forward_hook(self._join)

    def plant(self, seed: nn.Module) -> None:
        """Put a seed in, taking no part yet."""
        if self._features is not None:
            seed.to(device=self._features.device, dtype=self._features.dtype)
        self.seed = seed
        self.alpha = 0.0
        self.mixing = CONVEX

    def clear(self) -> None:
        """Take the seed out."""
        self.seed = None
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
        if self.seed is None or self.silent or (self.alpha == 0.0 and not self.isolated):
            return None
        self.seed.train(module.training)
        host = features.detach() if self.isolated else features
        mixed = self.mixing.mix(host, self.seed(host), 1.0 if self.isolated else self.alpha)
        if not isinstance(output, tuple):
            return mixed
        if hasattr(output, "_replace"):
            return type(output)(mixed, *output[1:])
        return (mixed, *output[1:])

    def _note(self, features: Tensor) -> None:
        if self.channels:
            return
        if not self._channel_dim_given:
            self.channel_dim = 1 if features.ndim in (4, 5) else -1
        self.channels = features.shape[self.channel_dim]
        # Remembered for its device and number format; no memory is kept alive.
        self._features = features.new_empty(0)
