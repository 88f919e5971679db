"""What is said and heard beside packets: events of the replica, safety sheets, alarms."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Commit, Committer, Output, RunWrite
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.outbox import Outbox
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.decision.record import severity_of
from tamiyo_svc.decision.telemetry import build_notice
from tamiyo_svc.errors import BusError, CommitConflictError, DuplicateEntryError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import parse_payload
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.mode import step_mode
from tamiyo_svc.risk.signals import ROLLBACK_DEADLINE
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import Event, Severity

log = structlog.get_logger("tamiyo.notices")


class NoticeBoard:
    """Puts events that belong to no packet on the bus."""

    def __init__(
        self,
        outbox: Outbox,
        dispatch: TelemetryDispatch,
        replica: ReplicaState,
        metrics: Metrics,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._outbox = outbox
        self._dispatch = dispatch
        self._replica = replica
        self._metrics = metrics
        self._wall_clock_ns = wall_clock_ns

    def publish(self, events: Sequence[FiredEvent]) -> None:
        """Have the events published together, as an emergency if one of them is severe."""
        if not events:
            return
        self._outbox.put(self.output(events))
        for event in events:
            self._metrics.event_reported(event.event, event.severity)
            log.info("event.reported", reported=event.event.value, **event.attributes)

    def publish_unreported(self) -> None:
        """Publish the transitions that no decision has told of."""
        self.publish(self._replica.take_unreported())

    def output(self, events: Sequence[FiredEvent]) -> Output:
        """The telemetry that carries these events."""
        notice = build_notice(
            f"tamiyo-{uuid.uuid4()}",
            tuple(events),
            self._replica.snapshot(),
            self._wall_clock_ns(),
        )
        return self._dispatch.output(notice, severity_of(tuple(events)))


class Inbox:
    """Takes the messages on our streams that are not state packets."""

    def __init__(
        self,
        catalog: UrzaCatalog,
        committer: Committer,
        runs: RunStore,
        health: BusHealth,
        board: NoticeBoard,
        replica: ReplicaState,
        run_ttl_s: float,
        cooldown_steps: int,
    ) -> None:
        self._catalog = catalog
        self._committer = committer
        self._runs = runs
        self._health = health
        self._board = board
        self._replica = replica
        self._run_ttl_ms = int(run_ttl_s * 1e3)
        self._cooldown_steps = cooldown_steps

    async def take(self, entry: Entry, envelope: leyline.BusEnvelope) -> None:
        """Act on one message and acknowledge it."""
        match parse_payload(envelope):
            case leyline.BSDSIssued(bsds=sheet):
                self._catalog.add_sheet(sheet)
                await self._settle(Commit([entry]))
            case leyline.EmergencySignal() as signal if signal.run_id:
                await self._alarm(entry, signal)
            case leyline.EmergencySignal() as signal:
                self._replica.alarm_all(signal)
                await self._settle(Commit([entry]))
            case _:
                self._catalog.announce()
                await self._settle(Commit([entry]))

    async def _alarm(self, entry: Entry, signal: leyline.EmergencySignal) -> None:
        """Turn one run conservative, for good even if this process dies right after."""
        if signal.level < leyline.EMERGENCY_LEVEL_CONSERVATIVE:
            await self._settle(Commit([entry]))
            return
        event = alarm_event(signal)
        while True:
            await self._health.wait_up()
            try:
                version, state = await self._runs.load(signal.run_id)
                mode, entered = step_mode(
                    state.mode,
                    alarm=event.event.value,
                    severity=event.severity,
                    cooldown_steps=self._cooldown_steps,
                )
                after = replace(state, mode=mode)
                events = (event, entered) if entered else (event,)
                write = RunWrite(signal.run_id, version, after.to_bytes(), self._run_ttl_ms)
                output = self._board.output(events)
                await self._committer.commit(Commit([entry], [output], write))
            except CommitConflictError:
                self._runs.forget(signal.run_id)
                continue
            except DuplicateEntryError:
                return
            except BusError as error:
                self._runs.forget(signal.run_id)
                self._health.failed(error)
                continue
            self._runs.remember(signal.run_id, version + 1, after)
            log.warning("run.alarmed", run_id=signal.run_id, reason=signal.reason)
            return

    async def _settle(self, commit: Commit) -> None:
        while True:
            await self._health.wait_up()
            try:
                await self._committer.commit(commit)
            except DuplicateEntryError:
                return
            except BusError as error:
                self._health.failed(error)
                continue
            return


def alarm_event(signal: leyline.EmergencySignal) -> FiredEvent:
    """The event an emergency signal is reported as."""
    event = (
        Event.ROLLBACK_DEADLINE if signal.reason == ROLLBACK_DEADLINE else Event.EMERGENCY_SIGNAL
    )
    attributes = {
        "reason": signal.reason,
        "origin": signal.origin,
        "level": leyline.EmergencyLevel.Name(signal.level),
    }
    return FiredEvent(event, Severity.CRITICAL, attributes)
