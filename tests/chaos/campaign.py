"""The fault campaign at its full length: `make chaos`.

Prints one row a fault with how often it ran, what was found and whether the promise held; the
exit code is 1 if one was broken. Arguments name the faults to run; without any all are run.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable

from chaos import scenarios
from rich.console import Console
from rich.table import Table

FULL: list[tuple[str, Callable[[int], scenarios.Figures], int]] = [
    ("service killed under load", scenarios.kill_under_load, 100),
    ("one of three replicas killed, one frozen", scenarios.kill_one_of_three, 50),
    ("replies of commits and reads lost", scenarios.lose_replies, 100),
    ("Redis restarted, killed, frozen", scenarios.restart_redis, 30),
    ("FLUSHALL", scenarios.flush_redis, 10),
    ("failover to a promoted copy", scenarios.fail_over, 10),
    ("Redis out of memory", scenarios.exhaust_memory, 5),
    ("network delayed, stalled, half open", scenarios.disturb_network, 10),
    ("poisoned entries", scenarios.poison, 100_000),
    ("packets replayed, reordered, doubled", scenarios.repeat_packets, 10_000),
    ("clocks an hour off", scenarios.shift_clocks, 5),
    ("lane hangs for good", scenarios.hang_lane, 3),
    ("SIGTERM under load", scenarios.stop_under_load, 20),
]


def main(names: list[str]) -> int:
    """Run the campaign and print its table."""
    console = Console(width=160)
    table = Table(title=f"Faults, on {os.cpu_count()} cores, Python {platform.python_version()}")
    for column in ("fault", "runs", "holds", "found", "s"):
        table.add_column(column, overflow="fold")
    broken = 0
    for title, scenario, times in FULL:
        if names and scenario.__name__ not in names:
            continue
        started = time.monotonic()
        try:
            figures = scenario(times)
            held = "yes"
        except (AssertionError, TimeoutError) as error:
            figures, held = {"broken": str(error)[:300]}, "NO"
            broken += 1
        took_s = time.monotonic() - started
        found = ", ".join(f"{name} {value}" for name, value in figures.items())
        console.print(f"{title}: {held} ({took_s:.0f} s) {found}", highlight=False, soft_wrap=True)
        table.add_row(title, str(times), held, found, f"{took_s:.0f}")
    console.print(table)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
