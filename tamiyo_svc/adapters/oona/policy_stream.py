"""The policy stream: every replica reads every entry, one at a time, in no consumer group.

An entry may hold 56 MB and more. Copying that would hold the interpreter for tens of
milliseconds, so a separate process reads it; the clients here are synchronous.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.exceptions import RedisError
from redis.retry import Retry

from tamiyo_svc.adapters.oona.connection import CONNECT_TIMEOUT_S, OUTAGE_ERRORS
from tamiyo_svc.adapters.oona.entries import Entry, id_order, read_entries
from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline.envelope import SignedEnvelope

FROM_THE_END: Final = "$"
"""A cursor that means: only what comes from now on."""

KEPT_UPDATES: Final = 8
"""Entries the policy stream keeps; what a replica needs is among the newest few."""

_MEASURE: Final = """
local entry = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', 1)[1]
if not entry then
  return false
end
local size = 0
for _, part in ipairs(entry[2]) do
  size = size + #part
end
return {entry[1], size}
"""
_PART_BYTES: Final = 128 << 10
_REST_S: Final = 1e-3
_READ_TIMEOUT_S: Final = 30.0
_STATUS_PREFIX: Final = "tamiyo:policy:"
STATUS_TTL_MS: Final = 15_000
"""A replica that has not written its status for this long is gone."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """Which policy one replica serves, as everybody may read it."""

    replica: str
    policy_id: str
    version: str
    digest: str
    previous: str = ""
    probation_left: int = 0
    shadow: Mapping[str, str] | None = None


def open_stream(redis_url: str) -> Redis:
    """A synchronous client that waits long for a large entry and repeats nothing."""
    keepalive = {} if redis_url.startswith("unix") else {"socket_keepalive": True}
    return Redis.from_url(
        redis_url,
        protocol=2,
        decode_responses=False,
        socket_timeout=_READ_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
        **keepalive,
    )


def read_next(redis: Redis, stream: str, after: str) -> Entry | None:
    """The entry after an id, if there is one.

    Raises:
        BusError: Redis did not answer.
    """
    try:
        reply = redis.xread({stream: after}, count=1)
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"{stream}: {error!r}") from error
    return next(read_entries(reply), None)


def await_next(
    redis: Redis, stream: str, after: str, block_ms: int, on_coming: Callable[[], None]
) -> Entry | None:
    """The entry after an id, waiting up to `block_ms` for it.

    `on_coming` is called when the first bytes of an answer are there, and most of it is not.

    Raises:
        BusError: Redis did not answer.
    """
    client: Any = redis
    with _connection(redis, stream) as connection:
        connection.send_command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", stream, after)
        if connection.can_read(timeout=_READ_TIMEOUT_S):
            on_coming()
        reply = client.parse_response(connection, "XREAD")
    return next(read_entries(reply), None)


def measure_next(redis: Redis, stream: str, after: str) -> tuple[str, int] | None:
    """Id and size in bytes of the entry after an id, without its bytes coming here.

    Raises:
        BusError: Redis did not answer.
    """
    try:
        reply: Any = redis.eval(_MEASURE, 1, stream, after)
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"{stream}: {error!r}") from error
    return (reply[0].decode(), int(reply[1])) if reply else None


def last_id(redis: Redis, stream: str) -> str:
    """Id of the last entry the stream ever had, `0-0` when there is no stream.

    Raises:
        BusError: Redis did not answer.
    """
    try:
        if not redis.exists(stream):
            return "0-0"
        status: Any = redis.xinfo_stream(stream)
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"{stream}: {error!r}") from error
    return str(status["last-generated-id"].decode())


def start_cursor(redis: Redis, stream: str, cursor: str) -> str:
    """Where to read on: from the end for `$`, from the beginning if the stream is a new one.

    Raises:
        BusError: Redis did not answer.
    """
    end = last_id(redis, stream)
    if cursor == FROM_THE_END:
        return end
    return "0-0" if id_order(end) < id_order(cursor) else cursor


def publish_update(redis: Redis, stream: str, update: SignedEnvelope) -> str:
    """Append an update, keeping the newest few; returns its id.

    Raises:
        BusError: Redis did not take it, or its answer was lost.
    """
    fields = [part for field in update.fields().items() for part in field]
    client: Any = redis
    with _connection(redis, stream) as connection:
        # Unlike hiredis it leaves a large field where it is.
        serializer = PythonRespSerializer(_PART_BYTES, connection.encoder.encode)
        command = serializer.pack(  # type: ignore[no-untyped-call]
            *("XADD", stream, "MAXLEN", "=", KEPT_UPDATES, "*", *fields)
        )
        connection.send_packed_command(_paced(command))
        entry_id: bytes = client.parse_response(connection, "XADD")
    return entry_id.decode()


@contextmanager
def _connection(redis: Redis, stream: str) -> Iterator[Any]:
    """A connection for a command whose sending or answer takes its time.

    Raises:
        BusError: Redis did not answer.
    """
    pool: Any = redis.connection_pool
    try:
        connection = pool.get_connection()
        try:
            yield connection
        finally:
            pool.release(connection)
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"{stream}: {error!r}") from error


def _paced(command: Iterable[bytes]) -> Iterator[memoryview]:
    """A command in small parts with rests between them.

    What comes at once, Redis takes in at once, and on a small machine a core is gone for 0.1 s.
    """
    for piece in command:
        for start in range(0, len(piece), _PART_BYTES):
            yield memoryview(piece)[start : start + _PART_BYTES]
            if len(piece) > _PART_BYTES:
                time.sleep(_REST_S)


async def write_status(redis: AsyncRedis, status: ReplicaStatus) -> None:
    """Say which policy a replica serves; it is forgotten unless said again.

    Raises:
        BusError: Redis did not answer.
    """
    try:
        await redis.set(
            f"{_STATUS_PREFIX}{status.replica}", json.dumps(asdict(status)), px=STATUS_TTL_MS
        )
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"policy status: {error!r}") from error


def read_statuses(redis: Redis) -> list[ReplicaStatus]:
    """What every live replica says it serves, by name.

    Raises:
        BusError: Redis did not answer.
    """
    try:
        keys = sorted(redis.scan_iter(match=f"{_STATUS_PREFIX}*", count=1000))
        # One by one: in a cluster the keys lie in different slots.
        texts: list[Any] = [redis.get(key) for key in keys]
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"policy status: {error!r}") from error
    return [ReplicaStatus(**json.loads(text)) for text in texts if text is not None]
