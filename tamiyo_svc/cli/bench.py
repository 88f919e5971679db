"""`tamiyo bench`: virtual trainers against a real service over a real Redis."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import typer
from redis import Redis
from rich.console import Console
from rich.table import Table

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.cli.child import child_service, free_port, scrape, stop
from tamiyo_svc.cli.measure import HEADINGS, Distribution, WeightProbe, machine, timed_ms
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.core import ClientSettings
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload
from tamiyo_svc.leyline.partition import tags
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import Outcome

_WAIT_S: Final = 2.0
_SEGMENT_S: Final = 10.0
_PROBES: Final = 50
_PROBE_GAP_S: Final = 0.02
_SCRAPE_S: Final = 1.0
_PAGE: Final = 500
_STAGES: Final = {
    "tamiyo.step.latency_ms": "step: read to command ready",
    "tamiyo.inference.latency_ms": "  in the lane and back",
    "tamiyo.graph.build_ms": "    graph build",
    "tamiyo.gnn.inference.latency_ms": "    forward",
}
"""Metrics of the telemetry and what the table calls them."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the trainers do; `rate` is decisions a second of all together, 0 a closed loop."""

    trainers: int = 1
    rate: float = 50.0
    duration_s: float = 60.0
    warm_up_s: float = 5.0
    seeds: int = 4
    blueprints: tuple[str, ...] = ()
    decisions: int = 0
    """End early once there were so many; 0 for no such end."""


@dataclass(slots=True)
class Result:
    """What a load showed; times in milliseconds, CPU in cores, memory in bytes."""

    load: Load
    command_ms: list[float] = field(default_factory=list)
    missed: int = 0
    unverified: int = 0
    duration_s: float = 0.0
    stages_ms: dict[str, list[float]] = field(default_factory=dict)
    timeouts: int = 0
    probe_ms: list[float] = field(default_factory=list)
    cpu_cores: float = 0.0
    start_s: float = 0.0
    resident_bytes: list[int] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    received: int = 0
    compiled: bool = False
    load_average: list[float] = field(default_factory=list)

    def over_budget(self, budget_ms: float) -> float:
        """Share of the decisions whose step took longer than the budget."""
        steps = self.stages_ms.get("tamiyo.step.latency_ms", [])
        return sum(step > budget_ms for step in steps) / len(steps) if steps else float("nan")

    def as_json(self, budget_ms: float) -> dict[str, Any]:
        """The figures, without the single times."""
        return {
            "machine": machine(),
            "load": asdict(self.load),
            "engine": "compiled" if self.compiled else "eager",
            "decisions_per_s": len(self.command_ms) / self.duration_s,
            "publish_to_command_ms": asdict(Distribution.of(self.command_ms)),
            "stages_ms": {
                name: asdict(Distribution.of(times)) for name, times in self.stages_ms.items()
            },
            "probe_ms": asdict(Distribution.of(self.probe_ms)),
            "over_budget_share": self.over_budget(budget_ms),
            "inference_timeouts": self.timeouts,
            "missed": self.missed,
            "unverified": self.unverified,
            "received": self.received,
            "outcomes": self.outcomes,
            "service_cpu_cores": self.cpu_cores,
            "start_to_ready_s": self.start_s,
            "service_resident_bytes": self.resident_bytes,
            "load_average_while_running": self.load_average,
        }

    def table(self) -> Table:
        """The figures as a table."""
        load = self.load
        pace = f"{load.rate:g} a second" if load.rate else "closed loop"
        table = Table(
            title=f"{load.trainers} trainers, {pace}, {self.duration_s:.0f} s; milliseconds",
            title_justify="left",
        )
        table.add_column("")
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        table.add_row("publish to verified command", *Distribution.of(self.command_ms).cells())
        for name, title in _STAGES.items():
            table.add_row(title, *Distribution.of(self.stages_ms.get(name, [])).cells())
        table.add_row("probe: 28 MB streamed", *Distribution.of(self.probe_ms).cells())
        return table

    def lines(self, budget_ms: float) -> list[str]:
        """The other figures in words."""
        ended = ", ".join(f"{name} {count}" for name, count in self.outcomes.items() if count)
        resident = [f"{size / 1e6:.0f}" for size in self.resident_bytes]
        if len(resident) > 5:
            resident = [*resident[:2], "...", *resident[-2:]]
        at = machine()
        engine = "compiled" if self.compiled else "eager"
        rate = len(self.command_ms) / self.duration_s
        over = self.over_budget(budget_ms)
        lost = (
            f"{self.timeouts} inference timeouts, {self.missed} commands missed, "
            f"{self.unverified} unverified"
        )
        loads = " ".join(f"{load:.2f}" for load in self.load_average)
        return [
            f"engine {engine}, start to ready {self.start_s:.1f} s",
            f"{rate:.0f} decisions a second, {over:.2%} over {budget_ms:g} ms, {lost}",
            f"packets received {self.received}, ended: {ended}",
            f"service: {self.cpu_cores:.2f} cores, resident {' '.join(resident)} MB",
            f"{at['cpu']}, {at['cores']} cores, load average while running {loads}",
        ]


