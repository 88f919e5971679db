"""Memory of a service over many decisions: `python -m benchmarks.soak [--decisions N]`.

A closed loop of a few trainers; prints the resident memory after every segment, the growth over
the second half, and how the packets ended. Exit code 1 when the memory grew by more than noise.
"""

from __future__ import annotations

import argparse
import sys
from typing import Final

from rich.console import Console

from benchmarks import workload
from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.cli.bench import Load, Result, measure

_TRAINERS: Final = 4
_ALLOWED_GROWTH: Final = 0.02
"""Share of the resident memory; allocators keep and return whole arenas."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--decisions", type=int, default=100_000)
    wanted = arguments.parse_args().decisions
    console = Console(width=100)
    load = Load(
        _TRAINERS, 0.0, wanted / 100, 5.0, workload.SEEDS, (workload.BLUEPRINT,), decisions=wanted
    )
    with EmbeddedRedis() as redis:
        # Redis holds what the trimming has not reached yet; the service is what is measured.
        variables = {"OONA_MESSAGE_TTL_MS": "30000", "TAMIYO_STEP_TIMEOUT_MS": "1000"}
        result = measure(load, variables, redis.url, workload.CATALOG)
    for line in result.lines(5.0):
        console.print(line, highlight=False)
    growth = second_half_growth(result)
    console.print(
        f"{len(result.command_ms)} decisions, resident {result.resident_bytes[-1] / 1e6:.0f} MB, "
        f"growth over the second half {growth:+.2%}",
        highlight=False,
    )
    sys.exit(1 if growth > _ALLOWED_GROWTH else 0)


def second_half_growth(result: Result) -> float:
    """Share by which the resident memory grew from the middle of the run to its end."""
    middle = result.resident_bytes[len(result.resident_bytes) // 2]
    return result.resident_bytes[-1] / middle - 1


if __name__ == "__main__":
    main()
