from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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


def test_a_stopped_process_is_sent_on_when_its_parent_is_gone() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert state(child) == STOPPED
        parent.kill()
        parent.wait()

        deadline_s = time.monotonic() + PATIENCE_S
        while state(child) == STOPPED:
            assert time.monotonic() < deadline_s
    # Where SIGHUP is ignored it is alive now.
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
