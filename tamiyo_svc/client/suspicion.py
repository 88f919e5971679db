"""When to tell a trainer that none of the service's commands can be used, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tamiyo_svc.taxonomy import CommandRejection

_REFUSALS: Final = 3
"""So many refused commands in a row are no accident."""
_MISSES: Final = 3
"""So many waits in a row without a command are none, nor are so many packets without one."""
_PACKETS: Final = 20
_LATE_WAITS: Final = 20
_PATIENCE_S: Final = 0.5
"""A service that has just been started answers by then."""
_WAITLESS_PATIENCE_S: Final = 5.0
_BETWEEN_S: Final = 60.0
"""Between two lines about the same trouble that came back."""
_FORGED: Final = (
    "commands come whose signature does not verify: is the secret (ESPER_LEYLINE_SECRET) the "
    "service's?"
)
_CLOCK: Final = "is the clock of this machine or of the service's wrong?"
_CAUSES: Final = {
    CommandRejection.MISSING_SIGNATURE: "commands come unsigned: does the service have the secret?",
    CommandRejection.INVALID_SIGNATURE: _FORGED,
    CommandRejection.MISSING_COMMAND_SIGNATURE: "commands come unsigned, not from a service",
    CommandRejection.INVALID_COMMAND_SIGNATURE: _FORGED,
    CommandRejection.STALE: _CLOCK,
    CommandRejection.FROM_THE_FUTURE: _CLOCK,
    CommandRejection.WRONG_RUN: "commands of another run come on this run's reply stream",
    CommandRejection.UNKNOWN_PACKET: (
        "commands come for packets that this process has not sent: does another one use this "
        "run id?"
    ),
}


class Suspicion:
    """Counts what goes wrong in a row; its user holds a lock and says what this returns.

    Each trouble is told once until it is over, and again at most once a minute. `monotonic` is in
    seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._told = False
        self._tell_from_s = float("-inf")
        self._refusals = 0
        self._reasons: set[CommandRejection] = set()
        self._packets = 0
        self._first_s = 0.0
        self._misses = 0
        self._late_told = False

    @property
    def is_doubtful(self) -> bool:
        """Whether there is reason to look whether anybody answers."""
        return not self._told and self._packets >= _MISSES and self._misses >= _MISSES

    def sent(self, packets: int) -> None:
        """Note packets that the bus has taken."""
        if not self._packets:
            self._first_s = self._monotonic()
        self._packets += packets

    def missed(self) -> None:
        """Note a wait that ended without a command."""
        self._misses += 1

    def taken(self) -> None:
        """Note a command that was there in time."""
        self._misses = 0

    def refused(self, reason: CommandRejection, detail: str) -> str:
        """Note a refused command; what is to be said, empty for nothing."""
        self._refusals += 1
        first = reason not in self._reasons
        self._reasons.add(reason)
        if not first and (self._refusals < _REFUSALS or not self._may_tell()):
            return ""
        self._tell()
        cause = "; ".join(part for part in (detail, _CAUSES.get(reason, "")) if part)
        return f"command refused: {reason}" + (f" ({cause})" if cause else "")

    def accepted(self) -> str:
        """Note a command that can be used; what is to be said, empty for nothing."""
        self._refusals = self._packets = 0
        line = "commands can be used again" if self._told else ""
        self._told = False
        return line

    def late(self, waited_s: float) -> str:
        """Note a command that nobody waits for any more; what is to be said, empty for nothing."""
        if self._misses < _LATE_WAITS or self._late_told:
            return ""
        self._late_told = True
        return (
            f"commands come after the wait for them is over, the last one after {waited_s:g} s: "
            "wait longer, or take them a step later with poll"
        )

    def is_silent(self, *, last: bool) -> bool:
        """Whether it is time to say that nobody answers, which then counts as said.

        With `last` there will be no better time.
        """
        if self._packets < _MISSES or not self._may_tell():
            return False
        silent_s = self._monotonic() - self._first_s
        waiting = self._misses >= _MISSES and (last or silent_s >= _PATIENCE_S)
        if not waiting and (self._packets < _PACKETS or silent_s < _WAITLESS_PATIENCE_S):
            return False
        self._tell()
        return True

    def _may_tell(self) -> bool:
        return not self._told and self._monotonic() >= self._tell_from_s

    def _tell(self) -> None:
        self._told = True
        self._tell_from_s = self._monotonic() + _BETWEEN_S
