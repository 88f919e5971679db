"""One packet's path, top to bottom: bytes, packet, proposal, verdict, command, commit.

`PacketPath.settle` is the whole of it for what one run has waiting; `decide` is the part that
answers a single packet and touches nothing outside but the device lane.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Commit, Committer, Output, RunWrite
from tamiyo_svc.adapters.oona.connection import ServerClock
from tamiyo_svc.adapters.oona.entries import Entry, id_order
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.command import CommandOptions, build_command
from tamiyo_svc.decision.record import PROPOSED_ACTIONS, Decision, abort
from tamiyo_svc.decision.report import build_report, build_synthesised_report, synthesised_event
from tamiyo_svc.decision.telemetry import Timings, build_notice, build_telemetry
from tamiyo_svc.decision.trace import Span
from tamiyo_svc.errors import (
    BusError,
    CommandError,
    CommitConflictError,
    DuplicateEntryError,
    InferenceError,
    InvalidPacketError,
    LaneBusyError,
)
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.evaluator import PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.engine import assess
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.mode import step_mode
from tamiyo_svc.risk.signals import Inference, Metadata, read_signals
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.runs.state import RunState, advance, fold, is_duplicate, packet_digest
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import (
    BreakerName,
    CommandAction,
    Event,
    InferenceStatus,
    Outcome,
    Severity,
    Stage,
    TimeoutAction,
    TimeoutPath,
)

log = structlog.get_logger("tamiyo.evaluate")

REPLY_PREFIX: Final = "oona.commands."
"""What a reply stream's name must begin with; other names are not written to."""

_REPLY_LIMIT: Final = 64
_REPLY_TO: Final = "reply_to"
_BLUEPRINTS: Final = "blueprint_id"
_TRACEPARENT: Final = "traceparent"


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


@dataclass(frozen=True, slots=True)
class Sorted:
    """What a run has waiting, by the way each packet will end; `newest` is to be decided."""

    newest: Received | None
    superseded: tuple[Received, ...] = ()
    late: tuple[Received, ...] = ()
    """Superseded by a packet decided before they came; the run state is past them."""
    expired: tuple[Received, ...] = ()
    duplicates: tuple[Received, ...] = ()


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
    reserve_ms: float = 0.6
    """Kept back from the lane for rules, command and signature."""
    timeout_action: TimeoutAction = TimeoutAction.PAUSE
    state_max_age_ms: float = 1000.0
    replay_window_s: float = 60.0
    conservative_cooldown_steps: int = 20
    observation_window_epochs: int = 1
    window_max_age_s: float = 86400.0
    blueprint_candidates: int = 8
    run_ttl_s: float = 86400.0
    message_ttl_ms: int = 900_000
    command_stream: str = "oona.normal"
    field_report_stream: str = "oona.normal"
    thresholds: Thresholds = field(default_factory=Thresholds)
    command: CommandOptions = field(default_factory=CommandOptions)


