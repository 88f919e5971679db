"""Stream entries as the consumer hands them on, whatever protocol they came over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tamiyo_svc.leyline.partition import tag_in


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of one stream.

    `fields` is empty when the entry was trimmed while it was pending. `deliveries` counts how
    often it was handed to a consumer, this time included.
    """

    stream: str
    entry_id: str
    fields: Mapping[bytes, bytes]
    deliveries: int = 1

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the entry across streams."""
        return self.stream, self.entry_id

    @property
    def tag(self) -> str:
        """The tag of the partition it lies in, empty where there is only one."""
        return tag_in(self.stream)

    @property
    def added_ms(self) -> int:
        """When the server appended it, in ms of the server's clock."""
        return int(self.entry_id.partition("-")[0])


def read_entries(reply: Any) -> Iterator[Entry]:
    """Flatten an XREADGROUP or XREAD reply, RESP2 or RESP3, keeping its order."""
    if not reply:
        return
    pairs = reply.items() if isinstance(reply, Mapping) else reply
    for stream, entries in pairs:
        name = stream.decode()
        # RESP3 wraps a stream's entries in one more list.
        nested = isinstance(reply, Mapping) and entries and isinstance(entries[0], list)
        for entry_id, fields in entries[0] if nested else entries:
            if entry_id is not None:
                yield Entry(name, entry_id.decode(), fields or {})


def next_id(entry_id: str) -> str:
    """The smallest id after `entry_id`."""
    milliseconds, _, sequence = entry_id.partition("-")
    return f"{milliseconds}-{int(sequence or 0) + 1}"


def id_order(entry_id: str) -> tuple[int, int]:
    """Sort key of an entry id."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)
