"""The step metrics a packet carries, measured from one step to the next."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tamiyo_svc.client.packets import LARGEST
from tamiyo_svc.taxonomy import OPTIMIZER_FAMILIES

_WEIGHT: Final = 0.1
"""Weight of the newest value in every moving average here."""
_REACH: Final = 100.0
"""How far beyond its usual size one value can draw an average, in multiples of that size."""
_FORGET: Final = 1e6
"""An average this many times what is seen now comes from a broken first value."""
_GIB: Final = 1 << 30
_KIB_PER_GIB: Final = 1 << 20
_LOOK_EVERY_S: Final = 1.0
"""How often the driver is asked for the GPU's utilization, which takes it a millisecond."""
_MEMORY_FIELDS: Final = (("total_memory_gb", "MemTotal"), ("available_memory_gb", "MemAvailable"))


@dataclass(slots=True)
class Moving:
    """Exponentially weighted mean and variance, which no single value can spoil.

    A value that is not finite is left out and counted in `nonfinite`. One far beyond all that was
    usual counts as `_REACH` times the usual size, so that 1e30 is forgotten as fast as it.
    """

    mean: float | None = None
    variance: float = 0.0
    nonfinite: int = 0

    def observe(self, value: float) -> None:
        """Fold in the next value."""
        if not math.isfinite(value):
            self.nonfinite += 1
            return
        value = min(max(value, -LARGEST), LARGEST)
        if self.mean is None or abs(self.mean) > _FORGET * (1.0 + abs(value)):
            self.mean, self.variance = value, 0.0
            return
        reach = _REACH * (1.0 + abs(self.mean) + math.sqrt(self.variance))
        deviation = min(max(value - self.mean, -reach), reach)
        self.mean += _WEIGHT * deviation
        self.variance = (1.0 - _WEIGHT) * (self.variance + _WEIGHT * deviation * deviation)


class LossMeter:
    """`loss`, `loss_delta`, `loss_ewma` and `loss_volatility`, in the loss's own unit.

    The delta is the change in validation loss since the step before, or while there is none that
    of the averaged training loss; volatility is the deviation of the training loss's changes. A
    loss that is not finite is passed on as it is and changes nothing else.
    """

    def __init__(self) -> None:
        self._loss = Moving()
        self._change = Moving()
        self._last_loss: float | None = None
        self._last_validation_loss: float | None = None

    @property
    def nonfinite(self) -> int:
        """How many training losses were not finite."""
        return self._loss.nonfinite

    def observe(self, loss: float, validation_loss: float | None = None) -> dict[str, float]:
        """Fold in one step."""
        last_ewma = self._loss.mean
        self._loss.observe(loss)
        if math.isfinite(loss):
            if self._last_loss is not None:
                self._change.observe(loss - self._last_loss)
            self._last_loss = loss
        ewma = self._loss.mean
        if validation_loss is not None:
            delta = self._validation_delta(validation_loss)
        else:
            delta = 0.0 if ewma is None or last_ewma is None else ewma - last_ewma
        metrics = {
            "loss": loss,
            "loss_delta": delta,
            "loss_volatility": math.sqrt(self._change.variance),
        }
        if ewma is not None:
            metrics["loss_ewma"] = ewma
        return metrics

    def _validation_delta(self, validation_loss: float) -> float:
        if not math.isfinite(validation_loss):
            return 0.0
        before, self._last_validation_loss = self._last_validation_loss, validation_loss
        return 0.0 if before is None else validation_loss - before


class GradientMeter:
    """`gradient_norm`, `grad_norm_ewma` and `grad_var`, the variance of the norm."""

    def __init__(self) -> None:
        self._norm = Moving()

    @property
    def nonfinite(self) -> int:
        """How many norms were not finite."""
        return self._norm.nonfinite

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
        self._hardware: dict[str, Any] = {}
        self._due_s = float("-inf")

    @property
    def hardware(self) -> dict[str, Any]:
        """The device and its memory when last looked at, by `HardwareContext`'s fields."""
        return {**self._hardware, "utilization_percent": self._utilization_percent}

    def observe(self) -> dict[str, float]:
        """Measure now."""
        now_s, used_s = self._clock(), time.process_time()
        elapsed_s = now_s - self._last[0]
        if elapsed_s > 0.0:
            share = (used_s - self._last[1]) / elapsed_s / self._cores
            self._cpu.observe(100.0 * min(max(share, 0.0), 1.0))
            self._last = (now_s, used_s)
        if now_s >= self._due_s:
            self._due_s = now_s + _LOOK_EVERY_S
            torch = sys.modules.get("torch")
            on_gpu = torch is not None and torch.cuda.is_initialized()
            self._hardware, self._gpu = _look_at_gpu(torch) if on_gpu else (_look_at_host(), {})
        return {"cpu_util_percent": self._cpu.mean or 0.0, **self._gpu}

    @property
    def _utilization_percent(self) -> float:
        return self._gpu.get("gpu_util_percent", self._cpu.mean or 0.0)


