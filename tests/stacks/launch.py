"""Runs cells in processes of their own, and says of each what became of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stacks.cells import Cell
from stacks.observation import Observation
from stacks.verdict import judge, judge_raised

CELL_LIMIT_S = 300.0
"""How long a cell, and the imports in front of the first, may take until it counts as a hang."""
_TESTS = Path(__file__).parents[1]
_LOOK_AGAIN_S = 0.05

Told = Callable[[Cell, str], None]


def run_cells(cells: Sequence[Cell], told: Told = lambda cell, verdict: None) -> dict[Cell, str]:
    """The verdict of each cell, all of one number of ranks, trained in turn in one process each.

    `told` hears each as soon as it is known. After one that raises or hangs come fresh processes.
    """
    verdicts: dict[Cell, str] = {}
    left = list(cells)
    while left:
        for cell, seen in _train([*left], bare=False):
            if seen is None:
                verdict = f"FAILS: no end within {CELL_LIMIT_S:g} s, or the process died"
            elif any(each.raised for each in seen):
                (_, without), *_ = _train([cell], bare=True)
                verdict = judge_raised(seen, without)
            else:
                verdict = judge(cell, seen)
            verdicts[cell] = verdict
            told(cell, verdict)
            left.remove(cell)
    return verdicts


def _train(cells: Sequence[Cell], *, bare: bool) -> Iterator[tuple[Cell, list[Observation] | None]]:
    """What the ranks saw of each cell, None where they came to no end, which is the last then."""
    ranks = cells[0].ranks
    with tempfile.TemporaryDirectory() as name, _processes(Path(name), cells, bare) as processes:
        for number, cell in enumerate(cells):
            paths = [Path(name, f"{number}.rank{rank}.json") for rank in range(ranks)]
            if not _wait(paths, processes):
                yield cell, None
                return
            seen = [Observation(**json.loads(path.read_text())) for path in paths]
            yield cell, seen
            if any(each.raised for each in seen):
                return


def _wait(paths: Sequence[Path], processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    limit_s = time.monotonic() + CELL_LIMIT_S
    while time.monotonic() < limit_s:
        ended = all(process.poll() is not None for process in processes)
        if all(path.exists() for path in paths):
            return True
        if ended:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return False


@contextmanager
def _processes(
    folder: Path, cells: Sequence[Cell], bare: bool
) -> Iterator[list[subprocess.Popen[bytes]]]:
    ranks = cells[0].ranks
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(_TESTS.parent), str(_TESTS))),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    try:
        for rank in range(ranks):
            place = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "stacks.rank", folder, str(int(bare)), *map(str, cells)],
                    env={**environment, **(place if ranks > 1 else {})},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=_log(rank),
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _log(rank: int) -> int:
    """Where a rank's errors go: nowhere, or to this process's own if STACKS_VERBOSE is set."""
    return subprocess.DEVNULL if not os.environ.get("STACKS_VERBOSE") else sys.stderr.fileno()
