"""Trains every cell of the matrix and writes the page: `python -m stacks.matrix <page>`."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Final

from stacks.cells import ALL, Cell
from stacks.launch import run_cells
from stacks.page import write_page

_PACKAGES: Final = ("torch", "lightning", "transformers", "accelerate")
_AT_ONCE: Final = 2


def main(path: Path) -> None:
    """Train, with processes of their own for each framework and spread, and write."""
    groups = itertools.groupby(ALL, lambda cell: (cell.framework, cell.spread))
    verdicts: dict[Cell, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for group in pool.map(lambda cells: run_cells(cells, told), [[*g] for _, g in groups]):
            verdicts |= group
    path.write_text(write_page(verdicts, {name: version(name) for name in _PACKAGES}))


def told(cell: Cell, verdict: str) -> None:
    """Say how it goes."""
    print(f"{cell}: {verdict}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
