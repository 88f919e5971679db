"""Dead letters read back: what each was, and the ways out of the dead-letter stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Self

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.adapters.oona.dead_letters import META_PREFIX
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.errors import BusError

REQUEUED_FROM: Final = "requeued_from"
"""The field of a requeued entry that holds the id it had at first."""

_BATCH: Final = 1000
_SCRIPT: Final = resources.files(__package__).joinpath("requeue.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry of a dead-letter stream; `original` is the entry it was, with its own fields.

    What somebody else put on that stream has an original without stream and id.
    """

    stream: str
    entry_id: str
    original: Entry
    reason: str
    detail: str

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """Take a letter apart; nothing about it raises."""
        prefix = META_PREFIX.encode()
        meta = {
            name.removeprefix(prefix).decode(errors="replace"): value.decode(errors="replace")
            for name, value in entry.fields.items()
            if name.startswith(prefix)
        }
        fields = {
            name: value for name, value in entry.fields.items() if not name.startswith(prefix)
        }
        deliveries = meta.get("deliveries", "")
        original = Entry(
            meta.get("stream", ""),
            meta.get("id", ""),
            fields,
            int(deliveries) if deliveries.isdecimal() else 0,
        )
        return cls(
            entry.stream, entry.entry_id, original, meta.get("reason", ""), meta.get("detail", "")
        )


class LetterMover:
    """Puts dead letters back or removes them; every call may be repeated after a lost reply."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)

    async def requeue(self, letter: DeadLetter) -> str | None:
        """Move a letter back to its stream in one step.

        Its fields are byte for byte those it had, and `requeued_from` is added. Returns the new
        id, or None when the letter was gone already.

        Raises:
            BusError: no answer, so whether it was moved is unknown, or Redis refused it.
        """
        keys = [letter.stream, letter.original.stream]
        arguments = [letter.entry_id, META_PREFIX, REQUEUED_FROM]
        reply = await self._call(self._script(keys=keys, args=arguments))
        return None if reply is None else str(reply.decode())

    async def purge(self, letters: Sequence[DeadLetter]) -> int:
        """Remove letters for good; returns how many were still there.

        Raises:
            BusError: no answer, so whether they were removed is unknown.
        """
        removed = 0
        by_stream: dict[str, list[str]] = {}
        for letter in letters:
            by_stream.setdefault(letter.stream, []).append(letter.entry_id)
        for stream, ids in by_stream.items():
            for first in range(0, len(ids), _BATCH):
                batch = ids[first : first + _BATCH]
                removed += int(await self._call(self._redis.xdel(stream, *batch)))
        return removed

    @staticmethod
    async def _call(command: Any) -> Any:
        try:
            return await command
        except (*OUTAGE_ERRORS, RedisError) as error:
            raise BusError(f"dead letters: {error}") from error
