"""The real trainer and client over a real Redis, answered by a scripted stand-in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis
from support.patience import PATIENT

from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.seeds.lifecycle import TRANSITIONS
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import SignedEnvelope, open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import CommandRejection
from tamiyo_svc.trainer.loop import Trainer, TrainerSettings
from tamiyo_svc.trainer.records import StepOutcome, StepRecord
from tamiyo_svc.trainer.report import write_report

pytestmark = pytest.mark.redis

KEYRING = Keyring(b"0123456789abcdef")
FORGER = Keyring(b"fedcba9876543210")
RUN = "digits-1"
NEXT = {
    stage: operation
    for (stage, operation) in TRANSITIONS
    if operation not in (leyline.SEED_OP_CULL, leyline.SEED_OP_CANCEL)
}

Packet = leyline.SystemStatePacket
Script = Callable[[Packet, str], Iterable[SignedEnvelope]]


def make_command(packet: Packet, blueprints: str) -> leyline.AdaptationCommand:
    command = leyline.AdaptationCommand(
        version=1,
        command_id=f"command-{packet.packet_id}",
        command_type=leyline.COMMAND_PAUSE,
        annotations={
            "risk_reason": "no_seed_candidates",
            "training_run_id": packet.training_run_id,
            "packet_id": packet.packet_id,
            "step_index": str(packet.global_step),
        },
    )
    command.issued_at.FromNanoseconds(time.time_ns())
    for seed in packet.seed_states:
        if seed.stage in NEXT:
            command.command_type = leyline.COMMAND_SEED
            command.target_seed_id = seed.seed_id
            command.seed_operation.operation = NEXT[seed.stage]
            command.seed_operation.blueprint_id = blueprints.partition(",")[0]
            command.annotations["risk_reason"] = "policy"
            break
    return command


def signed(command: leyline.AdaptationCommand, keyring: Keyring = KEYRING) -> SignedEnvelope:
    keyring.sign_command(command)
    return seal(command, keyring)


def answer_well(packet: Packet, blueprints: str) -> Iterable[SignedEnvelope]:
    yield signed(make_command(packet, blueprints))


@contextmanager
def responder(url: str, script: Script) -> Iterator[None]:
    """Answers every packet on the normal stream until the block ends."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def respond() -> None:
        cursor: Any = b"0-0"
        with Redis.from_url(url, protocol=2) as redis:
            while not stop.is_set():
                reply: Any = redis.xread({"oona.normal": cursor}, block=50)
                for entry_id, fields in reply[0][1] if reply else ():
                    cursor = entry_id
                    envelope = open_envelope(fields, KEYRING)
                    packet = parse_payload(envelope)
                    # The trainer's reports of what it applied pass on the same stream.
                    if not isinstance(packet, Packet):
                        continue
                    blueprints = envelope.attributes["blueprint_id"]
                    for sealed in script(packet, blueprints):
                        answer: Any = sealed.fields()
                        redis.xadd(envelope.attributes["reply_to"], answer)

    def run() -> None:
        try:
            respond()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="responder")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failures


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def client(redis_url: str) -> Iterator[TamiyoClient]:
    with TamiyoClient(redis_url, KEYRING, RUN, PATIENT) as client:
        yield client


def test_a_whole_run_learns_the_digits_and_keeps_a_seed_grafted_by_command(
    redis_url: str, client: TamiyoClient, tmp_path: Path
) -> None:
    records: list[StepRecord] = []
    trainer = Trainer(client, TrainerSettings(command_budget_s=5.0), on_step=records.append)
    with responder(redis_url, answer_well):
        summary = trainer.run()
    assert summary.published == summary.received == summary.steps == 320
    assert (summary.missed, summary.late, summary.unverifiable) == (0, 0, 0)
    assert summary.applied + summary.rejected == 320
    assert summary.accuracy > 0.95
    assert summary.isolation_violations == 0
    assert "FOSSILIZED" in {seed.stage for seed in summary.seeds}
    assert {seed.stage for seed in summary.seeds} <= {"FOSSILIZED", "CULLED"}
    assert all(record.latency_ms is not None for record in records)
    report = tmp_path / "report.html"
    write_report(report, records, summary)
    assert "test accuracy" in report.read_text(encoding="utf-8")


def test_bad_answers_are_counted_and_the_good_one_is_applied(
    redis_url: str, client: TamiyoClient
) -> None:
    earlier: list[SignedEnvelope] = []

    def answer_badly_first(packet: Packet, blueprints: str) -> Iterable[SignedEnvelope]:
        yield signed(make_command(packet, blueprints), FORGER)

        tampered = make_command(packet, blueprints)
        KEYRING.sign_command(tampered)
        tampered.target_seed_id = "seed-2"
        yield seal(tampered, KEYRING)

        stale = make_command(packet, blueprints)
        stale.command_id += "-stale"
        stale.issued_at.seconds -= 120
        yield signed(stale)

        other = make_command(packet, blueprints)
        other.command_id += "-other"
        other.annotations["training_run_id"] = "another-run"
        yield signed(other)

        yield from earlier[-1:]
        good = signed(make_command(packet, blueprints))
        earlier.append(good)
        yield good

    settings = TrainerSettings(steps=10, command_budget_s=5.0)
    with responder(redis_url, answer_badly_first):
        summary = Trainer(client, settings).run()
    assert (summary.received, summary.missed) == (10, 0)
    assert client.counters.rejected == {
        CommandRejection.INVALID_SIGNATURE: 10,
        CommandRejection.INVALID_COMMAND_SIGNATURE: 10,
        CommandRejection.STALE: 10,
        CommandRejection.WRONG_RUN: 10,
        CommandRejection.REPLAYED: 9,
    }
    assert summary.unverifiable == 49
    assert summary.seeds[0].stage == "TRAINING"
    assert summary.seeds[2].stage == "DORMANT"


def test_forged_commands_alone_change_nothing(redis_url: str, client: TamiyoClient) -> None:
    def forge(packet: Packet, blueprints: str) -> Iterable[SignedEnvelope]:
        yield signed(make_command(packet, blueprints), FORGER)

    records: list[StepRecord] = []
    settings = TrainerSettings(steps=5, command_budget_s=0.002)
    with responder(redis_url, forge):
        summary = Trainer(client, settings, on_step=records.append).run()
    assert [record.outcome for record in records] == [StepOutcome.MISSED] * 5
    assert (summary.received, summary.missed, summary.applied) == (0, 5, 0)
    assert {seed.stage for seed in summary.seeds} == {"DORMANT"}
    assert set(client.counters.rejected) <= {CommandRejection.INVALID_SIGNATURE}


def test_training_finishes_with_nobody_answering(client: TamiyoClient) -> None:
    settings = TrainerSettings(steps=5, command_budget_s=0.002)
    summary = Trainer(client, settings).run()
    assert (summary.published, summary.missed, summary.received) == (5, 5, 0)


def test_training_finishes_without_a_bus(tmp_path: Path) -> None:
    with TamiyoClient(f"unix://{tmp_path}/no.sock", KEYRING, RUN) as client:
        summary = Trainer(client, TrainerSettings(steps=5)).run()
    assert (summary.steps, summary.published, summary.missed) == (5, 0, 5)
