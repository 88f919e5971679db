"""`tamiyo policy publish, ls, rollback and promote` against a real service."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import pytest
from redis import Redis
from support.bus import SECRET, Bus
from support.policies import checkpoint
from support.running import StartService
from typer.testing import CliRunner, Result

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona.policy_stream import (
    KEPT_UPDATES,
    ReplicaStatus,
    _paced,
    open_stream,
    publish_update,
)
from tamiyo_svc.cli.main import app
from tamiyo_svc.cli.policy import publish
from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import load_settings
from tamiyo_svc.taxonomy import PolicyUpdateAction

pytestmark = pytest.mark.redis


async def tamiyo(redis_url: str, *arguments: str | Path, secret: str = SECRET) -> Result:
    """Run a command beside the service."""
    environment = {"REDIS_URL": redis_url, "ESPER_LEYLINE_SECRET": secret}
    texts = [str(argument) for argument in arguments]
    return await asyncio.to_thread(
        lambda: CliRunner(env=environment).invoke(app, ["policy", *texts])
    )


def test_large_updates_arrive_whole_and_the_newest_are_kept(redis_url: str) -> None:
    keyring = Keyring(SECRET.encode())
    updates = [
        leyline.PolicyUpdate(payload=bytes([number]) * 3_000_001)
        for number in range(KEPT_UPDATES + 2)
    ]
    with open_stream(redis_url) as redis:
        ids = [publish_update(redis, "oona.large", seal(one, keyring, {})) for one in updates]
        kept = redis.xrange("oona.large")

    assert [entry_id.decode() for entry_id, _ in kept] == ids[-KEPT_UPDATES:]
    for update, (_, fields) in zip(updates[-KEPT_UPDATES:], kept, strict=True):
        assert parse_payload(open_envelope(fields, keyring, 4 << 20)) == update


def test_publishing_makes_no_copy_of_a_large_update(redis_url: str) -> None:
    size = 8_000_000
    sealed = seal(leyline.PolicyUpdate(payload=bytes(size)), Keyring(SECRET.encode()), {})
    with open_stream(redis_url) as redis:
        redis.ping()
        tracemalloc.start()
        try:
            publish_update(redis, "oona.large", sealed)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < size / 2


def test_a_command_is_sent_in_parts_that_redis_takes_in_between_others() -> None:
    pieces = [b"XADD", bytes(range(256)) * 4096, b"end"]

    parts = list(_paced(pieces))

    assert b"".join(parts) == b"".join(pieces)
    assert max(map(len, parts)) == 128 << 10


async def test_publishing_waits_for_every_replica_and_rolling_back_undoes_it(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        await start_service(consumer_name=name, state_dir=tmp_path / name)
    good, other = tmp_path / "good", tmp_path / "other"
    good.write_bytes(checkpoint(1.0))
    other.write_bytes(checkpoint(2.0))

    first = await tamiyo(redis_url, "publish", good, "--version", "v1")
    second = await tamiyo(redis_url, "publish", other, "--version", "v2")
    listed = await tamiyo(redis_url, "ls", "--json")
    undone = await tamiyo(redis_url, "rollback")
    again = await tamiyo(redis_url, "rollback")

    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    # The services of this test log to the same place.
    assert all(f"{name}: took it" in first.output for name in ("one", "two"))
    assert listed.output.count('"version": "v2"') == 2
    assert undone.exit_code == 0, undone.output
    assert again.exit_code == 1
    assert "nothing to go back to" in again.output
    assert SECRET not in first.output + undone.output + again.output


async def test_a_candidate_is_shadowed_and_promoted(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    await start_service()
    path = tmp_path / "candidate"
    path.write_bytes(checkpoint(2.0))

    nothing = await tamiyo(redis_url, "promote")
    shadowed = await tamiyo(redis_url, "publish", path, "--shadow", "--version", "v2")
    promoted = await tamiyo(redis_url, "promote")

    assert nothing.exit_code == 1
    assert "no candidate in shadow" in nothing.output
    assert shadowed.exit_code == 0, shadowed.output
    assert promoted.exit_code == 0, promoted.output


async def test_a_refusal_is_the_answer_and_a_forger_gets_none(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    await start_service()
    path = tmp_path / "broken"
    path.write_bytes(checkpoint(3e38, heads__value__weight=3e38))

    refused = await tamiyo(redis_url, "publish", path)
    forged = await tamiyo(
        redis_url, "publish", path, "--timeout", "3", secret="another secret, a wrong one"
    )

    assert refused.exit_code == 1
    assert "probe_failed" in refused.output
    assert forged.exit_code == 1
    assert "no answer within 3 s" in forged.output


def test_a_server_lost_while_answers_are_awaited_is_told_from_one_that_took_nothing() -> None:
    asked = 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        if asked == 2:  # before the first look at the answers
            server.kill()
        return 0.0

    with EmbeddedRedis() as server:
        settings = load_settings(None, redis_url=server.url, ESPER_LEYLINE_SECRET=SECRET)
        status = ReplicaStatus("one", "full", "1", "digest")
        with Redis.from_url(server.url) as redis:
            redis.set("tamiyo:policy:one", json.dumps(asdict(status)))
        with pytest.raises(BusError, match="is published"):
            publish(
                settings,
                PolicyUpdateAction.ROLLBACK,
                timeout_s=10,
                on_answer=print,
                clock=clock,
            )


async def test_that_no_replica_runs_is_said(redis_url: str) -> None:
    assert (await tamiyo(redis_url, "ls")).output == "no replica is running\n"
