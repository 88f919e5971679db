"""A real model's steps on the whole decision path: its latencies, and what is seen afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.bus import Bus, state_packet
from support.replay import OPTIONS, START_NS, Replayed, replay
from support.running import StartService

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.runs.windows import MAX_WINDOWS
from tamiyo_svc.service.outcomes import PathOptions
from tamiyo_svc.taxonomy import CommandAction, Severity

SLOW = ("step_latency_high", "hook_budget")


async def steps(scales: Sequence[float], options: PathOptions = OPTIONS) -> Replayed:
    """Decide packets of a 200 ms step and a 60 ms forward, each times its scale."""
    packets: list[tuple[Any, str]] = []
    for number, scale in enumerate(scales):
        packet = state_packet("run-1", number + 1)
        packet.timestamp_ns = START_NS + number * 200_000_000
        packet.training_metrics["step_latency_ms"] = 200.0 * scale
        packet.training_metrics["hook_latency_ms"] = 60.0 * scale
        packets.append((packet, "demo-safe"))
    return await replay(packets, options)


def latency_events(replayed: Replayed) -> list[set[tuple[str, Severity]]]:
    """What each decision said of latencies."""
    return [
        {(e.event.value, e.severity) for e in answer.decision.events if e.event in SLOW}
        for answer in replayed.answers
    ]


async def test_a_model_with_long_steps_is_answered_and_a_jump_is_told() -> None:
    replayed = await steps([1.0] * 300 + [3.0] * 40 + [1.0] * 20)
    events = latency_events(replayed)
    actions = [answer.decision.verdict.action for answer in replayed.answers]
    usual, told, paused, settled = actions[:300], actions[300:307], actions[307:324], actions[324:]
    assert CommandAction.PAUSE not in usual + told + settled
    assert not any(events[:300])
    assert not any(events[324:])
    assert events[300:307] == [{(name, Severity.WARNING) for name in SLOW}] * 7
    assert events[307:324] == [{(name, Severity.HIGH) for name in SLOW}] * 17
    assert paused == [CommandAction.PAUSE] * 17
    assert replayed.answers[307].command.annotations["risk_reason"] == "hook_budget"
    assert replayed.answers[-1].command.annotations["risk_reason"] == "policy"


async def test_the_same_steps_give_the_same_bytes() -> None:
    scales = [1.0, 1.0, 2.5] * 20 + [4.0] * 20
    first, again = [(await steps(scales)).whole.hexdigest() for _ in range(2)]
    assert first == again


async def test_every_command_that_changes_something_is_reported_on_after_its_steps() -> None:
    options = PathOptions(step_timeout_ms=0, observation_window_steps=MAX_WINDOWS)
    replayed = await steps([1.0] * 100 + [3.0] * 20 + [1.0] * 80, options)
    commands = {answer.command.command_id: answer.command for answer in replayed.answers}
    paused = {
        command_id
        for command_id, command in commands.items()
        if command.command_type == leyline.COMMAND_PAUSE
    }
    reports = [report for answer in replayed.answers for report in answer.reports[1:]]
    assert len(paused) == 13
    assert len(reports) == len(commands) - MAX_WINDOWS - len(paused)
    for report in reports:
        command = commands[report.command_id]
        assert report.command_id not in paused
        assert report.notes == f"field_report_synthesised:{command.annotations['risk_reason']}"
        assert report.seed_id == command.target_seed_id
        assert report.blueprint_id == command.seed_operation.blueprint_id
        assert report.issued_at == command.issued_at
        assert report.metrics["observed_steps"] == MAX_WINDOWS
        assert report.metrics["observed_epochs"] in (0.0, 1.0)


@pytest.mark.redis
async def test_replicas_share_what_is_usual_in_a_run(bus: Bus, start_service: StartService) -> None:
    for name in ("a", "b"):
        await start_service(consumer_name=name, fr_obs_window_steps=5)
    reasons, deciders = [], set()
    for step in range(1, 41):
        packet = state_packet("run-1", step)
        packet.training_metrics["step_latency_ms"] = 200.0 if step <= 30 else 600.0
        await bus.publish(packet, blueprint_id="demo-safe")
        command = await bus.command_for(packet)
        reasons.append(command.annotations["risk_reason"])
    for telemetry in await bus.telemetry() + await bus.telemetry("oona.emergency"):
        deciders.add(telemetry.system_health.indicators["replica"])
    assert reasons == ["policy"] * 30 + ["step_latency_high"] * 10
    assert command.command_type == leyline.COMMAND_PAUSE
    reports = await bus.messages("oona.normal", leyline.FieldReport)
    observed = [r for r in reports if r.report_id.startswith("fr-synth-")]
    assert len(observed) == 35
    assert {report.metrics["observed_steps"] for report in observed} == {5.0}
    assert deciders == {"a", "b"}