def _look_at_gpu(torch: Any) -> tuple[dict[str, Any], dict[str, float]]:
    hardware: dict[str, Any] = {"device_type": "cuda"}
    pressure = {}
    try:
        hardware["device_id"] = f"cuda:{torch.cuda.current_device()}"
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        hardware["total_memory_gb"] = total_bytes / _GIB
        hardware["available_memory_gb"] = pressure["gpu_mem_free_gb"] = free_bytes / _GIB
        pressure["gpu_util_percent"] = float(torch.cuda.utilization())
    # Needs the driver's Python binding, which says in many ways that it is not there.
    except Exception:
        return hardware, pressure
    return hardware, pressure


def _look_at_host() -> dict[str, Any]:
    hardware: dict[str, Any] = {"device_type": "cpu", "device_id": "cpu"}
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = dict(line.split(":", 1) for line in lines)
        for field, name in _MEMORY_FIELDS:
            hardware[field] = int(sizes[name].split()[0]) / _KIB_PER_GIB
    # Another system, or one that hides it.
    except (OSError, KeyError, ValueError):
        return hardware
    return hardware


def family_index(name: str) -> float:
    """The number that stands for an optimizer family such as `adamw` in a packet, 0 unknown."""
    family = name.lower()
    return float(OPTIMIZER_FAMILIES.index(family) + 1) if family in OPTIMIZER_FAMILIES else 0.0


class StepMeter:
    """Everything measured for the user; with `enrich` false only losses and latencies.

    A packet carries the latencies of the step before, since the step is not over when it leaves.
    What `aside` timed is no part of `hook_latency_ms` and has a metric of its own.
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
        self._conflict = Moving()
        self._pressure = PressureMeter(clock) if enrich else None
        self._started_s = clock()
        self._hook_started_s = self._started_s
        self._asides: dict[str, float] = {}
        self._latencies: dict[str, float] = {}
        self._input_wait_ms: float | None = None
        self._batch_size = 0
        self._steps = 0

    @property
    def hardware(self) -> dict[str, Any] | None:
        """The device and its memory, None without enrichment."""
        return None if self._pressure is None else self._pressure.hardware

    @property
    def aside_ms(self) -> float:
        """What `aside` timed in this step, all together."""
        return sum(self._asides.values())

    def begin_hook(self) -> None:
        """The step's own work is done; Tamiyo's part begins."""
        self._asides = {}
        self._hook_started_s = self._clock()

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Time work within Tamiyo's part that is not its own, as the metric `name`, in ms."""
        started_s = self._clock()
        try:
            yield
        finally:
            elapsed_ms = 1e3 * max(self._clock() - started_s, 0.0)
            self._asides[name] = self._asides.get(name, 0.0) + elapsed_ms

    def end_hook(self) -> None:
        """Tamiyo's part is over, and with it the step."""
        now_s = self._clock()
        hook_ms = 1e3 * (now_s - self._hook_started_s) - self.aside_ms
        self._latencies = {"hook_latency_ms": max(hook_ms, 0.0), **self._asides}
        # The first step began before anybody looked, and a clock set back measures nothing.
        if self._steps and now_s > self._started_s:
            self._latencies["step_latency_ms"] = 1e3 * (now_s - self._started_s)
        self._started_s = now_s
        self._steps += 1

    def note_batch(self, wait_ms: float, size: int) -> None:
        """A batch of this step came after so long a wait; a step may have several."""
        self._input_wait_ms = (self._input_wait_ms or 0.0) + max(wait_ms, 0.0)
        self._batch_size += size

    def pass_over(self, elapsed_s: float) -> None:
        """Leave a time between two steps, such as a validation's, out of the one to come."""
        self._started_s += elapsed_s

    def observe(
        self,
        loss: float,
        *,
        validation_loss: float | None = None,
        gradient_norm: float | None = None,
        grad_conflict_rate: float | None = None,
        learning_rate: float | None = None,
        optimizer_family: str = "",
        batch_size: int = 0,
        isolation_violations: int = 0,
    ) -> dict[str, float]:
        """Fold in one step and return its metrics."""
        batch_size = batch_size or self._batch_size
        metrics = {**self._losses.observe(loss, validation_loss), **self._latencies}
        if batch_size and "step_latency_ms" in metrics:
            metrics["samples_per_s"] = 1e3 * batch_size / metrics["step_latency_ms"]
        if self._input_wait_ms is not None:
            metrics["input_wait_ms"] = self._input_wait_ms
        self._input_wait_ms, self._batch_size = None, 0
        metrics["kasmina.apply_ms"] = self.apply_ms
        metrics["kasmina.finalize_ms"] = self.finalize_ms
        metrics["kasmina.isolation.violations"] = float(isolation_violations)
        if learning_rate is not None:
            metrics["optimizer_lr"] = learning_rate
            metrics["optimizer_family_index"] = family_index(optimizer_family)
        if self.enrich and gradient_norm is not None:
            metrics |= self._gradients.observe(gradient_norm)
        if self.enrich and grad_conflict_rate is not None:
            self._conflict.observe(grad_conflict_rate)
            metrics["grad_conflict_rate"] = self._conflict.mean or 0.0
        if self._pressure is not None:
            metrics |= self._pressure.observe()
        nonfinite = self._losses.nonfinite + self._gradients.nonfinite
        if nonfinite:
            metrics["nonfinite_total"] = float(nonfinite)
        return metrics
