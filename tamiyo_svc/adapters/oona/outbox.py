"""Telemetry that belongs to no packet: a bounded queue that outlives an outage."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from tamiyo_svc.adapters.oona.commit import Commit, Committer, Output
from tamiyo_svc.adapters.oona.health import BusHealth


class Outbox:
    """Publishes outputs one after the other, waiting while the bus is down.

    They go to the partition of `tag`. Beyond `capacity` the oldest is dropped and counted.
    """

    def __init__(
        self, committer: Committer, health: BusHealth, tag: str = "", capacity: int = 256
    ) -> None:
        self._committer = committer
        self._health = health
        self._tag = tag
        self._waiting: deque[Output] = deque()
        self._capacity = capacity
        self._filled = asyncio.Event()
        self.dropped = 0

    def put(self, output: Output) -> None:
        """Have an output published."""
        if len(self._waiting) == self._capacity:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(output)
        self._filled.set()

    async def run(self) -> None:
        """Publish until cancelled.

        An output whose reply was lost is published again: this telemetry is sent at least once.
        """
        while True:
            await self._filled.wait()
            while self._waiting:
                commit = Commit((), (self._waiting.popleft(),), tag=self._tag)
                await self._health.until_done(partial(self._committer.commit, commit))
            self._filled.clear()
