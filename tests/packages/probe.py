"""What a training job does with the client, run where nothing but the client's needs is installed.

`python -W error probe.py`, with REDIS_URL and ESPER_LEYLINE_SECRET of a running service or without.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

from google.protobuf import json_format

from tamiyo_svc.client import (
    AckOutcome,
    ClientMode,
    ClientSettings,
    Keyring,
    State,
    TamiyoClient,
)
from tamiyo_svc.client.capture import read_capture
from tamiyo_svc.client.testing import FakeService, grow
from tamiyo_svc.leyline import leyline_pb2 as leyline

STATE = State(
    training_loss=0.7,
    validation_loss=0.6,
    epoch=1,
    metrics={"loss": 0.7, "gradient_norm": 1.0},
    seeds=(leyline.SeedState(seed_id="seed-0", stage=leyline.SEED_STAGE_DORMANT),),
)


def ask(client: TamiyoClient, steps: int) -> None:
    """Publish, wait, report."""
    with client:
        for step in range(1, steps + 1):
            client.publish(STATE, step, blueprint_ids=("mine",))
            verified = client.wait(step, 20.0)
            assert verified is not None, client.counters
            client.ack(verified, AckOutcome.APPLIED)
            assert verified.command.annotations["step_index"] == str(step)
    counters = client.counters
    assert (counters.received, counters.bus_errors, counters.faults) == (steps, 0, 0), counters


def use_the_fake_service() -> None:
    service = FakeService(grow("mine"))
    ask(service.client("probe"), 3)
    assert len(service.packets) == len(service.reports) == 3
    assert service.packets[0].training_metrics["gradient_norm"] == 1.0

    async def ask_too() -> None:
        async with service.async_client("probe") as client:
            client.publish(STATE, 1)
            assert await client.wait(1, 20.0) is not None

    asyncio.run(ask_too())


def spool() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "spool.jsonl")
        settings = ClientSettings(mode=ClientMode.OFFLINE, spool=path)
        with TamiyoClient("redis://unused:1/0", None, "offline", settings) as client:
            client.publish(STATE, 1)
        assert len(list(read_capture(path))) == 1


def write_messages_down() -> None:
    """Bytes and JSON there and back, with every kind of field that the contract has."""
    command = leyline.AdaptationCommand(
        version=1,
        command_id="one",
        command_type=leyline.COMMAND_SEED,
        seed_operation=leyline.CommandSeedOperation(
            operation=leyline.SEED_OP_GERMINATE, parameters={"alpha": 0.5}
        ),
        annotations={"key": "value"},
    )
    command.issued_at.FromMilliseconds(1_760_000_000_000)
    again = leyline.AdaptationCommand.FromString(command.SerializeToString(deterministic=True))
    assert again == command
    assert again.WhichOneof("payload") == "seed_operation"
    text = json_format.MessageToJson(command, preserving_proto_field_name=True)
    assert json_format.Parse(text, leyline.AdaptationCommand()) == command
    assert leyline.CommandType.Name(command.command_type) == "COMMAND_SEED"


def main() -> None:
    """Run every part; the last line names the versions."""
    write_messages_down()
    spool()
    use_the_fake_service()
    parts = ["fake"]
    if "REDIS_URL" in os.environ:
        keyring = Keyring(os.environ["ESPER_LEYLINE_SECRET"].encode())
        run_id, settings = f"probe-{os.getpid()}", ClientSettings(max_wait_s=20.0)
        ask(TamiyoClient(os.environ["REDIS_URL"], keyring, run_id, settings), 3)
        parts.append("real")
    foreign = [name for name in ("torch", "pytest", "structlog", "numpy") if name in sys.modules]
    assert not foreign, foreign
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("protobuf", "redis")]
    print(", ".join(versions), "with", " and ".join(parts), "service")


if __name__ == "__main__":
    main()
