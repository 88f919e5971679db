"""Work beside decisions begins when nothing is in flight."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from support.bus import as_fields

from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.service import intake as intake_module
from tamiyo_svc.service.intake import Intake, IntakeLimits


class Bus:
    """Hands out one notice; it is in flight until the test says so."""

    def __init__(self) -> None:
        self.taken, self.may_end = asyncio.Event(), asyncio.Event()
        fields = as_fields(seal(leyline.BSDSIssued(bsds=leyline.BSDS(blueprint_id="one")), None))
        self._entries = [Entry("oona.normal", "1-0", fields)]
        notices = {leyline.BUS_MESSAGE_TYPE_BSDS_ISSUED: self._take}
        parts: Any = [(), None, self, None, None, None, "oona.dead", IntakeLimits(), notices]
        self.intake = Intake(*parts)

    async def _take(self, entry: Entry, envelope: leyline.BusEnvelope) -> None:
        self.taken.set()
        await self.may_end.wait()

    async def wait_up(self) -> None:
        """A bus that is up."""

    def seen(self) -> None:
        """Of no interest here."""

    async def read(self, count: int, block_ms: int) -> list[Entry]:
        """The notice, then nothing for ever."""
        if not self._entries:
            await asyncio.Event().wait()
        return [self._entries.pop()]

    async def pending(self, stream: str, after: str, count: int) -> list[Entry]:
        """Nothing is."""
        return []


@pytest.fixture
async def bus() -> Any:
    bus = Bus()
    reading = asyncio.create_task(bus.intake.read(cast("Any", bus)))
    yield bus
    reading.cancel()


async def test_it_is_quiet_at_once_where_nothing_is_in_flight(bus: Bus) -> None:
    await bus.intake.quiet()


async def test_it_is_quiet_as_soon_as_what_is_in_flight_has_ended(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "_QUIET_WITHIN_S", 60.0)
    await bus.taken.wait()
    quiet = asyncio.create_task(bus.intake.quiet())
    await asyncio.sleep(0)
    assert not quiet.done()

    bus.may_end.set()
    await quiet
    await bus.intake.drain()


async def test_who_wants_quiet_does_not_wait_for_ever(bus: Bus) -> None:
    await bus.taken.wait()

    await bus.intake.quiet()

    bus.may_end.set()
    await bus.intake.drain()
