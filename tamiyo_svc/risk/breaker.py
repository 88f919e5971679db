"""Circuit breakers as a transition table over immutable states; the caller brings the clock.

CLOSED     success       CLOSED     the failures are forgotten
CLOSED     failure       CLOSED     one more in a row
CLOSED     last failure  OPEN       that many in a row
OPEN       success       OPEN       the late result of a call from before
OPEN       failure       OPEN       likewise
OPEN       cooled down   HALF_OPEN  one probe may go
HALF_OPEN  success       CLOSED     and the cool-down is short again
HALF_OPEN  failure       OPEN       and the cool-down doubles, up to a cap
HALF_OPEN  cooled down   HALF_OPEN  the probe was lost, another may go
any        recovered     CLOSED     its owner has probed on its own and seen it work
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite
from typing import Final

from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.risk.events import FiredEvent, number
from tamiyo_svc.taxonomy import BreakerName, BreakerState, Event, Severity

_FORMAT = struct.Struct("<BIdd")
_MAX_FAILURES = 2**32 - 1


class BreakerInput(Enum):
    """What can happen to a breaker."""

    SUCCESS = "success"
    FAILURE = "failure"
    LAST_FAILURE = "last_failure"
    COOLED_DOWN = "cooled_down"
    RECOVERED = "recovered"


TRANSITIONS: Final[Mapping[tuple[BreakerState, BreakerInput], BreakerState]] = {
    (BreakerState.CLOSED, BreakerInput.SUCCESS): BreakerState.CLOSED,
    (BreakerState.CLOSED, BreakerInput.FAILURE): BreakerState.CLOSED,
    (BreakerState.CLOSED, BreakerInput.LAST_FAILURE): BreakerState.OPEN,
    (BreakerState.OPEN, BreakerInput.SUCCESS): BreakerState.OPEN,
    (BreakerState.OPEN, BreakerInput.FAILURE): BreakerState.OPEN,
    (BreakerState.OPEN, BreakerInput.COOLED_DOWN): BreakerState.HALF_OPEN,
    (BreakerState.HALF_OPEN, BreakerInput.SUCCESS): BreakerState.CLOSED,
    (BreakerState.HALF_OPEN, BreakerInput.FAILURE): BreakerState.OPEN,
    (BreakerState.HALF_OPEN, BreakerInput.COOLED_DOWN): BreakerState.HALF_OPEN,
    (BreakerState.CLOSED, BreakerInput.RECOVERED): BreakerState.CLOSED,
    (BreakerState.OPEN, BreakerInput.RECOVERED): BreakerState.CLOSED,
    (BreakerState.HALF_OPEN, BreakerInput.RECOVERED): BreakerState.CLOSED,
}

_EVENTS: Final[Mapping[BreakerState, tuple[Event, Severity, str]]] = {
    BreakerState.OPEN: (Event.BREAKER_OPENED, Severity.CRITICAL, "opened"),
    BreakerState.HALF_OPEN: (Event.BREAKER_HALF_OPENED, Severity.INFO, "half_opened"),
    BreakerState.CLOSED: (Event.BREAKER_CLOSED, Severity.INFO, "closed"),
}


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens and for how long; the cool-down doubles from `cooldown_s` to the cap."""

    failures: int = 3
    cooldown_s: float = 5.0
    max_cooldown_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """State of one breaker.

    `failures` counts in a row. `cooldown_s` is the current one and 0 while closed. `since_s` is
    when it opened or last let a probe go, on the caller's clock.
    """

    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    cooldown_s: float = 0.0
    since_s: float = 0.0

    def to_bytes(self) -> bytes:
        """The breaker as a few bytes; `since_s` means something only on the same clock."""
        return _FORMAT.pack(self.state, self.failures, self.cooldown_s, self.since_s)

    @classmethod
    def from_bytes(cls, data: bytes) -> Breaker:
        """The inverse of `to_bytes`.

        Raises:
            StoredStateError: not what `to_bytes` writes.
        """
        try:
            state, failures, cooldown_s, since_s = _FORMAT.unpack(data)
            breaker = cls(BreakerState(state), failures, cooldown_s, since_s)
        except (struct.error, ValueError) as error:
            raise StoredStateError(f"breaker: {error}") from None
        if not (isfinite(cooldown_s) and cooldown_s >= 0.0 and isfinite(since_s)):
            raise StoredStateError("breaker: time is not finite")
        return breaker


CLOSED: Final = Breaker()


def admit(
    breaker: Breaker, name: BreakerName, now_s: float
) -> tuple[Breaker, bool, FiredEvent | None]:
    """Whether a call may be tried now: always when closed, else one probe per cool-down."""
    if breaker.state is BreakerState.CLOSED:
        return breaker, True, None
    if now_s - breaker.since_s < breaker.cooldown_s:
        return breaker, False, None
    state = TRANSITIONS[breaker.state, BreakerInput.COOLED_DOWN]
    after = replace(breaker, state=state, since_s=now_s)
    return after, True, _transition(breaker, after, name)


def record_success(breaker: Breaker, name: BreakerName) -> tuple[Breaker, FiredEvent | None]:
    """The breaker after a call that succeeded."""
    state = TRANSITIONS[breaker.state, BreakerInput.SUCCESS]
    if state is not BreakerState.CLOSED:
        return breaker, None
    return CLOSED, _transition(breaker, CLOSED, name)


def record_recovery(breaker: Breaker, name: BreakerName) -> tuple[Breaker, FiredEvent | None]:
    """The breaker once what it guards was seen to work by probes it had no say in."""
    assert TRANSITIONS[breaker.state, BreakerInput.RECOVERED] is BreakerState.CLOSED
    return CLOSED, _transition(breaker, CLOSED, name)


def record_failure(
    breaker: Breaker, policy: BreakerPolicy, name: BreakerName, now_s: float
) -> tuple[Breaker, FiredEvent | None]:
    """The breaker after a call that failed."""
    failures = min(breaker.failures + 1, _MAX_FAILURES)
    closed = breaker.state is BreakerState.CLOSED
    last = closed and failures >= policy.failures
    given = BreakerInput.LAST_FAILURE if last else BreakerInput.FAILURE
    state = TRANSITIONS[breaker.state, given]
    after = replace(breaker, state=state, failures=failures)
    if state is BreakerState.OPEN and breaker.state is not BreakerState.OPEN:
        doubled = policy.cooldown_s if closed else 2.0 * breaker.cooldown_s
        after = replace(after, cooldown_s=min(doubled, policy.max_cooldown_s), since_s=now_s)
    return after, _transition(breaker, after, name)


def _transition(before: Breaker, after: Breaker, name: BreakerName) -> FiredEvent | None:
    if before.state is after.state:
        return None
    event, severity, action = _EVENTS[after.state]
    attributes = {
        "component": name.value,
        "action": action,
        "failures": str(after.failures),
        "cooldown_s": number(after.cooldown_s),
    }
    return FiredEvent(event, severity, attributes)