def bench(
    load: Load,
    variables: Mapping[str, str],
    redis_url: str | None,
    catalog: Path | None,
    as_json: bool,
) -> int:
    """Start a service of its own, load it and print what that showed.

    Without `redis_url` a private Redis is started. The exit code is 1 when a packet is left
    without an outcome or a command does not verify.
    """
    if redis_url is not None:
        return _report(measure(load, variables, redis_url, catalog), variables, as_json)
    with EmbeddedRedis() as redis:
        return _report(measure(load, variables, redis.url, catalog), variables, as_json)


def measure(
    load: Load, variables: Mapping[str, str], redis_url: str, catalog: Path | None
) -> Result:
    """Load a service that runs with these variables over everything else's defaults.

    Raises:
        ConfigurationError: the service does not start.
    """
    # The trainers' threads must hand over as promptly as separate processes would.
    sys.setswitchinterval(5e-4)
    secret = secrets.token_hex(32)
    result = Result(load)
    with tempfile.TemporaryDirectory(prefix="tamiyo-bench-") as folder:
        if catalog is None:
            from tamiyo_svc.trainer.blueprints import write_catalog

            catalog = Path(folder, "catalog.db")
            write_catalog(catalog)
        port = free_port(0)
        url = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            "TAMIYO_POLICY": "untrained",
            "TAMIYO_STATE_DIR": folder,
            "OONA_PARTITIONS": "1",
            **variables,
            "REDIS_URL": redis_url,
            "ESPER_LEYLINE_SECRET": secret,
            "URZA_DATABASE_URL": f"sqlite:///{catalog.resolve()}",
            "TAMIYO_HTTP_HOST": "127.0.0.1",
            "TAMIYO_HTTP_PORT": str(port),
            "TAMIYO_LOG_FORMAT": "json",
            "OMP_NUM_THREADS": "1",
        }
        started = time.perf_counter()
        with child_service(environment, Path(folder, "service.log"), url) as service:
            result.start_s = time.perf_counter() - started
            _run(
                result,
                redis_url,
                Keyring(secret.encode()),
                url,
                int(environment["OONA_PARTITIONS"]),
            )
            stop(service)
    return result


def state_packet(run_id: str, step: int, seeds: int) -> leyline.SystemStatePacket:
    """A packet as a trainer sends it: losses that fall, seeds in every stage."""
    loss = 1.0 / (1.0 + step / 500)
    packet = leyline.SystemStatePacket(
        version=1,
        packet_id=f"{run_id}-{step}",
        training_run_id=run_id,
        source_subsystem="tolaria",
        current_epoch=1 + step // 100,
        global_step=step,
        timestamp_ns=time.time_ns(),
        training_loss=loss,
        validation_loss=loss,
        training_metrics={
            "loss": loss,
            "gradient_norm": 1.0 + 0.1 * (step % 7),
            "samples_per_s": 4500.0,
            "hook_latency_ms": 5.0 + step % 3,
            "step_latency_ms": 20.0,
            "optimizer_lr": 0.01,
            "epochs_total": 100.0,
        },
    )
    for index in range(seeds):
        stage = cast("leyline.SeedLifecycleStage", leyline.SEED_STAGE_DORMANT + index % 6)
        packet.seed_states.add(
            seed_id=f"seed-{index}",
            stage=stage,
            gradient_norm=0.5,
            learning_rate=0.01,
            layer_depth=index,
            age_epochs=2 + step // 100,
            risk_score=0.2,
        )
    return packet


class VirtualTrainer:
    """One run that publishes at its pace and waits for each command."""

    def __init__(self, client: TamiyoClient, load: Load) -> None:
        self._client = client
        self._load = load
        self._step = 0
        self.command_ms: list[float] = []
        self.missed = 0

    def run(self, duration_s: float, offset_s: float) -> None:
        """Publish for a while, first after `offset_s`."""
        load = self._load
        gap_s = load.trainers / load.rate if load.rate else 0.0
        due_s = time.perf_counter() + offset_s
        end_s = due_s + duration_s
        while due_s < end_s:
            if (left_s := due_s - time.perf_counter()) > 0:
                time.sleep(left_s)
            self._one()
            now_s = time.perf_counter()
            # A trainer that waited too long goes on from there; it does not catch up.
            due_s = max(now_s, due_s + gap_s)

    def _one(self) -> None:
        self._step += 1
        packet = state_packet(self._client.run_id, self._step, self._load.seeds)
        started = time.perf_counter()
        published = self._client.publish_packet(packet, blueprint_ids=self._load.blueprints)
        if published and self._client.wait(self._step, _WAIT_S) is not None:
            self.command_ms.append((time.perf_counter() - started) * 1e3)
        else:
            self.missed += 1


