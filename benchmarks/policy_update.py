"""A full-size policy update under load: time to applied, and what it does to the decisions.

    PYTHONPATH=tests python benchmarks/policy_update.py [seconds before and after]

A service in a process of its own is fed 50 packets a second through a real Redis. Halfway a
full-size policy (56 MB) is published. Step latencies are those of the service's own telemetry.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from redis.asyncio import Redis
from support.bus import CATALOG, SECRET, state_packet
from support.policies import update
from support.replica import Replica

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona.connection import connect
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.checkpoint import write_policy
from tamiyo_svc.policy.evaluator import build_policy
from tamiyo_svc.taxonomy import Event

RATE_PER_S = 50
BUDGET_MS = 5.0
PATIENCE_S = 180.0
KEYRING = Keyring(SECRET.encode())


@dataclass
class Seen:
    """What telemetry told: per decision its time, latency, events and whether the network ran."""

    decisions: list[tuple[float, float, tuple[str, ...], bool]] = field(default_factory=list)
    applied: dict[str, str] = field(default_factory=dict)
    applied_s: float = 0.0
    is_applied: asyncio.Event = field(default_factory=asyncio.Event)


def main() -> None:
    """Measure and print one line of JSON."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    torch.set_num_threads(1)
    full = replace(build_policy("untrained"), policy_id="full", version="full-1")
    with torch.no_grad():
        full.network.get_parameter("heads.value.weight").normal_()
    payload = write_policy(full, Vocabularies(), "2026-01-01T00:00:00Z")
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as server:
        settings = {
            "redis_url": server.url,
            "secret": SECRET,
            "urza_database_url": f"sqlite:///{CATALOG}",
            "state_dir": Path(folder),
            "http_host": "127.0.0.1",
            "http_port": 0,
            "step_timeout_ms": BUDGET_MS,
            "log_level": "WARNING",
            # On a busy machine the network has to run on although it is late now and then.
            "breaker_failures": 1_000_000,
            "policy_probation_decisions": 0,
        }
        replica = Replica(settings).start().wait_ready()
        try:
            figures = asyncio.run(_measure(server.url, payload, seconds))
        finally:
            replica.kill()
    print(json.dumps(figures))


async def _measure(url: str, payload: bytes, seconds: float) -> dict[str, Any]:
    redis = connect(url, 60.0, 4)
    seen, stop = Seen(), asyncio.Event()
    load = [asyncio.create_task(_feed(redis, stop)), asyncio.create_task(_watch(url, seen, stop))]
    try:
        await asyncio.sleep(5)
        started_s = time.time()
        await asyncio.sleep(seconds)
        sealed = await asyncio.to_thread(
            lambda: seal(update("full-1", payload, policy_id="full"), KEYRING)
        )
        published_s = time.time()
        fields: Any = sealed.fields()
        await redis.xadd("oona.policy", fields)
        sent_s = time.time()
        async with asyncio.timeout(PATIENCE_S):
            await seen.is_applied.wait()
        await asyncio.sleep(seconds)
    finally:
        stop.set()
        await asyncio.gather(*load)
        await redis.aclose()
    end_s = seen.applied_s + 0.2
    return {
        "update_mb": round(len(payload) / 1e6, 1),
        "publish_ms": round((sent_s - published_s) * 1e3),
        "applied_after_ms": int(seen.applied["took_ms"]),
        "before": _window(seen, started_s, published_s),
        "during": _window(seen, published_s, end_s),
        "after": _window(seen, end_s, time.time()),
        "load_average": os.getloadavg(),
        "cpus": os.cpu_count(),
    }


async def _feed(redis: Redis, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    due, step = loop.time(), 0
    while not stop.is_set():
        step += 1
        packet = state_packet("load", step)
        fields: Any = seal(packet, KEYRING).fields()
        await redis.xadd("oona.normal", fields)
        due += 1 / RATE_PER_S
        await asyncio.sleep(max(0.0, due - loop.time()))


async def _watch(url: str, seen: Seen, stop: asyncio.Event) -> None:
    redis = connect(url, 30.0)
    cursors: dict[Any, Any] = {"oona.telemetry": "$", "oona.emergency": "$"}
    while not stop.is_set():
        reply: Any = await redis.xread(cursors, count=100, block=200)
        for stream, entries in reply:
            for entry_id, fields in entries:
                cursors[stream.decode()] = entry_id
                envelope = open_envelope(fields, KEYRING)
                if envelope.message_type == leyline.BUS_MESSAGE_TYPE_TELEMETRY:
                    _note(seen, parse_payload(envelope), int(entry_id.split(b"-")[0]) / 1e3)
    await redis.aclose()


def _note(seen: Seen, telemetry: Any, at_s: float) -> None:
    events = tuple(event.description for event in telemetry.events)
    for event in telemetry.events:
        if event.description == Event.POLICY_UPDATE_APPLIED.value:
            seen.applied, seen.applied_s = dict(event.attributes), at_s
            seen.is_applied.set()
        elif event.description == Event.POLICY_UPDATE_REJECTED.value:
            raise RuntimeError(dict(event.attributes))
    values = {metric.name: metric.value for metric in telemetry.metrics}
    if "tamiyo.step.latency_ms" in values:
        ran = "tamiyo.graph.build_ms" in values
        seen.decisions.append((at_s, values["tamiyo.step.latency_ms"], events, ran))


def _window(seen: Seen, start_s: float, end_s: float) -> dict[str, Any]:
    chosen = [each for each in seen.decisions if start_s <= each[0] < end_s]
    latencies = sorted(latency for _, latency, _, _ in chosen)
    late = {Event.TIMEOUT_INFERENCE.value, Event.LANE_BUSY.value}
    return {
        "decisions": len(chosen),
        "with_network": sum(ran for *_, ran in chosen),
        "p50_ms": _quantile(latencies, 0.5),
        "p99_ms": _quantile(latencies, 0.99),
        "max_ms": _quantile(latencies, 1.0),
        "over_budget": sum(latency > BUDGET_MS for latency in latencies),
        "safe_commands": sum(bool(late & set(events)) for _, _, events, _ in chosen),
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return round(values[min(len(values) - 1, int(share * len(values)))], 2)


if __name__ == "__main__":
    main()
