"""The breakers of one replica in Redis, so that a restart does not close an open one.

A process that crashes on a broken device and comes back would otherwise try it again at once and
with the shortest cool-down. Breakers are a replica's own: another one's device may be well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS, ServerClock
from tamiyo_svc.errors import BusError, StoredStateError
from tamiyo_svc.risk.breaker import Breaker
from tamiyo_svc.taxonomy import BreakerName

log = structlog.get_logger("tamiyo.breakers")

KEPT: Final = (BreakerName.INFERENCE, BreakerName.METADATA)
"""That of the bus is not kept: while it is open nothing can be, and starting probes the bus."""

_EXPIRY_MS: Final = 86_400_000


class BreakerStore:
    """Saves and loads breakers; their times are seconds of `monotonic`, stored as server time."""

    def __init__(
        self,
        redis: Redis,
        replica: str,
        clock: ServerClock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._key = f"tamiyo:breakers:{replica}"
        self._clock = clock
        self._monotonic = monotonic
        self._saved: dict[BreakerName, Breaker] = {}

    async def save(self, breakers: Mapping[BreakerName, Breaker]) -> None:
        """Store what changed since the last time.

        Raises:
            BusError: Redis did not answer or refused.
        """
        kept = {name: breakers[name] for name in KEPT}
        if kept == self._saved:
            return
        offset_s = self._offset_s()
        fields: dict[Any, Any] = {
            name.value: replace(breaker, since_s=breaker.since_s + offset_s).to_bytes()
            for name, breaker in kept.items()
        }
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hset(self._key, mapping=fields)
                pipeline.pexpire(self._key, _EXPIRY_MS)
                await pipeline.execute()
        except (*OUTAGE_ERRORS, RedisError) as error:
            raise BusError(f"breakers: {error!r}") from error
        self._saved = kept

    async def load(self) -> dict[BreakerName, Breaker]:
        """The breakers as stored; those that cannot be read are left out.

        Raises:
            BusError: Redis did not answer or refused.
        """
        try:
            fields: Any = await self._redis.hgetall(self._key)
        except (*OUTAGE_ERRORS, RedisError) as error:
            raise BusError(f"breakers: {error!r}") from error
        offset_s = self._offset_s()
        found = {}
        for name in KEPT:
            data = fields.get(name.value.encode())
            if data is None:
                continue
            try:
                breaker = Breaker.from_bytes(data)
            except StoredStateError as error:
                log.warning("breaker.unreadable", breaker=name.value, error=str(error))
                continue
            # A server clock set back must not keep a breaker open for as long.
            since_s = min(breaker.since_s - offset_s, self._monotonic())
            found[name] = replace(breaker, since_s=since_s)
        return found

    def _offset_s(self) -> float:
        return self._clock.now_ms() / 1e3 - self._monotonic()