class _Scraper:
    """Reads the metrics once a second, as Prometheus would do at its most eager."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/metrics"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._scrape, name="scraper")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _scrape(self) -> None:
        while not self._stop.wait(_SCRAPE_S):
            with urllib.request.urlopen(self._url, timeout=5) as answer:  # noqa: S310  loopback
                answer.read()


class _Telemetry:
    """Reads what the service told about its decisions since the last call."""

    def __init__(self, redis: Redis, keyring: Keyring, partitions: int) -> None:
        self._redis = redis
        self._keyring = keyring
        names = ("oona.telemetry", "oona.emergency")
        self._after = dict.fromkeys((name + tag for tag in tags(partitions) for name in names), "0")

    def skip(self) -> None:
        """Leave out everything there is."""
        for stream in self._after:
            newest: Any = self._redis.xrevrange(stream, count=1)
            if newest:
                self._after[stream] = newest[0][0].decode()

    def add_to(self, result: Result) -> None:
        """Take what the new telemetry says into the result."""
        for stream in self._after:
            while True:
                start = f"({self._after[stream]}"
                entries: Any = self._redis.xrange(stream, start, count=_PAGE)
                if not entries:
                    break
                self._after[stream] = entries[-1][0].decode()
                for _, fields in entries:
                    message = parse_payload(open_envelope(fields, self._keyring))
                    if isinstance(message, leyline.TelemetryPacket):
                        self._take(message, result)

    @staticmethod
    def _take(packet: leyline.TelemetryPacket, result: Result) -> None:
        for metric in packet.metrics:
            if metric.name in _STAGES:
                result.stages_ms.setdefault(metric.name, []).append(metric.value)
        events = {event.description for event in packet.events}
        result.timeouts += bool(events & {"timeout_inference", "lane_busy"})


def _run(result: Result, redis_url: str, keyring: Keyring, url: str, partitions: int) -> None:
    load = result.load
    redis = Redis.from_url(redis_url)
    telemetry = _Telemetry(redis, keyring, partitions)
    probe = WeightProbe()
    settings = ClientSettings(partitions=partitions)
    clients = [
        TamiyoClient(redis_url, keyring, f"bench-{secrets.token_hex(4)}-{number}", settings)
        for number in range(load.trainers)
    ]
    trainers = [VirtualTrainer(client, load) for client in clients]
    try:
        _segment(trainers, load, load.warm_up_s)
        for trainer in trainers:
            trainer.command_ms.clear()
            trainer.missed = 0
        telemetry.skip()
        cpu_s = 0.0
        left_s = load.duration_s
        while left_s > 0 and not _is_enough(trainers, load):
            result.probe_ms += timed_ms(probe, _PROBES, _PROBE_GAP_S)
            before, started = scrape(url), time.perf_counter()
            with _Scraper(url):
                _segment(trainers, load, min(_SEGMENT_S, left_s))
            result.duration_s += time.perf_counter() - started
            after = scrape(url)
            cpu_s += after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
            result.resident_bytes.append(int(after["process_resident_memory_bytes"]))
            result.load_average.append(os.getloadavg()[0])
            telemetry.add_to(result)
            left_s -= _SEGMENT_S
        result.cpu_cores = cpu_s / result.duration_s
        _finish(result, clients, trainers, scrape(url))
    finally:
        for client in clients:
            client.close()
        redis.close()


def _is_enough(trainers: Sequence[VirtualTrainer], load: Load) -> bool:
    return 0 < load.decisions <= sum(len(trainer.command_ms) for trainer in trainers)


def _segment(trainers: Sequence[VirtualTrainer], load: Load, duration_s: float) -> None:
    """Let all trainers work for a while; at a fixed rate their steps are spread evenly."""
    spread_s = 1 / load.rate if load.rate else 0.0
    threads = [
        threading.Thread(target=trainer.run, args=(duration_s, number * spread_s), daemon=True)
        for number, trainer in enumerate(trainers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _finish(
    result: Result,
    clients: Sequence[TamiyoClient],
    trainers: Sequence[VirtualTrainer],
    samples: Mapping[str, float],
) -> None:
    for trainer in trainers:
        result.command_ms += trainer.command_ms
        result.missed += trainer.missed
    result.unverified = sum(sum(client.counters.rejected.values()) for client in clients)
    result.outcomes = {
        outcome.value: int(samples[f'tamiyo_packets_total{{outcome="{outcome.value}"}}'])
        for outcome in Outcome
    }
    result.received = int(samples["tamiyo_packets_received_total"])
    result.compiled = bool(samples["tamiyo_gnn_compile_enabled"])


def _report(result: Result, variables: Mapping[str, str], as_json: bool) -> int:
    budget_ms = float(variables.get("TAMIYO_STEP_TIMEOUT_MS", "5"))
    if as_json:
        typer.echo(json.dumps(result.as_json(budget_ms), indent=1))
    else:
        console = Console(width=max(110, Console().width))
        console.print(result.table())
        for line in result.lines(budget_ms):
            console.print(line, highlight=False)
    lost = result.received - sum(result.outcomes.values())
    return 1 if lost or result.unverified else 0
