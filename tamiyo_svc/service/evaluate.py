"""One packet's path, top to bottom: bytes, packet, proposal, verdict, command, commit.

`PacketPath.settle` is the whole of it for what one run has waiting; `decide` is the part that
answers a single packet and touches nothing outside but the device lane.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from tamiyo_svc.adapters.blueprint_fetch import BlueprintFetches
from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.connection import ServerClock
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.command import build_command
from tamiyo_svc.decision.observation import open_window
from tamiyo_svc.decision.record import PROPOSED_ACTIONS, Decision, abort
from tamiyo_svc.decision.report import build_report, build_synthesised_report, synthesised_event
from tamiyo_svc.decision.telemetry import Timings, build_telemetry
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
from tamiyo_svc.leyline.envelope import parse_payload
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.evaluator import PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.engine import assess
from tamiyo_svc.risk.mode import step_mode
from tamiyo_svc.risk.signals import Inference, Metadata, read_signals
from tamiyo_svc.runs.state import RunState, advance, fold, packet_digest
from tamiyo_svc.service.outcomes import (
    TRACEPARENT,
    Answer,
    Ledger,
    PathOptions,
    Received,
    Sorted,
    Unconfirmed,
    sort_waiting,
)
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.taxonomy import (
    BreakerName,
    CommandAction,
    InferenceStatus,
    Stage,
    TimeoutPath,
)

_BLUEPRINTS: Final = "blueprint_id"


class PacketPath:
    """Takes the packets of one run from the bus to their outcome."""

    def __init__(
        self,
        lane: DeviceLane[PolicyRequest, Proposal],
        catalog: UrzaCatalog,
        runs: RunStore,
        committer: Committer,
        health: BusHealth,
        ledger: Ledger,
        metrics: Metrics,
        replica: ReplicaState,
        keyring: Keyring | None,
        server_clock: ServerClock,
        options: PathOptions,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._lane = lane
        self._catalog = catalog
        self._runs = runs
        self._committer = committer
        self._health = health
        self._ledger = ledger
        self._metrics = metrics
        self._replica = replica
        self._keyring = keyring
        self._server_clock = server_clock
        self._options = options
        self._wall_clock_ns = wall_clock_ns
        self._clock = clock
        self._fetches = BlueprintFetches(
            catalog.fetch,
            options.metadata_timeout_ms,
            options.metadata_refresh_s,
            admit=lambda: replica.admit(BreakerName.METADATA, time.monotonic()),
            record=lambda success: replica.record(
                BreakerName.METADATA, success=success, now_s=time.monotonic()
            ),
            on_timeout=lambda: metrics.timed_out(TimeoutPath.METADATA),
            clock=time.monotonic,
        )
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

    async def close(self) -> None:
        """Give up the look-ups that nobody waits for."""
        await self._fetches.close()

    async def settle(self, run_key: str, batch: Sequence[Received]) -> None:
        """Bring every packet of one run to its outcome, in one commit if nothing interferes.

        `run_key` is where the run's state is kept.

        A conflict or an outage starts over from the state that Redis holds: what was committed
        after all is recognised there, what became too old meanwhile is not decided any more.
        """
        waiting = list(batch)
        unconfirmed = Unconfirmed()
        for received in waiting:
            age_ms = self._server_clock.now_ms() - received.entry.added_ms
            self._metrics.observe_packet_age(age_ms / 1e3)
        answer: Answer | None = None
        while waiting:
            await self._health.wait_up()
            if answer is not None:
                self._replica.give_back(answer.transitions)
            answer = None
            plan = Sorted(None)
            try:
                version, state = await self._runs.load(run_key)
                plan = sort_waiting(waiting, state, self._options, self._server_clock.now_ms())
                for older in (*plan.expired, *plan.superseded):
                    state = fold(state, older.packet)
                if plan.newest is not None:
                    answer = await self.decide(plan.newest, state)
                commit, after = self._ledger.commit(run_key, version, state, plan, answer)
                started = self._clock()
                await self._committer.commit(commit)
            except CommitConflictError:
                self._metrics.commit_conflict()
                self._runs.forget(run_key)
            except DuplicateEntryError:
                # The leading entry is acknowledged already; the others still need an outcome.
                self._runs.forget(run_key)
                leader, *waiting = plan.packets
                self._ledger.account(*unconfirmed.end_of(leader))
            except BusError as error:
                unconfirmed.note(plan, answer)
                self._runs.forget(run_key)
                self._health.failed(error)
            else:
                self._timed_commit(started, answer)
                if commit.run is not None:
                    self._runs.remember(run_key, version + 1, after)
                self._ledger.account(plan, answer)
                if answer is not None and answer.decision.signals.metadata.timed_out:
                    self._fetches.told(batch[0].run_id)
                return

    async def decide(self, received: Received, state: RunState) -> Answer:
        """Answer one packet from a run state; the same inputs and clocks give the same answer."""
        packet = received.packet
        options = self._options
        blueprints: tuple[Blueprint, ...] = ()
        if packet.seed_states:
            blueprints = self._candidates(received)
        infer_started = self._clock()
        proposal, inference = await self._propose(received, state, blueprints)
        risk_started = self._clock()
        signals = read_signals(
            packet,
            state.last_validation_loss,
            inference=inference,
            metadata=Metadata(
                candidates=len(blueprints) if packet.seed_states else None,
                timed_out=self._fetches.is_overdue(received.run_id),
                budget_ms=options.metadata_timeout_ms,
            ),
            latencies=state.latencies_before(packet),
            blueprint=proposal.blueprint if proposal is not None else None,
            emergencies=self._replica.emergencies_for(state.heard),
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
        emergency = self._replica.emergency
        now_ns = self._wall_clock_ns()
        decision, command = self._command(
            Decision(
                packet=packet,
                packet_digest=received.digest,
                signals=signals,
                verdict=verdict,
                proposal=proposal,
                runtime=self._replica.snapshot(),
                now_ns=now_ns,
                other_events=(*((mode_event,) if mode_event is not None else ()), *transitions),
            )
        )
        advanced = advance(
            state,
            packet,
            received.digest,
            mode=mode,
            severity=verdict.severity,
            now_ns=now_ns,
            window_max_age_s=options.window_max_age_s,
            opened=open_window(
                decision,
                command,
                options.observation_window_epochs,
                options.observation_window_steps,
            ),
            heard=emergency.mark if emergency is not None else None,
        )
        told = (*advanced.events, *(synthesised_event(window) for window in advanced.closed))
        if told:
            decision = replace(decision, other_events=(*decision.other_events, *told))
        ready = self._clock()
        timings = Timings(
            step_ms=(ready - received.read_at) * 1e3,
            inference_ms=(risk_started - infer_started) * 1e3,
        )
        spans = self._spans(decision, received.read_at, infer_started, risk_started, ready)
        return Answer(
            decision=decision,
            command=command,
            telemetry=build_telemetry(
                decision, timings, spans, received.attributes.get(TRACEPARENT, "")
            ),
            reports=(
                build_report(decision, command, timings, options.observation_window_epochs),
                *(build_synthesised_report(window, received.run_id) for window in advanced.closed),
            ),
            state=advanced.state,
            timings=timings,
            transitions=transitions,
        )

    def _candidates(self, received: Received) -> tuple[Blueprint, ...]:
        """What the catalogue offers; what it lacks is looked up for the run's next packet."""
        limit = self._options.blueprint_candidates
        names = received.attributes.get(_BLUEPRINTS, "").split(",")
        requested = [name.strip() for name in names if name.strip()]
        if missing := self._catalog.missing(requested):
            self._fetches.start(received.run_id, missing[:limit])
        return self._catalog.candidates(
            requested, received.packet.packet_id, received.run_id, limit
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
        took_s = self._clock() - started
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
        wall_offset_ns = self._wall_clock_ns() - int(self._clock() * 1e9)
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
