"""What keeps a dead bus from costing the training loop a timeout at every step."""

from __future__ import annotations


class Circuit:
    """Refuses attempts for a while after a failure, twice as long after each further one.

    Times are seconds on whatever monotonic clock the caller passes in.
    """

    __slots__ = ("_first_delay_s", "_max_delay_s", "_next_delay_s", "_open_until_s")

    def __init__(self, first_delay_s: float = 0.1, max_delay_s: float = 5.0) -> None:
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._next_delay_s = first_delay_s
        self._open_until_s = float("-inf")

    def allows(self, now_s: float) -> bool:
        """Whether an attempt may be made now."""
        return now_s >= self._open_until_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next attempt may be made."""
        return max(0.0, self._open_until_s - now_s)

    def failed(self, now_s: float) -> None:
        """Note a failed attempt."""
        self._open_until_s = now_s + self._next_delay_s
        self._next_delay_s = min(2 * self._next_delay_s, self._max_delay_s)

    def succeeded(self) -> None:
        """Note a successful attempt."""
        self._next_delay_s = self._first_delay_s
        self._open_until_s = float("-inf")
