"""What becomes of the packets of one run: how each will end, and everything that changes then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Commit, Output, RunWrite, run_key
from tamiyo_svc.adapters.oona.entries import Entry, id_order
from tamiyo_svc.adapters.tracing import ExportSpans, keep_spans
from tamiyo_svc.decision.command import CommandOptions
from tamiyo_svc.decision.record import Decision
from tamiyo_svc.decision.telemetry import Timings, build_notice
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.partition import reply_prefix
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.runs.state import RunState, is_duplicate
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import Event, Outcome, Severity, Stage, TimeoutAction

log = structlog.get_logger("tamiyo.outcomes")

TRACEPARENT: Final = "traceparent"
"""Envelope attribute with the trainer's trace; it is carried to everything that answers."""

_REPLY_TO: Final = "reply_to"
_REPLY_LIMIT: Final = 64


@dataclass(frozen=True, slots=True)
class Received:
    """A verified state packet as it came off the bus; `read_at` is a `perf_counter` value."""

    entry: Entry
    packet: leyline.SystemStatePacket
    attributes: Mapping[str, str]
    digest: bytes
    read_at: float

    @property
    def run_id(self) -> str:
        """The training run it belongs to."""
        return self.packet.training_run_id

    @property
    def run_key(self) -> str:
        """Where that run's state is kept."""
        return run_key(self.run_id, self.entry.tag)


