"""What the whole replica knows between packets: breakers, emergencies, how it serves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tamiyo_svc.decision.record import PolicyIdentity, Runtime
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.breaker import CLOSED, Breaker, BreakerPolicy, admit, record_failure
from tamiyo_svc.risk.breaker import record_success as breaker_success
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.taxonomy import BreakerName, BreakerState

OPERATOR_REASON = "operator"
INFERENCE_BREAKER_REASON = "inference_breaker_open"


@dataclass(slots=True)
class ReplicaState:
    """Breakers and serving facts; times are seconds of a monotonic clock."""

    runtime: Runtime
    breaker_policy: BreakerPolicy
    operator_conservative: bool = False
    policy_untrained: bool = False
    emergency: leyline.EmergencySignal | None = None
    breakers: dict[BreakerName, Breaker] = field(
        default_factory=lambda: dict.fromkeys(BreakerName, CLOSED)
    )
    _alarmed: set[str] = field(default_factory=set)
    _unreported: deque[FiredEvent] = field(default_factory=lambda: deque(maxlen=256))

    def admit(self, name: BreakerName, now_s: float) -> bool:
        """Whether a call may be tried now."""
        breaker, admitted, event = admit(self.breakers[name], name, now_s)
        self._store(name, breaker, event)
        return admitted

    def record(self, name: BreakerName, *, success: bool, now_s: float) -> None:
        """Note how a call ended."""
        if success:
            breaker, event = breaker_success(self.breakers[name], name)
        else:
            breaker, event = record_failure(self.breakers[name], self.breaker_policy, name, now_s)
        self._store(name, breaker, event)

    def conservative_reason(self) -> str | None:
        """Why every run is to be treated conservatively; None when none is."""
        if self.operator_conservative:
            return OPERATOR_REASON
        if self.breakers[BreakerName.INFERENCE].state is BreakerState.OPEN:
            return INFERENCE_BREAKER_REASON
        return None

    def serve(self, policy: PolicyIdentity, *, untrained: bool) -> None:
        """Name the policy that decides from now on."""
        self.runtime = replace(self.runtime, policy=policy)
        self.policy_untrained = untrained

    def alarm_all(self, signal: leyline.EmergencySignal) -> None:
        """Take an emergency signal that is for every run; each hears of it once."""
        self.emergency = signal
        self._alarmed.clear()

    def emergencies_for(self, run_id: str) -> tuple[leyline.EmergencySignal, ...]:
        """The emergency a run has not heard of yet."""
        if self.emergency is None or run_id in self._alarmed:
            return ()
        return (self.emergency,)

    def alarmed(self, run_id: str) -> None:
        """Note that a run has heard of the emergency and remembers it itself."""
        if self.emergency is not None:
            self._alarmed.add(run_id)

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
        self.breakers[name] = breaker
        if event is not None:
            self.report(event)

    def snapshot(self) -> Runtime:
        """The facts one decision is stamped with."""
        return replace(self.runtime, breakers=dict(self.breakers))
