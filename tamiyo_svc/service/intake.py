"""From the streams to the runs: every entry read is handed to whoever ends it, exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import structlog

from tamiyo_svc.adapters.cancellation import cancel
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.consumer import GroupLostError, StreamConsumer
from tamiyo_svc.adapters.oona.dead_letters import bury
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.errors import BusError, DuplicateEntryError, InvalidPacketError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import (
    PAYLOAD_FIELD,
    EnvelopeRejectedError,
    open_envelope,
    parse_payload,
)
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.evaluate import PacketPath
from tamiyo_svc.service.outcomes import Received
from tamiyo_svc.taxonomy import DeadLetterReason, Outcome, Stage

log = structlog.get_logger("tamiyo.intake")

_QUIET_WITHIN_S: Final = 0.02

Notice = Callable[[Entry, leyline.BusEnvelope], Awaitable[None]]
"""Takes a message that is not a state packet but is for us; it acknowledges the entry itself."""


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """How much is read and held; ages and intervals in milliseconds."""

    read_count: int = 32
    block_ms: int = 1000
    claim_idle_ms: int = 5000
    max_deliveries: int = 5
    max_message_bytes: int = 1 << 20
    in_flight: int = 1024


class Intake:
    """Reads entries and keeps at most one task a run at work on them.

    Packets that arrive while their run is at work wait in its mailbox and are settled together
    afterwards, so order within a run holds and only the newest is decided. `on_busy` hears of
    everything that was read, `on_idle` when nothing is in flight any more; either may come often.
    """

    def __init__(
        self,
        consumers: Sequence[StreamConsumer],
        committer: Committer,
        health: BusHealth,
        path: PacketPath,
        metrics: Metrics,
        keyring: Keyring | None,
        dead_letter_stream: str,
        limits: IntakeLimits,
        notices: dict[int, Notice],
    ) -> None:
        self.consumers = tuple(consumers)
        self._committer = committer
        self._health = health
        self._path = path
        self._metrics = metrics
        self._keyring = keyring
        self._dead_letter_stream = dead_letter_stream
        self._limits = limits
        self._notices = notices
        self._mailboxes: dict[str, list[Received]] = {}
        self._in_flight: set[tuple[str, str]] = set()
        # One look at pending entries at a time, and what ended here since it began: its reply
        # may still name those.
        self._looking = asyncio.Lock()
        self._ended_since: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._to_recover = set(self.consumers)
        self.on_busy: Callable[[], None] = lambda: None
        self.on_idle: Callable[[], None] = lambda: None

    async def read(self, consumer: StreamConsumer) -> None:
        """Read until cancelled: what is pending for us first, then what is new."""
        while True:
            await self._health.wait_up()
            await self._room.wait()
            try:
                if consumer in self._to_recover:
                    self._to_recover.discard(consumer)
                    await self._recover_pending(consumer)
                entries = await consumer.read(self._limits.read_count, self._limits.block_ms)
            except GroupLostError as error:
                log.warning("bus.group_lost", error=str(error))
                self._to_recover.add(consumer)
                self._health.failed(error)
            except BusError as error:
                # The reply may be lost and its entries pending for us without our knowing.
                self._to_recover.add(consumer)
                self._health.failed(error)
            else:
                self._health.seen()
                self._dispatch(consumer, entries)

    async def claim(self) -> None:
        """Take over what other consumers left pending too long, until cancelled."""
        while True:
            await asyncio.sleep(self._limits.claim_idle_ms / 2e3)
            await self._health.wait_up()
            try:
                for consumer in self.consumers:
                    for stream in consumer.streams:
                        await self._claim_idle(consumer, stream)
            except BusError as error:
                self._health.failed(error)

    async def _claim_idle(self, consumer: StreamConsumer, stream: str) -> None:
        async with self._looking:
            self._ended_since.clear()
            entries = await consumer.claim_idle(
                stream, self._limits.claim_idle_ms, self._limits.read_count
            )
            self._dispatch(consumer, entries)

    async def quiet(self) -> None:
        """Wait until nothing is in flight, or a moment where there always is something."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_QUIET_WITHIN_S):
                await self._idle.wait()

    async def drain(self) -> None:
        """Wait until everything read so far has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def abandon(self) -> int:
        """Give up what has not ended; it stays pending in Redis. Returns how many packets."""
        left = len(self._in_flight)
        await cancel(self._tasks)
        return left

    async def _recover_pending(self, consumer: StreamConsumer) -> None:
        for stream in consumer.streams:
            after = "0"
            while after:
                async with self._looking:
                    self._ended_since.clear()
                    entries = await consumer.pending(stream, after, self._limits.read_count)
                    self._dispatch(consumer, entries)
                after = entries[-1].entry_id if entries else ""
                await self._room.wait()

    def _dispatch(self, consumer: StreamConsumer, entries: Sequence[Entry]) -> None:
        """Hand every entry on; those not for us are acknowledged together."""
        read_at = time.perf_counter()
        if entries:
            self._idle.clear()
            self.on_busy()
        ignored: list[Entry] = []
        for entry in entries:
            if entry.key in self._in_flight or entry.key in self._ended_since:
                continue
            if PAYLOAD_FIELD not in entry.fields:
                self._metrics.entry_ignored("no_payload")
                ignored.append(entry)
                continue
            if entry.deliveries > self._limits.max_deliveries:
                self._reject(entry, DeadLetterReason.DELIVERIES_EXCEEDED, str(entry.deliveries))
                continue
            try:
                for_us = self._open(entry, read_at)
            except EnvelopeRejectedError as error:
                self._reject(entry, DeadLetterReason(error.reason), str(error))
                continue
            except InvalidPacketError as error:
                self._reject(entry, DeadLetterReason.INVALID_FIELD, str(error))
                continue
            if not for_us:
                ignored.append(entry)
        if ignored:
            self._start(self._acknowledge(consumer, ignored), "acknowledge")
        if not self._in_flight:
            self._idle.set()
            self.on_idle()

    def _open(self, entry: Entry, read_at: float) -> bool:
        """Verify one entry and hand it on if it is for us.

        Raises:
            EnvelopeRejectedError, InvalidPacketError: it must not be processed.
        """
        started = time.perf_counter()
        envelope = open_envelope(entry.fields, self._keyring, self._limits.max_message_bytes)
        if envelope.message_type == leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE:
            received = self._path.receive(entry, envelope, read_at)
            self._metrics.observe_stage(Stage.DECODE, time.perf_counter() - started)
            self._metrics.packet_received()
            self._in_flight.add(entry.key)
            self._enqueue(received)
            return True
        notice = self._notices.get(envelope.message_type)
        if notice is None:
            self._metrics.entry_ignored("not_for_us")
            return False
        parse_payload(envelope)
        self._in_flight.add(entry.key)
        self._start(self._give_notice(notice, entry, envelope), "notice")
        return True

    def _enqueue(self, received: Received) -> None:
        run_key = received.run_key
        if len(self._in_flight) >= self._limits.in_flight:
            self._room.clear()
        mailbox = self._mailboxes.get(run_key)
        if mailbox is not None:
            mailbox.append(received)
            return
        self._mailboxes[run_key] = [received]
        self._start(self._serve_run(run_key), "run")

    async def _serve_run(self, run_key: str) -> None:
        mailbox = self._mailboxes[run_key]
        try:
            while mailbox:
                batch = mailbox[:]
                mailbox.clear()
                try:
                    await self._path.settle(run_key, batch)
                except Exception:  # the one boundary: an unforeseen failure becomes a retry
                    log.exception("packet.failed", run_id=batch[0].run_id, packets=len(batch))
                    mailbox[:0] = await self._failed(batch)
                else:
                    self._ended(received.entry for received in batch)
        finally:
            del self._mailboxes[run_key]

    async def _failed(self, batch: Iterable[Received]) -> list[Received]:
        """Packets whose settling raised, to be tried again; those that did so often are buried."""
        again = []
        for received in batch:
            entry = replace(received.entry, deliveries=received.entry.deliveries + 1)
            if entry.deliveries <= self._limits.max_deliveries:
                again.append(replace(received, entry=entry))
            else:
                await self._bury(entry, DeadLetterReason.DELIVERIES_EXCEEDED, "settling failed")
        return again

    def _reject(self, entry: Entry, reason: DeadLetterReason, detail: str) -> None:
        self._metrics.packet_received()
        self._in_flight.add(entry.key)
        log.warning(
            "entry.rejected",
            stream=entry.stream,
            entry_id=entry.entry_id,
            reason=reason.value,
            detail=detail,
        )
        self._start(self._bury(entry, reason, detail), "dead-letter")

    async def _bury(self, entry: Entry, reason: DeadLetterReason, detail: str) -> None:
        commit = bury(entry, reason, detail, self._dead_letter_stream)
        outcome = Outcome.DEAD_LETTERED
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            await self._committer.commit(commit)

        try:
            await self._health.until_done(attempt)
        except DuplicateEntryError:
            # Someone else ended it, unless it was an attempt of ours whose reply was lost.
            if attempts == 1:
                outcome = Outcome.DUPLICATE
        if outcome is Outcome.DEAD_LETTERED:
            self._metrics.dead_letter(reason)
        self._metrics.packet_ended(outcome)
        self._ended([entry])

    async def _give_notice(
        self, notice: Notice, entry: Entry, envelope: leyline.BusEnvelope
    ) -> None:
        for _ in range(self._limits.max_deliveries):
            try:
                await notice(entry, envelope)
            except InvalidPacketError as error:
                self._metrics.packet_received()
                await self._bury(entry, DeadLetterReason.INVALID_FIELD, str(error))
                return
            except Exception:  # the boundary, as for packets: an unforeseen failure is a retry
                log.exception("message.failed", entry_id=entry.entry_id)
            else:
                self._ended([entry])
                return
        self._metrics.packet_received()
        await self._bury(entry, DeadLetterReason.DELIVERIES_EXCEEDED, "processing failed")

    async def _acknowledge(self, consumer: StreamConsumer, entries: Sequence[Entry]) -> None:
        try:
            await consumer.acknowledge(entries)
        except BusError as error:
            # They stay pending and are read again once the bus is back.
            self._to_recover.add(consumer)
            self._health.failed(error)

    def _ended(self, entries: Iterable[Entry]) -> None:
        keys = {entry.key for entry in entries}
        self._in_flight -= keys
        if self._looking.locked():
            self._ended_since |= keys
        if not self._in_flight:
            self._idle.set()
            self.on_idle()
        if len(self._in_flight) < self._limits.in_flight:
            self._room.set()

    def _start(self, work: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(work)
        task.set_name(f"tamiyo-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
