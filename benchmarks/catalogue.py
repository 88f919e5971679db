"""Whether the catalogue costs a step its budget: its blueprints, its absence, its locks, by turns.

`PYTHONPATH=tests python -m benchmarks.catalogue [--rounds N]`. A service with its defaults is fed
50 packets a second over a real Redis; every phase of two seconds asks for another blueprint of the
sample catalogue or finds the file locked or gone. The first phase of each round is the control.
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from redis import Redis
from rich.console import Console
from rich.table import Table
from support.catalogs import copy_sample, locked

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.cli.bench import state_packet
from tamiyo_svc.cli.child import child_service, free_port, scrape, stop
from tamiyo_svc.cli.measure import HEADINGS, Distribution, machine
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.core import ClientSettings
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import Event

_PHASE_S: Final = 2.0
_GAP_S: Final = 0.02
_BUDGET_MS: Final = 5.0
_WAIT_S: Final = 2.0
_REFRESH_S: Final = 0.25
_LATE: Final = frozenset({Event.TIMEOUT_INFERENCE.value, Event.LANE_BUSY.value})
_STREAMS: Final = ("oona.telemetry", "oona.emergency")


@dataclass
class Phase:
    """One way to meet the catalogue, and what the steps took meanwhile in milliseconds."""

    name: str
    blueprint: str
    file: str = "there"
    steps_ms: list[float] = field(default_factory=list)
    late: int = 0
    degraded: int = 0


def phases() -> list[Phase]:
    """The control first."""
    return [
        Phase("control: a safe blueprint", "demo-safe"),
        *(
            Phase(name, name)
            for name in (
                *("demo-elevated", "demo-quarantine", "demo-bsds-critical", "demo-bsds-high"),
                *("demo-guard-spec", "demo-odd-metadata"),
            )
        ),
        Phase("unknown blueprint", "nowhere"),
        Phase("file locked", "demo-safe", "locked"),
        Phase("file locked, unknown blueprint", "nowhere-else", "locked"),
        Phase("file gone", "demo-safe", "gone"),
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    secret = secrets.token_hex(32)
    measured = phases()
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as server:
        path = copy_sample(Path(folder, "catalog.db"))
        port = free_port(0)
        url = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            "REDIS_URL": server.url,
            "ESPER_LEYLINE_SECRET": secret,
            "TAMIYO_POLICY": "untrained",
            "TAMIYO_STATE_DIR": folder,
            "TAMIYO_HTTP_HOST": "127.0.0.1",
            "TAMIYO_HTTP_PORT": str(port),
            "URZA_DATABASE_URL": f"sqlite:///{path}",
            "TAMIYO_METADATA_REFRESH_S": str(_REFRESH_S),
        }
        with (
            child_service(environment, Path(folder, "service.log"), url) as service,
            Redis.from_url(server.url, protocol=2) as redis,
        ):
            keyring = Keyring(secret.encode())
            read = dict.fromkeys(_STREAMS, "-")
            feed(server.url, keyring, Phase("warm-up", "demo-safe"), "warm-up")
            for turn in range(rounds):
                for phase in measured:
                    run_id = f"{phase.name}-{turn}"
                    with met(phase.file, path):
                        redis.xadd("oona.normal", catalog_update(keyring))
                        feed(server.url, keyring, phase, run_id)
                        phase.degraded += int(scrape(url)["tamiyo_catalog_degraded"])
                    collect(redis, keyring, phase, run_id, read)
            stop(service)
    show(measured, rounds)


@contextmanager
def gone(path: Path) -> Iterator[None]:
    """The file is somewhere else until the block ends."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    yield
    aside.rename(path)


def met(file: str, path: Path) -> AbstractContextManager[None]:
    """The state of the file during a phase."""
    if file == "locked":
        return locked(path)
    return gone(path) if file == "gone" else nullcontext()


def catalog_update(keyring: Keyring) -> Any:
    """What makes the service read the catalogue again."""
    return seal(leyline.KernelCatalogUpdate(blueprint_id="demo-safe"), keyring).fields()


def feed(url: str, keyring: Keyring, phase: Phase, run_id: str) -> None:
    """Publish at the pace of a trainer and wait for every command."""
    client = TamiyoClient(url, keyring, run_id, ClientSettings(max_wait_s=_WAIT_S))
    with client:
        due_s = time.perf_counter()
        for step in range(1, int(_PHASE_S / _GAP_S) + 1):
            packet = state_packet(run_id, step, 4)
            if not client.publish_packet(packet, blueprint_ids=(phase.blueprint,)):
                raise RuntimeError("nothing was published")
            if client.wait(step, _WAIT_S) is None:
                raise RuntimeError(f"no command for step {step} of {run_id}")
            due_s += _GAP_S
            time.sleep(max(0.0, due_s - time.perf_counter()))


def collect(
    redis: Redis, keyring: Keyring, phase: Phase, run_id: str, read: dict[str, str]
) -> None:
    """Take what telemetry says of a run's steps; `read` is how far each stream has been."""
    for stream in _STREAMS:
        entries: Any = redis.xrange(stream, read[stream])
        for entry_id, fields in entries:
            read[stream] = f"({entry_id.decode()}"
            told: Any = parse_payload(open_envelope(fields, keyring))
            if not told.packet_id.startswith(f"{run_id}-"):
                continue
            phase.steps_ms += [
                metric.value for metric in told.metrics if metric.name == "tamiyo.step.latency_ms"
            ]
            phase.late += bool(_LATE & {event.description for event in told.events})


def show(measured: Sequence[Phase], rounds: int) -> None:
    """Print what the steps took, phase by phase."""
    at = machine()
    table = Table(title=f"read to command ready, milliseconds; {at['cpu']}, {at['cores']} cores")
    table.add_column("")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    table.add_column(f"over {_BUDGET_MS:g} ms", justify="right")
    table.add_column("without network", justify="right")
    table.add_column("degraded", justify="right")
    for phase in measured:
        over = sum(step > _BUDGET_MS for step in phase.steps_ms)
        table.add_row(
            phase.name,
            *Distribution.of(phase.steps_ms).cells(),
            str(over),
            str(phase.late),
            f"{phase.degraded}/{rounds}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
