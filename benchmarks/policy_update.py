"""What full-size policy updates cost the decisions: `python -m benchmarks.policy_update`.

A service of its own answers one trainer 50 times a second over a real Redis. Time and again a
policy of full size (56 MB) is published, with a control window before and after it. Latencies are
those of the service's own telemetry; a window ends a second after the update is applied, when what
it replaced is gone too. The publisher stands for one on another machine: it seals between the
windows, in a process of its own that runs when nobody else wants to.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from redis import Redis

from benchmarks import workload
from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona.policy_stream import open_stream, publish_update, read_statuses
from tamiyo_svc.cli.bench import Load, VirtualTrainer
from tamiyo_svc.cli.child import child_service, free_port, stop
from tamiyo_svc.cli.measure import Distribution, machine
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.checkpoint import write_policy
from tamiyo_svc.policy.evaluator import build_policy
from tamiyo_svc.service.courtesy import take_idle_time_only
from tamiyo_svc.taxonomy import Event

_RATE_PER_S: Final = 50.0
_BUDGET_MS: Final = 5.0
_SETTLE_S: Final = 3.0
_AFTERMATH_S: Final = 1.0
_PATIENCE_S: Final = 120.0
_POLL_S: Final = 0.1
_STREAM: Final = "oona.policy"
_LATE: Final = {Event.TIMEOUT_INFERENCE.value, Event.LANE_BUSY.value}


@dataclass(frozen=True, slots=True)
class Told:
    """What one telemetry packet says of a decision; its time is when Redis took it."""

    at_s: float
    step_ms: float
    stages_ms: dict[str, float]
    events: frozenset[str]


@dataclass(frozen=True, slots=True)
class Update:
    """One update: when it was on the stream, when it was applied, and by its own account."""

    version: str
    published_s: float
    publish_ms: float
    applied_s: float
    took_ms: float


def main() -> None:
    """Measure and print one JSON document."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--updates", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=8.0, help="of each control window")
    chosen = arguments.parse_args()
    sys.setswitchinterval(5e-4)
    torch.set_num_threads(1)
    secret = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as server:
        port = free_port(0)
        environment = {
            **os.environ,
            "REDIS_URL": server.url,
            "ESPER_LEYLINE_SECRET": secret,
            "URZA_DATABASE_URL": f"sqlite:///{workload.CATALOG}",
            "TAMIYO_STATE_DIR": folder,
            "TAMIYO_HTTP_HOST": "127.0.0.1",
            "TAMIYO_HTTP_PORT": str(port),
            "TAMIYO_STEP_TIMEOUT_MS": str(_BUDGET_MS),
            # On a busy machine the network has to run on although it is late now and then.
            "TAMIYO_BREAKER_FAILURES": "1000000",
            "TAMIYO_POLICY_PROBATION_DECISIONS": "0",
            "OMP_NUM_THREADS": "1",
        }
        log_file = Path(folder, "service.log")
        with child_service(environment, log_file, f"http://127.0.0.1:{port}") as service:
            figures = _measure(server.url, secret, service.pid, chosen.updates, chosen.seconds)
            stop(service)
    print(json.dumps(figures, indent=1))


def _measure(url: str, secret: str, pid: int, count: int, seconds: float) -> dict[str, Any]:
    keyring = Keyring(secret.encode())
    resident = {"started": _resident_mb(pid)}
    controls: list[tuple[float, float]] = []
    updates: list[Update] = []
    with Redis.from_url(url) as redis, _publisher(url, secret) as publisher, _load(url, keyring):
        for turn in range(1, count + 1):
            version = f"full-{turn}"
            publisher.send(version)
            size = publisher.recv()
            time.sleep(_SETTLE_S)
            before_s = time.time()
            time.sleep(seconds)
            published_s = time.time()
            publisher.send(None)
            publish_ms = publisher.recv()
            resident[f"largest during {turn}"] = _await_version(redis, version, pid)
            time.sleep(_SETTLE_S)
            after_s = time.time()
            time.sleep(seconds)
            controls += [(before_s, published_s), (after_s, time.time())]
            applied_s, took_ms = _applied(redis, keyring, version)
            updates.append(Update(version, published_s, publish_ms, applied_s, took_ms))
            resident[f"after {turn}"] = _resident_mb(pid)
        told = list(_telemetry(redis, keyring))
    windows = [(update.published_s, update.applied_s + _AFTERMATH_S) for update in updates]
    return {
        "machine": machine(),
        "update_mb": round(size / 1e6, 1),
        "publish_ms": [round(update.publish_ms) for update in updates],
        "applied_after_ms": [round(update.took_ms) for update in updates],
        "control": _figures(told, controls),
        "during": _figures(told, windows),
        "resident_mb": resident,
    }


