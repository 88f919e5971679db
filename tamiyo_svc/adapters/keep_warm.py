"""Foresees when the next work comes, so that the weights are read into the caches just before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

_REMEMBERED: Final = 8
_SHORTEST_GAP_S: Final = 0.005
_LONGEST_GAP_S: Final = 2.0


@dataclass(slots=True)
class KeepWarm:
    """Touches the weights once per arrival, `lead_s` before the next one is expected.

    `touch` reads one of so many parts; after each part the lane looks whether work has come. One
    pass an arrival bounds the price, whatever the forecast is worth. All times are seconds of one
    clock.
    """

    touch: Callable[[int, int], None]
    parts: int = 16
    lead_s: float = 0.002
    _gaps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _arrived_s: float | None = None

    def arrived(self, now_s: float) -> None:
        """Note that work has come."""
        if self._arrived_s is not None:
            self._gaps_s.append(now_s - self._arrived_s)
        self._arrived_s = now_s

    def due_s(self) -> float | None:
        """When to touch; None while the weights stay warm by themselves or nothing is foreseen."""
        if self._arrived_s is None or not self._gaps_s:
            return None
        gap_s = median(self._gaps_s)
        if not _SHORTEST_GAP_S <= gap_s <= _LONGEST_GAP_S:
            return None
        return self._arrived_s + gap_s - self.lead_s
