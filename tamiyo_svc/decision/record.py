"""One decision as it was made: what the command, the telemetry and the report are built from."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.breaker import Breaker
from tamiyo_svc.risk.engine import Verdict
from tamiyo_svc.risk.events import FiredEvent, most_severe
from tamiyo_svc.risk.signals import Signals
from tamiyo_svc.taxonomy import BreakerName, CommandAction, Event, PolicyAction, Severity

SOURCE: Final = "tamiyo"
"""How the service names itself in what it sends."""

PROPOSED_ACTIONS: Final[Mapping[PolicyAction, CommandAction]] = {
    PolicyAction.SEED: CommandAction.SEED,
    PolicyAction.OPTIMIZER: CommandAction.OPTIMIZER,
    PolicyAction.PAUSE: CommandAction.PAUSE,
    PolicyAction.BREAKER_OPEN: CommandAction.BREAKER,
    PolicyAction.BREAKER_CLOSE: CommandAction.BREAKER,
}
"""The kind of command each proposed action stands for."""

_RUN_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:esper:tamiyo:command")
_DETAIL_CHARS: Final = 256
_NANOS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class PolicyIdentity:
    """Which policy decided; `version` is the name that commands and reports carry."""

    policy_id: str
    version: str
    architecture: str = "tamiyo_gnn_v1"


@dataclass(frozen=True, slots=True)
class Runtime:
    """What served the decision: policy, device, compilation, budgets and breakers."""

    policy: PolicyIdentity
    device: str = "cpu"
    replica: str = ""
    compile_enabled: bool = False
    compile_warm_ms: float | None = None
    compile_fallbacks: int = 0
    compile_reason: str = ""
    step_timeout_ms: float = 5.0
    metadata_timeout_ms: float = 10.0
    breakers: Mapping[BreakerName, Breaker] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """A packet, what was proposed for it, and what became of that.

    `proposal` is None when the network did not run or did not finish. `other_events` are those
    that no risk rule fired: mode changes, breakers, windows. `now_ns` is wall-clock time.
    """

    packet: leyline.SystemStatePacket
    packet_digest: bytes
    signals: Signals
    verdict: Verdict
    proposal: Proposal | None
    runtime: Runtime
    now_ns: int
    other_events: tuple[FiredEvent, ...] = ()

    @cached_property
    def command_id(self) -> str:
        """The command's id, the same for the same packet."""
        return command_id_for(self.packet.training_run_id, self.packet_digest)

    @cached_property
    def events(self) -> tuple[FiredEvent, ...]:
        """Every event: the rules' in their order, what the graph left out, then the rest."""
        return (*self.verdict.events, *graph_events(self.proposal), *self.other_events)

    @cached_property
    def severity(self) -> Severity:
        """Severity of the worst event, INFO without any; it gives level, priority and stream."""
        return severity_of(self.events)

    @property
    def conservative(self) -> bool:
        """Whether conservative mode governs this decision or begins with it."""
        return self.signals.conservative_reason is not None or self.verdict.conservative


def command_id_for(run_id: str, packet_digest: bytes) -> str:
    """UUIDv5 of a run and the digest of a packet's bytes."""
    return str(uuid.uuid5(uuid.uuid5(_RUN_NAMESPACE, run_id), packet_digest.hex()))


def timestamp(time_ns: int) -> Timestamp:
    """A protobuf timestamp from nanoseconds since the epoch."""
    return Timestamp(seconds=time_ns // _NANOS, nanos=time_ns % _NANOS)


def severity_of(events: tuple[FiredEvent, ...]) -> Severity:
    """Severity of the worst event, INFO without any."""
    worst = most_severe(events)
    return worst.severity if worst else Severity.INFO


def abort(decision: Decision, detail: str) -> Decision:
    """The decision after its command could not be built: a pause that says so."""
    failed = FiredEvent(Event.COMMAND_FAILED, Severity.HIGH, {"detail": detail[:_DETAIL_CHARS]})
    verdict = replace(
        decision.verdict,
        action=CommandAction.PAUSE,
        reason=failed.event.value,
        leading=failed,
        events=(*decision.verdict.events, failed),
    )
    return replace(decision, verdict=verdict)


def graph_events(proposal: Proposal | None) -> tuple[FiredEvent, ...]:
    """What the graph had to leave out: nodes over their cap, metadata that does not parse."""
    if proposal is None:
        return ()
    events = []
    if any(proposal.truncated.values()):
        cut = {kind: str(count) for kind, count in sorted(proposal.truncated.items()) if count}
        events.append(FiredEvent(Event.GRAPH_TRUNCATED, Severity.INFO, cut))
    if proposal.skipped_metadata:
        skipped = {"count": str(proposal.skipped_metadata)}
        events.append(FiredEvent(Event.METADATA_SKIPPED, Severity.INFO, skipped))
    return tuple(events)
