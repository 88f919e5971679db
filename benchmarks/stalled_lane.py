"""How soon a safe command comes when the device lane stalls for 200 ms.

    python benchmarks/stalled_lane.py [stalls]

A real service on a private Redis; its network is made to sleep before every other answer. Prints
percentiles of the step (packet read to command ready, as telemetry reports it) and of publish to
command received, for the stalled packets, and checks that what the lane finished late changed
nothing: every packet has one command, and the packet after a stall is decided by the policy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import selectors
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from redis import Redis

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.evaluator import PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.wiring import Worker, open_service
from tamiyo_svc.trainer.blueprints import write_catalog

SECRET = "a secret for the benchmark"
STALL_S = 0.2
BUDGET_MS = 5.0


class Stalling:
    """Sleeps before the answers whose run is called `stall`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def warm_up(self) -> None:
        self._worker.warm_up()

    def evaluate(self, requests: Sequence[PolicyRequest]) -> Sequence[Proposal | InferenceError]:
        if any(request.packet.training_run_id == "stall" for request in requests):
            time.sleep(STALL_S)
        return self._worker.evaluate(requests)


def publish(redis: Redis, run_id: str, step: int) -> tuple[Any, float]:
    """Publish a packet, wait for its command, and return it with the milliseconds it took."""
    packet = leyline.SystemStatePacket(
        version=1,
        training_run_id=run_id,
        packet_id=f"{run_id}-{step}",
        global_step=step,
        timestamp_ns=time.time_ns(),
        validation_loss=0.5,
        training_loss=0.5,
    )
    packet.training_metrics["loss"] = 0.5
    for index in range(4):
        packet.seed_states.add(seed_id=f"seed-{index}", stage=leyline.SEED_STAGE_DORMANT)
    stream = f"oona.commands.{packet.packet_id}"
    fields: Any = dict(seal(packet, Keyring(SECRET.encode()), {"reply_to": stream}).fields())
    started = time.perf_counter()
    redis.xadd("oona.normal", fields)
    reply: Any = redis.xread({stream: "0"}, block=5000)
    took_ms = (time.perf_counter() - started) * 1e3
    envelope = open_envelope(reply[0][1][0][1], Keyring(SECRET.encode()))
    return parse_payload(envelope), took_ms


def drive(url: str, stalls: int, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Run the load and stop the service, however the load ends."""
    try:
        load(url, stalls)
    finally:
        loop.call_soon_threadsafe(stop.set)


def load(url: str, stalls: int) -> None:
    """Publish stalled and ordinary packets in turn and print what came of them."""
    stalled_ms: list[float] = []
    decided = 0
    with Redis.from_url(url, socket_timeout=10) as redis:
        for step in range(stalls):
            command, took_ms = publish(redis, "stall", step)
            assert command.annotations["risk_reason"] == "timeout_inference", command
            stalled_ms.append(took_ms)
            busy, _ = publish(redis, "behind", step)
            assert busy.annotations["risk_reason"] == "lane_busy", busy
            time.sleep(STALL_S + 0.05)
            after, _ = publish(redis, "after", step)
            decided += after.annotations["policy_action"] == "seed"
        steps_ms = [
            metric.value
            for _, fields in redis.xrange("oona.emergency")
            for packet in [parse_payload(open_envelope(fields, Keyring(SECRET.encode())))]
            if isinstance(packet, leyline.TelemetryPacket) and packet.packet_id.startswith("stall-")
            for metric in packet.metrics
            if metric.name == "tamiyo.step.latency_ms"
        ]
    print(f"{stalls} stalls of {STALL_S * 1e3:g} ms, budget {BUDGET_MS:g} ms, {machine()}")
    show("read to command ready", steps_ms)
    within = sum(step_ms <= BUDGET_MS + 1 for step_ms in steps_ms)
    print(f"ready within the budget plus 1 ms: {within} of {len(steps_ms)}")
    show("publish to command received", stalled_ms)
    print(f"decided by the policy after the stall: {decided} of {stalls}")


def show(name: str, values_ms: list[float]) -> None:
    """Print the distribution of some milliseconds."""
    ordered = sorted(values_ms)
    cuts = {
        share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.9, 0.99)
    }
    print(
        f"{name}: p50 {statistics.median(ordered):.2f} ms, p90 {cuts[0.9]:.2f} ms, "
        f"p99 {cuts[0.99]:.2f} ms, max {ordered[-1]:.2f} ms"
    )


def machine() -> str:
    """What this runs on."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f}"


async def main(stalls: int) -> None:
    """Run the service and the load beside it."""
    with EmbeddedRedis() as redis, tempfile.TemporaryDirectory() as folder:
        write_catalog(Path(folder, "catalog.db"))
        settings = Settings(
            redis_url=redis.url,
            secret=SECRET,  # type: ignore[arg-type]
            policy="bootstrap",
            urza_database_url=f"sqlite:///{folder}/catalog.db",
            state_dir=Path(folder),
            http_host="127.0.0.1",
            http_port=0,
            breaker_failures=1_000_000,
            emergency_max_per_min=1_000_000,
        )
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with open_service(settings, Metrics(), Stalling) as service:
            thread = threading.Thread(target=drive, args=(redis.url, stalls, loop, stop))
            await service.run(stop, thread.start)


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
    ) as runner:
        runner.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
