"""What waits to be sent: a queue with bounds, which the oldest leave when it is full."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tamiyo_svc.client.drafts import Draft, Outgoing, PacketDraft


@dataclass(slots=True, eq=False)
class Posted:
    """A draft in the queue; `outgoing` once it is sealed."""

    draft: Draft
    size_bytes: int
    outgoing: Outgoing | None = None

    @property
    def is_packet(self) -> bool:
        """Whether it is a state packet, not a field report."""
        return isinstance(self.draft, PacketDraft)


class Outbox:
    """Entries in order, at most `max_entries` and `max_bytes` of them; its user holds a lock."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.size_bytes = 0
        """Sizes of all entries together."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: deque[Posted] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, posted: Posted) -> Sequence[Posted]:
        """Add the newest; what had to go for it."""
        self._entries.append(posted)
        self.size_bytes += posted.size_bytes
        return self._shed()

    def put_back(self, batch: Sequence[Posted]) -> Sequence[Posted]:
        """Add the oldest, as `take` gave them; what had to go for them."""
        self._entries.extendleft(reversed(batch))
        self.size_bytes += _size_bytes(batch)
        return self._shed()

    def take(self, count: int) -> list[Posted]:
        """Remove and return the oldest, `count` at most."""
        batch = [self._entries.popleft() for _ in range(min(count, len(self._entries)))]
        self.size_bytes -= _size_bytes(batch)
        return batch

    def _shed(self) -> Sequence[Posted]:
        if len(self._entries) <= self._max_entries and self.size_bytes <= self._max_bytes:
            return ()
        dropped = []
        while len(self._entries) > self._max_entries or self.size_bytes > self._max_bytes:
            dropped += self.take(1)
        return dropped


def _size_bytes(batch: Iterable[Posted]) -> int:
    return sum(posted.size_bytes for posted in batch)
