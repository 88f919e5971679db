"""What is said and heard beside packets: events of the replica, safety sheets, alarms.

One replica reads each message; what concerns all of them goes through the bulletin, from which
every replica, this one included, takes it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import structlog
from google.protobuf.message import Message

from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.bulletin import Bulletin
from tamiyo_svc.adapters.oona.commit import Commit, Committer, Output, RunWrite, run_key
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.outbox import Outbox
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.decision.record import severity_of
from tamiyo_svc.decision.telemetry import build_notice
from tamiyo_svc.errors import (
    BusError,
    CommitConflictError,
    DuplicateEntryError,
    InvalidPacketError,
)
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import parse_payload
from tamiyo_svc.leyline.partition import tag_of_run
from tamiyo_svc.risk.events import FiredEvent, number
from tamiyo_svc.risk.mode import step_mode
from tamiyo_svc.risk.safety_sheet import HANDLING_CLASSES, HAZARD_BANDS, PROVENANCES, UNKNOWN
from tamiyo_svc.risk.signals import ROLLBACK_DEADLINE
from tamiyo_svc.service.state import Emergency, ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import Event, Severity

log = structlog.get_logger("tamiyo.notices")

_ALARMING: Final = leyline.EMERGENCY_LEVEL_CONSERVATIVE
_ATTRIBUTE_CHARS: Final = 256


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
        self.published(events)

    def published(self, events: Sequence[FiredEvent]) -> None:
        """Count and log events that are on the bus, or in the queue to it."""
        for event in events:
            self._metrics.event_reported(event.event, event.severity)
            log.info("event.reported", reported=event.event.value, attributes=event.attributes)

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


def check_fields(message: Message) -> None:
    """See that times are times and levels are levels, which parsing alone does not.

    Raises:
        InvalidPacketError: one is not.
    """
    match message:
        case leyline.BSDSIssued(bsds=sheet):
            time_of = sheet.issued_at
        case leyline.EmergencySignal(level=level, triggered_at=time_of):
            if level not in leyline.EmergencyLevel.values():
                raise InvalidPacketError(f"level {int(level)} is not in the contract")
        case _:
            return
    try:
        time_of.ToNanoseconds()
    except ValueError as error:
        raise InvalidPacketError(str(error)) from None


class Inbox:
    """Takes the messages on our streams that are not state packets.

    An emergency for every run counts for as long as messages stay on the bus; runs that begin
    later have nothing to do with it.
    """

    def __init__(
        self,
        catalog: UrzaCatalog,
        bulletin: Bulletin,
        committer: Committer,
        runs: RunStore,
        health: BusHealth,
        board: NoticeBoard,
        replica: ReplicaState,
        run_ttl_s: float,
        cooldown_steps: int,
        emergency_ttl_ms: float,
        partitions: int,
        server_now_ms: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._bulletin = bulletin
        self._committer = committer
        self._runs = runs
        self._health = health
        self._board = board
        self._replica = replica
        self._run_ttl_ms = int(run_ttl_s * 1e3)
        self._cooldown_steps = cooldown_steps
        self._emergency_ttl_ms = emergency_ttl_ms
        self._partitions = partitions
        self._server_now_ms = server_now_ms
        self._catalog_change = b""
        self._emergency_ms = 0

    async def take(self, entry: Entry, envelope: leyline.BusEnvelope) -> None:
        """Act on one message and acknowledge it.

        Raises:
            InvalidPacketError: a field holds what its type does not allow.
        """
        bulletin, added_ms = self._bulletin, entry.added_ms
        message = parse_payload(envelope)
        check_fields(message)
        match message:
            case leyline.BSDSIssued(bsds=sheet) if sheet.blueprint_id:
                if not sheet.HasField("issued_at"):
                    sheet.issued_at.FromMilliseconds(added_ms)
                await self._share(lambda: bulletin.post_sheet(sheet))
                await self._settle(entry, sheet_event(sheet))
            case leyline.BSDSFailed() as failed:
                await self._share(lambda: bulletin.post_catalog_change(added_ms))
                attributes = {"blueprint_id": failed.blueprint_id, "reason": failed.reason}
                await self._settle(entry, _event(Event.BSDS_FAILED, Severity.WARNING, attributes))
            case leyline.KernelCatalogUpdate() as update:
                await self._share(lambda: bulletin.post_catalog_change(added_ms))
                attributes = {"blueprint_id": update.blueprint_id}
                await self._settle(entry, _event(Event.CATALOG_UPDATED, Severity.INFO, attributes))
            case leyline.EmergencySignal(level=level) as signal if level >= _ALARMING:
                if signal.run_id:
                    tag = tag_of_run(signal.run_id, self._partitions)
                    if tag != entry.tag:
                        # The sender did not know where the run belongs.
                        await self._alarm(signal, Commit((), tag=tag))
                    await self._alarm(signal, Commit([entry]))
                else:
                    await self._share(lambda: bulletin.post_emergency(signal, added_ms))
                    await self._settle(entry, alarm_event(signal))
            case _:
                await self._settle(entry)

    async def refresh(self) -> None:
        """Take what is new in the bulletin.

        Raises:
            BusError: Redis did not answer.
        """
        edition = await self._bulletin.read()
        if edition is not None:
            self._catalog.add_sheets(edition.sheets)
            if edition.catalog != self._catalog_change:
                self._catalog_change = edition.catalog
                self._catalog.announce()
            signal = edition.emergency
            self._replica.emergency = Emergency.of(signal) if signal is not None else None
            self._emergency_ms = edition.emergency_ms
        age_ms = self._server_now_ms() - self._emergency_ms
        if self._replica.emergency is not None and age_ms > self._emergency_ttl_ms:
            self._replica.emergency = None

    async def _share(self, post: Callable[[], Awaitable[None]]) -> None:
        """Post something for every replica and take it here at once."""

        async def post_and_take() -> None:
            await post()
            await self.refresh()

        await self._health.until_done(post_and_take)

    async def _alarm(self, signal: leyline.EmergencySignal, commit: Commit) -> None:
        """Turn one run conservative by a commit, for good even if this process dies after it."""
        event = alarm_event(signal)
        key = run_key(signal.run_id, commit.partition_tag)
        while True:
            await self._health.wait_up()
            try:
                version, state = await self._runs.load(key)
                mode, entered = step_mode(
                    state.mode,
                    alarm=event.event.value,
                    severity=event.severity,
                    cooldown_steps=self._cooldown_steps,
                )
                after = replace(state, mode=mode)
                events = (event, entered) if entered else (event,)
                write = RunWrite(key, version, after.to_bytes(), self._run_ttl_ms)
                outputs = [self._board.output(events)]
                await self._committer.commit(replace(commit, outputs=outputs, run=write))
            except CommitConflictError:
                self._runs.forget(key)
                continue
            except DuplicateEntryError:
                return
            except BusError as error:
                self._runs.forget(key)
                self._health.failed(error)
                continue
            self._runs.remember(key, version + 1, after)
            self._board.published(events)
            log.warning("run.alarmed", run_id=signal.run_id, reason=signal.reason)
            return

    async def _settle(self, entry: Entry, *events: FiredEvent) -> None:
        """Acknowledge a message and tell of it in one step."""
        commit = Commit([entry], [self._board.output(events)] if events else [])
        try:
            await self._health.until_done(lambda: self._committer.commit(commit))
        except DuplicateEntryError:
            return
        self._board.published(events)


def alarm_event(signal: leyline.EmergencySignal) -> FiredEvent:
    """The event an emergency signal is reported as."""
    event = (
        Event.ROLLBACK_DEADLINE if signal.reason == ROLLBACK_DEADLINE else Event.EMERGENCY_SIGNAL
    )
    attributes = {
        "reason": signal.reason,
        "origin": signal.origin,
        "level": leyline.EmergencyLevel.Name(signal.level),
        "run_id": signal.run_id,
    }
    return _event(event, Severity.CRITICAL, attributes)


def sheet_event(sheet: leyline.BSDS) -> FiredEvent:
    """The event of a safety sheet that came over the bus."""
    attributes = {
        "blueprint_id": sheet.blueprint_id,
        "hazard_band": HAZARD_BANDS.get(sheet.hazard_band, UNKNOWN),
        "handling_class": HANDLING_CLASSES.get(sheet.handling_class, UNKNOWN),
        "risk": number(sheet.risk_score),
        "provenance": PROVENANCES.get(sheet.provenance, UNKNOWN),
    }
    return _event(Event.BSDS_ISSUED, Severity.INFO, attributes)


def _event(event: Event, severity: Severity, attributes: Mapping[str, str]) -> FiredEvent:
    """An event whose attributes are bounded, whoever wrote them."""
    bounded = {name: value[:_ATTRIBUTE_CHARS] for name, value in attributes.items()}
    return FiredEvent(event, severity, bounded)
