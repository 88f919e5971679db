"""The measurements a state packet carries, from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psutil

from tamiyo_svc.taxonomy import OPTIMIZER_FAMILIES
from tamiyo_svc.trainer.learner import OPTIMIZER_FAMILY, StepResult

_WEIGHT: Final = 0.1
"""Weight of the newest value in every moving average here."""
_FAMILY_INDEX: Final = OPTIMIZER_FAMILIES.index(OPTIMIZER_FAMILY) + 1


@dataclass(slots=True)
class Timings:
    """How long the parts of a step took, in milliseconds.

    The step and its hook (publishing, waiting, applying) are over only after the packet has left,
    so a packet carries those of the step before; 0 is not yet measured.
    """

    input_wait_ms: float = 0.0
    hook_latency_ms: float = 0.0
    step_latency_ms: float = 0.0
    apply_ms: float = 0.0
    finalize_ms: float = 0.0


@dataclass(slots=True)
class _Moving:
    mean: float | None = None
    variance: float = 0.0

    def observe(self, value: float) -> None:
        if self.mean is None:
            self.mean = value
            return
        deviation = value - self.mean
        self.mean += _WEIGHT * deviation
        self.variance = (1.0 - _WEIGHT) * (self.variance + _WEIGHT * deviation * deviation)


class TrainingMeters:
    """Moving averages over the run's steps.

    `loss_volatility` is the deviation of the change in training loss from step to step;
    `loss_delta` the change in validation loss since the step before. `cpu_util_percent` is this
    process's share of all cores, so that a neighbour's load is not taken for the trainer's; it is
    averaged because the system counts CPU time in ticks about as long as a step.
    """

    def __init__(self) -> None:
        self._loss = _Moving()
        self._loss_change = _Moving()
        self._gradient_norm = _Moving()
        self._conflict_rate = _Moving()
        self._cpu_util = _Moving()
        self._last_loss: float | None = None
        self._last_validation_loss: float | None = None
        self._process = psutil.Process()
        self._cores = psutil.cpu_count() or 1
        # The first call has nothing to compare with and answers 0.
        self._process.cpu_percent(interval=None)

    def observe(
        self,
        result: StepResult,
        validation_loss: float,
        timings: Timings,
        *,
        batch_size: int,
        learning_rate: float,
        epochs: int,
    ) -> dict[str, float]:
        """Fold in one step and return the packet's metrics."""
        loss_delta = validation_loss - (
            validation_loss if self._last_validation_loss is None else self._last_validation_loss
        )
        self._last_validation_loss = validation_loss
        if self._last_loss is not None:
            self._loss_change.observe(result.loss - self._last_loss)
        self._last_loss = result.loss
        self._loss.observe(result.loss)
        self._gradient_norm.observe(result.gradient_norm)
        self._conflict_rate.observe(result.conflict_rate)
        self._cpu_util.observe(min(self._process.cpu_percent(interval=None) / self._cores, 100.0))
        metrics = {
            "loss": result.loss,
            "loss_delta": loss_delta,
            "loss_ewma": self._loss.mean or 0.0,
            "loss_volatility": self._loss_change.variance**0.5,
            "gradient_norm": result.gradient_norm,
            "grad_norm_ewma": self._gradient_norm.mean or 0.0,
            "grad_var": self._gradient_norm.variance,
            "grad_conflict_rate": self._conflict_rate.mean or 0.0,
            "input_wait_ms": timings.input_wait_ms,
            "kasmina.apply_ms": timings.apply_ms,
            "kasmina.finalize_ms": timings.finalize_ms,
            "kasmina.isolation.violations": float(result.isolation_violations),
            "cpu_util_percent": self._cpu_util.mean or 0.0,
            "optimizer_lr": learning_rate,
            "optimizer_family_index": float(_FAMILY_INDEX),
            "epochs_total": float(epochs),
        }
        if timings.step_latency_ms > 0.0:
            metrics["hook_latency_ms"] = timings.hook_latency_ms
            metrics["step_latency_ms"] = timings.step_latency_ms
            metrics["samples_per_s"] = 1e3 * batch_size / timings.step_latency_ms
        return metrics
