"""What was seen of a run after one command, over a number of epochs."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Observation:
    """One later step; None is a value that was not measured."""

    epoch: int
    loss_delta: float | None
    hook_latency_ms: float | None
    critical: bool


@dataclass(frozen=True, slots=True)
class ObservationWindow:
    """Sums over the steps after a command, from `start_epoch` for `epochs` epochs.

    `losses` and `hooks` count the steps that had a loss delta or a hook latency;
    `opened_at_ns` is wall-clock time.
    """

    command_id: str
    start_epoch: int
    epochs: int
    opened_at_ns: int
    steps: int = 0
    losses: int = 0
    loss_delta_total: float = 0.0
    loss_delta_min: float = 0.0
    loss_delta_max: float = 0.0
    hooks: int = 0
    hook_latency_total_ms: float = 0.0
    critical: bool = False
    closed_early: bool = False

    def is_over(self, epoch: int) -> bool:
        """Whether the run has reached the end of the window."""
        return epoch >= self.start_epoch + self.epochs

    def observe(self, seen: Observation) -> ObservationWindow:
        """The window with one more step in it."""
        window = replace(self, steps=self.steps + 1, critical=self.critical or seen.critical)
        if seen.loss_delta is not None:
            first = self.losses == 0
            window = replace(
                window,
                losses=self.losses + 1,
                loss_delta_total=self.loss_delta_total + seen.loss_delta,
                loss_delta_min=seen.loss_delta
                if first
                else min(self.loss_delta_min, seen.loss_delta),
                loss_delta_max=seen.loss_delta
                if first
                else max(self.loss_delta_max, seen.loss_delta),
            )
        if seen.hook_latency_ms is not None:
            window = replace(
                window,
                hooks=self.hooks + 1,
                hook_latency_total_ms=self.hook_latency_total_ms + seen.hook_latency_ms,
            )
        return window
