"""What waits for the bus to come back, on a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tamiyo_svc.adapters.cancellation import cancel
from tamiyo_svc.adapters.oona.commit import Commit, Committer, Output
from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.outbox import Outbox
from tamiyo_svc.errors import BusError, DuplicateEntryError

pytestmark = pytest.mark.redis


class Supervised:
    """A health that is supervised; `changes` holds why it went down, None for coming back."""

    def __init__(self, health: BusHealth) -> None:
        self.health = health
        self.changes: list[str | None] = []
        health.on_change = self.changes.append


@pytest.fixture
async def supervised(redis_url: str) -> AsyncIterator[Supervised]:
    async def restore() -> None:
        return

    async with client(redis_url, 5) as redis:
        found = Supervised(BusHealth(redis, "test", restore))
        task = asyncio.create_task(found.health.supervise())
        yield found
        await cancel([task])


async def test_work_begins_again_after_every_outage_and_its_result_is_returned(
    supervised: Supervised,
) -> None:
    outcomes = [BusError("lost"), BusError("still lost"), None]

    async def work() -> str:
        if (error := outcomes.pop(0)) is not None:
            raise error
        return "done"

    async with asyncio.timeout(10):
        assert await supervised.health.until_done(work) == "done"
    assert supervised.changes == [None, "lost", None, "still lost", None]


async def test_what_is_no_outage_is_raised_and_leaves_the_bus_up(supervised: Supervised) -> None:
    async def work() -> None:
        raise DuplicateEntryError("1-0")

    async with asyncio.timeout(10):
        with pytest.raises(DuplicateEntryError):
            await supervised.health.until_done(work)
    assert supervised.changes == [None]


async def test_outputs_keep_their_order_over_an_outage(
    supervised: Supervised, redis_url: str
) -> None:
    class LosesOnce(Committer):
        lost = False

        async def commit(self, commit: Commit) -> list[str]:
            if not self.lost:
                self.lost = True
                raise BusError("lost")
            return await super().commit(commit)

    async with client(redis_url, 5, connections=2) as redis:
        outbox = Outbox(LosesOnce(redis, "tamiyo"), supervised.health)
        for text in (b"first", b"second"):
            outbox.put(Output("oona.telemetry", {b"payload": text}))
        task = asyncio.create_task(outbox.run())
        async with asyncio.timeout(10):
            while await redis.xlen("oona.telemetry") < 2:
                await asyncio.sleep(0)
        await cancel([task])
        rows: Any = await redis.xrange("oona.telemetry")
    assert [fields[b"payload"] for _, fields in rows] == [b"first", b"second"]
    assert outbox.dropped == 0
