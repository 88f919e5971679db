"""The bus adapter against real Redis servers, over both protocols."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from tamiyo_svc.adapters.embedded import EmbeddedRedis, server_binaries
from tamiyo_svc.adapters.oona.commit import Commit, Committer, Output, RunWrite, run_key
from tamiyo_svc.adapters.oona.connection import ServerClock, client
from tamiyo_svc.adapters.oona.consumer import GroupLostError, StreamConsumer
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.housekeeping import trim
from tamiyo_svc.adapters.oona.inspection import view_stream
from tamiyo_svc.errors import (
    BusError,
    CommitConflictError,
    CommitRefusedError,
    DuplicateEntryError,
)

pytestmark = pytest.mark.redis

RUN = run_key("run")
NORMAL, EMERGENCY, DEAD = "oona.normal", "oona.emergency", "oona.dead"
BINARIES = server_binaries()


@dataclass
class Bus:
    redis: Redis
    consumer: StreamConsumer
    other: StreamConsumer
    committer: Committer
    server: EmbeddedRedis

    async def publish(self, text: str, stream: str = NORMAL) -> str:
        entry_id: Any = await self.redis.xadd(stream, {"payload": text})
        return str(entry_id.decode())

    async def texts(self, stream: str) -> list[bytes]:
        entries: Any = await self.redis.xrange(stream)
        return [fields[b"payload"] for _, fields in entries]

    async def pending_count(self) -> int:
        summary: Any = await self.redis.xpending(NORMAL, "tamiyo")
        return int(summary["pending"])


@pytest.fixture(scope="module", params=BINARIES, ids=[path.parent.name for path in BINARIES])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    binary: Path = request.param
    with EmbeddedRedis(binary) as running:
        yield running


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
async def bus(server: EmbeddedRedis, request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    with SyncRedis.from_url(server.url) as admin:
        admin.flushall()
        admin.config_set("maxmemory", 0)
    async with (
        client(server.url, 5, protocol=request.param) as reader,
        client(server.url, 5, connections=4, protocol=request.param) as redis,
    ):
        consumer = StreamConsumer(reader, redis, (EMERGENCY, NORMAL), "tamiyo", "one")
        other = StreamConsumer(redis, redis, (EMERGENCY, NORMAL), "tamiyo", "two")
        await consumer.join()
        yield Bus(redis, consumer, other, Committer(redis, "tamiyo"), server)


async def test_reads_emergency_before_normal(bus: Bus) -> None:
    await bus.publish("normal")
    await bus.publish("urgent", EMERGENCY)
    entries = await bus.consumer.read(10, 100)
    assert [entry.fields[b"payload"] for entry in entries] == [b"urgent", b"normal"]
    assert [entry.deliveries for entry in entries] == [1, 1]


async def test_read_is_bounded_and_empty_without_entries(bus: Bus) -> None:
    for number in range(5):
        await bus.publish(str(number))
    assert len(await bus.consumer.read(3, 10)) == 3
    assert len(await bus.consumer.read(3, 10)) == 2
    assert await bus.consumer.read(3, 10) == []


async def test_group_made_later_still_reads_what_was_there(bus: Bus) -> None:
    await bus.publish("early", "late-group")
    consumer = StreamConsumer(bus.redis, bus.redis, ("late-group",), "tamiyo", "one")
    await consumer.join()
    await consumer.join()
    assert [entry.fields[b"payload"] for entry in await consumer.read(5, 10)] == [b"early"]


async def test_who_joins_is_known_before_reading_anything(bus: Bus) -> None:
    await bus.other.join()
    for stream in (EMERGENCY, NORMAL):
        (group,) = (await view_stream(bus.redis, stream)).groups
        assert {member.name for member in group.consumers} == {"one", "two"}


async def test_lost_group_is_named_and_can_be_made_again(bus: Bus) -> None:
    await bus.redis.flushall()
    with pytest.raises(GroupLostError):
        await bus.consumer.read(1, 10)
    await bus.consumer.join()
    await bus.publish("after")
    assert len(await bus.consumer.read(1, 10)) == 1


async def test_group_lost_while_blocked_is_named(bus: Bus) -> None:
    blocked = asyncio.create_task(bus.consumer.read(1, 4000))
    async with asyncio.timeout(3):
        while not (await bus.redis.info("clients"))["blocked_clients"]:
            await asyncio.sleep(0)
    await bus.redis.flushall()
    # Redis 6.2 leaves the reader blocked until its time is over; later servers wake it.
    await bus.publish("wakes")

    async def read_on() -> None:
        await blocked
        await bus.consumer.read(1, 10)

    with pytest.raises(GroupLostError):
        await read_on()


async def test_pending_entries_come_back_with_their_deliveries(bus: Bus) -> None:
    entry_id = await bus.publish("once")
    await bus.consumer.read(1, 10)
    again = await bus.consumer.pending(NORMAL, "0", 10)
    assert [entry.entry_id for entry in again] == [entry_id]
    assert again[0].deliveries == 2
    assert await bus.consumer.pending(NORMAL, entry_id, 10) == []


async def test_trimmed_pending_entry_comes_back_without_fields(bus: Bus) -> None:
    await bus.publish("gone")
    await bus.consumer.read(1, 10)
    await bus.redis.xtrim(NORMAL, maxlen=0, approximate=False)
    for entry in await bus.consumer.pending(NORMAL, "0", 10):
        assert entry.fields == {}


async def test_idle_entries_of_another_consumer_are_claimed(bus: Bus) -> None:
    for number in range(250):
        await bus.publish(str(number))
    await bus.other.read(250, 10)
    assert await bus.consumer.claim_idle(NORMAL, 60_000, 10) == []
    claimed = await bus.consumer.claim_idle(NORMAL, 0, 300)
    assert len(claimed) == 250
    assert {entry.deliveries for entry in claimed} == {2}


async def test_claims_are_bounded(bus: Bus) -> None:
    for number in range(50):
        await bus.publish(str(number))
    await bus.other.read(50, 10)
    assert len(await bus.consumer.claim_idle(NORMAL, 0, 5)) == 5


async def test_acknowledge_across_streams(bus: Bus) -> None:
    await bus.publish("a")
    await bus.publish("b", EMERGENCY)
    entries = await bus.consumer.read(5, 10)
    await bus.consumer.acknowledge(entries)
    assert await bus.pending_count() == 0


def decision(entries: list[Entry], version: int = 0, text: bytes = b"command") -> Commit:
    return Commit(
        acks=entries,
        outputs=[
            Output("out.telemetry", {b"payload": b"telemetry"}),
            Output("out.command", {b"payload": text, b"signature": b"s"}, 64, 60_000),
        ],
        run=RunWrite(RUN, version, b"state", 60_000),
    )


async def test_commit_writes_outputs_state_and_acknowledges(bus: Bus) -> None:
    await bus.publish("old")
    await bus.publish("new")
    entries = await bus.consumer.read(5, 10)
    ids = await bus.committer.commit(decision(entries[::-1]))
    assert len(ids) == 2
    assert await bus.texts("out.command") == [b"command"]
    assert await bus.committer.load_run(RUN) == (1, b"state")
    assert await bus.pending_count() == 0
    assert await bus.redis.pttl(RUN) > 50_000
    assert await bus.redis.pttl("out.command") > 50_000
    assert await bus.redis.pttl("out.telemetry") == -1


async def test_outputs_lie_in_the_partition_of_the_entry(bus: Bus) -> None:
    await bus.publish("one", f"{NORMAL}.{{2}}")
    consumer = StreamConsumer(bus.redis, bus.redis, (f"{NORMAL}.{{2}}",), "tamiyo", "one")
    await consumer.join()
    entries = await consumer.read(5, 10)
    outputs = [
        Output("out.telemetry", {b"payload": b"telemetry"}),
        Output("out.{2}.reply", {b"payload": b"command"}, whole=True),
    ]
    await bus.committer.commit(Commit(entries, outputs))
    await bus.committer.commit(Commit((), outputs[:1], tag=".{0}"))
    for stream in ("out.telemetry.{2}", "out.{2}.reply", "out.telemetry.{0}"):
        assert await bus.redis.xlen(stream) == 1


async def test_commit_on_a_stale_version_changes_nothing(bus: Bus) -> None:
    await bus.publish("one")
    await bus.publish("two")
    first, second = await bus.consumer.read(5, 10)
    await bus.committer.commit(decision([first]))
    with pytest.raises(CommitConflictError):
        await bus.committer.commit(decision([second]))
    assert await bus.texts("out.command") == [b"command"]
    assert await bus.pending_count() == 1
    await bus.committer.commit(decision([second], version=1))
    assert await bus.committer.load_run(RUN) == (2, b"state")


async def test_entry_acknowledged_before_gives_no_output(bus: Bus) -> None:
    await bus.publish("one")
    entries = await bus.consumer.read(5, 10)
    await bus.committer.commit(decision(entries))
    with pytest.raises(DuplicateEntryError):
        await bus.committer.commit(decision(entries, version=1))
    assert await bus.texts("out.command") == [b"command"]
    assert await bus.committer.load_run(RUN) == (1, b"state")


async def test_two_replicas_with_the_same_entry_make_one_command(bus: Bus) -> None:
    await bus.publish("one")
    entries = await bus.other.read(5, 10)
    claimed = await bus.consumer.claim_idle(NORMAL, 0, 5)
    results = await asyncio.gather(
        bus.committer.commit(decision(entries, text=b"slow replica")),
        bus.committer.commit(decision(claimed, text=b"new owner")),
        return_exceptions=True,
    )
    assert sum(isinstance(result, list) for result in results) == 1
    assert len(await bus.texts("out.command")) == 1


async def test_failed_output_leaves_no_trace_and_the_entry_pending(bus: Bus) -> None:
    await bus.redis.set("out.command", "not a stream")
    await bus.publish("one")
    entries = await bus.consumer.read(5, 10)
    with pytest.raises(CommitRefusedError, match="WRONGTYPE"):
        await bus.committer.commit(decision(entries))
    assert await bus.texts("out.telemetry") == []
    assert await bus.committer.load_run(RUN) == (0, None)
    assert await bus.pending_count() == 1
    await bus.redis.delete("out.command")
    await bus.committer.commit(decision(entries))
    assert await bus.texts("out.command") == [b"command"]


async def test_commit_out_of_memory_leaves_the_entry_pending(bus: Bus) -> None:
    await bus.publish("one")
    entries = await bus.consumer.read(5, 10)
    await bus.redis.config_set("maxmemory", 1)
    with pytest.raises(BusError, match=r"(?i)memory"):
        await bus.committer.commit(decision(entries))
    await bus.redis.config_set("maxmemory", 0)
    assert await bus.pending_count() == 1
    assert await bus.texts("out.telemetry") == []
    await bus.committer.commit(decision(entries))
    assert await bus.texts("out.command") == [b"command"]


async def test_key_of_another_kind_is_no_run_state(bus: Bus) -> None:
    await bus.redis.set(RUN, "not a run state")
    with pytest.raises(CommitRefusedError, match="WRONGTYPE"):
        await bus.committer.load_run(RUN)


async def test_read_only_server_is_a_bus_error(bus: Bus) -> None:
    await bus.publish("one")
    entries = await bus.consumer.read(5, 10)
    await bus.redis.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(BusError, match=r"(?i)read.?only"):
            await bus.committer.commit(decision(entries))
    finally:
        await bus.redis.replicaof("NO", "ONE")


async def test_commit_after_the_group_was_lost_is_a_duplicate(bus: Bus) -> None:
    await bus.publish("one")
    entries = await bus.consumer.read(5, 10)
    await bus.redis.flushall()
    with pytest.raises(DuplicateEntryError):
        await bus.committer.commit(decision(entries))
    assert await bus.texts("out.command") == []


async def test_commit_without_state_or_outputs_acknowledges(bus: Bus) -> None:
    await bus.publish("one")
    entries = await bus.consumer.read(5, 10)
    assert await bus.committer.commit(Commit(acks=entries)) == []
    assert await bus.pending_count() == 0


async def publish_many(bus: Bus, count: int) -> list[str]:
    async with bus.redis.pipeline(transaction=False) as together:
        for number in range(count):
            together.xadd(NORMAL, {"payload": str(number)})
        return [entry_id.decode() for entry_id in await together.execute()]


async def test_trimming_removes_everything_old_however_much_it_is(bus: Bus) -> None:
    await publish_many(bus, 25_000)
    await bus.redis.xgroup_setid(NORMAL, "tamiyo", "$")
    removed = await trim(bus.redis, NORMAL, time.time() * 1e3 + 60_000)
    left = await bus.redis.xlen(NORMAL)
    assert removed == 25_000 - left
    assert left <= 100  # the server removes whole nodes


async def test_trimming_leaves_what_is_pending_or_was_not_read(bus: Bus) -> None:
    ids = await publish_many(bus, 500)
    read = await bus.consumer.read(400, 100)
    assert len(read) == 400
    await bus.consumer.acknowledge(read[:250] + read[300:])
    await trim(bus.redis, NORMAL, time.time() * 1e3 + 60_000)
    entries: Any = await bus.redis.xrange(NORMAL)
    left = [entry_id.decode() for entry_id, _ in entries]
    assert left[-250:] == ids[250:]
    assert len(left) < 500


async def test_trimming_leaves_what_is_young(bus: Bus) -> None:
    await publish_many(bus, 500)
    await bus.redis.xgroup_setid(NORMAL, "tamiyo", "$")
    assert await trim(bus.redis, NORMAL, time.time() * 1e3 - 60_000) == 0


async def test_clock_follows_the_server(bus: Bus) -> None:
    clock = ServerClock()
    await clock.sync(bus.redis)
    before = clock.now_ms()
    entry_id = await bus.publish("now")
    after = clock.now_ms()
    assert int(before) - 2 <= Entry(NORMAL, entry_id, {}).added_ms <= after + 2


async def test_more_commands_than_connections_wait_for_one(server: EmbeddedRedis) -> None:
    async with client(server.url, 5, connections=2) as redis:
        committer = Committer(redis, "tamiyo")
        loaded = await asyncio.gather(*(committer.load_run(f"none-{n}") for n in range(64)))
    assert set(loaded) == {(0, None)}


async def test_unreachable_server_is_a_bus_error() -> None:
    async with client("redis://127.0.0.1:1/0", 1) as redis:
        consumer = StreamConsumer(redis, redis, (NORMAL,), "tamiyo", "one")
        with pytest.raises(BusError):
            await consumer.read(1, 10)
        with pytest.raises(BusError):
            await consumer.join()
        with pytest.raises(BusError):
            await Committer(redis, "tamiyo").load_run(RUN)
