"""What each kind of blueprint does to a command, with the real service and a real catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.bus import Bus, state_packet
from support.catalogs import copy_sample, descriptor, locked, write_rows
from support.running import Running, StartService

from tamiyo_svc.leyline import leyline_pb2 as leyline

pytestmark = pytest.mark.redis

SEED = leyline.COMMAND_SEED
OPTIMIZER = leyline.COMMAND_OPTIMIZER
PAUSE = leyline.COMMAND_PAUSE
TELEMETRY, EMERGENCY = "oona.telemetry", "oona.emergency"
ALWAYS_INDICATED = {
    "reason",
    "priority",
    "step_index",
    "policy",
    "policy_version",
    "policy_arch",
    "policy_compile",
    "mode",
    "timeout_budget_ms",
    "metadata_timeout_budget_ms",
    "blending_method",
    "device",
    "replica",
    "command",
}


@dataclass(frozen=True)
class Scenario:
    """What a packet that asks for one blueprint is answered with."""

    blueprint: str
    command: int
    reason: str
    priority: str
    stream: str
    events: frozenset[str]


SCENARIOS = (
    Scenario("demo-safe", SEED, "policy", "NORMAL", TELEMETRY, frozenset()),
    Scenario(
        "demo-elevated",
        OPTIMIZER,
        "blueprint_risk",
        "NORMAL",
        TELEMETRY,
        frozenset({"blueprint_risk"}),
    ),
    Scenario(
        "demo-quarantine",
        PAUSE,
        "bp_quarantine",
        "CRITICAL",
        EMERGENCY,
        frozenset({"bp_quarantine", "conservative_entered"}),
    ),
    Scenario(
        "demo-bsds-critical",
        PAUSE,
        "bp_quarantine",
        "CRITICAL",
        EMERGENCY,
        frozenset(
            {
                "bp_quarantine",
                "bsds_hazard_critical",
                "blueprint_risk",
                "bsds_present",
                "conservative_entered",
            }
        ),
    ),
    Scenario(
        "demo-bsds-high",
        OPTIMIZER,
        "bsds_hazard_high",
        "NORMAL",
        TELEMETRY,
        frozenset({"bsds_hazard_high", "bsds_present"}),
    ),
    Scenario("demo-guard-spec", SEED, "policy", "NORMAL", TELEMETRY, frozenset()),
    Scenario(
        "demo-odd-metadata",
        SEED,
        "policy",
        "NORMAL",
        TELEMETRY,
        frozenset({"metadata_skipped"}),
    ),
    Scenario(
        "not-in-the-catalogue",
        OPTIMIZER,
        "policy",
        "NORMAL",
        TELEMETRY,
        frozenset({"no_blueprint_candidates"}),
    ),
)
# Said of every decision here: the built-in policy has no trained weights.
UNTRAINED = "policy_untrained"


def described(telemetry: Any) -> set[str]:
    return {event.description for event in telemetry.events}


def indicators(telemetry: Any) -> dict[str, str]:
    return dict(telemetry.system_health.indicators)


async def told(bus: Bus, packet: Any, stream: str) -> Any:
    """The telemetry of a packet, which must be on that stream."""
    found = [one for one in await bus.telemetry(stream) if one.packet_id == packet.packet_id]
    assert len(found) == 1
    return found[0]


async def events_on(bus: Bus, name: str) -> list[Any]:
    """Every telemetry packet that tells of an event, wherever it is."""
    both = [*await bus.telemetry(TELEMETRY), *await bus.telemetry(EMERGENCY)]
    return [one for one in both if name in described(one)]


def assert_indicated(
    telemetry: Any, packet: Any, *, budget_ms: str = "2000.0", look_up_ms: str = "10.0"
) -> None:
    found = indicators(telemetry)
    assert found.keys() == ALWAYS_INDICATED
    assert found["step_index"] == str(packet.global_step)
    assert found["timeout_budget_ms"] == budget_ms
    assert found["metadata_timeout_budget_ms"] == look_up_ms
    assert found["policy_version"] == "bootstrap-1"
    assert found["policy_compile"] in ("0", "1")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.blueprint)
async def test_a_blueprint_decides_command_reason_priority_and_stream(
    bus: Bus, start_service: StartService, scenario: Scenario
) -> None:
    # What is looked up late, as on a busy machine, is another event.
    await start_service(metadata_timeout_ms=2000)
    packet = state_packet("run-1", 1)
    await bus.publish(packet, blueprint_id=scenario.blueprint)
    command = await bus.command_for(packet)
    assert command.command_type == scenario.command
    assert command.annotations["risk_reason"] == scenario.reason
    telemetry = await told(bus, packet, scenario.stream)
    assert described(telemetry) - {UNTRAINED, "degraded_inputs"} == scenario.events
    assert indicators(telemetry)["reason"] == scenario.reason
    assert indicators(telemetry)["priority"] == f"MESSAGE_PRIORITY_{scenario.priority}"
    assert_indicated(telemetry, packet, look_up_ms="2000.0")


async def test_without_a_catalogue_it_serves_and_says_so_once(
    bus: Bus, start_service: StartService, tmp_path: Path
) -> None:
    path = tmp_path / "none.db"
    running = await start_service(
        urza_database_url=f"sqlite:///{path}", metadata_refresh_s=0.05, state_dir=tmp_path
    )
    for step in range(1, 4):
        packet = state_packet("run-1", step)
        await bus.publish(packet)
        command = await bus.command_for(packet)
        assert command.command_type == OPTIMIZER
        assert command.annotations["risk_reason"] == "policy"
        assert "no_blueprint_candidates" in described(await told(bus, packet, TELEMETRY))
    await bus.until(lambda: catalog_degraded(running, 1))
    assert len(await events_on(bus, "catalog_degraded")) == 1
    copy_sample(path)
    await bus.until(lambda: events_on(bus, "catalog_recovered"))
    packet = state_packet("run-1", 9)
    await bus.publish(packet)
    assert (await bus.command_for(packet)).command_type == SEED
    assert len(await events_on(bus, "catalog_degraded")) == 1


async def catalog_degraded(running: Running, value: float) -> bool:
    return running.value("tamiyo_catalog_degraded") == value


async def test_a_locked_catalogue_changes_no_answer_and_is_told_once(
    bus: Bus, start_service: StartService, tmp_path: Path
) -> None:
    path = copy_sample(tmp_path / "catalog.db")
    running = await start_service(urza_database_url=f"sqlite:///{path}", metadata_refresh_s=600)
    with locked(path):
        await bus.publish(leyline.KernelCatalogUpdate(blueprint_id="demo-safe"))
        await bus.until(lambda: events_on(bus, "catalog_degraded"))
        for step in range(1, 6):
            packet = state_packet("run-1", step)
            await bus.publish(packet, blueprint_id="demo-safe")
            command = await bus.command_for(packet)
            assert command.command_type == SEED
            assert command.annotations["risk_reason"] == "policy"
            await told(bus, packet, TELEMETRY)
    await bus.until(lambda: events_on(bus, "catalog_recovered"))
    assert len(await events_on(bus, "catalog_degraded")) == 1
    assert running.value("tamiyo_timeouts_total", path="step") == 0


async def test_a_look_up_that_misses_its_budget_is_told_with_the_next_packet(
    bus: Bus, start_service: StartService, tmp_path: Path
) -> None:
    path = copy_sample(tmp_path / "catalog.db")
    running = await start_service(urza_database_url=f"sqlite:///{path}", metadata_refresh_s=600)
    write_rows(path, {"fresh": descriptor()})
    with locked(path):
        first = state_packet("run-1", 1)
        await bus.publish(first, blueprint_id="fresh")
        command = await bus.command_for(first)
        assert command.command_type == OPTIMIZER
        assert described(await told(bus, first, TELEMETRY)) >= {"no_blueprint_candidates"}

        async def timed_out() -> bool:
            return running.value("tamiyo_timeouts_total", path="metadata") == 1

        await bus.until(timed_out)
        second = state_packet("run-1", 2)
        await bus.publish(second, blueprint_id="demo-safe")
        command = await bus.command_for(second)
        assert command.command_type == SEED
        assert command.annotations["risk_reason"] == "timeout_urza"
        telemetry = await told(bus, second, EMERGENCY)
        assert indicators(telemetry)["priority"] == "MESSAGE_PRIORITY_HIGH"
        (event,) = (one for one in telemetry.events if one.description == "timeout_urza")
        assert event.attributes["budget_ms"] == "10.0"
        third = state_packet("run-1", 3)
        await bus.publish(third, blueprint_id="demo-safe")
        command = await bus.command_for(third)
        assert command.annotations["risk_reason"] == "policy"
    assert running.value("tamiyo_timeouts_total", path="step") == 0


async def test_a_fresh_blueprint_is_looked_up_for_the_next_packet(
    bus: Bus, start_service: StartService, tmp_path: Path
) -> None:
    path = copy_sample(tmp_path / "catalog.db")
    await start_service(
        urza_database_url=f"sqlite:///{path}", metadata_refresh_s=600, metadata_timeout_ms=5000
    )
    write_rows(path, {"fresh": descriptor()})
    step = 0

    async def selected() -> bool:
        nonlocal step
        step += 1
        packet = state_packet("run-1", step)
        await bus.publish(packet, blueprint_id="fresh")
        command = await bus.command_for(packet)
        if command.command_type != SEED:
            return False
        return bool(command.seed_operation.blueprint_id == "fresh")

    await bus.until(selected)
    assert step > 1


async def test_skipped_rows_are_counted(
    bus: Bus, start_service: StartService, tmp_path: Path
) -> None:
    path = copy_sample(tmp_path / "catalog.db")
    write_rows(
        path, {"broken": "{", "blob": b"\xff", "odd": descriptor(_urza={"bsds": 7, "tags": 1})}
    )
    running = await start_service(urza_database_url=f"sqlite:///{path}")

    async def counted() -> bool:
        return running.value("tamiyo_catalog_blueprints") == 8

    await bus.until(counted)
    assert running.value("tamiyo_catalog_skipped_entries", part="row") == 2
    assert running.value("tamiyo_catalog_skipped_entries", part="bsds") == 1
    assert running.value("tamiyo_catalog_skipped_entries", part="tags") == 1


async def test_three_missed_look_ups_open_the_metadata_breaker_and_the_file_is_left_alone(
    bus: Bus, start_service: StartService, tmp_path: Path
) -> None:
    path = copy_sample(tmp_path / "catalog.db")
    running = await start_service(urza_database_url=f"sqlite:///{path}", metadata_refresh_s=600)

    async def opened() -> bool:
        return running.value("tamiyo_breaker_state", breaker="metadata") == 2

    with locked(path):
        packet = state_packet("run-1", 1)
        await bus.publish(packet, blueprint_id="one,two,three,demo-safe")
        assert (await bus.command_for(packet)).command_type == SEED
        await bus.until(opened)
    (telemetry,) = await bus.until(lambda: events_on(bus, "breaker_opened"))
    (event,) = (one for one in telemetry.events if one.description == "breaker_opened")
    assert (event.attributes["component"], event.attributes["failures"]) == ("metadata", "3")
    assert event.level == leyline.TELEMETRY_LEVEL_CRITICAL
    packet = state_packet("run-1", 2)
    await bus.publish(packet, blueprint_id="four,demo-safe")
    assert (await bus.command_for(packet)).command_type == SEED
    assert running.value("tamiyo_timeouts_total", path="metadata") == 3
