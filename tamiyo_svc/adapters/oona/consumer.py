"""The consumer group's side of the bus: new entries, our own pending ones, and abandoned ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.adapters.oona.entries import Entry, next_id, read_entries
from tamiyo_svc.errors import BusError

_LOST_GROUP = ("NOGROUP", "UNBLOCKED", "no longer exists")
_CLAIM_PAGES = 4


class GroupLostError(BusError):
    """The consumer group is gone, as after a flush or a failover; create it again."""

    label = "group_lost"


class StreamConsumer:
    """Reads streams as one member of a consumer group.

    `reader` blocks, so it is used for nothing else; `background` serves the rest. Streams are
    read in the order given: emergency before normal.
    """

    def __init__(
        self,
        reader: Redis,
        background: Redis,
        streams: Sequence[str],
        group: str,
        name: str,
    ) -> None:
        self._reader = reader
        self._background = background
        self.streams = tuple(streams)
        self.group = group
        self.name = name

    async def join(self) -> None:
        """Be a member of the group on every stream, which starts at the stream's beginning.

        A member that only waits for entries is not one yet to Redis, so it is made one by name.

        Raises:
            BusError: Redis did not answer or refused.
        """
        for stream in self.streams:
            try:
                try:
                    await self._background.xgroup_create(stream, self.group, id="0", mkstream=True)
                except ResponseError as error:
                    if "BUSYGROUP" not in str(error):
                        raise
                await self._background.xgroup_createconsumer(stream, self.group, self.name)
            except ResponseError as error:
                raise BusError(f"consumer group on {stream}: {error}") from error
            except (*OUTAGE_ERRORS, RedisError) as error:
                raise BusError(f"consumer group on {stream}: {error!r}") from error

    async def read(self, count: int, block_ms: int) -> list[Entry]:
        """New entries, at most `count` a stream; empty after `block_ms` without any.

        Raises:
            GroupLostError: the group or stream is gone.
            BusError: the reply was lost; entries may be pending for us without our knowing.
        """
        reply = await self._call(
            self._reader.xreadgroup(
                self.group,
                self.name,
                dict.fromkeys(self.streams, ">"),
                count=count,
                block=block_ms,
            )
        )
        return list(read_entries(reply))

    async def pending(self, stream: str, after: str, count: int) -> list[Entry]:
        """Entries delivered to us and not acknowledged, after an id, oldest first.

        Raises:
            GroupLostError, BusError: as for `read`.
        """
        reply = await self._call(
            self._reader.xreadgroup(self.group, self.name, {stream: after}, count=count)
        )
        entries = list(read_entries(reply))
        return await self._with_deliveries(stream, entries)

    async def claim_idle(self, stream: str, min_idle_ms: int, count: int) -> list[Entry]:
        """Take over entries another consumer has held for `min_idle_ms`, a bounded number.

        XAUTOCLAIM looks at ten times `count` entries a call, so its cursor is followed for a few
        pages; entries trimmed meanwhile come back without fields.

        Raises:
            GroupLostError, BusError: as for `read`.
        """
        claimed: list[Entry] = []
        cursor: str | bytes = "0-0"
        for _ in range(_CLAIM_PAGES):
            reply = await self._call(
                self._background.xautoclaim(
                    stream, self.group, self.name, min_idle_ms, cursor, count=count
                )
            )
            cursor = reply[0]
            for entry_id, fields in reply[1]:
                if entry_id is not None:
                    claimed.append(Entry(stream, entry_id.decode(), fields or {}))
            if cursor in (b"0-0", "0-0") or len(claimed) >= count:
                break
        return await self._with_deliveries(stream, claimed)

    async def acknowledge(self, entries: Sequence[Entry]) -> None:
        """Acknowledge entries that need no output, one command a stream.

        Raises:
            BusError: Redis did not answer; acknowledging again is harmless.
        """
        for stream in {entry.stream for entry in entries}:
            ids = [entry.entry_id for entry in entries if entry.stream == stream]
            await self._call(self._background.xack(stream, self.group, *ids))

    async def _with_deliveries(self, stream: str, entries: list[Entry]) -> list[Entry]:
        if not entries:
            return entries
        counts: dict[str, int] = {}
        start = entries[0].entry_id
        # Our pending entries may lie scattered between other consumers' ones.
        while True:
            rows = await self._call(
                self._background.xpending_range(
                    stream,
                    self.group,
                    min=start,
                    max=entries[-1].entry_id,
                    count=max(100, len(entries)),
                    consumername=self.name,
                )
            )
            for row in rows:
                counts[row["message_id"].decode()] = int(row["times_delivered"])
            if len(rows) < max(100, len(entries)):
                break
            start = next_id(rows[-1]["message_id"].decode())
        return [
            Entry(entry.stream, entry.entry_id, entry.fields, counts.get(entry.entry_id, 1))
            for entry in entries
        ]

    @staticmethod
    async def _call(command: Any) -> Any:
        try:
            return await command
        except OUTAGE_ERRORS as error:
            raise BusError(repr(error)) from error
        except ResponseError as error:
            if any(sign in str(error) for sign in _LOST_GROUP):
                raise GroupLostError(str(error)) from error
            raise BusError(str(error)) from error
        except RedisError as error:
            raise BusError(repr(error)) from error
