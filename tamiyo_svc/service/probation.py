"""A new policy's probation: how its first inferences went, and whether that is good enough."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ProbationState(Enum):
    """Where a probation stands."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"


@dataclass(slots=True)
class Probation:
    """Counts inferences until `decisions` of them went by, or too many did not go well.

    It fails on `failures` failed or late inferences in all, or on `in_a_row` of them one after
    the other: that many open the breaker, after which there would be nothing left to count.
    """

    decisions: int
    failures: int
    in_a_row: int
    seen: int = 0
    failed: int = 0
    _row: int = 0

    @property
    def state(self) -> ProbationState:
        """Where it stands now; it never leaves `PASSED` or `FAILED`."""
        if self.failed >= self.failures or self._row >= self.in_a_row:
            return ProbationState.FAILED
        return ProbationState.PASSED if self.seen >= self.decisions else ProbationState.RUNNING

    @property
    def left(self) -> int:
        """Inferences still to be seen."""
        return max(0, self.decisions - self.seen)

    def record(self, *, success: bool) -> ProbationState:
        """Count one inference, unless the probation is over."""
        if self.state is ProbationState.RUNNING:
            self.seen += 1
            self.failed += not success
            self._row = 0 if success else self._row + 1
        return self.state
