"""One rank that trains cells in turn: `python -m stacks.rank <folder> <bare 0|1> <cell>...`.

With several ranks in the environment that torchrun gives. Writes what it saw of each cell to
`<folder>/<number>.rank<n>.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.nn
from stacks.cells import Cell, Framework, read_cell
from stacks.observation import Observation, overheard
from torch import distributed


def train(cell: Cell, folder: Path, *, bare: bool) -> Observation:
    """Train a cell with its framework, and see what is to be seen."""
    seen = Observation()
    torch._dynamo.reset()
    # Only what is needed is imported, as each of them takes seconds.
    with overheard(seen):
        try:
            if cell.framework is Framework.PLAIN:
                from stacks import plain

                if cell.ranks > 1 and not distributed.is_initialized():
                    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
                plain.train(cell, folder, seen, bare=bare)
            elif cell.framework is Framework.LIGHTNING:
                from stacks import with_lightning

                with_lightning.train(cell, folder, seen, bare=bare)
            else:
                from stacks import with_transformers

                with_transformers.train(cell, folder, seen, bare=bare)
        # What a framework raises is what this is here to see.
        except Exception as error:
            traceback.print_exc()
            words = str(error).strip() or type(error).__name__
            seen.raised = words.splitlines()[0]
    return seen


def main(folder: Path, bare: bool, cells: list[Cell]) -> None:
    """Train all cells, or up to the first that raises, as ranks may be apart then."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for number, cell in enumerate(cells):
        own = folder / f"files{number}"
        own.mkdir(exist_ok=True)
        print(f"=== {cell}", file=sys.stderr, flush=True)
        seen = train(cell, own, bare=bare)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as unfinished:
            json.dump(dataclasses.asdict(seen), unfinished)
        os.replace(unfinished.name, folder / f"{number}.rank{rank}.json")
        if seen.raised:
            break
    sys.stderr.flush()
    # Frameworks hold the group; a process that ends in the usual way would abort for it.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1", [read_cell(text) for text in sys.argv[3:]])
