"""The step metrics a packet carries, measured from one step to the next."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tamiyo_svc.taxonomy import OPTIMIZER_FAMILIES

_WEIGHT: Final = 0.1
"""Weight of the newest value in every moving average here."""
_GIB: Final = 1 << 30
_GPU_EVERY_S: Final = 1.0
"""How often the driver is asked for the GPU's utilization, which takes it a millisecond."""


@dataclass(slots=True)
class Moving:
    """Exponentially weighted mean and variance."""

    mean: float | None = None
    variance: float = 0.0

    def observe(self, value: float) -> None:
        """Fold in the next value."""
        if self.mean is None:
            self.mean = value
            return
        deviation = value - self.mean
        self.mean += _WEIGHT * deviation
        self.variance = (1.0 - _WEIGHT) * (self.variance + _WEIGHT * deviation * deviation)


class LossMeter:
    """`loss`, `loss_delta`, `loss_ewma` and `loss_volatility`, in the loss's own unit.

    The delta is the change in validation loss since the step before, or while there is none that
    of the averaged training loss; volatility is the deviation of the training loss's changes.
    """

    def __init__(self) -> None:
        self._loss = Moving()
        self._change = Moving()
        self._last_loss: float | None = None
        self._last_validation_loss: float | None = None

    def observe(self, loss: float, validation_loss: float | None = None) -> dict[str, float]:
        """Fold in one step."""
        last_ewma = self._loss.mean
        self._loss.observe(loss)
        if self._last_loss is not None:
            self._change.observe(loss - self._last_loss)
        self._last_loss = loss
        ewma = loss if self._loss.mean is None else self._loss.mean
        if validation_loss is None:
            delta = 0.0 if last_ewma is None else ewma - last_ewma
        else:
            before = self._last_validation_loss
            delta = 0.0 if before is None else validation_loss - before
            self._last_validation_loss = validation_loss
        return {
            "loss": loss,
            "loss_delta": delta,
            "loss_ewma": ewma,
            "loss_volatility": self._change.variance**0.5,
        }


class GradientMeter:
    """`gradient_norm`, `grad_norm_ewma` and `grad_var`, the variance of the norm."""

    def __init__(self) -> None:
        self._norm = Moving()

    def observe(self, norm: float) -> dict[str, float]:
        """Fold in one step."""
        self._norm.observe(norm)
        return {
            "gradient_norm": norm,
            "grad_norm_ewma": self._norm.mean or 0.0,
            "grad_var": self._norm.variance,
        }


class PressureMeter:
    """`cpu_util_percent` of this process over all cores, and GPU utilization and free memory.

    The CPU share is averaged because the system may count in ticks as long as a step; the GPU is
    looked at only when torch has been imported and uses one. `clock` is in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._cores = os.cpu_count() or 1
        self._cpu = Moving()
        self._last = (clock(), time.process_time())
        self._gpu: dict[str, float] = {}
        self._gpu_due_s = float("-inf")

    def observe(self) -> dict[str, float]:
        """Measure now."""
        now_s, used_s = self._clock(), time.process_time()
        elapsed_s = now_s - self._last[0]
        if elapsed_s > 0.0:
            share = (used_s - self._last[1]) / elapsed_s / self._cores
            self._cpu.observe(100.0 * min(max(share, 0.0), 1.0))
            self._last = (now_s, used_s)
        if now_s >= self._gpu_due_s:
            self._gpu_due_s = now_s + _GPU_EVERY_S
            self._gpu = _gpu_pressure()
        return {"cpu_util_percent": self._cpu.mean or 0.0, **self._gpu}


def _gpu_pressure() -> dict[str, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    free_bytes, _ = torch.cuda.mem_get_info()
    pressure = {"gpu_mem_free_gb": free_bytes / _GIB}
    try:
        pressure["gpu_util_percent"] = float(torch.cuda.utilization())
    # Needs the driver's Python binding, which says in many ways that it is not there.
    except Exception:
        return pressure
    return pressure


def family_index(name: str) -> float:
    """The number that stands for an optimizer family such as `adamw` in a packet, 0 unknown."""
    family = name.lower()
    return float(OPTIMIZER_FAMILIES.index(family) + 1) if family in OPTIMIZER_FAMILIES else 0.0


class StepMeter:
    """Everything measured for the user; with `enrich` false only losses and latencies.

    A packet carries the latencies of the step before, since the step is not over when it leaves.
    """

    def __init__(
        self, *, enrich: bool = True, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.enrich = enrich
        self.apply_ms = 0.0
        self.finalize_ms = 0.0
        self._clock = clock
        self._losses = LossMeter()
        self._gradients = GradientMeter()
        self._pressure = PressureMeter(clock) if enrich else None
        self._hook_started_s = 0.0
        self._hook_ms: float | None = None
        self._step_started_s: float | None = None
        self._step_ms: float | None = None

    def begin_hook(self) -> None:
        """The step's own work is done; Tamiyo's part begins."""
        self._hook_started_s = self._clock()

    def end_hook(self) -> None:
        """Tamiyo's part is over, and with it the step."""
        now_s = self._clock()
        self._hook_ms = 1e3 * (now_s - self._hook_started_s)
        if self._step_started_s is not None:
            self._step_ms = 1e3 * (now_s - self._step_started_s)
        self._step_started_s = now_s

    def observe(
        self,
        loss: float,
        *,
        validation_loss: float | None = None,
        gradient_norm: float | None = None,
        learning_rate: float | None = None,
        optimizer_family: str = "",
        batch_size: int = 0,
        isolation_violations: int = 0,
    ) -> dict[str, float]:
        """Fold in one step and return its metrics."""
        metrics = self._losses.observe(loss, validation_loss)
        if self._step_ms:
            metrics["step_latency_ms"] = self._step_ms
            if batch_size:
                metrics["samples_per_s"] = 1e3 * batch_size / self._step_ms
        if self._hook_ms is not None:
            metrics["hook_latency_ms"] = self._hook_ms
        metrics["kasmina.apply_ms"] = self.apply_ms
        metrics["kasmina.finalize_ms"] = self.finalize_ms
        metrics["kasmina.isolation.violations"] = float(isolation_violations)
        if learning_rate is not None:
            metrics["optimizer_lr"] = learning_rate
            metrics["optimizer_family_index"] = family_index(optimizer_family)
        if self.enrich and gradient_norm is not None:
            metrics |= self._gradients.observe(gradient_norm)
        if self._pressure is not None:
            metrics |= self._pressure.observe()
        return metrics
