"""A long run that must end with balanced books and no growth: `make soak`.

One service takes packets of many runs in bursts, so that most are superseded. Every stream is
followed while it is trimmed behind the ledger's back. Prints memory of the service and of Redis
over the run; the exit code is 1 if the books do not balance or either has grown.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from chaos.scenarios import KEYRING, BrokenPromiseError, Figures, replicas
from redis import Redis
from rich.console import Console
from rich.table import Table
from support.ledger import DEAD, EMERGENCY, NORMAL, TELEMETRY, connect, wait_quiet
from support.policies import checkpoint
from support.replica import Replica
from support.running_ledger import RunningLedger

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.cli.child import outcomes, scrape
from tamiyo_svc.cli.measure import machine

_RUNS: Final = 200
_TTL_MS: Final = 30_000
_SETTLED_S: Final = 50.0
"""By then Redis holds as much as it ever will: what is too old is trimmed every 15 s."""
_SAMPLE_S: Final = 1.0
_ROUND: Final = 10
"""Runs that publish in one round trip."""
_BURST: Final = 8
"""Most packets of a run in a round."""
_BACKLOG: Final = 2000
"""Entries the service may be behind before publishing waits."""
_ROWS: Final = 20
_ALLOWED_GROWTH: Final = 0.05
"""Share by which the peak of the last quarter may exceed that of the second.

Redis trims whole nodes of a stream every 15 s, and allocators keep and return whole arenas.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at everything that could grow."""

    at_s: float
    published: int
    commands: int
    service_bytes: int
    redis_bytes: int
    entries: int


@dataclass
class Soak:
    """What a run showed."""

    packets: int
    samples: list[Sample] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def growth(self, sizes: Sequence[int]) -> float:
        """By what share the peak of the last quarter exceeds that of the second."""
        quarter = len(sizes) // 4
        return max(sizes[-quarter:]) / max(sizes[quarter : 2 * quarter]) - 1

    def growths(self) -> dict[str, float]:
        """The growth of the service and of Redis; nothing of a run too short to tell."""
        if self.samples[-1].at_s < 4 * _SETTLED_S:
            return {}
        return {
            "service": self.growth([sample.service_bytes for sample in self.samples]),
            "Redis": self.growth([sample.redis_bytes for sample in self.samples]),
        }

    def table(self) -> Table:
        """The run in some twenty rows, each with the peaks since the one before."""
        table = Table(title=f"{self.packets} packets", title_justify="left")
        for heading in ("s", "packets", "commands", "service MB", "Redis MB", "entries held"):
            table.add_column(heading, justify="right")
        size = max(1, len(self.samples) // _ROWS)
        for start in range(0, len(self.samples), size):
            part = self.samples[start : start + size]
            table.add_row(
                f"{part[-1].at_s:.0f}",
                str(part[-1].published),
                str(part[-1].commands),
                f"{max(sample.service_bytes for sample in part) / 1e6:.1f}",
                f"{max(sample.redis_bytes for sample in part) / 1e6:.1f}",
                str(max(sample.entries for sample in part)),
            )
        return table


def soak(packets: int) -> Figures:
    """Publish so many packets as fast as they are taken and check the books."""
    found = run(packets, _RUNS, 0.0)
    if found.problems:
        raise BrokenPromiseError("; ".join(found.problems[:5]))
    return {"packets": packets, "outcomes": found.outcomes}


def run(packets: int, runs: int, per_s: float, policy: str = "") -> Soak:
    """Publish packets at a rate, 0 for as fast as they are taken, and book what becomes of them."""
    found = Soak(packets)
    with (
        _policy_file(policy) as name,
        EmbeddedRedis() as server,
        replicas(
            server.url, policy=name, read_count=256, message_ttl_ms=_TTL_MS, step_timeout_ms=1000.0
        ) as (replica,),
        connect(server.url, 30.0) as redis,
    ):
        ledger = RunningLedger(redis, KEYRING, runs)
        started_s = sampled_s = time.monotonic()
        for counts in _rounds(list(ledger.runs), packets):
            ledger.publish(counts, seeds=random.choice((0, 1, 4)))
            ledger.follow()
            while _backlog(redis) > _BACKLOG:
                ledger.follow()
                time.sleep(0.005)
            if per_s:
                due_s = started_s + ledger.published / per_s
                time.sleep(max(0.0, due_s - time.monotonic()))
            if (now_s := time.monotonic()) > sampled_s + _SAMPLE_S:
                sampled_s = now_s
                found.samples.append(_sample(now_s - started_s, ledger, redis, replica))
        wait_quiet(server.url)
        ledger.follow()
        found.samples.append(_sample(time.monotonic() - started_s, ledger, redis, replica))
        url = f"http://127.0.0.1:{replica.http_port}"
        found.outcomes = {outcome: count for outcome, count in outcomes(url).items() if count}
        found.problems = list(ledger.problems(found.outcomes))
    return found


@contextmanager
def _policy_file(policy: str) -> Iterator[str]:
    """The policy's name, or the file of a small one."""
    if policy:
        yield policy
        return
    with tempfile.TemporaryDirectory(prefix="tamiyo-soak-") as folder:
        path = Path(folder, "policy.safetensors")
        path.write_bytes(checkpoint())
        yield str(path)


