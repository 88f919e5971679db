"""The breaker of the bus: open while Redis is away, told once, closed when it is back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.bus import Bus, state_packet
from support.running import StartService

from tamiyo_svc.adapters.embedded import EmbeddedRedis

pytestmark = pytest.mark.redis


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(server: EmbeddedRedis) -> str:
    return server.url


async def bus_events(bus: Bus) -> list[str]:
    both = [*await bus.telemetry(), *await bus.telemetry("oona.emergency")]
    return [
        event.description
        for one in both
        for event in one.events
        if event.attributes.get("component") == "bus"
    ]


async def test_an_outage_opens_the_breaker_once_and_the_return_closes_it(
    bus: Bus, start_service: StartService, server: EmbeddedRedis
) -> None:
    running = await start_service()
    packet = state_packet("run-1", 1)
    await bus.publish(packet, blueprint_id="demo-safe")
    await bus.command_for(packet)

    async def state_is(value: float) -> bool:
        return running.value("tamiyo_breaker_state", breaker="bus") == value

    server.kill()
    await bus.until(lambda: state_is(2))
    server.start()
    await bus.until(lambda: state_is(1))
    packet = state_packet("run-1", 2)
    await bus.publish(packet, blueprint_id="demo-safe")
    command = await bus.command_for(packet)
    assert command.annotations["risk_reason"] == "policy"

    async def told() -> Any:
        found = await bus_events(bus)
        return found if len(found) > 1 else None

    assert sorted(await bus.until(told)) == ["breaker_closed", "breaker_opened"]
    assert not running.task.done()
