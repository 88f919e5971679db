"""Streams as an operator looks at them: read without a group, so that nothing is taken away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tamiyo_svc.adapters.oona.commit import run_key
from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.adapters.oona.entries import Entry, id_order, next_id, read_entries
from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline.partition import MAX_PARTITIONS, tag_in

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST_ID: Final = "0-0"
"""Before every entry."""

PAGE: Final = 200
"""Entries asked for at once; a caller that expects large ones asks for fewer."""


READING_CONNECTIONS: Final = MAX_PARTITIONS + 1
"""Connections that reading many streams at once may need; they are made when they are used."""


@dataclass(frozen=True, slots=True)
class ConsumerView:
    """One member of a group; `idle_ms` is how long ago it last asked the server for anything."""

    name: str
    pending: int
    idle_ms: int


@dataclass(frozen=True, slots=True)
class GroupView:
    """One consumer group on a stream; None is unknown, which is not 0.

    `waiting_id` is the oldest entry that was not delivered yet, `pending_id` the oldest that was
    delivered and not acknowledged; None there means that there is none.
    """

    name: str
    lag: int | None
    pending: int
    waiting_id: str | None
    pending_id: str | None
    consumers: tuple[ConsumerView, ...]

    @property
    def oldest_id(self) -> str | None:
        """The oldest entry the group is not done with."""
        known = [entry_id for entry_id in (self.waiting_id, self.pending_id) if entry_id]
        return min(known, key=id_order, default=None)


@dataclass(frozen=True, slots=True)
class StreamView:
    """A stream and its groups; one that is not there has `exists` False and length 0."""

    stream: str
    exists: bool = False
    length: int = 0
    groups: tuple[GroupView, ...] = ()


@contextmanager
def _bus_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OUTAGE_ERRORS as error:
        raise BusError(f"{what}: Redis does not answer: {error}") from error
    except RedisError as error:
        raise BusError(f"{what}: {error}") from error


async def server_time_ms(redis: Redis) -> int:
    """The server's clock, by which entry ids are made.

    Raises:
        BusError: Redis did not answer.
    """
    with _bus_errors("time"):
        seconds, microseconds = await redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


async def view_stream(redis: Redis, stream: str) -> StreamView:
    """Look at a stream and all of its groups.

    The parts are asked for one after the other, so under load they differ by some entries.

    Raises:
        BusError: Redis did not answer, or the key is no stream.
    """
    with _bus_errors(stream):
        try:
            info: Any = await redis.xinfo_groups(stream)
        except ResponseError as error:
            if "no such key" in str(error).lower():
                return StreamView(stream)
            raise
        length = int(await redis.xlen(stream))
        groups = [await _view_group(redis, stream, row) for row in info]
    return StreamView(stream, exists=True, length=length, groups=tuple(groups))


async def _view_group(redis: Redis, stream: str, row: Mapping[str, Any]) -> GroupView:
    name = row["name"].decode()
    summary: Any = await redis.xpending(stream, name)
    after = next_id(row["last-delivered-id"].decode())
    waiting: Any = await redis.xrange(stream, min=after, count=1)
    members: Any = await redis.xinfo_consumers(stream, name)
    lag = row.get("lag")
    return GroupView(
        name=name,
        lag=None if lag is None else int(lag),
        pending=int(summary["pending"]),
        waiting_id=waiting[0][0].decode() if waiting else None,
        pending_id=summary["min"].decode() if summary["min"] is not None else None,
        consumers=tuple(
            ConsumerView(each["name"].decode(), int(each["pending"]), int(each["idle"]))
            for each in members
        ),
    )


async def last_id(redis: Redis, stream: str) -> str:
    """The newest entry's id, `0-0` where there is none.

    Raises:
        BusError: Redis did not answer, or the key is no stream.
    """
    with _bus_errors(stream):
        newest: Any = await redis.xrevrange(stream, count=1)
    return newest[0][0].decode() if newest else FIRST_ID


async def scan(
    redis: Redis, stream: str, start: str = "-", stop: str = "+", page: int = PAGE
) -> AsyncIterator[Entry]:
    """Entries from `start` to `stop`, both included, oldest first.

    Raises:
        BusError: Redis did not answer, or the key is no stream.
    """
    while True:
        with _bus_errors(stream):
            rows: Any = await redis.xrange(stream, min=start, max=stop, count=page)
        for entry_id, fields in rows:
            yield Entry(stream, entry_id.decode(), fields)
        if len(rows) < page:
            return
        start = next_id(rows[-1][0].decode())


async def scan_back(
    redis: Redis, stream: str, end: str = "+", page: int = PAGE
) -> AsyncIterator[Entry]:
    """Entries from `end`, included, to the oldest, newest first.

    Raises:
        BusError: Redis did not answer, or the key is no stream.
    """
    while True:
        with _bus_errors(stream):
            rows: Any = await redis.xrevrange(stream, max=end, count=page)
        for entry_id, fields in rows:
            yield Entry(stream, entry_id.decode(), fields)
        if len(rows) < page:
            return
        # Exclusive ranges exist since Redis 6.2, the oldest server that is supported.
        end = f"({rows[-1][0].decode()}"


async def merged(sources: Sequence[AsyncIterator[Entry]]) -> AsyncIterator[Entry]:
    """The entries of several streams, each oldest first, as one sequence in the order of ids."""
    heads: dict[int, Entry] = {}

    async def advance(place: int) -> None:
        entry = await anext(sources[place], None)
        if entry is None:
            heads.pop(place, None)
        else:
            heads[place] = entry

    for place in range(len(sources)):
        await advance(place)
    while heads:
        place = min(heads, key=lambda place: id_order(heads[place].entry_id))
        yield heads[place]
        await advance(place)


async def read_after(
    redis: Redis, positions: Mapping[str, str], block_ms: int | None, count: int = PAGE
) -> list[Entry]:
    """What came after a position in each stream, waiting up to `block_ms` for the first entry.

    With None it does not wait. One command reads one partition, and all of them are waited for.
    The client's socket timeout must be longer than that, its connections `READING_CONNECTIONS`.

    Raises:
        BusError: Redis did not answer, or a key is no stream.
    """
    partitions: dict[str, dict[Any, Any]] = {}
    for stream, after in positions.items():
        partitions.setdefault(tag_in(stream), {})[stream] = after
    with _bus_errors("reading"):
        replies: list[Any] = await asyncio.gather(
            *(redis.xread(after, count=count, block=block_ms) for after in partitions.values())
        )
    entries = [entry for reply in replies for entry in read_entries(reply)]
    return sorted(entries, key=lambda entry: id_order(entry.entry_id))


async def run_states(redis: Redis) -> dict[str, bytes]:
    """The stored state of every run, by the key it is kept under.

    Raises:
        BusError: Redis did not answer.
    """
    states = {}
    with _bus_errors("run states"):
        for pattern in (run_key("*"), run_key("*", ".{*}")):
            async for key in redis.scan_iter(match=pattern, count=1000, _type="HASH"):
                state: Any = await redis.hget(key, "state")
                if state is not None:
                    states[key.decode()] = state
    return states


async def streams_under(redis: Redis, prefix: str) -> list[str]:
    """The names of all streams that begin so, sorted.

    Raises:
        BusError: Redis did not answer.
    """
    with _bus_errors("streams"):
        keys = redis.scan_iter(match=f"{prefix}*", count=1000, _type="STREAM")
        return sorted({key.decode() async for key in keys})
