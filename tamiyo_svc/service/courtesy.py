"""Work beside decisions: it stands back while a packet waits for its answer.

Python code in any thread keeps the interpreter from the others, and every tensor operation of a
decision has to get it back. Another process takes a core that the lane has to wait for. A few
milliseconds of either are the whole step budget.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

_NICENESS: Final = 5
# Whoever waits for the interpreter is woken each time that it is free, be it for a microsecond, and
# finds it taken again unless it is free for longer than the waking takes, some 0.1 ms.
_STRETCH_S: Final = 3e-4
_REST_S: Final = 3e-4
# With packets always in flight the work must still come to an end.
_PATIENCE_S: Final = 0.02
_TURN_S: Final = 0.002
# A process has caches and page tables to come back to, which is worth a longer turn.
_PROCESS_TURN_S: Final = 0.005
# Who needs memory meanwhile may have to wait, and what is returned is taken anew.
_RETURN_EVERY_S: Final = 0.1
_C_LIBRARY: Final = ctypes.CDLL(None)


def courteous_executor(name: str) -> ThreadPoolExecutor:
    """One thread that the scheduler prefers every other thread to."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_be_nice)


class ThreadTurns:
    """Has a thread stand back while packets are in flight; the event loop says when."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._is_free = threading.Event()
        self._is_free.set()
        self._is_closed = False
        self._stood_back_s = 0.0

    def clock(self) -> float:
        """Seconds of `perf_counter` but for those in which the thread stood back."""
        return time.perf_counter() - self._stood_back_s

    def stand_back(self) -> None:
        """Have the thread wait; it gets a twentieth of the time until `go_on`."""
        if not self._is_closed:
            self._is_free.clear()

    def go_on(self) -> None:
        """Let the thread run."""
        self._is_free.set()

    def close(self) -> None:
        """Let the thread run for good."""
        self._is_closed = True
        self.go_on()

    @contextmanager
    def standing_back(self, *, frees_much: bool = False) -> Iterator[None]:
        """Have this thread wait for its turns, and rest now and then, at any call it makes.

        If it frees much, that is returned to the system as it goes.
        """
        stretch_ends = turn_ends = 0.0
        return_at = 0.0 if frees_much else math.inf

        def hook(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal stretch_ends, turn_ends, return_at
            began = now = time.perf_counter()
            if self._is_free.is_set() or now < turn_ends:
                if now < stretch_ends:
                    return
                time.sleep(_REST_S)
                now = time.perf_counter()
            if now >= turn_ends and not self._is_free.wait(self._patience_s):
                turn_ends = time.perf_counter() + _TURN_S
            now = time.perf_counter()
            if now >= return_at:
                return_freed_memory()
                now = time.perf_counter()
                return_at = now + _RETURN_EVERY_S
            self._stood_back_s += now - began
            stretch_ends = now + _STRETCH_S

        before = sys.getprofile()
        sys.setprofile(hook)
        try:
            yield
        finally:
            sys.setprofile(before)
            if frees_much:
                return_freed_memory()


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


def yield_processor(group: int) -> None:
    """Have the scheduler prefer us to a process group that we started."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PGRP, group, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)


def take_idle_time_only() -> None:
    """Have this process run when nobody else wants to; there may be no way back."""
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def return_freed_memory() -> None:
    """Give the system what was freed; other threads have the interpreter meanwhile.

    protobuf does the same after every 10,000 frees, every 3 s at 50 decisions a second, but keeps
    the interpreter: 0.1 to 0.3 ms when there is little to return, 4 to 9 ms after a policy was
    loaded.
    """
    with suppress(AttributeError):  # the GNU C library alone has this
        _C_LIBRARY.malloc_trim(0)


def _be_nice() -> None:
    # Threads have priorities of their own on Linux; elsewhere this one stays as it is.
    with suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