def _rounds(runs: Sequence[str], packets: int) -> Iterator[dict[str, int]]:
    """Bursts of runs that take turns, until so many packets are published."""
    left = packets
    turns = itertools.cycle(runs)
    while left:
        counts = {}
        for run_id in itertools.islice(turns, min(_ROUND, len(runs))):
            counts[run_id] = min(left, random.randint(1, _BURST))
            left -= counts[run_id]
        yield counts


def _backlog(redis: Redis) -> int:
    """Entries of the normal stream that the service has not ended."""
    (group,) = _groups(redis)
    lag = group.get("lag")
    if lag is None:  # older servers never tell, newer ones not after an entry was deleted
        delivered = group["last-delivered-id"].decode()
        entries: Any = redis.xrange(NORMAL, f"({delivered}", count=_BACKLOG + 1)
        lag = len(entries)
    return int(lag) + int(group["pending"])


def _groups(redis: Redis) -> Any:
    return redis.xinfo_groups(NORMAL)


def _sample(at_s: float, ledger: RunningLedger, redis: Redis, replica: Replica) -> Sample:
    memory: Any = redis.info("memory")
    samples = scrape(f"http://127.0.0.1:{replica.http_port}")
    entries = sum(int(redis.xlen(name)) for name in (NORMAL, EMERGENCY, TELEMETRY, DEAD))
    return Sample(
        at_s,
        ledger.published,
        ledger.commands,
        int(samples["process_resident_memory_bytes"]),
        int(memory["used_memory"]),
        entries,
    )


def main() -> int:
    """Run the soak and print what it showed."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--packets", type=int, default=1_000_000)
    arguments.add_argument("--runs", type=int, default=_RUNS)
    arguments.add_argument("--rate", type=float, default=600.0, help="packets a second, 0: no pace")
    arguments.add_argument("--policy", default="", help="as TAMIYO_POLICY; a small one if left out")
    given = arguments.parse_args()
    console = Console(width=100)
    found = run(given.packets, given.runs, given.rate, given.policy)
    console.print(found.table())
    growths = found.growths()
    ended = ", ".join(f"{name} {count}" for name, count in found.outcomes.items())
    grown = ", ".join(f"{name} {growth:+.1%}" for name, growth in growths.items())
    grown = grown or f"not judged below {4 * _SETTLED_S:.0f} s"
    at = machine()
    for line in (
        f"{given.packets} packets of {given.runs} runs in {found.samples[-1].at_s:.0f} s: {ended}",
        "books: " + ("balanced" if not found.problems else "; ".join(found.problems[:10])),
        f"growth of the peak from the second to the last quarter: {grown}",
        f"{at['cpu']}, {at['cores']} cores, Python {at['python']}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return 1 if found.problems or max(growths.values(), default=0.0) > _ALLOWED_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
