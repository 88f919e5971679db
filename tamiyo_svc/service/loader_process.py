"""The process that reads and checks policy updates, from its start to its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any, Final

import structlog

from tamiyo_svc.service.courtesy import ProcessTurns, yield_processor
from tamiyo_svc.service.policy_loader import BUS_EXIT, Finding, LoaderRequest
from tamiyo_svc.taxonomy import PolicyRejection

log = structlog.get_logger("tamiyo.loader_process")

_EXAMINE_TIMEOUT_S: Final = 120.0


class LoaderProcess:
    """Starts a process when it is asked for a finding, and another one when that is of no use.

    `position` is how far it knows the stream to be read, `is_first` whether it has yet to look
    where the stream begins. Until it first waits for an update it runs like any process: a starting
    service waits for it. From then on it yields the processor to the service and, while it
    reads and examines an update, stands still whenever a packet is in flight.
    """

    def __init__(self, position: str) -> None:
        self.position = position
        self.is_first = True
        self.caught_up = asyncio.Event()
        self._starting: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._has_loaded = False
        self._yields = False
        self._turns: ProcessTurns | None = None

    def stand_back(self) -> None:
        """Make room for a packet."""
        if self._turns is not None:
            self._turns.stand_back()

    def go_on(self) -> None:
        """Use the time until the next packet."""
        if self._turns is not None:
            self._turns.go_on()

    async def process_id(self) -> int | None:
        """The process that runs, if any."""
        return (await asyncio.shield(self._starting)).pid if self._starting is not None else None

    async def find(self, request: LoaderRequest) -> Finding | None:
        """What the next entry of the stream is; None when it is best asked for again.

        Raises:
            OSError: no process could be started.
            ValueError: what it said makes no sense.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(), name="tamiyo-policy-loader")
        try:
            # Shielded, so that a process once started is always known to `close`.
            process = await asyncio.shield(self._starting)
            assert process.stdin is not None
            process.stdin.write(request.to_json().encode() + b"\n")
            try:
                finding = await self._listen(process)
            finally:
                self._end_turns()
        except (OSError, ValueError):
            await self.close()
            raise
        if finding is None or process.returncode is not None:
            await self.close()
        if finding is not None:
            self.position, self.is_first = finding.entry_id, False
        return finding

    async def close(self) -> None:
        """End the process."""
        if self._starting is None:
            return
        try:
            process = await asyncio.shield(self._starting)
        except OSError:  # it never started
            self._starting = None
            return
        _kill(process)
        # Reads to the end of its output as well, so that no pipe stays open.
        await process.communicate()
        self._starting, self._has_loaded, self._yields = None, False, False

    def _take_turns(self, process: asyncio.subprocess.Process) -> None:
        if self._yields and self._turns is None:
            self._turns = ProcessTurns(process.pid)

    def _end_turns(self) -> None:
        self.go_on()
        self._turns = None

    @staticmethod
    async def _start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tamiyo_svc.service.policy_loader"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # Not a session of its own: Linux gives each of those the same share of the processor.
            process_group=0,
        )

    async def _listen(self, process: asyncio.subprocess.Process) -> Finding | None:
        assert process.stdout is not None
        entry_id = ""
        timeout_s: float | None = None
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    line = await process.stdout.readline()
            except TimeoutError:
                _kill(process)
                await process.wait()
                detail = f"it took more than {_EXAMINE_TIMEOUT_S:.0f} s to examine"
                return Finding(entry_id, reason=PolicyRejection.INVALID_PAYLOAD, detail=detail)
            if not line:
                code = await process.wait()
                if code == BUS_EXIT or not entry_id:
                    return None
                detail = f"the process that examined it ended with {code}"
                return Finding(entry_id, reason=PolicyRejection.INVALID_PAYLOAD, detail=detail)
            answer: dict[str, Any] = json.loads(line)
            match answer.pop("kind"):
                case "waiting":
                    self.position, self.is_first = answer["after"], False
                    self._end_turns()
                    if self._has_loaded:
                        # It keeps half a gigabyte, which a new one does not.
                        return None
                    self.caught_up.set()
                    if not self._yields:
                        yield_processor(process.pid)
                        self._yields = True
                case "coming":
                    self._take_turns(process)
                case "reading":
                    entry_id, timeout_s = answer["entry_id"], _EXAMINE_TIMEOUT_S
                    self._has_loaded = self._has_loaded or not answer["is_apart"]
                    self._take_turns(process)
                case "finding":
                    return Finding(**answer)
                case _:
                    log.warning("policy.stream_unreadable", detail=answer.get("detail"))


def _kill(process: asyncio.subprocess.Process) -> None:
    """End a process and its children, which share its group."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
