"""Redis clients that never retry on their own, and the server's clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tamiyo_svc.errors import BusError

CONNECT_TIMEOUT_S: Final = 2.0
OUTAGE_ERRORS: Final = (RedisConnectionError, RedisTimeoutError, OSError, asyncio.TimeoutError)
"""What redis-py raises when the server cannot be reached or does not answer."""


def connect(url: str, timeout_s: float, connections: int = 1, protocol: int = 2) -> Redis:
    """A client with its own small pool and no automatic retries.

    Commands beyond its connections wait up to `timeout_s` for one: a pool that is busy is no
    outage. A retried command runs twice when only its reply was lost; every caller here decides for
    itself what is safe to repeat.
    """
    keepalive = {} if url.startswith("unix") else {"socket_keepalive": True}
    pool = BlockingConnectionPool.from_url(
        url,
        timeout=timeout_s,
        protocol=protocol,
        decode_responses=False,
        max_connections=connections,
        socket_timeout=timeout_s,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
        **keepalive,
    )
    return Redis.from_pool(pool)


@asynccontextmanager
async def client(
    url: str, timeout_s: float, connections: int = 1, protocol: int = 2
) -> AsyncIterator[Redis]:
    """A client that is closed at the end of the block, whatever state its connection is in."""
    redis = connect(url, timeout_s, connections, protocol)
    try:
        yield redis
    finally:
        # A connection that was broken already leaves nothing to close.
        with suppress(RedisError, OSError):
            await redis.aclose()


class ServerClock:
    """Milliseconds of the Redis server's clock without asking it each time.

    Synchronised by `sync`; between two calls it follows this machine's monotonic clock, so a
    jump of the local wall clock changes nothing.
    """

    __slots__ = ("_offset_ms",)

    def __init__(self) -> None:
        self._offset_ms: float | None = None

    async def sync(self, redis: Redis) -> None:
        """Ask the server for its time; the answer is taken to be half a round trip old.

        Raises:
            BusError: Redis did not answer.
        """
        before = time.monotonic()
        try:
            seconds, microseconds = await redis.time()
        except (*OUTAGE_ERRORS, RedisError) as error:
            raise BusError(f"server time: {error!r}") from error
        after = time.monotonic()
        server_ms = seconds * 1e3 + microseconds / 1e3
        self._offset_ms = server_ms - (before + after) / 2 * 1e3

    def now_ms(self) -> float:
        """The server's time now; the local wall clock until the first `sync`."""
        if self._offset_ms is None:
            return time.time() * 1e3
        return time.monotonic() * 1e3 + self._offset_ms
