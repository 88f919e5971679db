"""The training loop with a scripted source of commands."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tamiyo_svc.client.counters import ClientCounters
from tamiyo_svc.client.packets import State, build_packet, freeze
from tamiyo_svc.client.seeds.lifecycle import TRANSITIONS
from tamiyo_svc.client.testing import make_optimizer_command
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import AckOutcome
from tamiyo_svc.trainer.blueprints import BLUEPRINTS
from tamiyo_svc.trainer.loop import Trainer, TrainerSettings
from tamiyo_svc.trainer.records import StepOutcome, StepRecord

GOLDEN = Path(__file__).parents[2] / "data" / "golden.jsonl"
GPU_ONLY = {"gpu_mem_free_gb", "gpu_util_percent"}

Packet = leyline.SystemStatePacket
Script = Callable[[Packet, tuple[str, ...]], leyline.AdaptationCommand | None]

NEXT = {
    stage: operation
    for (stage, operation) in TRANSITIONS
    if operation not in (leyline.SEED_OP_CULL, leyline.SEED_OP_CANCEL)
}


class ScriptedSource:
    """Answers each packet as its script says, without a bus."""

    def __init__(self, script: Script) -> None:
        self.run_id = "run-1"
        self.counters = ClientCounters()
        self.packets: list[Packet] = []
        self.blueprints: list[tuple[str, ...]] = []
        self.reported: list[str] = []
        self._script = script

    def publish(self, state: State, step: int, *, blueprint_ids: Sequence[str] = ()) -> str:
        packet_id = f"{self.run_id}-{step}"
        self.packets.append(
            build_packet(
                freeze(state), run_id=self.run_id, packet_id=packet_id, step=step, timestamp_ns=1
            )
        )
        self.blueprints.append(tuple(blueprint_ids))
        self.counters.published += 1
        return packet_id

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None:
        packet = self.packets[-1]
        assert packet.global_step == step
        command = self._script(packet, self.blueprints[-1])
        if command is None:
            self.counters.missed += 1
            return None
        self.counters.received += 1
        return VerifiedCommand(command, packet.packet_id, step)

    def poll(self) -> VerifiedCommand | None:
        return None

    def ack(self, verified: VerifiedCommand, outcome: AckOutcome, reason: str = "") -> None:
        self.reported.append(f"{outcome}: {reason}" if reason else str(outcome))

    def flush(self, timeout_s: float) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return

    def close(self) -> None:
        return


def pause() -> leyline.AdaptationCommand:
    return leyline.AdaptationCommand(
        command_type=leyline.COMMAND_PAUSE, annotations={"risk_reason": "no_seed_candidates"}
    )


def next_operation(packet: Packet, blueprints: tuple[str, ...]) -> leyline.AdaptationCommand:
    for seed in packet.seed_states:
        if seed.stage in NEXT:
            return leyline.AdaptationCommand(
                command_type=leyline.COMMAND_SEED,
                target_seed_id=seed.seed_id,
                seed_operation=leyline.CommandSeedOperation(
                    operation=NEXT[seed.stage], blueprint_id=blueprints[0]
                ),
                annotations={"risk_reason": "policy"},
            )
    return pause()


def no_command(packet: Packet, blueprints: tuple[str, ...]) -> None:
    return None


def train(script: Script, steps: int) -> tuple[ScriptedSource, list[StepRecord], Trainer]:
    source = ScriptedSource(script)
    ticks = itertools.count()
    trainer = Trainer(
        source,
        TrainerSettings(steps=steps, batch_size=32, blend_steps=5),
        clock=lambda: next(ticks) * 1e-3,
    )
    return source, list(trainer.steps()), trainer


def test_grafts_a_seed_by_command_and_keeps_it() -> None:
    source, records, _ = train(next_operation, 60)
    assert records[-1].seeds[0].stage == "FOSSILIZED"
    assert records[-1].seeds[0].blueprint_id == next(iter(BLUEPRINTS))
    stages = [record.seeds[0].stage for record in records]
    assert list(dict.fromkeys(stages)) == [
        *("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED")
    ]
    assert records[2].operation == "start_training"
    assert records[2].outcome is StepOutcome.APPLIED
    assert records[1].rejection == "gate: min_steps"
    assert [packet.global_step for packet in source.packets] == list(range(1, 61))
    assert len({packet.packet_id for packet in source.packets}) == 60


def test_names_first_the_blueprint_that_suits_the_next_seed() -> None:
    source, records, _ = train(next_operation, 60)
    known = list(BLUEPRINTS)
    assert all(sorted(names) == sorted(known) for names in source.blueprints)
    assert source.blueprints[0][0] == known[0]
    after = next(r.step for r in records if r.seeds[0].stage == "FOSSILIZED")
    assert source.blueprints[after][0] == known[1]


def test_goes_on_without_commands() -> None:
    source, records, _ = train(no_command, 3)
    assert [record.outcome for record in records] == [StepOutcome.MISSED] * 3
    assert [record.command_type for record in records] == [""] * 3
    assert all(record.latency_ms is None for record in records)
    assert all(seed.stage == "DORMANT" for seed in records[-1].seeds)
    assert source.packets[0].training_metrics["loss"] == pytest.approx(records[0].loss)


def test_its_packets_have_every_metric_of_the_contract_vectors() -> None:
    vectors = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    decoded = next(v["decoded"] for v in vectors if v["name"] == "state-0-seeds")
    source, _, _ = train(no_command, 8)
    assert set(decoded["training_metrics"]) - GPU_ONLY <= set(source.packets[-1].training_metrics)


def test_says_of_each_command_what_became_of_it() -> None:
    source, records, _ = train(next_operation, 4)
    assert source.reported == [
        "applied",
        "rejected: gate: min_steps",
        "applied",
        "rejected: gate: min_steps",
    ]
    assert [record.rejection for record in records] == ["", "gate: min_steps"] * 2


def test_a_seeds_risk_is_that_of_its_blueprint_from_when_it_germinates() -> None:
    source, records, _ = train(next_operation, 2)
    assert source.packets[0].seed_states[0].risk_score == 0.0
    blueprint = BLUEPRINTS[records[0].seeds[0].blueprint_id]
    assert source.packets[1].seed_states[0].risk_score == pytest.approx(blueprint.risk)


def test_a_commanded_rate_lasts_to_the_end_of_the_schedule() -> None:
    def halve_once(packet: Packet, blueprints: tuple[str, ...]) -> leyline.AdaptationCommand | None:
        return make_optimizer_command(-0.5) if packet.global_step == 5 else None

    plain, halved = train(no_command, 12)[1], train(halve_once, 12)[1]
    for one, other in zip(plain, halved, strict=True):
        factor = 1.0 if one.step < 5 else 0.5
        assert other.learning_rate == pytest.approx(factor * one.learning_rate)


def test_same_seed_and_commands_give_the_same_run() -> None:
    first, second = train(next_operation, 30), train(next_operation, 30)
    assert first[1] == second[1]
    for one, other in zip(first[0].packets, second[0].packets, strict=True):
        for packet in (one, other):
            packet.ClearField("hardware_context")
            del packet.training_metrics["cpu_util_percent"]
        assert one == other


def test_a_pause_holds_a_blend_and_a_miss_does_not() -> None:
    answers: list[leyline.AdaptationCommand | None] = []

    def script(packet: Packet, blueprints: tuple[str, ...]) -> leyline.AdaptationCommand | None:
        if packet.seed_states[0].stage != leyline.SEED_STAGE_BLENDING:
            return next_operation(packet, blueprints)
        answers.append(pause() if len(answers) < 3 else None)
        return answers[-1]

    _, records, _ = train(script, 31)
    alphas = [r.seeds[0].alpha for r in records if r.seeds[0].stage == "BLENDING"]
    assert alphas[:4] == pytest.approx([0.2] * 4)
    assert alphas[4:7] == pytest.approx([0.4, 0.6, 0.8])


def test_a_command_of_an_unknown_kind_is_rejected_and_spelled_as_a_number() -> None:
    command = leyline.AdaptationCommand(
        command_type=77,  # type: ignore[arg-type]
        seed_operation=leyline.CommandSeedOperation(operation=88),  # type: ignore[arg-type]
    )
    _, records, _ = train(lambda packet, blueprints: command, 1)
    assert (records[0].command_type, records[0].operation) == ("77", "88")
    assert records[0].rejection == "unsupported"


def test_the_summary_adds_up() -> None:
    def every_third(
        packet: Packet, blueprints: tuple[str, ...]
    ) -> leyline.AdaptationCommand | None:
        return None if packet.global_step % 3 == 0 else next_operation(packet, blueprints)

    source = ScriptedSource(every_third)
    records: list[StepRecord] = []
    summary = Trainer(source, TrainerSettings(steps=9), on_step=records.append).run()
    assert summary.steps == len(records) == summary.published == 9
    assert (summary.received, summary.missed) == (6, 3)
    assert summary.applied + summary.rejected == summary.received
    assert sum(summary.rejections.values()) == summary.rejected > 0
    assert summary.isolation_violations == 0
    assert summary.seeds == records[-1].seeds
    assert 0.0 <= summary.accuracy <= 1.0


def test_epochs_cover_the_steps() -> None:
    source, records, trainer = train(no_command, 40)
    assert [record.epoch for record in records] == sorted(record.epoch for record in records)
    assert records[-1].epoch == trainer.epochs == 2
    assert source.packets[-1].current_epoch == 2
    assert source.packets[-1].training_metrics["epochs_total"] == 2.0