@dataclass(frozen=True, slots=True)
class Sorted:
    """What a run has waiting, by the way each packet will end; `newest` is to be decided."""

    newest: Received | None
    superseded: tuple[Received, ...] = ()
    late: tuple[Received, ...] = ()
    """Superseded by a packet decided before they came; the run state is past them."""
    expired: tuple[Received, ...] = ()
    duplicates: tuple[Received, ...] = ()

    @property
    def packets(self) -> tuple[Received, ...]:
        """All of them, the one to be decided first."""
        leading = () if self.newest is None else (self.newest,)
        return (*leading, *self.superseded, *self.late, *self.expired, *self.duplicates)

    def only(self, packet: Received) -> Sorted:
        """The part of this that concerns one packet."""

        def its(packets: Sequence[Received]) -> tuple[Received, ...]:
            return tuple(one for one in packets if one is packet)

        return Sorted(
            newest=packet if self.newest is packet else None,
            superseded=its(self.superseded),
            late=its(self.late),
            expired=its(self.expired),
            duplicates=its(self.duplicates),
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A decision with everything it sends and the run state it leaves behind."""

    decision: Decision
    command: leyline.AdaptationCommand
    telemetry: leyline.TelemetryPacket
    reports: tuple[leyline.FieldReport, ...]
    state: RunState
    timings: Timings
    transitions: tuple[FiredEvent, ...]
    """What this answer tells of the replica as a whole; told again if it is not committed."""


@dataclass(frozen=True, slots=True)
class PathOptions:
    """What an operator chose for the path; milliseconds, seconds and epochs as named."""

    step_timeout_ms: float = 5.0
    metadata_timeout_ms: float = 10.0
    reserve_ms: float = 1.2
    """Kept back from the lane for rules, command and signature."""
    timeout_action: TimeoutAction = TimeoutAction.PAUSE
    state_max_age_ms: float = 1000.0
    replay_window_s: float = 60.0
    conservative_cooldown_steps: int = 20
    observation_window_epochs: int = 1
    observation_window_steps: int = 0
    window_max_age_s: float = 86400.0
    blueprint_candidates: int = 8
    metadata_refresh_s: float = 5.0
    run_ttl_s: float = 86400.0
    message_ttl_ms: int = 900_000
    command_stream: str = "oona.normal"
    field_report_stream: str = "oona.normal"
    thresholds: Thresholds = field(default_factory=Thresholds)
    command: CommandOptions = field(default_factory=CommandOptions)


def sort_waiting(
    waiting: Sequence[Received], state: RunState, options: PathOptions, now_ms: float
) -> Sorted:
    """See how each waiting packet will end; `now_ms` is the server's time."""
    newest_first = sorted(
        waiting, key=lambda one: (one.packet.timestamp_ns, id_order(one.entry.entry_id))
    )[::-1]
    seen: set[bytes] = set()
    fresh: list[Received] = []
    late: list[Received] = []
    expired: list[Received] = []
    duplicates: list[Received] = []
    for received in newest_first:
        repeated = received.digest in seen or is_duplicate(
            state, received.digest, received.packet.timestamp_ns, options.replay_window_s
        )
        seen.add(received.digest)
        if repeated:
            duplicates.append(received)
        elif 0 < received.packet.timestamp_ns < state.newest_timestamp_ns:
            late.append(received)
        elif now_ms - received.entry.added_ms > options.state_max_age_ms:
            expired.append(received)
        else:
            fresh.append(received)
    return Sorted(
        newest=fresh[0] if fresh else None,
        superseded=tuple(fresh[:0:-1]),
        late=tuple(late),
        expired=tuple(expired[::-1]),
        duplicates=tuple(duplicates),
    )


class Unconfirmed:
    """How packets were to end in commits that got no reply and may have been applied."""

    def __init__(self) -> None:
        self._ends: dict[tuple[str, str], tuple[Sorted, Answer | None]] = {}

    def note(self, plan: Sorted, answer: Answer | None) -> None:
        """Remember a commit that got no reply."""
        for packet in plan.packets:
            # A packet that its run knows by now was decided by an earlier one of these.
            if packet in plan.duplicates and packet.entry.key in self._ends:
                continue
            self._ends[packet.entry.key] = plan.only(packet), answer

    def end_of(self, packet: Received) -> tuple[Sorted, Answer | None]:
        """How a packet ended that turns out to be acknowledged: by us, else by someone else."""
        elsewhere = Sorted(None, duplicates=(packet,)), None
        return self._ends.get(packet.entry.key, elsewhere)


class Ledger:
    """Turns answers into commits, and commits that were applied into counts."""

    def __init__(
        self,
        dispatch: TelemetryDispatch,
        metrics: Metrics,
        replica: ReplicaState,
        keyring: Keyring | None,
        options: PathOptions,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        export_spans: ExportSpans = keep_spans,
    ) -> None:
        self._dispatch = dispatch
        self._metrics = metrics
        self._replica = replica
        self._keyring = keyring
        self._options = options
        self._wall_clock_ns = wall_clock_ns
        self._export_spans = export_spans

    def commit(
        self,
        run_key: str,
        version: int,
        before: RunState,
        plan: Sorted,
        answer: Answer | None,
    ) -> tuple[Commit, RunState]:
        """Everything the outcome of these packets changes, and the state it leaves."""
        acks = [packet.entry for packet in plan.packets]
        if answer is None and not plan.expired:
            return Commit(acks), before
        outputs: list[Output] = []
        state = before
        if plan.expired:
            outputs.append(self._expired_notice(plan.expired))
        if answer is not None and plan.newest is not None:
            outputs += self._outputs(plan.newest, answer)
            state = answer.state
        write = RunWrite(run_key, version, state.to_bytes(), int(self._options.run_ttl_s * 1e3))
        return Commit(acks, outputs, write), state

    def _outputs(self, received: Received, answer: Answer) -> list[Output]:
        options = self._options
        packet, command = received.packet, answer.command
        attributes = {
            "training_run_id": packet.training_run_id,
            "packet_id": packet.packet_id,
            "step_index": str(packet.global_step),
            "command_id": command.command_id,
            "policy_version": answer.decision.runtime.policy.version,
        }
        if traceparent := received.attributes.get(TRACEPARENT):
            attributes[TRACEPARENT] = traceparent
        outputs = [self._dispatch.output(answer.telemetry, answer.decision.severity, attributes)]
        outputs += [
            Output.of(options.field_report_stream, seal(report, self._keyring, attributes))
            for report in answer.reports
        ]
        sealed = seal(command, self._keyring, attributes)
        reply_to = received.attributes.get(_REPLY_TO, "")
        # Names outside the packet's partition could not be written to in the same step.
        if reply_to.startswith(reply_prefix(received.entry.tag)):
            fields, expiry_ms = sealed.fields(), options.message_ttl_ms
            outputs.append(Output(reply_to, fields, _REPLY_LIMIT, expiry_ms, whole=True))
        else:
            outputs.append(Output.of(options.command_stream, sealed))
        return outputs

    def _expired_notice(self, expired: Sequence[Received]) -> Output:
        """One telemetry packet for all of a batch, so that a backlog does not become a flood."""
        event = FiredEvent(
            Event.PACKETS_EXPIRED,
            Severity.WARNING,
            {
                "count": str(len(expired)),
                "max_age_ms": str(int(self._options.state_max_age_ms)),
                "oldest": expired[0].packet.packet_id,
                "newest": expired[-1].packet.packet_id,
            },
        )
        notice = build_notice(
            expired[-1].packet.packet_id,
            (event,),
            self._replica.snapshot(),
            self._wall_clock_ns(),
        )
        attributes = {"training_run_id": expired[-1].run_id}
        return self._dispatch.output(notice, event.severity, attributes)

    def account(self, plan: Sorted, answer: Answer | None) -> None:
        """Count how everything ended, once it is certain."""
        ended = self._metrics.packet_ended
        ended(Outcome.SUPERSEDED, len(plan.superseded) + len(plan.late))
        ended(Outcome.EXPIRED, len(plan.expired))
        ended(Outcome.DUPLICATE, len(plan.duplicates))
        if plan.expired:
            self._metrics.event_reported(Event.PACKETS_EXPIRED, Severity.WARNING)
        if answer is None or plan.newest is None:
            return
        decision = answer.decision
        ended(Outcome.DECIDED)
        self._export_spans(answer.telemetry, plan.newest.attributes.get(TRACEPARENT, ""))
        self._metrics.observe_decision(answer.timings.step_ms / 1e3)
        self._metrics.command_issued(decision.verdict.action, decision.verdict.reason)
        for fired in decision.events:
            self._metrics.event_reported(fired.event, fired.severity)
        if decision.proposal is not None:
            self._metrics.observe_stage(Stage.BUILD, decision.proposal.build_ms / 1e3)
            self._metrics.observe_stage(Stage.INFER, decision.proposal.inference_ms / 1e3)
            self._metrics.coverage_seen(decision.proposal.coverage.by_family)
        for name, breaker in decision.runtime.breakers.items():
            self._metrics.breaker_state(name, breaker.state)
        self._metrics.observe_stage(
            Stage.RISK, (answer.timings.step_ms - answer.timings.inference_ms) / 1e3
        )
        log.debug(
            "command.published",
            run_id=decision.packet.training_run_id,
            packet_id=decision.packet.packet_id,
            step=decision.packet.global_step,
            command_id=decision.command_id,
            reason=decision.verdict.reason,
            policy_version=decision.runtime.policy.version,
            latency_ms=round(answer.timings.step_ms, 3),
        )
