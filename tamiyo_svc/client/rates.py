"""The learning rate of somebody else's optimizer, as far as commands may change it."""

from __future__ import annotations

from typing import Any, Final

MIN_LEARNING_RATE: Final = 1e-8
MAX_LEARNING_RATE: Final = 1.0


class OptimizerRate:
    """Scales the learning rates of a torch optimizer, and the base rates of its scheduler.

    A scheduler computes each rate from its base or from the rate before; scaling both keeps the
    change whichever way it goes. Without an optimizer the rate is 0 and nothing changes.
    """

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler

    @property
    def family(self) -> str:
        """The optimizer's class name in lower case, such as `adamw`."""
        return "" if self.optimizer is None else type(self.optimizer).__name__.lower()

    @property
    def learning_rate(self) -> float:
        """The first group's rate now."""
        return 0.0 if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    def change_learning_rate(self, delta: float) -> None:
        """Multiply every rate by 1 + `delta`, within bounds; 0 leaves each bit as it is."""
        if delta == 0.0 or self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = _scaled(group["lr"], delta)
            if "initial_lr" in group:
                group["initial_lr"] = _scaled(group["initial_lr"], delta)
        bases = getattr(self.scheduler, "base_lrs", None)
        if bases is not None:
            self.scheduler.base_lrs = [_scaled(rate, delta) for rate in bases]


def _scaled(rate: Any, delta: float) -> Any:
    if rate == 0.0:
        return rate
    scaled = rate * (1.0 + delta)
    # A rate beyond the bounds by the user's own choice is not dragged back to them.
    return min(max(scaled, min(rate, MIN_LEARNING_RATE)), max(rate, MAX_LEARNING_RATE))
