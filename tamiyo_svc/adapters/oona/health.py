"""Whether the bus can be used, and the one place that waits for it to come back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.errors import BusError

_FIRST_DELAY_S: Final = 0.05
_MAX_DELAY_S: Final = 1.0
_PROBE_TTL_MS: Final = 1000

T = TypeVar("T")


class BusHealth:
    """Knows whether Redis takes reads and writes.

    Whoever sees a bus error calls `failed` and awaits `wait_up`; only `supervise` probes, with
    capped exponential backoff and jitter, and then runs `restore` before anyone goes on.
    """

    def __init__(self, redis: Redis, name: str, restore: Callable[[], Awaitable[None]]) -> None:
        self._redis = redis
        self._probe_key = f"tamiyo:probe:{name}"
        self._restore = restore
        self._up = asyncio.Event()
        self._down = asyncio.Event()
        self._down.set()
        self.reason: str | None = "not connected yet"
        self.seen_s: float | None = None
        self.on_change: Callable[[str | None], None] = lambda reason: None
        self.on_probe_failed: Callable[[], None] = lambda: None

    def failed(self, error: BusError) -> None:
        """Note that an operation failed; everyone waits from now on."""
        if self._up.is_set():
            self.on_change(str(error))
        self.reason = str(error)
        self._up.clear()
        self._down.set()

    def seen(self) -> None:
        """Note that Redis just answered."""
        self.seen_s = time.monotonic()

    async def wait_up(self) -> None:
        """Wait until the bus can be used."""
        await self._up.wait()

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something on the bus, from the beginning again after every outage.

        Raises:
            Whatever `work` raises but a `BusError`.
        """
        while True:
            await self.wait_up()
            try:
                return await work()
            except BusError as error:
                self.failed(error)

    async def supervise(self) -> None:
        """Bring the bus back whenever it failed, until cancelled."""
        delay_s = _FIRST_DELAY_S
        while True:
            await self._down.wait()
            try:
                await self.check_writes()
                await self._restore()
            except BusError as error:
                self.reason = str(error)
                self.on_probe_failed()
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
                delay_s = min(_MAX_DELAY_S, 2 * delay_s)
                continue
            delay_s = _FIRST_DELAY_S
            self.seen()
            self.reason = None
            self._down.clear()
            self._up.set()
            self.on_change(None)

    async def check_writes(self) -> None:
        """Write something small: a server that is full or read-only still answers reads.

        Raises:
            BusError: Redis did not take it.
        """
        try:
            await self._redis.set(self._probe_key, b"1", px=_PROBE_TTL_MS)
        except (*OUTAGE_ERRORS, RedisError) as error:
            raise BusError(f"Redis does not take writes: {error!r}") from error
