"""What a trainer holds: publish a state packet, get the command for it or go on without."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from tamiyo_svc.client.circuit import Circuit
from tamiyo_svc.client.transport import Entry, Transport, TransportOptions
from tamiyo_svc.client.verification import CommandRejectedError, CommandVerifier, VerifiedCommand
from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import CommandRejection

NORMAL_STREAM: Final = "oona.normal"
REPLY_STREAM_PREFIX: Final = "oona.commands."


@dataclass(slots=True)
class ClientCounters:
    """What became of packets and commands; every `wait` ends in `received` or `missed`."""

    published: int = 0
    unpublished: int = 0
    received: int = 0
    missed: int = 0
    late: int = 0
    bus_errors: int = 0
    rejected: Counter[CommandRejection] = field(default_factory=Counter)


class TamiyoClient:
    """Synchronous client of one training run; not to be shared between threads.

    No call raises because Redis is away, and none waits longer than its timeout and the socket
    timeouts in `options` together; after a failure the bus is left alone for a while. `clock` is
    Unix time, `monotonic` measures waiting, both in seconds.
    """

    def __init__(
        self,
        redis_url: str,
        keyring: Keyring | None,
        run_id: str,
        *,
        stream: str = NORMAL_STREAM,
        options: TransportOptions | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if not run_id:
            raise ValueError("a client needs a run id")
        self.run_id = run_id
        self.reply_stream = REPLY_STREAM_PREFIX + run_id
        self.counters = ClientCounters()
        self._keyring = keyring
        self._stream = stream
        self._clock = clock
        self._monotonic = monotonic
        self._transport = Transport(redis_url, self.reply_stream, options, monotonic)
        self._circuit = Circuit()
        self._verifier = CommandVerifier(keyring, run_id)
        self._awaited = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def publish(
        self,
        packet: leyline.SystemStatePacket,
        *,
        blueprint_ids: Sequence[str] = (),
        traceparent: str = "",
    ) -> bool:
        """Send a packet of this run; False when the bus did not take it.

        Raises:
            ValueError: the packet has no id or is of another run.
        """
        if not packet.packet_id or packet.training_run_id != self.run_id:
            raise ValueError(f"not a packet of run {self.run_id!r}")
        attributes = {
            "reply_to": self.reply_stream,
            "training_run_id": self.run_id,
            "packet_id": packet.packet_id,
            "step_index": str(packet.global_step),
        }
        if blueprint_ids:
            attributes["blueprint_id"] = ",".join(blueprint_ids)
        if traceparent:
            attributes["traceparent"] = traceparent
        self._awaited = ""
        if not self._circuit.allows(self._monotonic()):
            self.counters.unpublished += 1
            return False
        try:
            # The read must know where the stream ends before an answer can be on it.
            self._transport.open()
            self._verifier.expect(packet.packet_id, packet.global_step)
            self._transport.append(self._stream, seal(packet, self._keyring, attributes).fields())
        except BusError:
            self._bus_failed()
            self.counters.unpublished += 1
            return False
        self._circuit.succeeded()
        self._awaited = packet.packet_id
        self.counters.published += 1
        return True

    def wait(self, packet_id: str, timeout_s: float) -> VerifiedCommand | None:
        """The command for this packet, None when there is none in time.

        Commands for other packets that arrive meanwhile are verified, counted as late and
        dropped. A packet that was not the last one published has no command any more.
        """
        command = self._receive(packet_id, timeout_s) if packet_id == self._awaited else None
        if command is None:
            self.counters.missed += 1
        return command

    def poll(self) -> VerifiedCommand | None:
        """The command for the packet published last if it is there, without waiting."""
        return self._receive(self._awaited, 0.0)

    def _receive(self, packet_id: str, timeout_s: float) -> VerifiedCommand | None:
        deadline_s = self._monotonic() + timeout_s
        while True:
            now_s = self._monotonic()
            if not self._circuit.allows(now_s):
                return None
            try:
                entries = self._transport.read(max(0.0, deadline_s - now_s))
            except BusError:
                self._bus_failed()
                return None
            wanted = None
            for entry in entries:
                command = self._verified(entry)
                if command is None:
                    continue
                if command.packet_id == packet_id:
                    wanted = command
                    self.counters.received += 1
                else:
                    self.counters.late += 1
            if wanted is not None:
                self._awaited = ""
                return wanted
            if self._monotonic() >= deadline_s:
                return None

    def _verified(self, entry: Entry) -> VerifiedCommand | None:
        try:
            return self._verifier.verify(entry, self._clock())
        except CommandRejectedError as error:
            self.counters.rejected[error.reason] += 1
            return None

    def _bus_failed(self) -> None:
        self.counters.bus_errors += 1
        self._circuit.failed(self._monotonic())
