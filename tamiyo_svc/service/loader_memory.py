"""The memory of the process that examines updates: how much it may take, and what it gives back."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from tamiyo_svc.policy.compiled import Library

_MAX_DATA_BYTES: Final = 6 << 30
# Where a container finds its memory limit (cgroups, version 2).
_CONTAINER_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
# Parameters of the allocator, from malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4
_MOST_FREED_BYTES: Final = (1 << 31) - 1
# What is worth giving back before the end, and how much of it at once: some 0.05 ms.
_SMALLEST_SPAN_BYTES: Final = 1 << 20
_STEP_BYTES: Final = 256 << 10


def keep_freed_memory() -> None:
    """Have what is freed stay with this process; for one that does not live long.

    The kernel takes 4 to 8 ms to take 56 MB back, in which a process cannot be stopped.
    """
    with suppress(OSError, AttributeError):  # the GNU C library alone has this
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_MAX, 0)
        allocator.mallopt(_M_TRIM_THRESHOLD, _MOST_FREED_BYTES)


def end_in_steps(library: Library, code: int) -> NoReturn:
    """End this process at once, but for giving its memory back step by step.

    The kernel takes 30 ms to take back half a gigabyte when a process ends, in which it cannot be
    stopped; between two steps it can.
    """
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.is_file() else ""
    spans = spans_to_give_back(text)
    ends = (ctypes.c_uint64 * (2 * len(spans)))(*(end for span in spans for end in span))
    library.end(ctypes.addressof(ends), len(spans), _STEP_BYTES, code)
    os._exit(code)  # not reached


def spans_to_give_back(maps: str) -> list[tuple[int, int]]:
    """The large spans of `/proc/self/maps` that a process can do without to end: its heap and other
    memory of its own, and what it has mapped of files without changing it.
    """
    spans = []
    for line in maps.splitlines():
        ends, permissions, _, _, inode, *path = line.split()
        start, end = (int(place, 16) for place in ends.split("-"))
        own = inode == "0" and permissions == "rw-p" and path in ([], ["[heap]"])
        unchanged = inode != "0" and permissions in ("r--p", "r-xp")
        if (own or unchanged) and end - start >= _SMALLEST_SPAN_BYTES:
            spans.append((start, end))
    return spans


def data_limit_bytes(hard: int, container: str) -> int:
    """Private memory this process may take.

    `hard` is what `getrlimit` gives; `container` is the memory limit as cgroups write it, empty if
    there is none. Half of that is left to the service: at the limit of a container the kernel ends
    all of its processes.
    """
    limits = [_MAX_DATA_BYTES]
    if hard != resource.RLIM_INFINITY:
        limits.append(hard)
    if container.strip().isdecimal():
        limits.append(int(container) // 2)
    return min(limits)


def bound_memory() -> None:
    """Hold this process to its limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    container = _CONTAINER_LIMIT.read_text() if _CONTAINER_LIMIT.is_file() else ""
    resource.setrlimit(resource.RLIMIT_DATA, (data_limit_bytes(hard, container), hard))
