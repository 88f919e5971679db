"""The client's two Redis connections: one that appends, one that has a read in flight.

The blocking read is sent once and stays outstanding; the thread that owns the transport sleeps on
its socket and on a pipe that wakes it for outgoing entries.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline.envelope import SignedEnvelope

Entry = Mapping[bytes, bytes]
"""The fields of one stream entry."""

_READ_COUNT: Final = 64
_BLOCK_MS: Final = 1000
_DEAD_AFTER_S: Final = _BLOCK_MS / 1000 + 1.0
"""A read unanswered for this long hangs on a connection whose other end is gone."""
_ZERO_ID: Final = b"0-0"


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """How long a call on the bus may take, in seconds."""

    connect_timeout_s: float = 0.25
    socket_timeout_s: float = 0.25


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An entry on its way to a stream."""

    stream: str
    envelope: SignedEnvelope


class Link(Protocol):
    """Where a client's thread sends to and receives from; `wake` alone may be called by others."""

    cursor: str

    def open(self) -> None:
        """Connect, unless connected.

        Raises:
            BusError: it cannot be.
        """

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Send entries; when it fails some may have been sent.

        Raises:
            BusError: it failed.
        """

    def receive(self, timeout_s: float) -> list[Entry]:
        """Entries that arrived, waiting for the first until `timeout_s` or a wake.

        Raises:
            BusError: the connection failed.
        """

    def wake(self) -> None:
        """End a `receive` that waits, or else the next one."""

    def close(self) -> None:
        """Let go of everything."""


class Transport:
    """Appends to streams and reads one reply stream; every failure is a `BusError`.

    A failed connection is dropped and made anew by the next `open`. Nothing is retried. `cursor`
    is the id of the last entry read; reading begins there or at the end of the reply stream as
    first seen, whichever is later, since nothing older can answer a packet of this process.
    """

    def __init__(
        self,
        url: str,
        reply_stream: str,
        options: TransportOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = options or TransportOptions()
        keepalive = {} if url.startswith("unix") else {"socket_keepalive": True}
        self.cursor = ""
        self._reply_stream = reply_stream
        self._clock = clock
        self._redis = Redis.from_url(
            url,
            protocol=2,
            decode_responses=False,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=options.socket_timeout_s,
            socket_connect_timeout=options.connect_timeout_s,
            health_check_interval=0,
            max_connections=2,
            **keepalive,
        )
        self._pool: Any = self._redis.connection_pool
        self._reader: Any = None
        self._socket: Any = None
        self._writer: Any = None
        self._end_seen = False
        self._sent_s: float | None = None
        self._selector: selectors.BaseSelector | None = None
        self._pipe: tuple[int, int] | None = None
        self._woken = False

    def open(self) -> None:
        """Connect and put the read in flight, unless that has been done."""
        try:
            self._open()
        except (RedisError, OSError) as error:
            self._drop()
            raise BusError(f"reading {self._reply_stream}: {error}") from error

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Append entries in one round trip."""
        try:
            if self._writer is None:
                self._writer = self._pool.get_connection()
            commands = [
                ("XADD", entry.stream, "*", *_flat(entry.envelope.fields())) for entry in batch
            ]
            self._writer.send_packed_command(self._writer.pack_commands(commands))
            errors = [error for error in map(self._reply, batch) if error is not None]
        except (RedisError, OSError) as error:
            self._drop_writer()
            raise BusError(f"writing to {batch[0].stream}: {error}") from error
        if errors:
            raise BusError(f"writing to {batch[0].stream}: {errors[0]}") from errors[0]

    def _reply(self, entry: Outgoing) -> RedisError | None:
        try:
            self._writer.read_response()
        except ResponseError as error:
            return error
        return None

    def receive(self, timeout_s: float) -> list[Entry]:
        """Entries that arrived, waiting for the first until `timeout_s` or a wake."""
        try:
            self._open()
            if not self._reader.can_read(0) and not self._readable(timeout_s):
                if self._sent_s is not None and self._clock() - self._sent_s > _DEAD_AFTER_S:
                    raise BusError(f"reading {self._reply_stream}: no answer")
                return []
            reply = self._reader.read_response()
            self._sent_s = None
            entries = reply[0][1] if reply else []
            if entries:
                self.cursor = entries[-1][0].decode()
            self._open()
        except (RedisError, OSError) as error:
            self._drop()
            raise BusError(f"reading {self._reply_stream}: {error}") from error
        except BusError:
            self._drop()
            raise
        return [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries if flat]

    def wake(self) -> None:
        """End a `receive` that waits, or else the next one."""
        pipe = self._pipe
        if pipe is not None and not self._woken:
            self._woken = True
            # A pipe that is closed or full at this moment needs no waking.
            with suppress(OSError):
                os.write(pipe[1], b"\0")

    def close(self) -> None:
        """Close both connections and the pipe."""
        self._drop()
        self._drop_writer()
        self._redis.close()
        pipe, self._pipe = self._pipe, None
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        for end in pipe or ():
            os.close(end)

    def _readable(self, timeout_s: float) -> bool:
        assert self._selector is not None
        assert self._pipe is not None
        ready = {key.fd for key, _ in self._selector.select(timeout_s)}
        if self._pipe[0] in ready:
            # Cleared before the pipe is drained: a wake in between costs one turn, not a packet.
            self._woken = False
            os.read(self._pipe[0], 64)
            ready.remove(self._pipe[0])
        return bool(ready)

    def _open(self) -> None:
        if self._pipe is None:
            pipe = os.pipe()
            os.set_blocking(pipe[0], False)
            os.set_blocking(pipe[1], False)
            self._selector = selectors.DefaultSelector()
            self._selector.register(pipe[0], selectors.EVENT_READ)
            self._pipe = pipe
        if self._reader is None:
            self._reader = self._pool.get_connection()
            assert self._selector is not None
            # redis-py offers no public way to sleep on a connection and on something else.
            self._socket = self._reader._sock
            self._selector.register(self._socket, selectors.EVENT_READ)
        if not self._end_seen:
            self._reader.send_command("XREVRANGE", self._reply_stream, "+", "-", "COUNT", 1)
            newest = self._reader.read_response()
            end = newest[0][0] if newest else _ZERO_ID
            self.cursor = max(self.cursor or "0-0", end.decode(), key=_order)
            self._end_seen = True
        if self._sent_s is None:
            self._reader.send_command(
                *("XREAD", "COUNT", _READ_COUNT, "BLOCK", _BLOCK_MS),
                *("STREAMS", self._reply_stream, self.cursor),
            )
            self._sent_s = self._clock()

    def _drop(self) -> None:
        if self._reader is not None:
            if self._selector is not None and self._socket is not None:
                # By object: redis-py has closed the socket already when it failed.
                self._selector.unregister(self._socket)
            self._reader.disconnect()
            self._pool.release(self._reader)
        self._reader = self._socket = None
        self._sent_s = None

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.disconnect()
            self._pool.release(self._writer)
        self._writer = None


def _flat(fields: Entry) -> list[bytes]:
    return [part for field in fields.items() for part in field]


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
