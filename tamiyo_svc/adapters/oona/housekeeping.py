"""What a stream looks like from outside, and trimming that never takes what a group still needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.adapters.oona.entries import id_order, next_id
from tamiyo_svc.errors import BusError


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """A stream as one group sees it; None is unknown, which is not 0."""

    length: int
    lag: int | None = None
    pending: int | None = None
    oldest_unacked_id: str | None = None


async def read_status(redis: Redis, stream: str, group: str) -> StreamStatus:
    """Ask the server for a stream's length and the group's lag and pending entries.

    Raises:
        BusError: Redis did not answer.
    """
    try:
        length = int(await redis.xlen(stream))
        for row in await _groups(redis, stream):
            if row["name"] == group.encode():
                oldest = await _oldest_pending(redis, stream, group)
                lag = row.get("lag")
                pending = int(row["pending"])
                return StreamStatus(length, None if lag is None else int(lag), pending, oldest)
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"status of {stream}: {error!r}") from error
    return StreamStatus(length)


async def trim(redis: Redis, stream: str, older_than_ms: float) -> int:
    """Remove entries older than a server time that every group has read and acknowledged.

    Returns how many were removed.

    Raises:
        BusError: Redis did not answer.
    """
    limit = f"{max(0, int(older_than_ms))}-0"
    try:
        for row in await _groups(redis, stream):
            name = row["name"].decode()
            needed = await _oldest_pending(redis, stream, name)
            if needed is None:
                needed = next_id(row["last-delivered-id"].decode())
            limit = min(limit, needed, key=id_order)
        removed = 0
        # One call removes at most 10,000 entries, so that the server never stands still for long.
        while some := int(await redis.xtrim(stream, minid=limit, approximate=True)):
            removed += some
        return removed
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"trimming {stream}: {error!r}") from error


async def _groups(redis: Redis, stream: str) -> list[dict[str, Any]]:
    try:
        return list(await redis.xinfo_groups(stream))
    except ResponseError as error:
        if "no such key" in str(error).lower():
            return []
        raise


async def _oldest_pending(redis: Redis, stream: str, group: str) -> str | None:
    summary: Any = await redis.xpending(stream, group)
    return summary["min"].decode() if summary["min"] is not None else None
