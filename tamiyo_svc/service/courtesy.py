"""Work beside decisions: it stands back while a packet waits for its answer.

Python code in any thread keeps the interpreter from the others, and every tensor operation of a
decision has to get it back. Another process takes a core that the lane has to wait for. A few
milliseconds of either are the whole step budget.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

_NICENESS: Final = 5
_PAUSE_S: Final = 3e-4
# With packets always in flight the work must still come to an end: it gets a tenth of the time.
_PATIENCE_S: Final = 0.02
_TURN_S: Final = 0.002
# A process has caches and page tables to come back to, which is worth a longer turn.
_PROCESS_TURN_S: Final = 0.005


def courteous_executor(name: str) -> ThreadPoolExecutor:
    """One thread that the scheduler prefers every other thread to."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_be_nice)


@contextmanager
def standing_back(is_busy: Callable[[], bool], patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Have this thread wait, at every Python call it makes, while `is_busy()`.

    Whenever it has waited for `patience_s` it goes on for 2 ms all the same.
    """
    turn_ends = 0.0

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal turn_ends
        if not is_busy() or (now := time.monotonic()) < turn_ends:
            return
        deadline = now + patience_s
        while is_busy():
            if time.monotonic() >= deadline:
                turn_ends = time.monotonic() + _TURN_S
                return
            time.sleep(_PAUSE_S)

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(before)


class ProcessTurns:
    """Stops a process group while packets are in flight; belongs to the event loop.

    A group whose parent has gone is sent on by the kernel, so none is left stopped for good.
    """

    def __init__(self, group: int) -> None:
        self._group = group
        self._timer: asyncio.TimerHandle | None = None

    def stand_back(self) -> None:
        """Stop the group; it gets a fifth of the time until `go_on`."""
        if self._timer is None:
            self._stop()

    def go_on(self) -> None:
        """Let the group run."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._signal(signal.SIGCONT)

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        self._timer = asyncio.get_running_loop().call_later(_PATIENCE_S, self._take_turn)

    def _take_turn(self) -> None:
        self._signal(signal.SIGCONT)
        self._timer = asyncio.get_running_loop().call_later(_PROCESS_TURN_S, self._stop)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._group, number)


def yield_processor(process: int) -> None:
    """Have the scheduler prefer us to a process that we started."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)


def _be_nice() -> None:
    # Threads have priorities of their own on Linux; elsewhere this one stays as it is.
    with suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
