"""The whole service on a real Redis: what goes in, what comes out, what becomes of the rest."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.bus import Bus, as_fields, state_packet
from support.running import Running, StartService

from tamiyo_svc.errors import InferenceError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import SignedEnvelope, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.evaluator import PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.service.lifecycle import Service
from tamiyo_svc.service.wiring import Worker

pytestmark = pytest.mark.redis

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "golden.jsonl").read_text().splitlines()
]


def indicators(telemetry: Any) -> dict[str, str]:
    return dict(telemetry.system_health.indicators)


async def settled(bus: Bus, running: Running, packets: int) -> dict[str, float]:
    """The outcomes once so many packets have ended."""

    async def ended() -> bool:
        return sum(running.outcomes().values()) >= packets

    await bus.until(ended)
    return running.outcomes()


async def test_packet_is_answered_with_one_signed_command(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    command = await bus.command_for(packet)
    assert command.command_type == leyline.COMMAND_SEED
    assert command.target_seed_id == "seed-0"
    assert command.seed_operation.operation == leyline.SEED_OP_GERMINATE
    assert command.annotations["risk_reason"] == "policy"
    assert command.annotations["training_run_id"] == "run-1"
    assert command.annotations["step_index"] == "1"
    (telemetry,) = await bus.telemetry()
    assert telemetry.packet_id == packet.packet_id
    assert indicators(telemetry)["priority"] == "MESSAGE_PRIORITY_NORMAL"
    assert indicators(telemetry)["reason"] == "policy"
    (report,) = await bus.messages("oona.normal", leyline.FieldReport)
    assert report.command_id == command.command_id
    assert report.outcome == leyline.FIELD_REPORT_OUTCOME_SUCCESS
    assert running.outcomes() == {"decided": 1}


async def test_loss_spike_pauses_the_run_and_alerts(bus: Bus, start_service: StartService) -> None:
    await start_service()
    first = state_packet("run-1", 1, loss=0.5)
    await bus.publish(first)
    await bus.command_for(first)
    spike = state_packet("run-1", 2, loss=0.7)
    await bus.publish(spike)
    command = await bus.command_for(spike)
    assert command.command_type == leyline.COMMAND_PAUSE
    assert command.annotations["risk_reason"] == "loss_spike"
    (alert,) = await bus.telemetry("oona.emergency")
    assert indicators(alert)["priority"] == "MESSAGE_PRIORITY_HIGH"
    calm = state_packet("run-1", 3, loss=0.5)
    await bus.publish(calm)
    command = await bus.command_for(calm)
    assert command.command_type == leyline.COMMAND_PAUSE
    assert command.annotations["risk_reason"] == "conservative_mode"


async def test_packet_without_seeds_is_a_pause_without_the_network(
    bus: Bus, start_service: StartService
) -> None:
    batches: list[int] = []
    await start_service(lambda worker: Recording(worker, batches))
    packet = state_packet("run-1", 1, seeds=0)
    await bus.publish(packet)
    command = await bus.command_for(packet)
    assert command.command_type == leyline.COMMAND_PAUSE
    assert command.annotations["risk_reason"] == "no_seed_candidates"
    assert batches == []


async def test_nonfinite_loss_pauses(bus: Bus, start_service: StartService) -> None:
    await start_service()
    packet = state_packet("run-1", 1, loss=float("nan"))
    await bus.publish(packet)
    command = await bus.command_for(packet)
    assert command.annotations["risk_reason"] == "loss_nonfinite"
    (alert,) = await bus.telemetry("oona.emergency")
    assert indicators(alert)["priority"] == "MESSAGE_PRIORITY_CRITICAL"


async def test_emergencies_beyond_the_rate_are_told_on_the_telemetry_stream(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service(emergency_max_per_min=1)
    for step in range(1, 4):
        packet = state_packet("run-1", step, loss=float("nan"))
        await bus.publish(packet)
        await bus.command_for(packet)
    (first,) = await bus.telemetry("oona.emergency")
    later = await bus.telemetry()
    assert "emergency_rate_limited" not in indicators(first)
    assert [indicators(one)["emergency_rate_limited"] for one in later] == ["1", "1"]
    assert running.value("tamiyo_emergency_rate_limited_total") == 2


async def test_reply_stream_gets_the_command_and_the_normal_stream_does_not(
    bus: Bus, start_service: StartService
) -> None:
    await start_service()
    packet = state_packet("run-1", 1)
    trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    await bus.publish(packet, reply_to="oona.commands.run-1", traceparent=trace)
    command = await bus.command_for(packet, "oona.commands.run-1")
    assert await bus.commands() == []
    entries: Any = await bus.redis.xrange("oona.commands.run-1")
    envelope = leyline.BusEnvelope.FromString(entries[0][1][b"payload"])
    assert dict(envelope.attributes) == {
        "training_run_id": "run-1",
        "packet_id": packet.packet_id,
        "step_index": "1",
        "command_id": command.command_id,
        "policy_version": command.annotations["policy_version"],
        "traceparent": trace,
    }
    (telemetry,) = await bus.telemetry()
    assert {span.parent_span_id for span in telemetry.spans} == {"cd" * 8}


async def test_reply_stream_outside_its_prefix_is_not_written_to(
    bus: Bus, start_service: StartService
) -> None:
    await start_service()
    packet = state_packet("run-1", 1)
    await bus.publish(packet, reply_to="oona.policy")
    await bus.command_for(packet)
    assert await bus.redis.exists("oona.policy") == 0


async def test_repeated_packet_makes_no_second_command(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    packet = state_packet("run-1", 1)
    for _ in range(3):
        await bus.publish(packet)
    assert await settled(bus, running, 3) == {"decided": 1, "duplicate": 2}
    assert len(await bus.commands()) == 1


async def test_resumed_trainer_that_repeats_steps_is_answered_again(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    for _ in range(2):
        await bus.publish(state_packet("run-1", 1))
        await settled(bus, running, 1)
    await settled(bus, running, 2)
    commands = await bus.commands()
    assert len({command.command_id for command in commands}) == 2


async def test_backlog_of_one_run_is_superseded_by_its_newest(
    bus: Bus, start_service: StartService
) -> None:
    packets = [state_packet("run-1", step) for step in range(10)]
    for packet in packets:
        await bus.publish(packet)
    other = state_packet("run-2", 0)
    await bus.publish(other)
    running = await start_service()
    assert await settled(bus, running, 11) == {"decided": 2, "superseded": 9}
    answered = {command.annotations["packet_id"] for command in await bus.commands()}
    assert answered == {packets[-1].packet_id, other.packet_id}


async def test_packet_that_comes_after_a_newer_one_was_decided_is_superseded(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    older, newer = (state_packet("run-1", step) for step in (1, 2))
    await bus.publish(newer)
    await bus.command_for(newer)
    await bus.publish(older)
    assert await settled(bus, running, 2) == {"decided": 1, "superseded": 1}
    assert len(await bus.commands()) == 1


async def test_old_packets_expire_with_one_notice(bus: Bus, start_service: StartService) -> None:
    for step in range(5):
        packet = state_packet("run-1", step)
        fields = as_fields(seal(packet, bus.keyring))
        await bus.redis.xadd("oona.normal", fields, id=f"{1_700_000_000_000 + step}-1")
    running = await start_service()
    assert await settled(bus, running, 5) == {"expired": 5}
    assert await bus.commands() == []
    (notice,) = await bus.telemetry()
    (event,) = notice.events
    assert event.description == "packets_expired"
    assert event.attributes["count"] == "5"


@pytest.mark.parametrize(
    "vector", [vector for vector in GOLDEN if not vector["accept"]], ids=lambda v: v["name"]
)
async def test_refused_vector_is_a_dead_letter_and_the_next_packet_is_decided(
    bus: Bus, start_service: StartService, vector: dict[str, Any]
) -> None:
    running = await start_service(secret=vector["secret"] + "-is-padded", secret_previous=None)
    bus.keyring = Keyring((vector["secret"] + "-is-padded").encode())
    payload = bytes.fromhex(vector["envelope_hex"])
    signature = vector["signature"]
    if vector["reason"] not in ("missing_signature", "invalid_signature"):
        signature = bus.keyring.sign(payload)
    await bus.redis.xadd("oona.normal", {"payload": payload, "signature": signature})
    good = state_packet("run-1", 1)
    await bus.publish(good)
    await settled(bus, running, 2)
    letters: Any = await bus.redis.xrange("oona.dead")
    ((_, fields),) = letters
    assert fields[b"dead.reason"].decode() == vector["reason"]
    assert fields[b"dead.stream"] == b"oona.normal"
    assert fields[b"payload"] == payload
    assert fields[b"signature"].decode() == signature
    assert running.outcomes() == {"decided": 1, "dead_lettered": 1}
    pending: Any = await bus.redis.xpending("oona.normal", "tamiyo")
    assert pending["pending"] <= 3  # our own outputs may still be on their way past us


async def test_packet_whose_answer_is_refused_is_a_dead_letter_and_stops_nobody(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    await bus.redis.set("oona.commands.run-1", "not a stream")
    await bus.redis.set("tamiyo:run:run-2", "not a run state")
    await bus.publish(state_packet("run-1", 1), reply_to="oona.commands.run-1")
    await bus.publish(state_packet("run-2", 1))
    good = state_packet("run-3", 1)
    await bus.publish(good)
    await bus.command_for(good)
    assert await settled(bus, running, 3) == {"decided": 1, "dead_lettered": 2}
    assert await bus.telemetry("oona.emergency") == []


async def test_messages_with_impossible_fields_are_dead_letters(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    sheet = leyline.BSDSIssued(bsds=leyline.BSDS(blueprint_id="demo-safe", risk_score=0.5))
    sheet.bsds.issued_at.nanos = 2_000_000_000
    await bus.publish(sheet)
    signal = leyline.EmergencySignal(run_id="run-1")
    signal.level = 77  # type: ignore[assignment]
    await bus.publish(signal, "oona.emergency")
    assert await settled(bus, running, 2) == {"dead_lettered": 2}
    letters: Any = await bus.redis.xrange("oona.dead")
    assert {fields[b"dead.reason"] for _, fields in letters} == {b"invalid_field"}


async def test_oversized_and_unnamed_packets_are_dead_letters(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service(max_message_bytes=4096)
    large = state_packet("run-1", 1)
    large.experiment_name = "x" * 5000
    await bus.publish(large)
    await bus.publish(state_packet("", 1))
    assert await settled(bus, running, 2) == {"dead_lettered": 2}
    letters: Any = await bus.redis.xrange("oona.dead")
    reasons = sorted(fields[b"dead.reason"] for _, fields in letters)
    assert reasons == [b"invalid_field", b"oversized"]


async def test_foreign_entries_and_other_messages_are_acknowledged(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    await bus.redis.xadd("oona.normal", {"bootstrap": "1"})
    await bus.publish(leyline.KernelPrefetchRequest(request_id="r", blueprint_id="b"))
    await bus.publish(leyline.AdaptationCommand(command_id="somebody else's"))

    async def drained() -> bool:
        groups: Any = await bus.redis.xinfo_groups("oona.normal")
        pending: Any = await bus.redis.xpending("oona.normal", "tamiyo")
        last: Any = await bus.redis.xinfo_stream("oona.normal")
        seen = groups[0]["last-delivered-id"] == last["last-generated-id"]
        return bool(seen and pending["pending"] == 0)

    await bus.until(drained)
    assert running.outcomes() == {}
    assert await bus.redis.xlen("oona.dead") == 0


async def test_packets_left_pending_by_a_dead_process_are_decided_on_start(
    bus: Bus, start_service: StartService
) -> None:
    await bus.redis.xgroup_create("oona.normal", "tamiyo", id="0", mkstream=True)
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    await bus.redis.xreadgroup("tamiyo", "this-one", {"oona.normal": ">"})
    running = await start_service(consumer_name="this-one")
    assert await settled(bus, running, 1) == {"decided": 1}
    await bus.command_for(packet)


async def test_what_was_left_pending_is_decided_before_what_is_new(
    bus: Bus, start_service: StartService
) -> None:
    await bus.redis.xgroup_create("oona.normal", "tamiyo", id="0", mkstream=True)
    packets = [state_packet("run-1", step) for step in (1, 2)]
    await bus.publish(packets[0])
    await bus.redis.xreadgroup("tamiyo", "this-one", {"oona.normal": ">"})
    await bus.publish(packets[1])
    running = await start_service(consumer_name="this-one")
    # The other way round the older one would have come too late for a command.
    assert await settled(bus, running, 2) == {"decided": 2}


async def test_entry_delivered_too_often_is_a_dead_letter(
    bus: Bus, start_service: StartService
) -> None:
    await bus.redis.xgroup_create("oona.normal", "tamiyo", id="0", mkstream=True)
    await bus.publish(state_packet("run-1", 1))
    await bus.redis.xreadgroup("tamiyo", "this-one", {"oona.normal": ">"})
    for _ in range(5):
        await bus.redis.xreadgroup("tamiyo", "this-one", {"oona.normal": "0"})
    running = await start_service(consumer_name="this-one")
    assert await settled(bus, running, 1) == {"dead_lettered": 1}
    letters: Any = await bus.redis.xrange("oona.dead")
    assert letters[0][1][b"dead.reason"] == b"deliveries_exceeded"


async def test_work_of_a_vanished_replica_is_claimed(bus: Bus, start_service: StartService) -> None:
    await bus.redis.xgroup_create("oona.normal", "tamiyo", id="0", mkstream=True)
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    await bus.redis.xreadgroup("tamiyo", "vanished", {"oona.normal": ">"})
    await start_service(consumer_name="survivor", claim_idle_ms=200)
    await bus.command_for(packet)


async def test_emergency_signal_makes_its_run_conservative_over_a_restart(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    signal = leyline.EmergencySignal(
        version=1,
        level=leyline.EMERGENCY_LEVEL_HALT,
        reason="rollback_deadline",
        origin="tolaria",
        run_id="run-1",
    )
    await bus.publish(signal, "oona.emergency")
    (alert,) = await bus.until(lambda: bus.telemetry("oona.emergency"))
    assert alert.events[0].description == "rollback_deadline"
    running.stop.set()
    await running.task
    await start_service()
    packet, other = state_packet("run-1", 1), state_packet("run-2", 1)
    await bus.publish(packet)
    await bus.publish(other)
    command = await bus.command_for(packet)
    assert command.annotations["risk_reason"] == "conservative_mode"
    assert (await bus.command_for(other)).command_type == leyline.COMMAND_SEED


class Recording:
    """Runs the real worker and notes its batches."""

    def __init__(self, worker: Worker, batches: list[int]) -> None:
        self._worker = worker
        self._batches = batches

    def warm_up(self) -> None:
        self._worker.warm_up()

    def evaluate(self, requests: Sequence[PolicyRequest]) -> Sequence[Proposal | InferenceError]:
        self._batches.append(len(requests))
        return self._worker.evaluate(requests)


class Gated(Recording):
    """Holds every batch back until told."""

    def __init__(self, worker: Worker, gate: threading.Event) -> None:
        super().__init__(worker, [])
        self._gate = gate

    def evaluate(self, requests: Sequence[PolicyRequest]) -> Sequence[Proposal | InferenceError]:
        self._gate.wait(30)
        return super().evaluate(requests)


async def test_stalled_lane_gets_safe_commands_and_its_late_result_changes_nothing(
    bus: Bus, start_service: StartService
) -> None:
    gate = threading.Event()
    # Long enough to reach the lane on a busy machine.
    running = await start_service(lambda worker: Gated(worker, gate), step_timeout_ms=200.0)
    first, second = state_packet("run-1", 1), state_packet("run-2", 1)
    await bus.publish(first)
    command = await bus.command_for(first)
    assert command.command_type == leyline.COMMAND_PAUSE
    assert command.annotations["risk_reason"] == "timeout_inference"
    assert command.annotations["policy_action"] == "timeout"
    assert command.annotations["feature_coverage"] == "0.0"
    assert command.annotations["coverage_types"] == "{}"
    await bus.publish(second)
    command = await bus.command_for(second)
    assert command.annotations["risk_reason"] == "lane_busy"
    gate.set()

    async def late() -> bool:
        return running.value("tamiyo_late_results_total") == 1.0

    await bus.until(late)
    assert len(await bus.commands()) == 2
    assert running.outcomes() == {"decided": 2}
    third = state_packet("run-3", 1)
    await bus.publish(third)
    assert await bus.command_for(third)


async def test_baseline_timeout_action_changes_nothing_in_the_optimizer(
    bus: Bus, start_service: StartService
) -> None:
    gate = threading.Event()
    await start_service(
        lambda worker: Gated(worker, gate), step_timeout_ms=5.0, timeout_action="baseline"
    )
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    command = await bus.command_for(packet)
    assert command.command_type == leyline.COMMAND_OPTIMIZER
    assert command.optimizer_adjustment.optimizer_id == "adam"
    assert dict(command.optimizer_adjustment.hyperparameters) == {"lr_delta": 0.0}
    gate.set()


async def test_stop_finishes_what_was_read(bus: Bus, start_service: StartService) -> None:
    gate = threading.Event()
    running = await start_service(lambda worker: Gated(worker, gate))
    packet = state_packet("run-1", 1)
    await bus.publish(packet)

    async def in_flight() -> bool:
        return running.value("tamiyo_in_flight_packets") == 1.0

    await bus.until(in_flight)
    running.stop.set()
    assert not running.task.done()
    gate.set()
    await running.task
    assert len(await bus.commands()) == 1
    assert running.value("tamiyo_in_flight_packets") == 0.0


async def test_stop_leaves_what_does_not_finish_pending(
    bus: Bus, start_service: StartService
) -> None:
    gate = threading.Event()
    running = await start_service(lambda worker: Gated(worker, gate), drain_timeout_s=0.05)
    await bus.publish(state_packet("run-1", 1))

    async def in_flight() -> bool:
        return running.value("tamiyo_in_flight_packets") == 1.0

    await bus.until(in_flight)
    running.stop.set()
    await running.task
    assert await bus.commands() == []
    pending: Any = await bus.redis.xpending("oona.normal", "tamiyo")
    assert pending["pending"] == 1
    gate.set()


async def test_health_and_metrics_over_http(bus: Bus, start_service: StartService) -> None:
    running = await start_service()
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    await bus.command_for(packet)

    async def get(path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{running.service.http_port}{path}"

        def fetch() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(fetch)

    assert (await get("/livez"))[0] == 200
    assert (await get("/startupz"))[0] == 200
    status, body = await get("/readyz?verbose")
    assert status == 200
    assert set(json.loads(body)["checks"]) == {"bus", "policy", "draining"}
    status, body = await get("/metrics")
    assert 'tamiyo_packets_total{outcome="decided"} 1.0' in body
    running.stop.set()
    await running.task
    assert (await get("/readyz"))[0] == 503


async def test_unsigned_packets_are_taken_only_when_told_so(
    bus: Bus, start_service: StartService
) -> None:
    await start_service(require_signatures=False, secret=None)
    packet = state_packet("run-1", 1)
    await bus.add(SignedEnvelope(seal(packet, None).payload, ""))

    async def command() -> bool:
        entries: Any = await bus.redis.xrange("oona.normal")
        return any(
            leyline.BusEnvelope.FromString(fields[b"payload"]).message_type
            == leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND
            for _, fields in entries
        )

    await bus.until(command)


async def test_commands_carry_the_time_they_were_issued(
    bus: Bus, start_service: StartService
) -> None:
    await start_service()
    before_ns = time.time_ns()
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    command = await bus.command_for(packet)
    assert before_ns <= command.issued_at.ToNanoseconds() <= time.time_ns()


async def test_a_service_of_which_a_part_failed_ends_although_another_part_misses_that(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def misses_one_cancellation(service: Service) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def fails(service: Service) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Service, "_tick", misses_one_cancellation)
    monkeypatch.setattr(Service, "_observe", fails)

    with pytest.raises(ExceptionGroup) as failure:
        await start_service()

    assert "broken" in str(failure.value.exceptions)
