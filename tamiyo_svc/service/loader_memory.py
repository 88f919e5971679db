"""The memory of the process that examines updates: how much it may take, and what it gives back."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path
from typing import Final

_MAX_DATA_BYTES: Final = 6 << 30
# Where a container finds its memory limit (cgroups, version 2).
_CONTAINER_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
# Parameters of the allocator, from malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_MAX: Final = -4
_MOST_FREED_BYTES: Final = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Have what is freed stay with this process; for one that does not live long.

    The kernel takes 4 to 8 ms to take 56 MB back, in which a process cannot be stopped.
    """
    with suppress(OSError, AttributeError):  # the GNU C library alone has this
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_MAX, 0)
        allocator.mallopt(_M_TRIM_THRESHOLD, _MOST_FREED_BYTES)


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
