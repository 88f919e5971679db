"""The measurements a state packet carries, from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psutil

from tamiyo_svc.client.meters import GradientMeter, LossMeter, Moving, family_index
from tamiyo_svc.trainer.learner import OPTIMIZER_FAMILY, StepResult

_FAMILY_INDEX: Final = family_index(OPTIMIZER_FAMILY)


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


class TrainingMeters:
    """Moving averages over the run's steps.

    `cpu_util_percent` is this
    process's share of all cores, so that a neighbour's load is not taken for the trainer's; it is
    averaged because the system counts CPU time in ticks about as long as a step.
    """

    def __init__(self) -> None:
        self._losses = LossMeter()
        self._gradients = GradientMeter()
        self._conflict_rate = Moving()
        self._cpu_util = Moving()
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
        self._conflict_rate.observe(result.conflict_rate)
        self._cpu_util.observe(min(self._process.cpu_percent(interval=None) / self._cores, 100.0))
        metrics = {
            **self._losses.observe(result.loss, validation_loss),
            **self._gradients.observe(result.gradient_norm),
            "grad_conflict_rate": self._conflict_rate.mean or 0.0,
            "input_wait_ms": timings.input_wait_ms,
            "kasmina.apply_ms": timings.apply_ms,
            "kasmina.finalize_ms": timings.finalize_ms,
            "kasmina.isolation.violations": float(result.isolation_violations),
            "cpu_util_percent": self._cpu_util.mean or 0.0,
            "optimizer_lr": learning_rate,
            "optimizer_family_index": _FAMILY_INDEX,
            "epochs_total": float(epochs),
        }
        if timings.step_latency_ms > 0.0:
            metrics["hook_latency_ms"] = timings.hook_latency_ms
            metrics["step_latency_ms"] = timings.step_latency_ms
            metrics["samples_per_s"] = 1e3 * batch_size / timings.step_latency_ms
        return metrics
