from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from tamiyo_svc.service.loader_memory import data_limit_bytes

MIB = 1 << 20
GIB = 1 << 30
FREEING = """
import resource
from pathlib import Path
from tamiyo_svc.service.loader_memory import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

keep_freed_memory()
before = resident()
block = bytearray(b"x") * (64 << 20)
del block
print(resident() - before)
"""


@pytest.mark.parametrize(
    ("hard", "container", "limit"),
    [
        (resource.RLIM_INFINITY, "", 6 * GIB),
        (resource.RLIM_INFINITY, "max\n", 6 * GIB),
        (resource.RLIM_INFINITY, f"{2 * GIB}\n", GIB),
        (GIB // 2, f"{2 * GIB}\n", GIB // 2),
        (resource.RLIM_INFINITY, f"{64 * GIB}\n", 6 * GIB),
    ],
)
def test_the_loader_leaves_half_of_a_container_to_the_service(
    hard: int, container: str, limit: int
) -> None:
    assert data_limit_bytes(hard, container) == limit


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_stays() -> None:
    kept = subprocess.run([sys.executable, "-c", FREEING], capture_output=True, check=True)

    assert int(kept.stdout) > 60 * MIB
