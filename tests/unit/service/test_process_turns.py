from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tamiyo_svc.service.courtesy import ProcessTurns

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PATIENCE_S = 20.0
STOPPED = "T"
ORPHANING = """
import os, signal, subprocess, sys
child = subprocess.Popen(["sleep", "600"], process_group=0)
os.killpg(child.pid, signal.SIGSTOP)
os.waitpid(child.pid, os.WUNTRACED)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def group() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"], process_group=0) as process:
        yield process.pid
        process.kill()


def state(process: int) -> str:
    """The letter the kernel gives a process, empty when there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.0005)


async def test_a_process_stands_still_while_packets_are_in_flight(group: int) -> None:
    turns = ProcessTurns(group)

    turns.stand_back()
    await until(lambda: state(group) == STOPPED)
    turns.go_on()

    await until(lambda: state(group) != STOPPED)


async def test_packets_always_in_flight_leave_it_turns(group: int) -> None:
    turns = ProcessTurns(group)

    for _ in range(3):
        turns.stand_back()
        await until(lambda: state(group) == STOPPED)
        await until(lambda: state(group) != STOPPED)

    turns.go_on()


async def test_a_process_that_has_ended_is_no_trouble(group: int) -> None:
    turns = ProcessTurns(group)
    turns.stand_back()
    os.killpg(group, signal.SIGKILL)
    await until(lambda: state(group) == "Z")

    turns.go_on()


async def test_a_stopped_process_does_not_outlive_its_parent() -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ORPHANING),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    assert state(child) == STOPPED

    parent.kill()
    await parent.wait()

    await until(lambda: state(child) in ("", "Z"))
