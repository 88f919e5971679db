"""Help for a thread that waits for a core although another one is free.

The kernel has a woken thread run where it ran last or where its waker runs. Who has that core may
keep it for milliseconds, in the kernel most of all, and on a virtual machine idle cores often count
as taken: only the next tick, 4 ms later or less, moves the thread.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from contextlib import suppress
from typing import Final

_C_LIBRARY: Final = ctypes.PyDLL(None)


class ThreadPlacement:
    """Knows how long the thread that made it ran, and moves it where it is free to run.

    Raises:
        AttributeError: this system cannot; Linux can.
    """

    def __init__(self) -> None:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._thread = threading.get_native_id()
        self._cores = os.sched_getaffinity
        self._confine = os.sched_setaffinity
        self._here = _C_LIBRARY.sched_getcpu

    @classmethod
    def of_this_thread(cls) -> ThreadPlacement | None:
        """The placement of the calling thread; None where the system cannot move it."""
        try:
            return cls()
        except AttributeError:
            return None

    def ran_s(self) -> float:
        """Processor time of the thread in seconds, waiting not included; infinite at its end."""
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return math.inf

    def move_here(self) -> None:
        """Have the thread go on on the caller's core, which the caller is about to leave."""
        with suppress(OSError):  # it has ended, or the system does not let us
            cores = self._cores(self._thread)
            here = self._here()
            if here in cores:
                self._confine(self._thread, {here})
                self._confine(self._thread, cores)
