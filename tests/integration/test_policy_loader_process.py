"""The process that reads the policy stream, and entries that are too much for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.bus import SECRET

from tamiyo_svc.adapters.oona.policy_stream import await_next, measure_next, open_stream
from tamiyo_svc.errors import BusError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.service.loader_process import LoaderProcess
from tamiyo_svc.service.policy_loader import LoaderRequest
from tamiyo_svc.taxonomy import PolicyRejection

pytestmark = pytest.mark.redis

STREAM = "oona.policy"
MIB = 1 << 20


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
        request_ = LoaderRequest(**{**json.loads(request_.to_json()), "after": loader.position})
        second = await loader.find(request_)
        assert second is not None
        assert (second.entry_id, second.reason) == (small, PolicyRejection.INVALID_SIGNATURE)
    finally:
        await loader.close()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_an_entry_that_does_not_fit_in_memory_is_refused(request_: LoaderRequest) -> None:
    entry_id = add(request_.redis_url, 150 * MIB)
    allowed = {**json.loads(request_.to_json()), "max_bytes": 256 * MIB}
    command = [sys.executable, "-m", "tamiyo_svc.service.policy_loader"]
    with subprocess.Popen(
        ["prlimit", f"--data={100 * MIB}", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # Left open: its end would mean that the service is gone.
        process.stdin.write(json.dumps(allowed) + "\n")
        process.stdin.flush()
        reading, finding = (json.loads(process.stdout.readline()) for _ in range(2))
    assert (reading["kind"], reading["entry_id"]) == ("reading", entry_id)
    assert (finding["kind"], finding["entry_id"]) == ("finding", entry_id)
    assert finding["reason"] == PolicyRejection.PAYLOAD_TOO_LARGE
    assert finding["detail"].endswith("do not fit in memory")
