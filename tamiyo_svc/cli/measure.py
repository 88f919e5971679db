"""Percentiles, the machine they were measured on, and the probe that tells its noise from ours."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

PROBE_BYTES: Final = 28 << 20
"""About the folded network's weights in float32."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles of a sample, in the sample's unit."""

    count: int
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Percentiles that are values of the sample; all NaN when there are none.

        The p99.9 of fewer than a thousand values is the largest of them.
        """
        ordered = sorted(values)

        def at(share: float) -> float:
            if not ordered:
                return float("nan")
            return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]

        return cls(len(ordered), at(0.5), at(0.9), at(0.95), at(0.99), at(0.999), at(1.0))

    def cells(self) -> list[str]:
        """One row of a table; `HEADINGS` are its titles."""
        figures = (self.p50, self.p90, self.p95, self.p99, self.p999, self.worst)
        return [str(self.count), *(f"{figure:.2f}" for figure in figures)]


HEADINGS: Final = ("count", "p50", "p90", "p95", "p99", "p99.9", "max")
"""Titles of `Distribution.cells`."""


class WeightProbe:
    """Streams as many bytes as the network's weights have, and does nothing else."""

    def __init__(self, size_bytes: int = PROBE_BYTES) -> None:
        self._memory = np.ones(size_bytes // 4, np.float32)

    def __call__(self) -> None:
        """Read all of it once."""
        self._memory.sum()


def timed_ms(call: Callable[[], object], count: int, gap_s: float = 0.0) -> list[float]:
    """Milliseconds of `count` calls, one every `gap_s` as far as they leave time."""
    times_ms = []
    due_s = time.perf_counter()
    for _ in range(count):
        due_s += gap_s
        if (left_s := due_s - time.perf_counter()) > 0:
            time.sleep(left_s)
        started = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - started) * 1e3)
    return times_ms


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], rounds: int, count: int, gap_s: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of several calls that take turns, `count` at a time, over `rounds`.

    The first round of each is a warm-up and is left out.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = timed_ms(call, count, gap_s)
            if number:
                times_ms[name] += taken
    return times_ms


def machine() -> dict[str, Any]:
    """What it ran on, and how busy that was."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if "model name" in line), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.system(),
        "python": platform.python_version(),
    }
