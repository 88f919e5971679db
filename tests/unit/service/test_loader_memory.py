from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.service.loader_memory import data_limit_bytes, spans_to_give_back

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


MAPS = """\
00400000-00800000 r--p 00000000 08:01 42  /usr/bin/python3.11
00800000-00a00000 r-xp 00400000 08:01 42  /usr/bin/python3.11
00a00000-00c00000 rw-p 00600000 08:01 42  /usr/bin/python3.11
10000000-20000000 rw-p 00000000 00:00 0   [heap]
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f0000200000-7f00002ff000 rw-p 00000000 00:00 0
7f0000300000-7f0000700000 ---p 00000000 00:00 0
7f0000800000-7f0000c00000 rw-s 00000000 00:01 43  /dev/zero (deleted)
7ffe00000000-7ffe00800000 rw-p 00000000 00:00 0   [stack]
7ffe00900000-7ffe00b00000 r-xp 00000000 00:00 0   [vdso]
"""


def test_a_process_that_ends_does_without_its_heap_and_what_it_can_read_again() -> None:
    assert spans_to_give_back(MAPS) == [
        (0x00400000, 0x00800000),
        (0x00800000, 0x00A00000),
        (0x10000000, 0x20000000),
        (0x7F0000000000, 0x7F0000100000),
    ]


ENDING = """
import atexit, sys
from pathlib import Path
from tamiyo_svc.policy.compiled import Library
from tamiyo_svc.service.loader_memory import end_in_steps, keep_freed_memory

keep_freed_memory()
blocks = [bytes(bytearray(b"x") * (16 << 20)) for _ in range(4)]
print("said", flush=True)
atexit.register(print, "in an orderly way")
end_in_steps(Library(Path(sys.argv[1])), 7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_ends_in_steps_with_its_code(tmp_path: Path) -> None:
    try:
        library = load_compiled(tmp_path)
    except CompiledFormUnavailableError as error:
        pytest.skip(str(error))
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, str(library.path)],
        check=False,
        capture_output=True,
        text=True,
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "said\n", "")
