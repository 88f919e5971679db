"""What is measured of a step's gradients: their norm, how they turn, the scale they carry."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

_TENSORS: Final = 32
_ELEMENTS: Final = 1024
_EVERY_STEPS: Final = 4
_WEIGHT: Final = 0.1
_AGAINST: Final = -0.5
"""Cosine of 120 degrees: noise alone rarely turns a gradient that far."""
_NARROW: Final = frozenset({torch.float16, torch.bfloat16})
_UNSCALED: Final = ("UNSCALED", "STEPPED")


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor]) -> float | None:
    """The norm of all gradients together, over all ranks where they are sharded DTensors.

    None without any, and where all are 0, as gradients are that have been zeroed. Waits once for
    each device and dtype; with DTensors every rank must call it.
    """
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        if gradient.dtype.is_complex:
            gradient = torch.view_as_real(gradient)
        # DTensors of different meshes cannot be stacked, nor can they with plain tensors.
        mesh = getattr(gradient, "device_mesh", None)
        groups.setdefault((mesh, gradient.device, gradient.dtype), []).append(gradient)
    total = math.hypot(*(_norm(group) for group in groups.values()))
    return total if total != 0.0 else None


def _norm(gradients: list[Tensor]) -> float:
    if gradients[0].dtype in _NARROW:
        # The norm of fp16 gradients is easily above the largest fp16 number.
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    else:
        norms = list(torch._foreach_norm(gradients))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    full = getattr(norm, "full_tensor", None)
    return float(norm if full is None else full())


class ConflictMeter:
    """Share of gradient tensors that turned more than 120 degrees from their running mean.

    Looks at 1,024 elements each of 32 dense tensors on one device, at every fourth step: 256 KiB
    and some dozen kernels. The share is that of the tensors looked at, None before the second
    look.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        self._steps = 0
        self._shapes: tuple[Any, ...] = ()
        self._mean: Tensor | None = None

    @torch.no_grad()
    def observe(self, gradients: list[Tensor]) -> None:
        """Look at this step's gradients if their turn has come."""
        self._steps += 1
        if (self._steps - 1) % _EVERY_STEPS:
            return
        gradients = [gradient for gradient in gradients if not gradient.is_sparse]
        if not gradients:
            return
        every = -(-len(gradients) // _TENSORS)
        device = gradients[0].device
        samples = [_sample(g) for g in gradients[::every] if g.device == device]
        shapes = (device, *(sample.numel() for sample in samples))
        rows = torch.zeros(len(samples), _ELEMENTS, device=device)
        for row, sample in zip(rows, samples, strict=True):
            row[: sample.numel()].copy_(sample)
        mean = self._mean
        if mean is None or shapes != self._shapes:
            if bool(rows.isfinite().all()):
                self._mean, self._shapes = rows, shapes
            return
        against = (rows * mean).sum(1) < _AGAINST * rows.norm(dim=1) * mean.norm(dim=1)
        share, finite = torch.stack(
            [against.float().mean(), rows.isfinite().all().float()]
        ).tolist()
        if finite:
            self.rate = share
            mean.lerp_(rows, _WEIGHT)


def _sample(gradient: Tensor) -> Tensor:
    local = getattr(gradient, "to_local", None)
    gradient = gradient if local is None else local()
    if gradient.dtype.is_complex:
        gradient = torch.view_as_real(gradient)
    flat = gradient.reshape(-1)
    return flat[:: max(flat.numel() // _ELEMENTS, 1)][:_ELEMENTS]


class LossScale:
    """The factor by which a `GradScaler` scales a step's loss, and so its gradients; 1 without.

    A step ends after `scaler.update()`, so the scale of its backward pass is the one read when
    the step before ended.
    """

    def __init__(self, scaler: Any = None) -> None:
        self.scaler = scaler
        self._scale = self._read()

    def refresh(self) -> None:
        """Read it anew, as after a checkpoint was loaded."""
        self._scale = self._read()

    def of_gradients(self, optimizer: Any) -> float:
        """The scale that an optimizer's gradients carry before its step, 1 once unscaled."""
        states = getattr(self.scaler, "_per_optimizer_states", {})
        stage = states.get(id(optimizer), {}).get("stage")
        return 1.0 if getattr(stage, "name", "") in _UNSCALED else self._read()

    def end_step(self) -> tuple[float, bool]:
        """The scale of the step that ends, and whether it was skipped for overflow."""
        scale, self._scale = self._scale, self._read()
        return scale, self._scale < scale

    def _read(self) -> float:
        # Frameworks have objects of other kinds in that place, for precisions that scale nothing.
        get_scale = getattr(self.scaler, "get_scale", None)
        return 1.0 if get_scale is None else float(get_scale())
