"""Where the training thread and the client's own threads meet, under one lock.

The training thread posts drafts and asks for the command of its last packet; one thread takes
what was posted in order, another hands in what arrived. Everything here is bounded, and nothing
under the lock takes long: what is posted is sealed and what arrived is authenticated outside.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from tamiyo_svc.client.circuit import Circuit
from tamiyo_svc.client.counters import ClientCounters
from tamiyo_svc.client.drafts import Draft, Outgoing, PacketDraft
from tamiyo_svc.client.interpreter import PROMPT_RETURN
from tamiyo_svc.client.notices import note
from tamiyo_svc.client.outbox import Outbox, Posted
from tamiyo_svc.client.suspicion import Suspicion
from tamiyo_svc.client.transport import Entry
from tamiyo_svc.client.verification import CommandRejectedError, CommandVerifier, VerifiedCommand
from tamiyo_svc.leyline.envelope import DEFAULT_MAX_BYTES
from tamiyo_svc.taxonomy import Direction

_NOBODY: Final = ("", -1)
_MISSES_IN_A_ROW: Final = 3
"""After this many the service counts as silent and waiting stops for a while."""
_MAX_REFUSALS: Final = 8
"""Kinds of refusals that are logged, each the first time."""


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
        """Whether the bus answered last, both ways; None before the first attempt."""
        self._away: set[Direction] = set()
        self._largest_bytes = min(DEFAULT_MAX_BYTES, max_bytes)
        self._hands_out = hands_out
        self._clock = clock
        self._monotonic = monotonic
        # A signal's handler runs in the training thread and may call the client from within.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._outbox = Outbox(max_entries, max_bytes)
        self._in_flight = 0
        self._awaited = _NOBODY
        self._command: VerifiedCommand | None = None
        self._patience = Circuit()
        self._misses = 0
        self._last_wait_s = 0.0
        self._arrived: Callable[[], None] | None = None
        self._suspicion = Suspicion(monotonic)
        self._refusals_told: set[str] = set()

    @property
    def is_doubtful(self) -> bool:
        """Whether there is reason to look whether anybody answers."""
        return self._suspicion.is_doubtful and self.reachable is not False

    @property
    def queued_bytes(self) -> int:
        """Bytes of what waits to be sent, estimated while it is not sealed."""
        return self._outbox.size_bytes

    def reset(self) -> None:
        """Start anew in a forked child, where whoever held the lock does not exist."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._outbox.take(len(self._outbox))
        self._in_flight = 0
        self._awaited = _NOBODY
        self._command = None
        self.reachable = None
        self._away.clear()
        self.counters = ClientCounters()
        self._suspicion = Suspicion(self._monotonic)

    def restore(self, accepted_s: Mapping[str, float]) -> None:
        """Refuse these commands too."""
        with self._lock:
            self.verifier.restore(accepted_s)

    def post(self, draft: Draft) -> bool:
        """Queue a draft; from now on the command for the last packet is the one that counts.

        False when it is larger than any reader takes.
        """
        posted = Posted(draft, draft.size_bytes)
        fits = not posted.is_packet or posted.size_bytes <= self._largest_bytes
        with self._lock:
            if isinstance(draft, PacketDraft):
                self._retire_command()
                if fits:
                    self._awaited = (draft.packet_id, draft.step)
            if fits:
                self._count_dropped(self._outbox.append(posted))
        if not fits:
            self.refuse(draft.step, "it is too large")
        return fits

    def refuse(self, step: int, reason: str, posted: Posted | None = None) -> None:
        """Give up a packet that cannot be built; whoever waits for its command need not."""
        with self._lock:
            self.counters.unpublished += posted is None or posted.is_packet
            if posted is None or self._is_awaited(posted.draft.packet_id):
                self._retire_command()
                self._notify()
            if posted is not None:
                self._in_flight -= 1
                self._changed.notify_all()
            kind = reason.partition(":")[0]
            first = kind not in self._refusals_told and len(self._refusals_told) < _MAX_REFUSALS
            self._refusals_told.add(kind)
        if first:
            note(logging.WARNING, "step %s cannot be published: %s", step, reason)

    def sealed(self, posted: Posted, outgoing: Outgoing) -> bool:
        """Note the sealed form of what `take` gave; an answer to it is expected from now on.

        False when it turned out larger than any reader takes.
        """
        posted.outgoing = outgoing
        posted.size_bytes = len(outgoing.envelope.payload)
        if posted.size_bytes > self._largest_bytes:
            return False
        if isinstance(posted.draft, PacketDraft):
            with self._lock:
                self.verifier.expect(posted.draft.packet_id, posted.draft.step)
        return True

    def take(self, count: int) -> list[Posted]:
        """The oldest of the queue; each is to be given to `refuse`, `sent` or `unsent`."""
        with self._lock:
            batch = self._outbox.take(count)
            self._in_flight = len(batch)
        return batch

    def sent(self, batch: Sequence[Posted]) -> None:
        """Note that the bus has these."""
        with self._lock:
            packets = sum(entry.is_packet for entry in batch)
            self.counters.published += packets
            self.counters.acknowledged += len(batch) - packets
            self._suspicion.sent(packets)
            self._in_flight = 0
            self._changed.notify_all()

    def unsent(self, batch: Sequence[Posted]) -> None:
        """Put entries back to be sent again; readers recognise one that arrives twice."""
        with self._lock:
            self._count_dropped(self._outbox.put_back(batch))
            self._in_flight = 0
            self._changed.notify_all()

    def discard(self) -> None:
        """Give up what is still queued."""
        with self._lock:
            left = self._outbox.take(len(self._outbox))
            self.counters.unpublished += sum(posted.is_packet for posted in left)
            self._changed.notify_all()

    def answered(self, direction: Direction) -> bool:
        """Note that the bus answers in this direction; whether it was away and is back with it."""
        if self.reachable and direction not in self._away:
            return False
        with self._lock:
            self._away.discard(direction)
            back = self.reachable is False and not self._away
            self.reachable = not self._away
            self._notify()
        return back

    def failed(self, direction: Direction, *, fault: bool = False) -> bool:
        """Count a failure in this direction, a `fault` if nobody foresaw it; waiters give up.

        Whether the bus was not known to be away.
        """
        with self._lock:
            lost = self.reachable is not False
            self.counters.faults += fault
            self.counters.bus_errors += not fault
            self._away.add(direction)
            self.reachable = False
            self._notify()
        return lost

    def deliver(self, entries: Iterable[Entry]) -> None:
        """Verify what arrived on the reply stream and keep the command that is waited for."""
        for entry in entries:
            lines = []
            try:
                authentic = self.verifier.open(entry)
                with self._lock:
                    command = self.verifier.accept(authentic, self._clock())
                    lines = self._keep(command)
            except CommandRejectedError as error:
                with self._lock:
                    self.counters.rejected[error.reason] += 1
                    lines = [self._suspicion.refused(error.reason, error.detail)]
            else:
                if not self._hands_out:
                    note(
                        logging.INFO,
                        "command %s for step %d observed, not applied",
                        command.command.command_id,
                        command.step_index,
                    )
            for line in filter(None, lines):
                note(logging.WARNING, "%s", line)

    def is_silent(self, *, last: bool) -> bool:
        """Whether it is time to say that nobody answers; with `last` there will be no better."""
        with self._lock:
            return self.reachable is not False and self._suspicion.is_silent(last=last)

    def restarted(self) -> None:
        """Forget that nothing could be sent for want of a thread."""
        with self._lock:
            self._away.clear()
            self.reachable = None

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None:
        """Block until the command for `step`, the last one posted, is there or time is up."""
        with PROMPT_RETURN, self._lock:
            deadline_s = self._begin(step, timeout_s)
            while (command := self._taken(step)) is None:
                left_s = deadline_s - self._monotonic()
                if left_s <= 0.0 or not self.may_come(step):
                    break
                self._changed.wait(left_s)
            if command is None:
                self._missed(timeout_s)
        return command

    def may_come(self, step: int) -> bool:
        """Whether the command for `step` can still come."""
        return self.reachable is not False and step == self._awaited[1]

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
            while self._outbox or self._in_flight:
                left_s = deadline_s - self._monotonic()
                if left_s <= 0.0 or self.reachable is False:
                    return False
                self._changed.wait(left_s)
        return True

    def _keep(self, command: VerifiedCommand) -> list[str]:
        """Keep a command; what is to be said about it."""
        self._misses = 0
        self._patience.succeeded()
        lines = [self._suspicion.accepted()]
        if not self._hands_out:
            self.counters.observed += 1
        elif self._is_awaited(command.packet_id):
            self._command = command
            self._notify()
        else:
            self.counters.late += 1
            lines.append(self._suspicion.late(self._last_wait_s))
        return lines

    def _is_awaited(self, packet_id: str) -> bool:
        return packet_id == self._awaited[0]

    def _begin(self, step: int, timeout_s: float) -> float:
        now_s = self._monotonic()
        if (
            step != self._awaited[1]
            or not timeout_s > 0.0
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
        self._awaited = _NOBODY
        self.counters.received += 1
        self._suspicion.taken()
        return command

    def _missed(self, timeout_s: float) -> None:
        self.counters.missed += 1
        now_s = self._monotonic()
        waited = timeout_s > 0.0 and self.reachable is not False and self._hands_out
        if waited and self._patience.allows(now_s):
            self._last_wait_s = timeout_s
            self._suspicion.missed()
            self._misses += 1
            if self._misses >= _MISSES_IN_A_ROW:
                self._patience.failed(now_s)

    def _retire_command(self) -> None:
        self._awaited = _NOBODY
        if self._command is not None:
            self._command = None
            self.counters.late += 1

    def _count_dropped(self, dropped: Sequence[Posted]) -> None:
        self.counters.dropped += len(dropped)
        self.counters.unpublished += sum(posted.is_packet for posted in dropped)

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._arrived is not None:
            self._arrived()