def _publish(url: str, secret: str, pipe: Connection) -> None:
    """Seal a policy per version received, say its size, and publish it when told to."""
    take_idle_time_only()
    torch.set_num_threads(1)
    policy = replace(build_policy("untrained"), policy_id="full")
    with open_stream(url) as redis:
        while (version := pipe.recv()) is not None:
            with torch.no_grad():
                policy.network.get_parameter("heads.value.weight").normal_()
            payload = write_policy(policy, Vocabularies(), "2026-01-01T00:00:00Z")
            update = leyline.PolicyUpdate(
                version=1, policy_id="full", tamiyo_policy_version=version, payload=payload
            )
            update.issued_at.FromNanoseconds(time.time_ns())
            sealed = seal(update, Keyring(secret.encode()))
            pipe.send(len(payload))
            pipe.recv()
            started = time.perf_counter()
            publish_update(redis, _STREAM, sealed)
            pipe.send((time.perf_counter() - started) * 1e3)


@contextmanager
def _publisher(url: str, secret: str) -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_publish, args=(url, secret, there))
    process.start()
    try:
        yield here
        here.send(None)
        process.join()
    finally:
        process.kill()


@contextmanager
def _load(url: str, keyring: Keyring) -> Iterator[None]:
    load = Load(1, _RATE_PER_S, seeds=workload.SEEDS, blueprints=(workload.BLUEPRINT,))
    client = TamiyoClient(url, keyring, "load")
    trainer = VirtualTrainer(client, load)
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            trainer.run(1.0, 0.0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        client.close()


def _await_version(redis: Redis, version: str, pid: int) -> dict[str, int]:
    """Wait until a version serves; the largest resident memory meanwhile."""
    largest: dict[str, int] = {}
    deadline_s = time.monotonic() + _PATIENCE_S
    while not any(status.version == version for status in read_statuses(redis)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{version} is not served after {_PATIENCE_S:.0f} s")
        for name, size_mb in _resident_mb(pid).items():
            largest[name] = max(size_mb, largest.get(name, 0))
        time.sleep(_POLL_S)
    return largest


def _packets(redis: Redis, keyring: Keyring) -> Iterator[tuple[float, leyline.TelemetryPacket]]:
    for stream in ("oona.telemetry", "oona.emergency"):
        entries: Any = redis.xrange(stream)
        for entry_id, fields in entries:
            message = parse_payload(open_envelope(fields, keyring))
            if isinstance(message, leyline.TelemetryPacket):
                yield int(entry_id.partition(b"-")[0]) / 1e3, message


def _applied(redis: Redis, keyring: Keyring, version: str) -> tuple[float, float]:
    """When a version was applied, and after how many milliseconds by the service's account."""
    for at_s, packet in _packets(redis, keyring):
        for event in packet.events:
            if event.attributes.get("version") == version:
                return at_s, float(event.attributes["took_ms"])
    raise RuntimeError(f"nothing told of {version}")


def _telemetry(redis: Redis, keyring: Keyring) -> Iterator[Told]:
    for at_s, packet in _packets(redis, keyring):
        values = {metric.name: metric.value for metric in packet.metrics}
        step_ms = values.get("tamiyo.step.latency_ms")
        if step_ms is not None:
            stages_ms = {
                "lane": values["tamiyo.inference.latency_ms"],
                "build": values.get("tamiyo.graph.build_ms", -1.0),
                "forward": values.get("tamiyo.gnn.inference.latency_ms", -1.0),
            }
            events = frozenset(event.description for event in packet.events)
            yield Told(at_s, step_ms, stages_ms, events)


def _figures(told: list[Told], windows: list[tuple[float, float]]) -> dict[str, Any]:
    """Latencies of the decisions in some windows, and where in them the late ones lie, with those
    that had to do without the network.
    """
    chosen = [
        (round((each.at_s - start_s) * 1e3), each)
        for start_s, end_s in windows
        for each in told
        if start_s <= each.at_s < end_s
    ]
    steps_ms = Distribution.of([each.step_ms for _, each in chosen])
    late = [
        (at_ms, each) for at_ms, each in chosen if each.step_ms > _BUDGET_MS or _LATE & each.events
    ]
    return {
        "decisions": steps_ms.count,
        "p50_ms": round(steps_ms.p50, 2),
        "p99_ms": round(steps_ms.p99, 2),
        "max_ms": round(steps_ms.worst, 2),
        "over_budget": sum(each.step_ms > _BUDGET_MS for _, each in chosen),
        "without_network": sum(bool(_LATE & each.events) for _, each in chosen),
        "late": [
            {
                "at_ms": at_ms,
                "step_ms": round(each.step_ms, 1),
                **{name: round(value, 1) for name, value in each.stages_ms.items()},
                "events": sorted(_LATE & each.events),
            }
            for at_ms, each in late
        ],
    }


def _resident_mb(pid: int) -> dict[str, int]:
    """Resident memory of the service and of the processes it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "service": _status_mb(pid),
        "loader": sum(_status_mb(int(child)) for child in children),
    }


def _status_mb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) // 1000 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
