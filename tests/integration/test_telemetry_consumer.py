"""What an observability service can rebuild from the two streams it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from support.bus import Bus, state_packet
from support.running import StartService

from tamiyo_svc.graph.coverage import FAMILIES
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload
from tamiyo_svc.leyline.signing import Keyring

pytestmark = pytest.mark.redis

TELEMETRY = "oona.telemetry"
EMERGENCY = "oona.emergency"
FAMILY_PREFIX = "tamiyo.gnn.feature_coverage."


@dataclass(frozen=True)
class Signals:
    """One decision as a consumer of telemetry sees it."""

    stream: str
    priority: int
    level: int
    coverage: float
    by_family: Mapping[str, float]
    hazard: str
    conservative: bool
    reason: str


def rebuild(streams: Mapping[str, Iterable[Any]], keyring: Keyring) -> dict[str, Signals]:
    """Signals by run, from entries alone: no state of the service, none of its modules."""
    found = {}
    for stream, entries in streams.items():
        for _, fields in entries:
            envelope = open_envelope(fields, keyring)
            packet: Any = parse_payload(envelope)
            if envelope.message_type != leyline.BUS_MESSAGE_TYPE_TELEMETRY:
                continue
            indicators = packet.system_health.indicators
            if "step_index" not in indicators:
                continue
            metrics = {metric.name: metric.value for metric in packet.metrics}
            hazard = "none"
            if metrics.get("tamiyo.bsds.hazard_high_signal"):
                hazard = "high"
            if metrics.get("tamiyo.bsds.hazard_critical_signal"):
                hazard = "critical"
            found[envelope.attributes["training_run_id"]] = Signals(
                stream=stream,
                priority=leyline.MessagePriority.Value(indicators["priority"]),
                level=packet.level,
                coverage=metrics["tamiyo.gnn.feature_coverage"],
                by_family={
                    name.removeprefix(FAMILY_PREFIX): value
                    for name, value in metrics.items()
                    if name.startswith(FAMILY_PREFIX)
                },
                hazard=hazard,
                conservative=indicators["mode"] == "1",
                reason=indicators["reason"],
            )
    return found


async def observed(bus: Bus) -> dict[str, Signals]:
    streams: dict[str, Any] = {
        stream: await bus.redis.xrange(stream) for stream in (TELEMETRY, EMERGENCY)
    }
    return rebuild(streams, bus.keyring)


async def test_coverage_hazard_and_priority_are_rebuilt_from_both_streams(
    bus: Bus, start_service: StartService
) -> None:
    await start_service()
    cases = {
        "calm": ("demo-guard-spec", 0.5),
        "hazard-high": ("demo-bsds-high", 0.5),
        "hazard-critical": ("demo-bsds-critical", 0.5),
    }
    for run, (blueprint, loss) in cases.items():
        packet = state_packet(run, 1, loss=loss)
        await bus.publish(packet, blueprint_id=blueprint)
        await bus.command_for(packet)
    spike = state_packet("calm-then-spike", 1, loss=0.5)
    await bus.publish(spike, blueprint_id="demo-guard-spec")
    await bus.command_for(spike)
    spike = state_packet("calm-then-spike", 2, loss=1.5)
    await bus.publish(spike, blueprint_id="demo-guard-spec")
    await bus.command_for(spike)

    signals = await observed(bus)
    assert {run: one.hazard for run, one in signals.items()} == {
        "calm": "none",
        "hazard-high": "high",
        "hazard-critical": "critical",
        "calm-then-spike": "none",
    }
    assert {run: (one.stream, one.priority) for run, one in signals.items()} == {
        "calm": (TELEMETRY, leyline.MESSAGE_PRIORITY_NORMAL),
        "hazard-high": (TELEMETRY, leyline.MESSAGE_PRIORITY_NORMAL),
        "hazard-critical": (EMERGENCY, leyline.MESSAGE_PRIORITY_CRITICAL),
        "calm-then-spike": (EMERGENCY, leyline.MESSAGE_PRIORITY_HIGH),
    }
    assert signals["calm-then-spike"].reason == "loss_spike"
    assert signals["calm-then-spike"].conservative
    assert not signals["calm"].conservative
    for one in signals.values():
        assert set(one.by_family) == set(FAMILIES)
        assert all(0.0 <= share <= 1.0 for share in one.by_family.values())
        assert 0.0 < one.coverage <= 1.0
    assert signals["calm"].by_family["node.global"] > 0.5


async def test_what_telemetry_carries_is_what_the_reference_lists(
    bus: Bus, start_service: StartService
) -> None:
    from tamiyo_svc.cli.reference_tables import TELEMETRY_INDICATORS, TELEMETRY_METRICS

    await start_service()
    for number, blueprint in enumerate(("demo-guard-spec", "demo-bsds-high", "demo-bsds-critical")):
        packet = state_packet(f"run-{number}", 1)
        await bus.publish(packet, blueprint_id=blueprint)
        await bus.command_for(packet)
    packets = [*await bus.telemetry(TELEMETRY), *await bus.telemetry(EMERGENCY)]
    metrics = {
        (
            f"{FAMILY_PREFIX}<family>" if metric.name.startswith(FAMILY_PREFIX) else metric.name,
            metric.unit,
        )
        for packet in packets
        for metric in packet.metrics
    }
    listed = {(name, unit) for name, (unit, _) in TELEMETRY_METRICS.items()}
    assert metrics <= listed
    rare = {
        "tamiyo.gnn.compile_warm_ms",
        "tamiyo.gnn.compile_fallback_total",
        "tamiyo.bsds.elevated_risk_flag",
        "tamiyo.blueprint.risk",
    }
    assert {name for name, _ in listed - metrics} <= rare
    indicators = {name for packet in packets for name in packet.system_health.indicators}
    assert indicators <= set(TELEMETRY_INDICATORS)
    assert set(TELEMETRY_INDICATORS) - indicators == {"emergency_rate_limited"}
