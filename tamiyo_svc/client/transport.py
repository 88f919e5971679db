"""The client's two Redis connections: one that appends, one that has a read in flight.

The blocking read is sent once and stays outstanding between steps; waiting for a command is
waiting for its socket. A miss so costs neither a reconnect nor the server's own timer, which on
an idle Redis is only looked at ten times a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tamiyo_svc.errors import BusError

Entry = Mapping[bytes, bytes]
"""The fields of one stream entry."""

_READ_COUNT: Final = 64
_BLOCK_MS: Final = 1000
_DEAD_AFTER_S: Final = _BLOCK_MS / 1000 + 1.0
"""A read unanswered for this long hangs on a connection whose other end is gone."""


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """How long a call on the bus may take, in seconds."""

    connect_timeout_s: float = 0.25
    socket_timeout_s: float = 0.25


class Transport:
    """Appends to streams and reads one reply stream; every failure is a `BusError`.

    A failed connection is dropped and made anew by the next call. Nothing is retried.
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
        self._connection: Any = None
        self._cursor: bytes | None = None
        self._sent_s: float | None = None

    def open(self) -> None:
        """Put the read in flight, from the end of the reply stream when it is the first.

        Raises:
            BusError: Redis cannot be reached.
        """
        try:
            self._open()
        except (RedisError, OSError) as error:
            self._drop()
            raise BusError(f"reading {self._reply_stream}: {error}") from error

    def append(self, stream: str, fields: Mapping[bytes, bytes]) -> None:
        """Append one entry; when the reply is lost it may have been written.

        Raises:
            BusError: Redis cannot be reached or refused it.
        """
        entry: Any = fields
        try:
            self._redis.xadd(stream, entry)
        except (RedisError, OSError) as error:
            raise BusError(f"writing to {stream}: {error}") from error

    def read(self, timeout_s: float) -> list[Entry]:
        """Entries that arrived since the last call, waiting up to `timeout_s` for the first.

        Raises:
            BusError: Redis cannot be reached.
        """
        try:
            self._open()
            if not self._connection.can_read(timeout_s):
                if self._sent_s is not None and self._clock() - self._sent_s > _DEAD_AFTER_S:
                    raise BusError(f"reading {self._reply_stream}: no answer")
                return []
            reply = self._connection.read_response()
            self._sent_s = None
            entries = reply[0][1] if reply else []
            if entries:
                self._cursor = entries[-1][0]
            self._open()
        except (RedisError, OSError) as error:
            self._drop()
            raise BusError(f"reading {self._reply_stream}: {error}") from error
        except BusError:
            self._drop()
            raise
        return [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in entries if flat]

    def close(self) -> None:
        """Close both connections."""
        self._drop()
        self._redis.close()

    def _open(self) -> None:
        pool: Any = self._redis.connection_pool
        if self._connection is None:
            self._connection = pool.get_connection()
        if self._cursor is None:
            self._connection.send_command("XREVRANGE", self._reply_stream, "+", "-", "COUNT", 1)
            newest = self._connection.read_response()
            self._cursor = newest[0][0] if newest else b"0-0"
        if self._sent_s is None:
            self._connection.send_command(
                *("XREAD", "COUNT", _READ_COUNT, "BLOCK", _BLOCK_MS),
                *("STREAMS", self._reply_stream, self._cursor),
            )
            self._sent_s = self._clock()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            pool: Any = self._redis.connection_pool
            pool.release(self._connection)
        self._connection = None
        self._sent_s = None