class PacketPath:
    """Takes the packets of one run from the bus to their outcome."""

    def __init__(
        self,
        lane: DeviceLane[PolicyRequest, Proposal],
        catalog: UrzaCatalog,
        runs: RunStore,
        committer: Committer,
        health: BusHealth,
        dispatch: TelemetryDispatch,
        metrics: Metrics,
        replica: ReplicaState,
        keyring: Keyring | None,
        server_clock: ServerClock,
        options: PathOptions,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._lane = lane
        self._catalog = catalog
        self._runs = runs
        self._committer = committer
        self._health = health
        self._dispatch = dispatch
        self._metrics = metrics
        self._replica = replica
        self._keyring = keyring
        self._server_clock = server_clock
        self._options = options
        self._wall_clock_ns = wall_clock_ns
        self._commit_span: Span | None = None

    def receive(self, entry: Entry, envelope: leyline.BusEnvelope, read_at: float) -> Received:
        """Parse a state packet out of its verified envelope.

        Raises:
            EnvelopeRejectedError: the payload is not a state packet.
            InvalidPacketError: it names no run, so nothing can be decided for it.
        """
        packet = parse_payload(envelope)
        assert isinstance(packet, leyline.SystemStatePacket)
        if not packet.training_run_id:
            raise InvalidPacketError("training_run_id is empty")
        digest = packet_digest(envelope.payload)
        return Received(entry, packet, dict(envelope.attributes), digest, read_at)

    async def settle(self, run_id: str, batch: Sequence[Received]) -> None:
        """Bring every packet of one run to its outcome, in one commit if nothing interferes.

        A conflict or an outage starts over from the state that Redis holds: what was committed
        after all is recognised there, what became too old meanwhile is not decided any more.
        """
        waiting = list(batch)
        uncertain: set[tuple[str, str]] = set()
        for received in waiting:
            age_ms = self._server_clock.now_ms() - received.entry.added_ms
            self._metrics.observe_packet_age(age_ms / 1e3)
        answer: Answer | None = None
        while waiting:
            await self._health.wait_up()
            if answer is not None:
                self._replica.give_back(answer.transitions)
            answer = None
            leader = waiting[0].entry
            try:
                version, state = await self._runs.load(run_id)
                plan = self._sort(waiting, state)
                for older in (*plan.expired, *plan.superseded):
                    state = fold(state, older.packet)
                if plan.newest is not None:
                    answer = await self.decide(plan.newest, state)
                commit, after = self._commit(run_id, version, state, plan, answer)
                leader = commit.acks[0]
                started = time.perf_counter()
                await self._committer.commit(commit)
            except CommitConflictError:
                self._metrics.commit_conflict()
                self._runs.forget(run_id)
            except DuplicateEntryError:
                # Someone else acknowledged the leading entry; the others still need an outcome.
                self._runs.forget(run_id)
                self._metrics.packet_ended(Outcome.DUPLICATE)
                waiting = [received for received in waiting if received.entry.key != leader.key]
            except BusError as error:
                # The commit may have been applied; then this run's memory will tell.
                uncertain.add(leader.key)
                self._runs.forget(run_id)
                self._health.failed(error)
            else:
                self._timed_commit(started, answer)
                if commit.run is not None:
                    self._runs.remember(run_id, version + 1, after)
                self._account(plan, answer, uncertain)
                return

    async def decide(self, received: Received, state: RunState) -> Answer:
        """Answer one packet from a run state; the same inputs and clocks give the same answer."""
        packet = received.packet
        options = self._options
        blueprints: tuple[Blueprint, ...] = ()
        if packet.seed_states:
            blueprints = self._candidates(received)
        infer_started = time.perf_counter()
        proposal, inference = await self._propose(received, state, blueprints)
        risk_started = time.perf_counter()
        signals = read_signals(
            packet,
            state.last_validation_loss,
            inference=inference,
            metadata=Metadata(candidates=len(blueprints) if packet.seed_states else None),
            blueprint=proposal.blueprint if proposal is not None else None,
            emergencies=self._replica.emergencies_for(received.run_id),
            conservative_reason=(state.mode.reason if state.mode.active else None)
            or self._replica.conservative_reason(),
        )
        proposed = CommandAction.PAUSE
        if proposal is not None:
            proposed = PROPOSED_ACTIONS[proposal.action]
        verdict = assess(signals, options.thresholds, proposed, options.timeout_action)
        mode, mode_event = step_mode(
            state.mode,
            alarm=verdict.conservative_reason,
            severity=verdict.severity,
            cooldown_steps=options.conservative_cooldown_steps,
        )
        transitions = self._replica.take_unreported()
        now_ns = self._wall_clock_ns()
        advanced = advance(
            state,
            packet,
            received.digest,
            mode=mode,
            severity=verdict.severity,
            now_ns=now_ns,
            window_epochs=options.observation_window_epochs,
            window_max_age_s=options.window_max_age_s,
        )
        decision = Decision(
            packet=packet,
            packet_digest=received.digest,
            signals=signals,
            verdict=verdict,
            proposal=proposal,
            runtime=self._replica.snapshot(),
            now_ns=now_ns,
            other_events=(
                *((mode_event,) if mode_event is not None else ()),
                *transitions,
                *advanced.events,
                *(synthesised_event(window) for window in advanced.closed),
            ),
        )
        decision, command = self._command(decision)
        ready = time.perf_counter()
        timings = Timings(
            step_ms=(ready - received.read_at) * 1e3,
            inference_ms=(risk_started - infer_started) * 1e3,
        )
        spans = self._spans(decision, received.read_at, infer_started, risk_started, ready)
        version = decision.runtime.policy.version
        return Answer(
            decision=decision,
            command=command,
            telemetry=build_telemetry(
                decision, timings, spans, received.attributes.get(_TRACEPARENT, "")
            ),
            reports=(
                build_report(decision, command, timings, options.observation_window_epochs),
                *(
                    build_synthesised_report(window, received.run_id, version, now_ns)
                    for window in advanced.closed
                ),
            ),
            state=advanced.state,
            timings=timings,
            transitions=transitions,
        )

    def _candidates(self, received: Received) -> tuple[Blueprint, ...]:
        requested = received.attributes.get(_BLUEPRINTS, "")
        return self._catalog.snapshot.candidates(
            [name.strip() for name in requested.split(",") if name.strip()],
            received.packet.packet_id,
            received.run_id,
            self._options.blueprint_candidates,
        )

    async def _propose(
        self, received: Received, state: RunState, blueprints: tuple[Blueprint, ...]
    ) -> tuple[Proposal | None, Inference]:
        """Ask the network, unless there is nothing to ask or its breaker is open."""
        budget_ms = self._options.step_timeout_ms
        if not received.packet.seed_states:
            return None, Inference(InferenceStatus.NOT_RUN, budget_ms=budget_ms)
        if not self._replica.admit(BreakerName.INFERENCE, time.monotonic()):
            return None, Inference(InferenceStatus.NOT_RUN, budget_ms=budget_ms)
        deadline = math.inf
        if budget_ms > 0:
            deadline = received.read_at + (budget_ms - self._options.reserve_ms) / 1e3
        request = PolicyRequest(received.packet, blueprints, state.statistics)
        status, detail = InferenceStatus.COMPLETED, ""
        proposal: Proposal | None = None
        try:
            proposal = await self._lane.submit(request, deadline)
        except TimeoutError:
            status = InferenceStatus.TIMED_OUT
            self._metrics.timed_out(TimeoutPath.STEP)
        except LaneBusyError:
            # The overrun that occupies the lane has been counted as a failure already.
            return None, Inference(InferenceStatus.LANE_BUSY, budget_ms=budget_ms)
        except InferenceError as error:
            status, detail = InferenceStatus.FAILED, str(error)
        self._replica.record(
            BreakerName.INFERENCE, success=proposal is not None, now_s=time.monotonic()
        )
        if proposal is None:
            return None, Inference(status, detail, budget_ms)
        return proposal, Inference(
            status,
            detail,
            budget_ms,
            coverage_mean=proposal.coverage.mean,
            policy_risk_score=proposal.risk_score,
            policy_untrained=self._replica.policy_untrained,
        )

    def _timed_commit(self, started: float, answer: Answer | None) -> None:
        """Time a commit; its span travels with the telemetry of the next decision."""
        took_s = time.perf_counter() - started
        self._metrics.observe_stage(Stage.COMMIT, took_s)
        if answer is not None:
            now_ns = self._wall_clock_ns()
            self._commit_span = Span(
                Stage.COMMIT, now_ns - int(took_s * 1e9), now_ns, answer.decision.command_id
            )

    def _command(self, decision: Decision) -> tuple[Decision, leyline.AdaptationCommand]:
        """The signed command; one that cannot be built becomes a pause that says so."""
        try:
            command = build_command(decision, self._options.command)
        except CommandError as error:
            decision = abort(decision, str(error))
            command = build_command(decision, self._options.command)
        if self._keyring is not None:
            self._keyring.sign_command(command)
        return decision, command

    def _spans(
        self,
        decision: Decision,
        read_at: float,
        infer_started: float,
        risk_started: float,
        ready: float,
    ) -> list[Span]:
        """The stages of this decision and the commit of the one before."""
        wall_offset_ns = decision.now_ns - int(ready * 1e9)
        edges = [(Stage.DECODE, read_at, infer_started)]
        if decision.proposal is not None:
            built = infer_started + decision.proposal.build_ms / 1e3
            edges += [(Stage.BUILD, infer_started, built), (Stage.INFER, built, risk_started)]
        edges.append((Stage.RISK, risk_started, ready))
        spans = [
            Span(
                stage,
                wall_offset_ns + int(start * 1e9),
                wall_offset_ns + int(end * 1e9),
                decision.command_id,
            )
            for stage, start, end in edges
        ]
        if self._commit_span is not None:
            spans.append(self._commit_span)
        return spans

    def _sort(self, waiting: Sequence[Received], state: RunState) -> Sorted:
        """Decide how each waiting packet will end, without deciding any."""
        options = self._options
        now_ms = self._server_clock.now_ms()
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

    def _commit(
        self,
        run_id: str,
        version: int,
        before: RunState,
        plan: Sorted,
        answer: Answer | None,
    ) -> tuple[Commit, RunState]:
        """Everything the outcome of these packets changes, and the state it leaves."""
        leading = () if plan.newest is None else (plan.newest,)
        acks = [
            received.entry
            for received in (
                *leading,
                *plan.superseded,
                *plan.late,
                *plan.expired,
                *plan.duplicates,
            )
        ]
        if answer is None and not plan.expired:
            return Commit(acks), before
        outputs: list[Output] = []
        state = before
        if plan.expired:
            outputs.append(self._expired_notice(run_id, plan.expired))
        if answer is not None and plan.newest is not None:
            outputs += self._outputs(plan.newest, answer)
            state = answer.state
        write = RunWrite(run_id, version, state.to_bytes(), int(self._options.run_ttl_s * 1e3))
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
        if traceparent := received.attributes.get(_TRACEPARENT):
            attributes[_TRACEPARENT] = traceparent
        outputs = [self._dispatch.output(answer.telemetry, answer.decision.severity, attributes)]
        outputs += [
            Output.of(options.field_report_stream, seal(report, self._keyring, attributes))
            for report in answer.reports
        ]
        sealed = seal(command, self._keyring, attributes)
        reply_to = received.attributes.get(_REPLY_TO, "")
        if reply_to.startswith(REPLY_PREFIX):
            outputs.append(Output.of(reply_to, sealed, _REPLY_LIMIT, options.message_ttl_ms))
        else:
            outputs.append(Output.of(options.command_stream, sealed))
        return outputs

    def _expired_notice(self, run_id: str, expired: Sequence[Received]) -> Output:
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
        return self._dispatch.output(notice, event.severity, {"training_run_id": run_id})

    def _account(
        self, plan: Sorted, answer: Answer | None, uncertain: set[tuple[str, str]]
    ) -> None:
        """Count how everything ended, once it is certain."""
        ended = self._metrics.packet_ended
        ended(Outcome.SUPERSEDED, len(plan.superseded) + len(plan.late))
        ended(Outcome.EXPIRED, len(plan.expired))
        for received in plan.duplicates:
            ours = received.entry.key in uncertain
            ended(Outcome.DECIDED if ours else Outcome.DUPLICATE)
        if plan.expired:
            self._metrics.event_reported(Event.PACKETS_EXPIRED, Severity.WARNING)
        if answer is None:
            return
        decision = answer.decision
        ended(Outcome.DECIDED)
        self._replica.alarmed(decision.packet.training_run_id)
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
