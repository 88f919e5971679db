"""The fault campaign at its full length: `make chaos`.

Prints one row a fault with how often it ran, what was found and whether the promise held; the
exit code is 1 if one was broken. Arguments name the faults to run; without any all are run.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from chaos import scenarios
from rich.console import Console
from rich.table import Table

_RECOVERY: Final = {"recovery max s": 5.0}
_STOP: Final = {"stop max s": 10.0}
_CONTROL_FACTOR: Final = 2.0
"""The longest of thousands of waits for nothing still varies from run to run by so much."""


@dataclass(frozen=True)
class Row:
    """One fault, how often to run it, and how long what it measures may take."""

    title: str
    scenario: Callable[[int], scenarios.Figures]
    times: int
    limits: Mapping[str, float] = field(default_factory=dict)


FULL: Final = (
    Row("service killed under load", scenarios.kill_under_load, 100),
    Row("one of three replicas killed, one frozen", scenarios.kill_one_of_three, 50),
    Row(
        "the same on four partitions in a cluster",
        scenarios.kill_one_of_three_on_partitions,
        20,
    ),
    Row("replies of commits and reads lost", scenarios.lose_replies, 100),
    Row("Redis restarted, killed", scenarios.restart_redis, 20, _RECOVERY),
    Row("Redis paused 10 s", scenarios.pause_redis, 10, _RECOVERY),
    Row("FLUSHALL", scenarios.flush_redis, 10, _RECOVERY),
    Row("failover to a promoted copy", scenarios.fail_over, 10, _RECOVERY),
    Row("Redis out of memory", scenarios.exhaust_memory, 5),
    Row("network delayed, stalled, half open", scenarios.disturb_network, 10),
    Row("poisoned entries", scenarios.poison, 100_000),
    Row("packets replayed, reordered, doubled", scenarios.repeat_packets, 10_000),
    Row("clocks an hour off", scenarios.shift_clocks, 5),
    Row("lane hangs for good", scenarios.hang_lane, 3),
    Row("SIGTERM under load", scenarios.stop_under_load, 20, _STOP),
)


def run(row: Row) -> scenarios.Figures:
    """Run one row and judge what it measured.

    Raises:
        BrokenPromiseError, TimeoutError: the promise does not hold.
    """
    figures: Mapping[str, Any] = row.scenario(row.times)
    limits = dict(row.limits)
    if "control max ms" in figures:
        limits["beyond budget max ms"] = _CONTROL_FACTOR * figures["control max ms"]
    for name, limit in limits.items():
        scenarios.expect(figures[name] <= limit, f"{name} {figures[name]} of {limit:g}; {figures}")
    return figures


def main(names: list[str]) -> int:
    """Run the campaign and print its table."""
    console = Console(width=160)
    table = Table(title=f"Faults, on {os.cpu_count()} cores, Python {platform.python_version()}")
    for column in ("fault", "runs", "holds", "found", "s"):
        table.add_column(column, overflow="fold")
    broken = 0
    for row in FULL:
        if names and row.scenario.__name__ not in names:
            continue
        started = time.monotonic()
        try:
            figures = run(row)
            held = "yes"
        except (AssertionError, TimeoutError) as error:
            figures, held = {"broken": str(error)[:600]}, "NO"
            broken += 1
        took_s = time.monotonic() - started
        found = ", ".join(f"{name} {value}" for name, value in figures.items())
        console.print(
            f"{row.title}: {held} ({took_s:.0f} s) {found}", highlight=False, soft_wrap=True
        )
        table.add_row(row.title, str(row.times), held, found, f"{took_s:.0f}")
    console.print(table)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
