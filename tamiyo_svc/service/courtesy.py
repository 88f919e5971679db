"""Work beside decisions: a thread that stands back while a packet waits for its answer.

Python code in any thread keeps the interpreter from the others, and every tensor operation of a
decision has to get it back. A few milliseconds of that are the whole step budget.
"""

from __future__ import annotations

import os
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
