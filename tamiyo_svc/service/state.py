"""What the whole replica knows between packets: breakers, emergencies, how it serves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from tamiyo_svc.decision.record import PolicyIdentity, Runtime
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.breaker import (
    CLOSED,
    Breaker,
    BreakerPolicy,
    admit,
    record_failure,
    record_recovery,
    record_success,
)
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.runs.state import packet_digest
from tamiyo_svc.taxonomy import BreakerName, BreakerState, Event, Severity

OPERATOR_REASON = "operator"
INFERENCE_BREAKER_REASON = "inference_breaker_open"


@dataclass(frozen=True, slots=True)
class Emergency:
    """An emergency signal for every run; runs remember by `mark` that they heard of it."""

    signal: leyline.EmergencySignal
    mark: bytes

    @classmethod
    def of(cls, signal: leyline.EmergencySignal) -> Emergency:
        """The emergency of a signal; the same signal has the same mark in every replica."""
        return cls(signal, packet_digest(signal.SerializeToString(deterministic=True)))


@dataclass(slots=True)
class ReplicaState:
    """Breakers and serving facts; times are seconds of a monotonic clock."""

    runtime: Runtime
    breaker_policy: BreakerPolicy
    operator_conservative: bool = False
    policy_untrained: bool = False
    on_inference: Callable[[bool], None] = lambda success: None
    """Hears how each inference ended: in time and well, or not."""
    emergency: Emergency | None = None
    breakers: dict[BreakerName, Breaker] = field(
        default_factory=lambda: dict.fromkeys(BreakerName, CLOSED)
    )
    _unreported: deque[FiredEvent] = field(default_factory=lambda: deque(maxlen=256))

    def admit(self, name: BreakerName, now_s: float) -> bool:
        """Whether a call may be tried now."""
        breaker, admitted, event = admit(self.breakers[name], name, now_s)
        self._store(name, breaker, event)
        return admitted

    def record(self, name: BreakerName, *, success: bool, now_s: float) -> None:
        """Note how a call ended."""
        if name is BreakerName.INFERENCE:
            self.on_inference(success)
        if success:
            breaker, event = record_success(self.breakers[name], name)
        else:
            breaker, event = record_failure(self.breakers[name], self.breaker_policy, name, now_s)
        self._store(name, breaker, event)

    def recovered(self, name: BreakerName) -> None:
        """Note that what a breaker guards was seen to work by other means than admitted calls."""
        breaker, event = record_recovery(self.breakers[name], name)
        self._store(name, breaker, event)

    def restore(self, breakers: Mapping[BreakerName, Breaker]) -> None:
        """Go on with the breakers an earlier process of this replica left; nothing is told."""
        self.breakers.update(breakers)

    def conservative_reason(self) -> str | None:
        """Why every run is to be treated conservatively; None when none is.

        A half-open breaker lets one packet try the network; the others still get no proposal.
        """
        if self.operator_conservative:
            return OPERATOR_REASON
        if self.breakers[BreakerName.INFERENCE].state is not BreakerState.CLOSED:
            return INFERENCE_BREAKER_REASON
        return None

    def serve(self, policy: PolicyIdentity, *, untrained: bool) -> None:
        """Name the policy that decides from now on."""
        self.runtime = replace(self.runtime, policy=policy)
        self.policy_untrained = untrained

    def emergencies_for(self, heard: bytes) -> tuple[leyline.EmergencySignal, ...]:
        """The emergency for all runs, unless it is the one that a run has heard of."""
        if self.emergency is None or self.emergency.mark == heard:
            return ()
        return (self.emergency.signal,)

    def take_unreported(self) -> tuple[FiredEvent, ...]:
        """The transitions nobody was told of yet; whoever takes them tells or gives them back."""
        events = tuple(self._unreported)
        self._unreported.clear()
        return events

    def give_back(self, events: Iterable[FiredEvent]) -> None:
        """Return transitions whose telemetry was not committed."""
        self._unreported.extendleft(reversed(tuple(events)))

    def report(self, event: FiredEvent) -> None:
        """Have an event that belongs to no packet told with the next telemetry."""
        self._unreported.append(event)

    def _store(self, name: BreakerName, breaker: Breaker, event: FiredEvent | None) -> None:
        before = self.conservative_reason()
        self.breakers[name] = breaker
        after = self.conservative_reason()
        if event is not None:
            self.report(event)
        # Between open and half open the reason stays, so a failed probe is no new entry.
        if before is None and after is not None:
            entered = {"reason": after, "scope": "service"}
            self.report(FiredEvent(Event.CONSERVATIVE_ENTERED, Severity.WARNING, entered))
        elif before is not None and after is None:
            left = {"reason": before, "scope": "service"}
            self.report(FiredEvent(Event.CONSERVATIVE_EXITED, Severity.INFO, left))

    def snapshot(self) -> Runtime:
        """The facts one decision is stamped with."""
        return replace(self.runtime, breakers=dict(self.breakers))
