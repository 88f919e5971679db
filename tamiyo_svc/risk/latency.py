"""Whether a latency has risen above what a run's own steps take.

The reference is the median of the older half of a run's last latencies, so that a rise is told
while it is one, and is the run's own level once it fills most of that half.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Final

from tamiyo_svc.leyline import leyline_pb2 as leyline

KEPT: Final = 32
"""How many latencies of a kind are remembered."""

MAX_STEPS: Final = KEPT // 2
"""The longest row of slow steps that can be told from the level before it."""

_WARM_UP: Final = 16
"""So many are known before any can be slow: compilation and first batches are no measure."""

Series = tuple[float, ...]
"""Latencies in milliseconds, the oldest first; each is finite, above 0 and a float32."""


@dataclass(frozen=True, slots=True)
class Rise:
    """A latency above `limit_ms`; `steps` is how many in a row, this one included."""

    median_ms: float
    limit_ms: float
    steps: int


@dataclass(frozen=True, slots=True)
class Latencies:
    """The last latencies of one run, by kind."""

    step: Series = ()
    hook: Series = ()

    def observe(self, packet: leyline.SystemStatePacket) -> Latencies:
        """With a packet's latencies; one that is absent or no length of time is left out."""
        metrics = packet.training_metrics
        step = _appended(self.step, metrics.get("step_latency_ms", 0.0))
        hook = _appended(self.hook, metrics.get("hook_latency_ms", 0.0))
        return Latencies(step, hook)


NO_LATENCIES: Final = Latencies()


def find_rise(known: Series, value_ms: float, ratio: float, floor_ms: float) -> Rise | None:
    """How far `value_ms` lies above the run's level, None where it does not.

    Above means both `ratio` times the median and `floor_ms` more than it. Slow steps that come
    now and then, as those with an evaluation do, are part of the level: a row of slow steps is a
    rise once it is longer than the number of slow steps before it.
    """
    if len(known) < _WARM_UP:
        return None
    half = (len(known) + 1) // 2
    middle = median(known[:half])
    limit = max(ratio * middle, middle + floor_ms)
    if value_ms <= limit:
        return None
    steps = 1
    for latency in reversed(known[half:]):
        if latency <= limit:
            break
        steps += 1
    usual = sum(latency > limit for latency in known[: len(known) - steps + 1])
    return Rise(middle, limit, steps) if steps > usual else None


def _appended(series: Series, value_ms: float) -> Series:
    return (*series[1 - KEPT :], value_ms) if 0.0 < value_ms < inf else series
