"""`tamiyo explain`: a decision read back from the bus, whatever of it is still there."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest
from support.bus import SECRET, Bus, state_packet
from support.running import StartService

from tamiyo_svc.cli.main import main

pytestmark = pytest.mark.redis


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", SECRET)


async def tamiyo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `tamiyo <arguments>`, run beside the event loop."""
    monkeypatch.setattr(sys, "argv", ["tamiyo", *arguments])

    def run() -> int:
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return await asyncio.to_thread(run)


async def explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command_id: str
) -> dict[str, Any]:
    capsys.readouterr()
    assert await tamiyo(monkeypatch, "explain", command_id, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


async def test_a_decision_is_explained_with_everything_that_led_to_it(
    bus: Bus,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await start_service()
    for step in range(1, 4):
        await bus.publish(state_packet("run-1", step), blueprint_id="demo-safe")
        await bus.command_for(state_packet("run-1", step))
    packet = state_packet("run-1", 4)
    await bus.publish(packet, blueprint_id="demo-bsds-critical,demo-safe")
    command = await bus.command_for(packet)
    found = await explained(monkeypatch, capsys, command.command_id)
    assert found["packet"]["packet_id"] == packet.packet_id
    assert found["packet"]["seed_states"][0]["seed_id"] == "seed-0"
    assert found["command"]["command_id"] == command.command_id
    assert [report["report_id"] for report in found["reports"]] == [f"fr-{command.command_id}"]
    assert found["proposed"]["action"] == "seed"
    assert found["runner_up"]["probability"] <= found["proposed"]["probability"]
    assert {pair["seed_id"] for pair in found["seed_scores"]} == {f"seed-{n}" for n in range(4)}
    assert {pair["blueprint_id"] for pair in found["blueprint_scores"]} == {
        "demo-bsds-critical",
        "demo-safe",
    }
    assert 0.0 < found["coverage"] <= 1.0
    assert found["coverage_by_family"]["node.global"] > 0.0
    leading = next(event for event in found["events"] if event["event"] == "bp_quarantine")
    assert (leading["value"], leading["threshold"]) == ("0.95", "0.8")
    assert (leading["severity"], leading["effect"]) == ("CRITICAL", "pause")
    assert found["command_type"] == "pause"
    assert found["reason"] == command.annotations["risk_reason"] == "bp_quarantine"
    assert found["why"] == (
        f"the policy proposed seed ({found['proposed']['probability']:.3f}; next optimizer "
        f"{found['runner_up']['probability']:.3f}); bp_quarantine (CRITICAL, value "
        f"0.95, threshold 0.8) is the most severe of {len(found['events'])} events and asks for: "
        "pause; also asking: bsds_hazard_critical, blueprint_risk; the most conservative action "
        "wins: pause"
    )
    assert await tamiyo(monkeypatch, "explain", command.command_id) == 0
    shown = capsys.readouterr().out
    for text in (packet.packet_id, "bp_quarantine", "runner-up", "Coverage", "seed-0", "demo-safe"):
        assert text in shown


async def test_a_command_on_a_reply_stream_and_markup_in_ids_are_no_obstacle(
    bus: Bus,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await start_service()
    packet = state_packet("run-[/red]", 1)
    reply_to = "oona.commands.run-1"
    await bus.publish(packet, blueprint_id="demo-safe", reply_to=reply_to)
    command = await bus.command_for(packet, reply_to)
    found = await explained(monkeypatch, capsys, command.command_id)
    assert found["command"]["command_id"] == command.command_id
    assert found["why"].endswith("and no event had a say: seed")
    assert await tamiyo(monkeypatch, "explain", command.command_id) == 0
    assert "run-[/red]" in capsys.readouterr().out


async def test_what_was_trimmed_is_said_to_be_gone(
    bus: Bus,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await start_service()
    packet = state_packet("run-1", 1)
    await bus.publish(packet, blueprint_id="demo-safe")
    command = await bus.command_for(packet)
    await bus.redis.delete("oona.telemetry")
    found = await explained(monkeypatch, capsys, command.command_id)
    assert found["why"] == "the telemetry of this decision is not on the bus any more"
    assert (found["reason"], found["packet"]["packet_id"]) == ("policy", packet.packet_id)
    await bus.redis.delete("oona.normal")
    assert await tamiyo(monkeypatch, "explain", command.command_id) == 1
    assert "nothing of command" in capsys.readouterr().err


async def test_forged_telemetry_explains_nothing(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tamiyo_svc.leyline import leyline_pb2 as leyline
    from tamiyo_svc.leyline.envelope import seal
    from tamiyo_svc.leyline.signing import Keyring

    forged = seal(leyline.TelemetryPacket(), Keyring(b"another secret 16"), {"command_id": "c-1"})
    await bus.add(forged, "oona.telemetry")
    assert await tamiyo(monkeypatch, "explain", "c-1") == 1


async def test_a_bus_that_is_away_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIS_URL", "unix:///nowhere/redis.sock")
    assert await tamiyo(monkeypatch, "explain", "c-1") == 1
    assert capsys.readouterr().err.count("\n") == 1
