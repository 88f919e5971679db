"""The client's two Redis connections: one that appends, one that has a read in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from tamiyo_svc.client.drafts import Outgoing
from tamiyo_svc.errors import BusError

Entry = Mapping[bytes, bytes]
"""The fields of one stream entry."""

_READ_COUNT: Final = 8
"""Entries verified in a row, few for the sake of whoever wants the interpreter meanwhile."""
_BLOCK_MS: Final = 1000
_DEAD_AFTER_S: Final = _BLOCK_MS / 1000 + 1.0
"""A read unanswered for this long, in seconds, hangs on a connection without another end."""
_ZERO_ID: Final = b"0-0"


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """How long a call on the bus may take, in seconds."""

    connect_timeout_s: float = 0.25
    socket_timeout_s: float = 0.25


class Link(Protocol):
    """Where a client's two threads send to and receive from.

    One thread calls `connect`, `send` and `disconnect`, another, when the first `connect` has
    succeeded, `listen`, `receive` and `stop_listening`. Any thread may call `interrupt`.
    """

    cursor: str
    """The id of the last entry received."""
    receives: bool
    """Whether there is anything to listen to."""

    def connect(self) -> None:
        """Make ready to send, unless that has been done.

        Raises:
            BusError: it cannot be.
        """

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Send entries; when it fails some may have been sent.

        Raises:
            BusError: it failed.
        """

    def disconnect(self) -> None:
        """Let go of what `connect` made."""

    def listen(self) -> None:
        """Make ready to receive, unless that has been done.

        Raises:
            BusError: it cannot be.
        """

    def receive(self) -> list[Entry]:
        """Entries that arrived, waiting for the first for a second or so.

        Raises:
            BusError: the connection failed, or somebody interrupted.
        """

    def stop_listening(self) -> None:
        """Let go of what `listen` made."""

    def interrupt(self) -> None:
        """End a `receive` that waits."""


class Transport:
    """Appends to streams and reads one reply stream; every failure is a `BusError`.

    A failed connection is dropped and made anew by the next `connect` or `listen`. Nothing is
    retried. Reading begins at `cursor` or at the end of the reply stream as first seen, whichever
    is later, since nothing older can answer a packet of this process.
    """

    receives = True

    def __init__(
        self,
        url: str,
        reply_stream: str,
        options: TransportOptions | None = None,
    ) -> None:
        options = options or TransportOptions()
        keepalive = {} if url.startswith("unix") else {"socket_keepalive": True}
        self.cursor = ""
        self._reply_stream = reply_stream
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
        self._asked = False
        self._writer: Any = None
        self._end_seen = False

    def connect(self) -> None:
        """Connect for writing and see where the reply stream ends, unless that has been done."""
        if self._writer is not None:
            return
        try:
            self._writer = self._pool.get_connection()
            if not self._end_seen:
                self._writer.send_command("XREVRANGE", self._reply_stream, "+", "-", "COUNT", 1)
                newest = self._writer.read_response()
                end = newest[0][0] if newest else _ZERO_ID
                self.cursor = max(self.cursor or "0-0", end.decode(), key=_order)
                self._end_seen = True
        except (RedisError, OSError) as error:
            self.disconnect()
            raise BusError(f"connecting: {error}") from error

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Append entries in one round trip."""
        commands = [("XADD", entry.stream, "*", *_flat(entry.envelope.fields())) for entry in batch]
        try:
            self._writer.send_packed_command(self._writer.pack_commands(commands))
            errors = [error for error in map(self._reply, batch) if error is not None]
        except (RedisError, OSError) as error:
            self.disconnect()
            raise BusError(f"writing to {batch[0].stream}: {error}") from error
        if errors:
            raise BusError(f"writing to {batch[0].stream}: {errors[0]}") from errors[0]

    def _reply(self, entry: Outgoing) -> RedisError | None:
        try:
            self._writer.read_response()
        except ResponseError as error:
            return error
        return None

    def disconnect(self) -> None:
        """Close the connection for writing."""
        writer, self._writer = self._writer, None
        self._close(writer)

    def listen(self) -> None:
        """Connect for reading and put a read in flight, unless that has been done."""
        try:
            reader = self._reader
            if reader is None:
                self._reader = reader = self._pool.get_connection()
                self._asked = False
            if not self._asked:
                reader.send_command(
                    *("XREAD", "COUNT", _READ_COUNT, "BLOCK", _BLOCK_MS),
                    *("STREAMS", self._reply_stream, self.cursor),
                )
                self._asked = True
        except (RedisError, OSError) as error:
            self.stop_listening()
            raise BusError(f"reading {self._reply_stream}: {error}") from error

    def receive(self) -> list[Entry]:
        """Entries that arrived, waiting for the first for a second."""
        try:
            reply = self._reader.read_response(timeout=_DEAD_AFTER_S)
        except (RedisError, OSError) as error:
            self.stop_listening()
            raise BusError(f"reading {self._reply_stream}: {error}") from error
        self._asked = False
        entries = reply[0][1] if reply else []
        if entries:
            self.cursor = entries[-1][0].decode()
        return [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries if flat]

    def stop_listening(self) -> None:
        """Close the connection for reading."""
        reader, self._reader = self._reader, None
        self._close(reader)

    def interrupt(self) -> None:
        """Shut the connection for reading, so that a read that waits fails."""
        reader = self._reader
        if reader is not None:
            reader.disconnect()

    def _close(self, connection: Any) -> None:
        if connection is not None:
            connection.disconnect()
            self._pool.release(connection)


def _flat(fields: Entry) -> list[bytes]:
    return [part for field in fields.items() for part in field]


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
