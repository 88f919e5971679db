"""What must hold for policies whatever happens to the process or the payload, at any length."""

from __future__ import annotations

import contextlib
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from redis import Redis
from support.bus import CATALOG, SECRET
from support.policies import checkpoint, trained, update
from support.replica import Replica

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona.policy_stream import open_stream, publish_update, read_statuses
from tamiyo_svc.adapters.policy_store import PolicyStore
from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.checkpoint import read_checkpoint

Figures = dict[str, object]
STREAM = "oona.policy"
_PATIENCE_S = 60.0


def kill_during_updates(times: int) -> Figures:
    """Kill a service at random points of an update; it holds the old policy or the new, whole."""
    chance = random.Random(times)
    came_back: dict[str, int] = {"old": 0, "new": 0}
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis() as server,
        open_stream(server.url) as redis,
    ):
        settings = {
            "redis_url": server.url,
            "secret": SECRET,
            "urza_database_url": f"sqlite:///{CATALOG}",
            "state_dir": Path(folder),
            "http_host": "127.0.0.1",
            "http_port": 0,
            "block_ms": 100,
            "step_timeout_ms": 2000.0,
            "consumer_name": "killed",
        }
        store = PolicyStore(Path(folder))
        replica = Replica(settings).start().wait_ready()
        started = time.monotonic()
        _publish(redis, "v0", 0.0)
        _await_version(redis, "v0")
        took_s = time.monotonic() - started
        old = "v0"
        try:
            for turn in range(1, times + 1):
                new = f"v{turn}"
                _publish(redis, new, float(turn))
                time.sleep(chance.uniform(0, 1.2 * took_s))
                replica.kill()
                kept = store.load().current
                assert kept is not None
                assert kept.version in (old, new), kept
                # Opening it checks every weight and the digest of them all.
                policy = store.open(kept, Vocabularies())
                assert policy.digest == trained(float(kept.version[1:])).digest
                came_back["new" if kept.version == new else "old"] += 1
                replica = Replica(settings).start().wait_ready()
                _await_version(redis, new)
                old = new
        finally:
            replica.kill()
    return {"kills": times, **came_back, "update_s": round(took_s, 2)}


def mutate_checkpoints(times: int) -> Figures:
    """Damage a valid checkpoint in many ways; each is refused, or harmless and finite."""
    chance = random.Random(times)
    payloads = [checkpoint(), _as_state_dict()]
    vocabularies = Vocabularies()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused: dict[str, int] = {}
    slowest_s = 0.0
    for turn in range(times):
        damaged = _damaged(payloads[turn % len(payloads)], chance)
        started = time.thread_time()
        try:
            checked = read_checkpoint(damaged, vocabularies)
        except PolicyRejectedError as error:
            refused[error.reason] = refused.get(error.reason, 0) + 1
        else:
            assert all(bool(torch.isfinite(w).all()) for w in checked.weights.values())
        slowest_s = max(slowest_s, time.thread_time() - started)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "mutations": times,
        "accepted": times - sum(refused.values()),
        "refused": dict(sorted(refused.items())),
        "slowest_cpu_ms": round(slowest_s * 1e3, 1),
        "peak_rss_mb": round(peak_kib / 1024),
        "grown_mb": round((peak_kib - before_kib) / 1024),
    }


def _damaged(payload: bytes, chance: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, a part cut, doubled or swapped; the header more often."""
    data = bytearray(payload)
    header = 8 + int.from_bytes(payload[:8], "little") if payload[:2] != b"PK" else 4096
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        end = min(header, len(data)) if chance.random() < 0.7 else len(data)
        place = chance.randrange(max(1, end))
        size = chance.choice((1, 2, 4, 8, 64))
        match chance.randrange(6):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place : place + size] = chance.randbytes(size)
            case 2:
                del data[place : place + size]
            case 3:
                data[place:place] = data[place : place + size]
            case 4:
                other = chance.randrange(len(data))
                data[place : place + size] = data[other : other + size]
            case _:
                # Numbers in JSON and lengths in zip records grow or shrink by magnitudes.
                data[place : place + 1] = chance.choice((b"9", b"0", b"\xff", b"-", b"}", b'"'))
    return bytes(data)


def _as_state_dict() -> bytes:
    import io
    import json

    import safetensors.torch

    payload = checkpoint()
    length = int.from_bytes(payload[:8], "little")
    metadata: dict[str, Any] = json.loads(payload[8 : 8 + length])["__metadata__"]
    file = io.BytesIO()
    torch.save(
        {
            **safetensors.torch.load(payload),
            "_metadata": {
                "architecture_version": metadata["architecture_version"],
                "registries": json.loads(metadata["registries"]),
            },
        },
        file,
    )
    return file.getvalue()


def _publish(redis: Redis, version: str, value: float) -> None:
    sealed = seal(update(version, checkpoint(value)), Keyring(SECRET.encode()))
    publish_update(redis, STREAM, sealed)


def _await_version(redis: Redis, version: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(IndexError):
            if read_statuses(redis)[0].version == version:
                return
        time.sleep(0.02)
    raise TimeoutError(f"{version} is not served after {_PATIENCE_S:.0f} s")
