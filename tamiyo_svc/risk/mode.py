"""Conservative mode of one run.

A rule enters it; it is left after enough steps in a row without a HIGH or CRITICAL event. One
step either enters or leaves, never both: the table has a single next state for each input.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.taxonomy import Event, Severity

_HEADER = struct.Struct("<?IB")
_REASON_BYTES = 64


class StepKind(Enum):
    """What a step means for the mode, the strongest first."""

    ALARM = "alarm"
    """A rule asks for conservative mode."""
    TROUBLED = "troubled"
    """An event was HIGH or CRITICAL, but no rule asks for the mode."""
    LAST_CALM = "last_calm"
    """Calm, and with it the cool-down is over."""
    CALM = "calm"


_ACTIVE_NEXT: Final[Mapping[tuple[bool, StepKind], bool]] = {
    (False, StepKind.ALARM): True,
    (False, StepKind.TROUBLED): False,
    (False, StepKind.LAST_CALM): False,
    (False, StepKind.CALM): False,
    (True, StepKind.ALARM): True,
    (True, StepKind.TROUBLED): True,
    (True, StepKind.LAST_CALM): False,
    (True, StepKind.CALM): True,
}


@dataclass(frozen=True, slots=True)
class ConservativeMode:
    """The mode and why; `calm_steps` counts towards leaving it and is 0 while inactive."""

    active: bool = False
    reason: str = ""
    calm_steps: int = 0

    def to_bytes(self) -> bytes:
        """The mode as a few bytes."""
        reason = self.reason.encode()
        return _HEADER.pack(self.active, self.calm_steps, len(reason)) + reason

    @classmethod
    def from_bytes(cls, data: bytes) -> ConservativeMode:
        """The inverse of `to_bytes`.

        Raises:
            StoredStateError: not what `to_bytes` writes.
        """
        try:
            active, calm_steps, length = _HEADER.unpack_from(data)
            reason = data[_HEADER.size :].decode()
        except (struct.error, UnicodeDecodeError) as error:
            raise StoredStateError(f"conservative mode: {error}") from None
        if len(data) != _HEADER.size + length:
            raise StoredStateError("conservative mode: wrong length")
        return cls(active, reason, calm_steps)


INACTIVE: Final = ConservativeMode()


def step_mode(
    mode: ConservativeMode,
    *,
    alarm: str | None,
    severity: Severity,
    cooldown_steps: int,
) -> tuple[ConservativeMode, FiredEvent | None]:
    """The mode after a step, and the event when it was entered or left.

    `alarm` is the reason of the rule that asks for the mode, `severity` the step's worst.
    """
    calm_steps = mode.calm_steps + 1
    kind = _kind(alarm, severity, last=calm_steps >= cooldown_steps)
    active = _ACTIVE_NEXT[mode.active, kind]
    if active and not mode.active:
        reason = _bounded(alarm or "")
        entered = FiredEvent(Event.CONSERVATIVE_ENTERED, Severity.WARNING, {"reason": reason})
        return ConservativeMode(active=True, reason=reason), entered
    if mode.active and not active:
        attributes = {"reason": mode.reason, "calm_steps": str(calm_steps)}
        return INACTIVE, FiredEvent(Event.CONSERVATIVE_EXITED, Severity.INFO, attributes)
    if not active:
        return INACTIVE, None
    calm = kind is StepKind.CALM
    return replace(mode, calm_steps=calm_steps if calm else 0), None


def _kind(alarm: str | None, severity: Severity, *, last: bool) -> StepKind:
    if alarm is not None:
        return StepKind.ALARM
    if severity >= Severity.HIGH:
        return StepKind.TROUBLED
    return StepKind.LAST_CALM if last else StepKind.CALM


def _bounded(reason: str) -> str:
    return reason.encode()[:_REASON_BYTES].decode(errors="ignore")
