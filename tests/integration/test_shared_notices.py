"""What one replica reads and all must know: sheets, emergencies for all, catalogue changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from support.bus import Bus, state_packet
from support.catalogs import copy_sample, descriptor, write_rows
from support.running import Running, StartService

from tamiyo_svc.adapters.oona.breaker_store import BreakerStore
from tamiyo_svc.adapters.oona.bulletin import Bulletin
from tamiyo_svc.adapters.oona.connection import ServerClock, client
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.breaker import CLOSED, Breaker
from tamiyo_svc.taxonomy import BreakerName, BreakerState

pytestmark = pytest.mark.redis


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with client(redis_url, 5) as redis:
        yield redis


def sheet(
    blueprint_id: str, band: leyline.HazardBand, issued_s: int = 0, risk: float = 0.3
) -> leyline.BSDS:
    made = leyline.BSDS(
        version=1,
        blueprint_id=blueprint_id,
        hazard_band=band,
        handling_class=leyline.HANDLING_CLASS_STANDARD,
        provenance=leyline.PROVENANCE_URABRASK,
        risk_score=risk,
    )
    if issued_s:
        made.issued_at.FromSeconds(issued_s)
    return made


def emergency(reason: str = "overheating", run_id: str = "") -> leyline.EmergencySignal:
    return leyline.EmergencySignal(
        version=1,
        level=leyline.EMERGENCY_LEVEL_HALT,
        reason=reason,
        origin="tolaria",
        run_id=run_id,
    )


def bands(running: Running) -> dict[str, int]:
    """Hazard bands a service knows, by blueprint."""
    blueprints = running.service._catalog.snapshot.blueprints
    return {name: one.bsds.hazard_band for name, one in blueprints.items() if one.bsds}


async def answered(bus: Bus, run_id: str, step: int, blueprint: str = "demo-safe") -> Any:
    packet = state_packet(run_id, step)
    await bus.publish(packet, blueprint_id=blueprint)
    return await bus.command_for(packet)


async def events_on(bus: Bus, name: str) -> list[Any]:
    both = [*await bus.telemetry(), *await bus.telemetry("oona.emergency")]
    return [event for one in both for event in one.events if event.description == name]


async def test_of_two_posts_the_newer_stays_and_reading_again_gives_nothing_new(
    redis: Redis,
) -> None:
    writer, reader = Bulletin(redis), Bulletin(redis)
    assert await reader.read() is None
    await writer.post_sheet(sheet("a", leyline.HAZARD_BAND_HIGH, 200))
    await writer.post_sheet(sheet("a", leyline.HAZARD_BAND_LOW, 100))
    await writer.post_sheet(sheet("b", leyline.HAZARD_BAND_LOW, 100))
    edition = await reader.read()
    assert edition is not None
    assert [(one.blueprint_id, one.hazard_band) for one in edition.sheets] == [
        ("a", leyline.HAZARD_BAND_HIGH),
        ("b", leyline.HAZARD_BAND_LOW),
    ]
    assert await reader.read() is None
    await writer.post_emergency(emergency("first"), 1000)
    await writer.post_emergency(emergency("older"), 999)
    edition = await reader.read()
    assert edition is not None
    assert edition.emergency is not None
    assert (edition.emergency.reason, edition.emergency_ms) == ("first", 1000)
    before = edition.catalog
    await writer.post_catalog_change(5)
    edition = await reader.read()
    assert edition is not None
    assert edition.catalog != before


async def test_junk_in_the_bulletin_is_left_out(redis: Redis) -> None:
    await redis.hset(
        "tamiyo:bulletin",
        mapping={"sheet:a": b"\xff" * 40, "emergency": b"no time", "edition": b"1"},
    )
    edition = await Bulletin(redis).read()
    assert edition is not None
    assert (edition.sheets, edition.emergency) == ((), None)


async def test_a_sheet_reaches_every_replica_and_outlives_them(
    bus: Bus, start_service: StartService
) -> None:
    replicas = [await start_service(consumer_name=name) for name in ("a", "b")]
    await bus.publish(leyline.BSDSIssued(bsds=sheet("demo-safe", leyline.HAZARD_BAND_CRITICAL)))
    critical = leyline.HAZARD_BAND_CRITICAL

    async def everywhere() -> bool:
        return all(bands(one).get("demo-safe") == critical for one in replicas)

    await bus.until(everywhere)
    (event,) = await events_on(bus, "bsds_issued")
    assert event.attributes["provenance"] == "URABRASK"
    for replica in replicas:
        replica.stop.set()
        await replica.task
    await start_service(consumer_name="c")
    command = await answered(bus, "run-1", 1)
    assert command.annotations["risk_reason"] == "bsds_hazard_critical"
    assert command.annotations["bsds_provenance"] == "URABRASK"


async def test_an_emergency_for_all_reaches_each_run_once_on_any_replica(
    bus: Bus, start_service: StartService
) -> None:
    first = await start_service(consumer_name="a", conservative_cooldown_steps=2)
    await bus.publish(emergency(), "oona.emergency")
    await bus.until(lambda: events_on(bus, "emergency_signal"))
    reasons = [(await answered(bus, "run-1", step)).annotations["risk_reason"] for step in (1, 2)]
    assert reasons == ["emergency_signal", "conservative_mode"]
    first.stop.set()
    await first.task
    await start_service(consumer_name="b", conservative_cooldown_steps=2)
    reasons = [(await answered(bus, "run-1", step)).annotations["risk_reason"] for step in (3, 4)]
    assert reasons == ["conservative_mode", "policy"]
    command = await answered(bus, "run-2", 1)
    assert command.annotations["risk_reason"] == "emergency_signal"
    assert command.command_type == leyline.COMMAND_PAUSE


async def test_an_emergency_is_over_when_its_message_would_be(
    bus: Bus, start_service: StartService, redis: Redis
) -> None:
    seconds, _ = await redis.time()
    await Bulletin(redis).post_emergency(emergency(), (seconds - 10) * 1000)
    await start_service(message_ttl_ms=5000)
    assert (await answered(bus, "run-1", 1)).annotations["risk_reason"] == "policy"


async def test_a_milder_signal_changes_nothing(bus: Bus, start_service: StartService) -> None:
    await start_service()
    signal = emergency()
    signal.level = leyline.EMERGENCY_LEVEL_ELEVATED
    await bus.publish(signal, "oona.emergency")
    assert (await answered(bus, "run-1", 1)).annotations["risk_reason"] == "policy"


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (leyline.KernelCatalogUpdate(blueprint_id="fresh"), "catalog_updated"),
        (leyline.BSDSFailed(blueprint_id="fresh", reason="no signature"), "bsds_failed"),
    ],
    ids=["update", "failed"],
)
async def test_a_catalogue_message_makes_every_replica_read_the_file(
    bus: Bus, start_service: StartService, tmp_path: Path, message: Any, event: str
) -> None:
    path = copy_sample(tmp_path / "catalog.db")
    options = {"urza_database_url": f"sqlite:///{path}", "metadata_refresh_s": 600}
    replicas = [await start_service(consumer_name=name, **options) for name in ("a", "b")]
    write_rows(path, {"fresh": descriptor()})
    await bus.publish(message)

    async def everywhere() -> bool:
        return all("fresh" in one.service._catalog.snapshot.blueprints for one in replicas)

    await bus.until(everywhere)
    (told,) = await events_on(bus, event)
    assert told.attributes["blueprint_id"] == "fresh"


async def test_breakers_come_back_as_they_were(redis: Redis) -> None:
    clock = ServerClock()
    await clock.sync(redis)
    opened = Breaker(BreakerState.OPEN, failures=3, cooldown_s=20.0, since_s=100.0)
    breakers = dict.fromkeys(BreakerName, CLOSED) | {
        BreakerName.INFERENCE: opened,
        BreakerName.BUS: opened,
    }
    await BreakerStore(redis, "a", clock, monotonic=lambda: 105.0).save(breakers)
    # Another process: its clock starts anywhere, five seconds of cool-down are gone.
    found = await BreakerStore(redis, "a", clock, monotonic=lambda: 7.0).load()
    restored = found[BreakerName.INFERENCE]
    assert (restored.state, restored.failures, restored.cooldown_s) == (BreakerState.OPEN, 3, 20.0)
    assert restored.since_s == pytest.approx(2.0, abs=2.0)
    assert found.keys() == {BreakerName.INFERENCE, BreakerName.METADATA}
    assert await BreakerStore(redis, "b", clock).load() == {}


async def test_a_breaker_that_cannot_be_read_is_left_out(redis: Redis) -> None:
    await redis.hset("tamiyo:breakers:a", "inference", b"junk")
    assert await BreakerStore(redis, "a", ServerClock()).load() == {}


async def test_an_open_inference_breaker_outlives_a_restart(
    bus: Bus, start_service: StartService
) -> None:
    options = {"consumer_name": "a", "breaker_cooldown_s": 600, "breaker_max_cooldown_s": 600}
    running = await start_service(Failing, **options)
    for step in range(1, 4):
        command = await answered(bus, "run-1", step)
        assert command.annotations["risk_reason"] == "inference_failed"
    command = await answered(bus, "run-2", 1)
    assert command.annotations["risk_reason"] == "conservative_mode"
    assert command.command_type == leyline.COMMAND_PAUSE
    running.stop.set()
    await running.task
    await start_service(**options)
    command = await answered(bus, "run-3", 1)
    assert command.annotations["risk_reason"] == "conservative_mode"
    (opened,) = await events_on(bus, "breaker_opened")
    assert (opened.attributes["component"], opened.attributes["action"]) == ("inference", "opened")
    (entered,) = await events_on(bus, "conservative_entered")
    assert dict(entered.attributes) == {"reason": "inference_breaker_open", "scope": "service"}


class Failing:
    """A worker that warms up and then never answers well."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def warm_up(self) -> None:
        self._worker.warm_up()

    def evaluate(self, requests: Any) -> Any:
        raise RuntimeError("the device is broken")
