"""The process that reads the policy stream, and entries that are too much for it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis
from support.bus import SECRET

from tamiyo_svc.adapters.oona.policy_stream import await_next, measure_next, open_stream
from tamiyo_svc.errors import BusError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.service.loader_process import LoaderProcess
from tamiyo_svc.service.policy_loader import LoaderRequest, idle_patience_s
from tamiyo_svc.taxonomy import PolicyRejection

pytestmark = pytest.mark.redis

STREAM = "oona.policy"
MIB = 1 << 20
PATIENCE_S = 60.0

Ask = Callable[[LoaderRequest], None]
Answer = Callable[[], dict[str, Any]]


@pytest.fixture
def request_(redis_url: str, tmp_path: Path) -> LoaderRequest:
    return LoaderRequest(
        redis_url=redis_url,
        stream=STREAM,
        after="0",
        folder=str(tmp_path),
        vocabularies=Vocabularies().snapshot(),
        secrets=(SECRET,),
        max_bytes=MIB,
    )


def add(redis_url: str, size: int) -> str:
    """An entry whose payload has so many bytes; its id."""
    with Redis.from_url(redis_url) as redis:
        entry_id: Any = redis.xadd(STREAM, {"payload": bytes(size), "signature": b"none"})
        return str(entry_id.decode())


@contextmanager
def loader_process(*prefix: str) -> Iterator[tuple[Ask, Answer, int]]:
    """A process to ask, what it answers, and its id."""
    command = [*prefix, sys.executable, "-m", "tamiyo_svc.service.policy_loader"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(request: LoaderRequest) -> None:
            questions.write(request.to_json() + "\n")
            questions.flush()

        def answer() -> dict[str, Any]:
            said: dict[str, Any] = json.loads(answers.readline())
            return said

        yield ask, answer, process.pid


def test_an_entry_is_measured_where_it_lies(redis_url: str) -> None:
    with Redis.from_url(redis_url, protocol=2) as redis:
        assert measure_next(redis, STREAM, "0") is None
        entry_id = add(redis_url, 100)
        assert measure_next(redis, STREAM, "0") == (entry_id, 100 + len("payloadsignaturenone"))
        assert measure_next(redis, STREAM, entry_id) is None


def test_who_waits_for_an_entry_hears_of_it_before_it_is_read(redis_url: str) -> None:
    heard: list[str] = []
    with open_stream(redis_url) as redis:
        assert await_next(redis, STREAM, "0", 1, lambda: heard.append("nothing")) is None
        entry_id = add(redis_url, 8 * MIB)
        entry = await_next(redis, STREAM, "0", 1, lambda: heard.append("coming"))

    assert entry is not None
    assert (entry.entry_id, len(entry.fields[b"payload"])) == (entry_id, 8 * MIB)
    assert heard == ["nothing", "coming"]


def test_who_waits_while_redis_goes_away_is_told(tmp_path: Path) -> None:
    with (
        open_stream(f"unix://{tmp_path}/no.sock") as redis,
        pytest.raises(BusError, match=r"oona\.policy"),
    ):
        await_next(redis, STREAM, "0", 1, lambda: None)


async def test_an_entry_that_is_too_large_is_refused_unread_and_the_next_one_is_looked_at(
    request_: LoaderRequest,
) -> None:
    large = add(request_.redis_url, 8 * MIB)
    small = add(request_.redis_url, 8)
    loader = LoaderProcess("0")
    try:
        first = await loader.find(request_)
        assert first is not None
        assert (first.entry_id, first.reason) == (large, PolicyRejection.PAYLOAD_TOO_LARGE)
        assert first.detail == f"the entry has {8 * MIB + 20} bytes, at most {MIB} are taken"
        second = await loader.find(replace(request_, after=loader.position))
        assert second is not None
        assert (second.entry_id, second.reason) == (small, PolicyRejection.INVALID_SIGNATURE)
    finally:
        await loader.close()


async def test_a_process_that_is_killed_while_it_waits_is_missed_and_the_next_one_goes_on(
    request_: LoaderRequest,
) -> None:
    loader = LoaderProcess("0")
    try:
        waiting = asyncio.create_task(loader.find(request_))
        await loader.caught_up.wait()
        killed = await loader.process_id()
        assert killed is not None
        # Not its group: what it started has to end of itself.
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            assert await waiting is None
        entry_id = add(request_.redis_url, 8)
        found = await loader.find(replace(request_, after=loader.position))
        assert found is not None
        assert (found.entry_id, found.reason) == (entry_id, PolicyRejection.INVALID_SIGNATURE)
    finally:
        await loader.close()


def test_once_it_has_waited_a_child_reads_every_entry(request_: LoaderRequest) -> None:
    with loader_process() as (ask, answer, _):
        ask(request_)
        assert answer()["kind"] == "waiting"
        first = add(request_.redis_url, 8)
        assert answer()["kind"] == "coming"
        reading = answer()
        assert (reading["entry_id"], reading["is_apart"]) == (first, True)
        assert answer()["entry_id"] == first
        second = add(request_.redis_url, 8)
        ask(replace(request_, after=first))
        reading = answer()
        assert (reading["entry_id"], reading["is_apart"]) == (second, True)
        assert answer()["reason"] == PolicyRejection.INVALID_SIGNATURE


def test_an_update_that_idle_time_is_too_short_for_is_examined_all_the_same(
    request_: LoaderRequest,
) -> None:
    with loader_process() as (ask, answer, _):
        ask(replace(request_, idle_patience_s=0.0))
        assert answer()["kind"] == "waiting"
        entry_id = add(request_.redis_url, 8)
        assert answer()["kind"] == "coming"
        assert answer()["kind"] == "reading"
        again = answer()
        assert (again["kind"], again["entry_id"]) == ("reading", entry_id)
        assert answer()["reason"] == PolicyRejection.INVALID_SIGNATURE


@pytest.mark.parametrize(("size", "patience_s"), [(1000, 1.0), (100_000, 45.0)])
def test_idle_time_is_waited_for_with_weights_alone(
    request_: LoaderRequest, size: int, patience_s: float
) -> None:
    add(request_.redis_url, size)

    assert idle_patience_s(request_) == patience_s
    assert idle_patience_s(replace(request_, idle_patience_s=0.5)) == 0.5


def test_idle_time_is_waited_for_where_the_size_of_an_entry_is_not_known(
    request_: LoaderRequest,
) -> None:
    assert idle_patience_s(request_) == 45.0
    assert idle_patience_s(replace(request_, redis_url="redis://127.0.0.1:1")) == 45.0


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs a policy of Linux's")
def test_updates_are_awaited_in_idle_time(request_: LoaderRequest) -> None:
    with loader_process() as (ask, answer, pid):
        ask(request_)
        assert answer()["kind"] == "waiting"
        (child,) = psutil.Process(pid).children()
        assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
        assert os.sched_getscheduler(pid) == os.SCHED_OTHER


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_whether_an_entry_fits_is_found_out_without_taking_the_memory(
    request_: LoaderRequest,
) -> None:
    size = 64 * MIB
    add(request_.redis_url, size)
    with loader_process() as (ask, answer, pid):
        ask(replace(request_, max_bytes=2 * size))
        assert answer()["kind"] == "reading"
        assert answer()["reason"] == PolicyRejection.INVALID_SIGNATURE
        status = Path(f"/proc/{pid}/status").read_text()
    (peak_kb,) = (int(line.split()[1]) for line in status.splitlines() if line[:5] == "VmHWM")
    assert peak_kb * 1024 < 5 * size


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_an_entry_that_does_not_fit_in_memory_is_refused(request_: LoaderRequest) -> None:
    entry_id = add(request_.redis_url, 150 * MIB)
    with loader_process("prlimit", f"--data={100 * MIB}") as (ask, answer, _):
        ask(replace(request_, max_bytes=256 * MIB))
        reading, finding = answer(), answer()
    assert (reading["kind"], reading["entry_id"]) == ("reading", entry_id)
    assert (finding["kind"], finding["entry_id"]) == ("finding", entry_id)
    assert finding["reason"] == PolicyRejection.PAYLOAD_TOO_LARGE
    assert finding["detail"].endswith("do not fit in memory")
