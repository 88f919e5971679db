"""A bus of four partitions, on one server and on one that refuses what spans hash slots."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.bus import CATALOG, SECRET, Bus, state_packet
from support.clustered import clustered_redis
from support.patience import PATIENT
from support.running import Running, StartService

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona.inspection import run_states
from tamiyo_svc.adapters.oona.policy_stream import ReplicaStatus, write_status
from tamiyo_svc.cli.capture import capture
from tamiyo_svc.cli.decision_diff import Agreement
from tamiyo_svc.cli.dlq import Selection, listed, purge, requeue
from tamiyo_svc.cli.explain import find
from tamiyo_svc.cli.policy import replicas
from tamiyo_svc.cli.replay import replay_file
from tamiyo_svc.cli.reports import read_reports
from tamiyo_svc.cli.serve import check_start
from tamiyo_svc.cli.stream import status
from tamiyo_svc.cli.tail import OutputFormat, Wanted, tail
from tamiyo_svc.cli.top import top
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.testing import LONG_S
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.partition import partition_of
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.taxonomy import AckOutcome

pytestmark = pytest.mark.redis

KEYRING = Keyring(SECRET.encode())
COUNT = 4
RUNS = [
    next(f"run-{n}" for n in itertools.count(1) if partition_of(f"run-{n}", COUNT) == number)
    for number in range(COUNT)
]
"""A run in each partition."""


@pytest.fixture(scope="module", params=["server", "cluster"])
def server(request: pytest.FixtureRequest, redis_server: EmbeddedRedis) -> Iterator[EmbeddedRedis]:
    in_cluster = request.param == "cluster"
    with clustered_redis() if in_cluster else nullcontext(redis_server) as running:
        yield running


@pytest.fixture
def redis_url(server: EmbeddedRedis) -> str:
    with Redis.from_url(server.url) as client:
        client.flushall()
    return server.url


def operator(url: str, state_dir: Path, **overrides: object) -> Settings:
    """Settings as the service under test has them."""
    values = {
        "redis_url": url,
        "secret": SECRET,
        "partitions": COUNT,
        "policy": "bootstrap",
        "urza_database_url": f"sqlite:///{CATALOG}",
        "state_dir": state_dir,
        "http_host": "127.0.0.1",
        "http_port": 0,
        **overrides,
    }
    return Settings(**values)  # type: ignore[arg-type]


async def settled(bus: Bus, running: Running, count: int) -> dict[str, float]:
    async def done() -> bool:
        return sum(running.outcomes().values()) >= count

    await bus.until(done)
    return running.outcomes()


async def train(url: str, run_id: str, steps: int = 2) -> list[str]:
    """Ids of the commands that a trainer got and acknowledged, one for each step."""

    def work() -> list[str]:
        settings = replace(PATIENT, partitions=COUNT)
        ids = []
        with TamiyoClient(url, KEYRING, run_id, settings) as client:
            for step in range(1, steps + 1):
                assert client.publish_packet(state_packet(run_id, step))
                verified = client.wait(step, LONG_S)
                assert verified is not None
                client.ack(verified, AckOutcome.APPLIED)
                ids.append(verified.command.command_id)
            assert client.flush(LONG_S)
        return ids

    return await asyncio.to_thread(work)


async def names_on(bus: Bus) -> set[str]:
    return {key.decode() async for key in bus.redis.scan_iter(match="*", count=1000)}


async def test_each_run_is_answered_where_it_belongs(
    bus: Bus, start_service: StartService, redis_url: str
) -> None:
    running = await start_service(partitions=COUNT)
    for run_id in RUNS:
        assert len(await train(redis_url, run_id)) == 2
    assert await settled(bus, running, 2 * COUNT) == {"decided": 2 * COUNT}
    names = await names_on(bus)
    for number, run_id in enumerate(RUNS):
        tag = f".{{{number}}}"
        assert {f"oona.commands{tag}.{run_id}", f"tamiyo:run{tag}:{run_id}"} <= names
        assert len(await bus.commands(f"oona.commands{tag}.{run_id}")) == 2
        # Ours for each decision, and the trainer's for each command.
        assert len(await bus.messages(f"oona.normal{tag}", leyline.FieldReport)) == 4
        told = [*await bus.telemetry(f"oona.telemetry{tag}")]
        told += await bus.telemetry(f"oona.emergency{tag}")
        assert sum(one.packet_id.startswith(f"{run_id}-") for one in told) == 2
        lag = running.value("tamiyo_stream_lag_entries", stream=f"oona.normal{tag}")
        assert lag in (0, None)
    untagged = {name for name in names if name.startswith("oona.") and "{" not in name}
    assert untagged == set()


async def test_a_reply_stream_elsewhere_is_not_written_to(
    bus: Bus, start_service: StartService
) -> None:
    await start_service(partitions=COUNT)
    for step, elsewhere in enumerate(("oona.commands.{2}.mine", "oona.commands.mine"), 1):
        packet = state_packet(RUNS[1], step)
        await bus.publish(packet, "oona.normal.{1}", reply_to=elsewhere)
        await bus.command_for(packet, "oona.normal.{1}")
        assert elsewhere not in await names_on(bus)


async def test_a_run_is_served_in_whichever_partition_its_trainer_publishes(
    bus: Bus, start_service: StartService
) -> None:
    """A trainer that knows of fewer partitions finds its run where it left it."""
    await start_service(partitions=COUNT)
    packet = state_packet(RUNS[3], 1)
    await bus.publish(packet, "oona.normal.{1}", reply_to=f"oona.commands.{{1}}.{RUNS[3]}")
    await bus.command_for(packet, f"oona.commands.{{1}}.{RUNS[3]}")
    assert f"tamiyo:run.{{1}}:{RUNS[3]}" in await names_on(bus)


@pytest.mark.parametrize("through", [0, 2], ids=["another_partition", "its_own"])
async def test_an_alarm_reaches_its_run_through_any_partition(
    bus: Bus, start_service: StartService, through: int
) -> None:
    await start_service(partitions=COUNT)
    signal = leyline.EmergencySignal(
        version=1, level=leyline.EMERGENCY_LEVEL_HALT, reason="overheating", run_id=RUNS[2]
    )
    await bus.publish(signal, f"oona.emergency.{{{through}}}")

    async def acknowledged() -> bool:
        summary: Any = await bus.redis.xinfo_groups(f"oona.emergency.{{{through}}}")
        return bool(summary[0]["pending"] == 0 and summary[0]["last-delivered-id"] != b"0-0")

    await bus.until(acknowledged)
    told = await bus.telemetry("oona.emergency.{2}")
    assert [one.events[0].description for one in told] == ["emergency_signal"]
    packet = state_packet(RUNS[2], 1)
    await bus.publish(packet, "oona.normal.{2}")
    command = await bus.command_for(packet, "oona.normal.{2}")
    assert command.annotations["risk_reason"] == "conservative_mode"


async def test_a_sheet_from_one_partition_counts_in_all(
    bus: Bus, start_service: StartService
) -> None:
    await start_service(partitions=COUNT)
    sheet = leyline.BSDS(
        version=1,
        blueprint_id="demo-safe",
        hazard_band=leyline.HAZARD_BAND_CRITICAL,
        handling_class=leyline.HANDLING_CLASS_STANDARD,
    )
    await bus.publish(leyline.BSDSIssued(bsds=sheet), "oona.normal.{0}")
    await bus.until(lambda: bus.telemetry("oona.telemetry.{0}"))
    packet = state_packet(RUNS[3], 1)
    await bus.publish(packet, "oona.normal.{3}", blueprint_id="demo-safe")
    command = await bus.command_for(packet, "oona.normal.{3}")
    assert command.annotations["risk_reason"] == "bsds_hazard_critical"


async def test_dead_letters_stay_in_their_partition_and_go_back_there(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    running = await start_service(partitions=COUNT)
    forger = Keyring(b"another secret 16")
    for number in (1, 2):
        packet = state_packet(RUNS[number], 1)
        await bus.add(seal(packet, forger, {}), f"oona.normal.{{{number}}}")
    assert await settled(bus, running, 2) == {"dead_lettered": 2}
    running.stop.set()
    await running.task
    settings = operator(redis_url, tmp_path)
    text = await asyncio.to_thread(listed, settings, Selection(), as_json=True)
    assert isinstance(text, str)
    streams = [(letter["stream"], letter["original"]["stream"]) for letter in json.loads(text)]
    assert sorted(streams) == [
        ("oona.dead.{1}", "oona.normal.{1}"),
        ("oona.dead.{2}", "oona.normal.{2}"),
    ]
    chosen = Selection(stream="oona.normal.{1}")
    (action,) = await asyncio.to_thread(requeue, settings, chosen, act=True)
    assert action.result.startswith("back on oona.normal.{1}")
    assert await bus.redis.xlen("oona.normal.{1}") == 2
    assert await bus.redis.xlen("oona.dead.{1}") == 0
    await asyncio.to_thread(purge, settings, Selection(everything=True), act=True)
    assert await bus.redis.xlen("oona.dead.{2}") == 0


async def test_what_an_operator_looks_with_sees_every_partition(
    bus: Bus,
    start_service: StartService,
    redis_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    running = await start_service(partitions=COUNT)
    settings = operator(redis_url, tmp_path)
    commands = {run_id: await train(redis_url, run_id) for run_id in RUNS}
    await settled(bus, running, 2 * COUNT)

    looked = await asyncio.to_thread(status, settings, as_json=True)
    assert isinstance(looked, str)
    views = {each["stream"]: each for each in json.loads(looked)["streams"]}
    for name in settings.input_streams:
        assert [group["group"] for group in views[name]["groups"]] == ["tamiyo"]
        assert views[name]["diagnosis"] == []

    lines: list[str] = []
    for wanted in (Wanted(newest=1000), Wanted(since="1h")):
        lines.clear()
        await asyncio.to_thread(
            tail, settings, wanted, OutputFormat.JSON, follow=False, show=lines.append
        )
        seen = [json.loads(line) for line in lines]
        assert {each["run_id"] for each in seen if each["type"] == "adaptation_command"} == set(
            RUNS
        )

    reports = await asyncio.to_thread(read_reports, settings)
    assert {report.training_run_id for report in reports} == set(RUNS)
    assert len(await asyncio.to_thread(read_reports, settings, run_id=RUNS[2])) == 4
    for run_id, ids in commands.items():
        explanation = await asyncio.to_thread(find, settings, ids[-1])
        assert explanation is not None
        assert explanation.packet is not None
        assert explanation.command is not None
        assert explanation.packet.training_run_id == run_id
        # Ours, and the trainer's.
        assert len(explanation.reports) == 2

    capsys.readouterr()
    assert await asyncio.to_thread(top, settings, once=True) == 0
    shown = capsys.readouterr().out
    assert all(run_id in shown for run_id in RUNS)

    assert set(await run_states(bus.redis)) == {
        f"tamiyo:run.{{{number}}}:{run_id}" for number, run_id in enumerate(RUNS)
    }
    await asyncio.to_thread(capture, settings, tmp_path / "all.jsonl", duration=None, since="1h")
    comparison = await asyncio.to_thread(replay_file, settings, tmp_path / "all.jsonl")
    assert comparison.count(Agreement.IDENTICAL) == comparison.compared == 2 * COUNT


async def test_packets_in_partitions_that_nobody_serves_are_pointed_out(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    await start_service(partitions=COUNT)
    for stream in ("oona.normal", "oona.normal.{7}", "oona.normal.pod-1"):
        await bus.publish(state_packet("run-1", 1), stream)
    text = await asyncio.to_thread(status, operator(redis_url, tmp_path), as_json=True)
    assert isinstance(text, str)
    found = {each["stream"]: each["diagnosis"] for each in json.loads(text)["streams"]}
    for stream in ("oona.normal", "oona.normal.{7}"):
        (line,) = found.pop(stream)
        assert line.startswith("1 entry that no service reads")
        assert "OONA_PARTITIONS" in line
    assert not any(found.values())
    assert "oona.normal.pod-1" not in found


async def test_the_statuses_of_several_replicas_are_read(
    bus: Bus, redis_url: str, tmp_path: Path
) -> None:
    for name in ("one", "two", "three"):
        await write_status(bus.redis, ReplicaStatus(name, "policy", "1", "digest"))
    found = await asyncio.to_thread(replicas, operator(redis_url, tmp_path))
    assert [each.replica for each in found] == ["one", "three", "two"]


def test_a_start_is_refused_only_where_one_partition_meets_a_cluster(
    redis_url: str, tmp_path: Path
) -> None:
    check_start(operator(redis_url, tmp_path))
    alone = operator(redis_url, tmp_path, partitions=1)
    with Redis.from_url(redis_url) as redis:
        server: Any = redis.info("cluster")
    if server["cluster_enabled"]:
        with pytest.raises(ConfigurationError, match="OONA_PARTITIONS"):
            check_start(alone)
    else:
        check_start(alone)


def test_a_server_that_answers_for_some_slots_only_is_refused(tmp_path: Path) -> None:
    with clustered_redis() as server, Redis.from_url(server.url) as admin:
        admin.execute_command("CLUSTER DELSLOTS", *range(8000))
        admin.config_set("cluster-require-full-coverage", "no")
        with pytest.raises(ConfigurationError, match="redis cluster"):
            check_start(operator(server.url, tmp_path))
