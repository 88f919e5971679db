"""Where the training thread and the client's own thread meet: two sides of one lock.

The training thread posts entries and asks for the command of its last packet; the other thread
takes entries in order and hands in what arrived. Everything here is bounded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tamiyo_svc.client.circuit import Circuit
from tamiyo_svc.client.transport import Entry, Outgoing
from tamiyo_svc.client.verification import CommandRejectedError, CommandVerifier, VerifiedCommand
from tamiyo_svc.leyline.envelope import DEFAULT_MAX_BYTES
from tamiyo_svc.taxonomy import CommandRejection

_LOG: Final = logging.getLogger("tamiyo.client")
_MISSES_IN_A_ROW: Final = 3
"""After this many the service counts as silent and waiting stops for a while."""


@dataclass(slots=True)
class ClientCounters:
    """What became of packets and commands.

    `published` counts entries of packets that the bus has taken, `unpublished` packets that were
    never sent: refused, dropped from a full queue (`dropped`, oldest first) or lost at closing.
    Every `wait` ends in `received` or `missed`; `waits_skipped` of the misses did not wait,
    because the bus or the service had been silent. `late` commands came for an earlier packet or
    after nobody waited any more. `observed` commands were only logged.
    """

    published: int = 0
    unpublished: int = 0
    dropped: int = 0
    received: int = 0
    observed: int = 0
    missed: int = 0
    waits_skipped: int = 0
    late: int = 0
    acknowledged: int = 0
    bus_errors: int = 0
    faults: int = 0
    rejected: Counter[CommandRejection] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Posted:
    """An entry in the queue; `is_packet` tells state packets from field reports."""

    outgoing: Outgoing
    is_packet: bool

    @property
    def size_bytes(self) -> int:
        """Size of the envelope."""
        return len(self.outgoing.envelope.payload)


class Exchange:
    """One run's queue of outgoing entries and the place for the command it waits for.

    `clock` is Unix time, `monotonic` measures waiting, both in seconds. With `hands_out` false
    commands are verified and logged, nothing more.
    """

    def __init__(
        self,
        verifier: CommandVerifier,
        *,
        max_entries: int,
        max_bytes: int,
        hands_out: bool,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = ClientCounters()
        self.verifier = verifier
        self.reachable: bool | None = None
        """Whether the bus answered last; None before the first attempt."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._hands_out = hands_out
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[Posted] = deque()
        self._queued_bytes = 0
        self._in_flight = 0
        self._awaited = ("", -1)
        self._command: VerifiedCommand | None = None
        self._patience = Circuit()
        self._misses = 0
        self._arrived: Callable[[], None] | None = None

    @property
    def queued_bytes(self) -> int:
        """Bytes of the entries that wait to be sent."""
        return self._queued_bytes

    def reset(self) -> None:
        """Start anew in a forked child, where whoever held the lock does not exist."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue.clear()
        self._queued_bytes = self._in_flight = 0
        self._awaited = ("", -1)
        self._command = None
        self.reachable = None
        self.counters = ClientCounters()

    def restore(self, accepted_s: Mapping[str, float]) -> None:
        """Refuse these commands too."""
        with self._lock:
            self.verifier.restore(accepted_s)

    def post_packet(self, outgoing: Outgoing, packet_id: str, step: int) -> bool:
        """Queue a state packet; from now on its command is the one that counts.

        False when it is larger than any reader takes.
        """
        posted = Posted(outgoing, is_packet=True)
        with self._lock:
            self._retire_command()
            self._awaited = ("", -1)
            if posted.size_bytes > min(DEFAULT_MAX_BYTES, self._max_bytes):
                self.counters.unpublished += 1
                return False
            self.verifier.expect(packet_id, step)
            self._awaited = (packet_id, step)
            self._enqueue(posted)
        return True

    def post_report(self, outgoing: Outgoing) -> None:
        """Queue a field report."""
        with self._lock:
            self._enqueue(Posted(outgoing, is_packet=False))

    def refused(self) -> None:
        """Count a packet that could not be built."""
        with self._lock:
            self._retire_command()
            self._awaited = ("", -1)
            self.counters.unpublished += 1

    def take(self, count: int) -> list[Posted]:
        """The oldest entries of the queue, to be given back to `sent` or `unsent`."""
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
            self._queued_bytes -= sum(entry.size_bytes for entry in batch)
            self._in_flight = len(batch)
        return batch

    def sent(self, batch: Sequence[Posted]) -> None:
        """Note that the bus has these."""
        with self._lock:
            packets = sum(entry.is_packet for entry in batch)
            self.counters.published += packets
            self.counters.acknowledged += len(batch) - packets
            self._in_flight = 0
            self._changed.notify_all()

    def unsent(self, batch: Sequence[Posted]) -> None:
        """Put entries back to be sent again; readers recognise one that arrives twice."""
        with self._lock:
            self._queue.extendleft(reversed(batch))
            self._queued_bytes += sum(entry.size_bytes for entry in batch)
            self._in_flight = 0
            self._shed()
            self._changed.notify_all()

    def discard(self) -> None:
        """Give up what is still queued."""
        with self._lock:
            self.counters.unpublished += sum(entry.is_packet for entry in self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()

    def set_reachable(self, reachable: bool) -> None:
        """Note whether the bus answers; waiters give up when it does not."""
        if reachable is self.reachable:
            return
        with self._lock:
            self.reachable = reachable
            self._notify()

    def bus_failed(self) -> None:
        """Count a failure of the bus."""
        with self._lock:
            self.counters.bus_errors += 1

    def faulted(self) -> None:
        """Count an error nobody foresaw in the client's own thread."""
        with self._lock:
            self.counters.faults += 1

    def deliver(self, entries: Iterable[Entry]) -> None:
        """Verify what arrived on the reply stream and keep the command that is waited for."""
        for entry in entries:
            with self._lock:
                try:
                    command = self.verifier.verify(entry, self._clock())
                except CommandRejectedError as error:
                    first = not self.counters.rejected[error.reason]
                    self.counters.rejected[error.reason] += 1
                    if first:
                        _LOG.warning("command refused: %s", error.reason)
                    continue
                self._misses = 0
                self._patience.succeeded()
                if not self._hands_out:
                    self.counters.observed += 1
                    _LOG.info(
                        "command %s for step %d observed, not applied",
                        command.command.command_id,
                        command.step_index,
                    )
                elif command.packet_id == self._awaited[0]:
                    self._command = command
                    self._notify()
                else:
                    self.counters.late += 1

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None:
        """Block until the command for `step`, the last one posted, is there or time is up."""
        with self._lock:
            deadline_s = self._begin(step, timeout_s)
            while (command := self._taken(step)) is None:
                left_s = deadline_s - self._monotonic()
                if left_s <= 0.0 or self.reachable is False:
                    break
                self._changed.wait(left_s)
            if command is None:
                self._missed(timeout_s)
        return command

    def begin(self, step: int, timeout_s: float, arrived: Callable[[], None]) -> float:
        """Start a wait that does not block: `arrived` is called from the other thread.

        Returns the time on the monotonic clock at which it is over; `end` must follow.
        """
        with self._lock:
            self._arrived = arrived
            return self._begin(step, timeout_s)

    def poll(self) -> VerifiedCommand | None:
        """The command for the packet posted last if it is there."""
        if self._command is None:
            return None
        with self._lock:
            return self._taken(self._awaited[1])

    def end(self, timeout_s: float, *, missed: bool) -> None:
        """Finish a wait that `begin` started."""
        with self._lock:
            self._arrived = None
            if missed:
                self._missed(timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued is sent; False when it is not, at once without a bus."""
        deadline_s = self._monotonic() + timeout_s
        with self._lock:
            while self._queue or self._in_flight:
                left_s = deadline_s - self._monotonic()
                if left_s <= 0.0 or self.reachable is False:
                    return False
                self._changed.wait(left_s)
        return True

    def _begin(self, step: int, timeout_s: float) -> float:
        now_s = self._monotonic()
        if (
            step != self._awaited[1]
            or timeout_s <= 0.0
            or self.reachable is False
            or not self._hands_out
            or not self._patience.allows(now_s)
        ):
            self.counters.waits_skipped += timeout_s > 0.0 and self._command is None
            return now_s
        return now_s + timeout_s

    def _taken(self, step: int) -> VerifiedCommand | None:
        command = self._command
        if command is None or step != self._awaited[1]:
            return None
        self._command = None
        self._awaited = ("", -1)
        self.counters.received += 1
        return command

    def _missed(self, timeout_s: float) -> None:
        self.counters.missed += 1
        now_s = self._monotonic()
        waited = timeout_s > 0.0 and self.reachable is not False and self._hands_out
        if waited and self._patience.allows(now_s):
            self._misses += 1
            if self._misses >= _MISSES_IN_A_ROW:
                self._patience.failed(now_s)

    def _retire_command(self) -> None:
        if self._command is not None:
            self._command = None
            self.counters.late += 1

    def _enqueue(self, posted: Posted) -> None:
        self._queue.append(posted)
        self._queued_bytes += posted.size_bytes
        self._shed()

    def _shed(self) -> None:
        while self._queue and (
            len(self._queue) > self._max_entries or self._queued_bytes > self._max_bytes
        ):
            oldest = self._queue.popleft()
            self._queued_bytes -= oldest.size_bytes
            self.counters.dropped += 1
            self.counters.unpublished += oldest.is_packet

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._arrived is not None:
            self._arrived()
