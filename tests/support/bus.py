"""A trainer's and an observer's side of the bus; every message read is verified."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import SignedEnvelope, open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring

SECRET = "a secret for the tests"
CATALOG = Path(__file__).parents[1] / "data" / "urza_catalog.db"


def as_fields(envelope: SignedEnvelope) -> Any:
    """The envelope's fields as redis-py wants them."""
    return dict(envelope.fields())


def state_packet(run_id: str, step: int, *, seeds: int = 4, loss: float = 0.5) -> Any:
    """A plausible state packet of a run."""
    packet = leyline.SystemStatePacket(
        version=1,
        training_run_id=run_id,
        packet_id=f"{run_id}-step-{step}",
        global_step=step,
        current_epoch=1 + step // 100,
        validation_loss=loss,
        training_loss=loss,
        timestamp_ns=time.time_ns(),
        source_subsystem="tolaria",
    )
    packet.training_metrics.update(
        {
            "loss": loss,
            "gradient_norm": 1.0,
            "samples_per_s": 4500.0,
            "hook_latency_ms": 5.0,
            "step_latency_ms": 20.0,
            "optimizer_lr": 0.01,
            "optimizer_family_index": 2.0,
        }
    )
    for index in range(seeds):
        packet.seed_states.add(
            seed_id=f"seed-{index}",
            stage=leyline.SEED_STAGE_DORMANT + index % 6,
            gradient_norm=0.5,
            learning_rate=0.01,
            layer_depth=index,
            age_epochs=2,
            risk_score=0.2,
        )
    return packet


@dataclass
class Bus:
    """The streams as a trainer and an observer see them; every message is verified."""

    redis: Redis
    keyring: Keyring

    async def publish(self, message: Any, stream: str = "oona.normal", **attributes: str) -> str:
        return await self.add(seal(message, self.keyring, attributes), stream)

    async def add(self, envelope: SignedEnvelope, stream: str = "oona.normal") -> str:
        entry_id: Any = await self.redis.xadd(stream, as_fields(envelope))
        return str(entry_id.decode())

    async def messages(self, stream: str, kind: type) -> list[Any]:
        entries: Any = await self.redis.xrange(stream)
        opened = [parse_payload(open_envelope(fields, self.keyring)) for _, fields in entries]
        return [message for message in opened if isinstance(message, kind)]

    async def commands(self, stream: str = "oona.normal") -> list[Any]:
        commands = await self.messages(stream, leyline.AdaptationCommand)
        assert all(self.keyring.verify_command(command) for command in commands)
        return commands

    async def telemetry(self, stream: str = "oona.telemetry") -> list[Any]:
        return await self.messages(stream, leyline.TelemetryPacket)

    async def until(self, condition: Callable[[], Awaitable[Any]], timeout_s: float = 20) -> Any:
        """Wait until the condition gives something true, and return that."""
        async with asyncio.timeout(timeout_s):
            while not (found := await condition()):
                await asyncio.sleep(0.002)
        return found

    async def command_for(self, packet: Any, stream: str = "oona.normal") -> Any:
        """The one command that answers a packet."""

        async def find() -> list[Any]:
            commands = await self.commands(stream)
            return [c for c in commands if c.annotations["packet_id"] == packet.packet_id]

        found = await self.until(find)
        assert len(found) == 1
        return found[0]
