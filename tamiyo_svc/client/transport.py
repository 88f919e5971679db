"""The client's two Redis connections: one that appends, one that has a read in flight."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from tamiyo_svc.client.address import Address
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
_LOG_ON: Final = "set the user name and password in the Redis URL (REDIS_URL)"
_UNREAD: Final = (
    "is the service running, on this server and database, with the same OONA_NORMAL_STREAM and "
    "OONA_PARTITIONS?"
)
_UNANSWERED: Final = (
    "is the secret (ESPER_LEYLINE_SECRET) the service's? Packets that it refuses are in its "
    "dead-letter stream, with the reason"
)


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

    def readers(self, stream: str) -> str:
        """Who reads what was sent to a stream, as far as can be seen, and what to look at.

        For the thread that sends. Raises nothing because of the bus.
        """


class Transport:
    """Appends to streams and reads one reply stream; every failure is a `BusError`.

    Whatever a server refuses is an outage: none of its replies proves an entry to be at fault, as
    it looks into none. Both connections go to one server. When one fails or is told that this
    server is not the one, such as a primary that was demoted, both are dropped, and the next
    `connect` and `listen` resolve the address anew. Nothing is retried. Reading begins at the end
    of the reply stream as first seen, since nothing older can answer a packet of this process.

    Raises:
        ValueError: the URL cannot be used.
    """

    receives = True

    def __init__(
        self,
        url: str,
        reply_stream: str,
        options: TransportOptions | None = None,
    ) -> None:
        options = options or TransportOptions()
        self.cursor = ""
        self._reply_stream = reply_stream
        self._address = Address.of(url)
        self._timeouts = {
            "socket_timeout": options.socket_timeout_s,
            "socket_connect_timeout": options.connect_timeout_s,
        }
        self._lock = threading.Lock()
        self._move = 0
        """How often the connections had to be dropped."""
        self._reader: Any = None
        self._reader_move = 0
        self._asked = False
        self._found: list[Any] = []
        self._writer: Any = None
        self._writer_move = 0
        self._end_seen = False
        self._sent: dict[str, bytes] = {}
        """The id of the last entry sent to each stream."""

    def connect(self) -> None:
        """Connect for writing and see where the reply stream ends, unless that has been done."""
        if self._writer is not None and self._writer_move == self._move:
            return
        self.disconnect()
        self._writer_move = self._move
        try:
            self._writer = self._address.connection(self._timeouts)
            self._writer.connect()
            if not self._end_seen:
                self.cursor = self._end(self._writer).decode()
                self._end_seen = True
        except (RedisError, OSError) as error:
            failure = self._worded(error, "connecting", self._reply_stream)
        else:
            return
        self._drop_writer()
        raise failure

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Append entries in one round trip."""
        commands = [("XADD", entry.stream, "*", *_flat(entry.envelope.fields())) for entry in batch]
        stream = batch[0].stream
        refusals: list[tuple[Exception, str]] = []
        try:
            self._writer.send_packed_command(self._writer.pack_commands(commands))
            for entry in batch:
                refusal = self._reply(entry)
                if refusal is not None:
                    refusals.append((refusal, entry.stream))
        except (RedisError, OSError) as error:
            refusals.append((error, stream))
        if refusals:
            first, stream = refusals[0]
            self._drop_writer()
            raise self._worded(first, f"writing to {stream}", stream)

    def _reply(self, entry: Outgoing) -> Exception | None:
        try:
            self._sent[entry.stream] = self._writer.read_response()
        except ResponseError as error:
            return error
        return None

    def disconnect(self) -> None:
        """Close the connection for writing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.disconnect()

    def listen(self) -> None:
        """Connect for reading and put a read in flight, unless that has been done."""
        if self._reader_move != self._move:
            self.stop_listening()
        try:
            if self._reader is None:
                self._begin_reading()
            if not self._asked and not self._found:
                self._reader.send_command(*self._read("BLOCK", _BLOCK_MS))
                self._asked = True
        except (RedisError, OSError) as error:
            failure = self._worded(error, f"reading {self._reply_stream}", self._reply_stream)
        else:
            return
        # Writing had to move meanwhile, and so has reading.
        if self._reader_move != self._move:
            self.listen()
            return
        self._drop_reader()
        raise failure

    def receive(self) -> list[Entry]:
        """Entries that arrived, waiting for the first for a second."""
        try:
            reply = self._found or self._reader.read_response()
        except (RedisError, OSError) as error:
            failure = self._worded(error, f"reading {self._reply_stream}", self._reply_stream)
        else:
            if self._found:
                self._found = []
            else:
                self._asked = False
            return self._entries(reply)
        # Writing had to move, and so has reading.
        if self._reader_move != self._move:
            self.stop_listening()
            return []
        self._drop_reader()
        raise failure

    def stop_listening(self) -> None:
        """Close the connection for reading."""
        reader, self._reader = self._reader, None
        self._asked = False
        self._found = []
        if reader is not None:
            reader.disconnect()

    def interrupt(self) -> None:
        """Shut the connection for reading, so that a read that waits fails."""
        reader = self._reader
        connected = None if reader is None else reader._sock
        if connected is not None:
            try:
                # Only the thread that reads may close it, and a TLS socket's own shutdown would
                # change what that thread is using.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)
            except OSError:
                return

    def readers(self, stream: str) -> str:
        """What the stream's consumer groups have read of what was sent."""
        last_id = self._sent.get(stream, _ZERO_ID)
        try:
            self.connect()
            self._writer.send_command("XINFO", "GROUPS", stream)
            groups = [_fields(group) for group in self._writer.read_response()]
        except ResponseError:
            return f"who reads {stream} cannot be seen; {_UNREAD} And {_UNANSWERED}"
        except (BusError, RedisError, OSError):
            self._drop_writer()
            return f"who reads {stream} cannot be seen; {_UNREAD}"
        if not groups:
            return f"nobody reads {stream}: {_UNREAD}"
        reached = (_order(_text(group.get("last-delivered-id", _ZERO_ID))) for group in groups)
        names = ", ".join(_text(group.get("name", b"")) for group in groups)
        if max(reached) < _order(_text(last_id)):
            return f"{stream} is not read any more by its group {names}: {_UNREAD}"
        return f"packets are read from {stream} by {names} and not answered: {_UNANSWERED}"

    def _begin_reading(self) -> None:
        """Connect, and read what is there: a server that refuses does so before it is waited for.

        Where the stream ends before what was read last it is not the same one, and begins anew.
        """
        self._reader_move = self._move
        # What a read may take is not what any other call may.
        self._reader = self._address.connection(self._timeouts, socket_timeout=_DEAD_AFTER_S)
        self._reader.connect()
        end = self._end(self._reader).decode()
        self.cursor = min(self.cursor or end, end, key=_order)
        self._reader.send_command(*self._read())
        self._found = self._reader.read_response() or []

    def _read(self, *options: str | int) -> tuple[str | int, ...]:
        streams = ("STREAMS", self._reply_stream, self.cursor)
        return ("XREAD", "COUNT", _READ_COUNT, *options, *streams)

    def _end(self, connection: Any) -> bytes:
        connection.send_command("XREVRANGE", self._reply_stream, "+", "-", "COUNT", 1)
        newest = connection.read_response()
        end: bytes = newest[0][0] if newest else _ZERO_ID
        return end

    def _entries(self, reply: Any) -> list[Entry]:
        entries = reply[0][1] if reply else []
        if entries:
            self.cursor = entries[-1][0].decode()
        return [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries if flat]

    def _drop_writer(self) -> None:
        self._leave(self._writer_move)
        self.disconnect()
        if self._reader_move != self._move:
            self.interrupt()

    def _drop_reader(self) -> None:
        self._leave(self._reader_move)
        self.stop_listening()

    def _leave(self, move: int) -> None:
        """Let both connections be made anew, if that is not under way."""
        with self._lock:
            self._move += move == self._move

    def _worded(self, error: Exception, doing: str, stream: str) -> BusError:
        """The failure in words, by its kind: what a server says may hold the user's name."""
        match error:
            case AuthenticationError():
                why = f"the server refuses the log-on: {_LOG_ON}"
            case NoPermissionError() | AuthorizationError():
                why = (
                    f"the user of the Redis URL may not: allow XADD and XINFO on the normal and "
                    f"report streams and XREAD and XREVRANGE on {self._reply_stream} (ACL SETUSER)"
                )
            case ReadOnlyError():
                why = "the server is a replica that takes no writes; connecting anew"
            case ResponseError() if _code(error) == "WRONGTYPE":
                why = (
                    f"the key {stream} is no stream: delete it or, if another program needs it, "
                    "use a database or names of your own"
                )
            case _:
                code = _code(error)
                text = self._address.without_credentials(str(error))
                why = text if not code or text.startswith(code) else f"{code} {text}"
        return BusError(f"{doing}: {why}")


def _flat(fields: Entry) -> list[bytes]:
    return [part for field in fields.items() for part in field]


def _fields(flat: Sequence[Any]) -> dict[str, Any]:
    return {_text(name): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _code(error: Exception) -> str:
    """The code of an error reply, which redis-py leaves in its text unless it knows it."""
    if not isinstance(error, ResponseError):
        return ""
    code = getattr(error, "status_code", None) or str(error).partition(" ")[0]
    return str(code) if str(code).isupper() else ""


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
