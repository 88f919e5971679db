"""Trains one small network after the other beside the service, as the compose stack's trainer."""

from __future__ import annotations

import argparse
import sys
import time
from itertools import count
from pathlib import Path

import torch

from tamiyo_svc.client import from_environment
from tamiyo_svc.trainer.blueprints import write_catalog
from tamiyo_svc.trainer.loop import Trainer, TrainerSettings


def main() -> None:
    """Write the blueprint catalogue, then train run after run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catalog", type=Path, required=True, help="where the catalogue goes")
    parser.add_argument("--runs", type=int, default=0, help="stop after so many; 0 never stops")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.catalog.exists():
        write_catalog(arguments.catalog)
    for number in count(1):
        run_id = f"compose-{int(time.time())}-{number}"
        with from_environment(run_id) as client:
            summary = Trainer(client, TrainerSettings(random_seed=number)).run()
        print(
            f"{run_id}: accuracy {summary.accuracy:.4f}, {summary.received} of "
            f"{summary.published} packets answered in time, {summary.applied} commands applied",
            flush=True,
        )
        if number == arguments.runs:
            sys.exit(0)


if __name__ == "__main__":
    main()
