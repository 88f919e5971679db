"""What full-size policy updates cost the decisions: `python -m benchmarks.policy_update`.

A service of its own answers one trainer 50 times a second over a real Redis. Time and again a
policy of full size (56 MB) is published, with a control window before and after it. Latencies are
those of the service's own telemetry; a window ends a second after the update is applied, when what
it replaced is gone too. The publisher stands for one on another machine: it seals between the
windows, in a process of its own that runs when nobody else wants to.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from redis import Redis

from benchmarks import workload
from benchmarks.kernel_record import ASLEEP, NO_CORE, READY, RUNS, Record, recording
from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona.policy_stream import open_stream, publish_update, read_statuses
from tamiyo_svc.cli.bench import Load, VirtualTrainer
from tamiyo_svc.cli.child import child_service, free_port, stop
from tamiyo_svc.cli.measure import Distribution, machine
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.checkpoint import write_policy
from tamiyo_svc.policy.evaluator import build_policy
from tamiyo_svc.service.courtesy import take_idle_time_only
from tamiyo_svc.taxonomy import Event, Stage

_RATE_PER_S: Final = 50.0
_BUDGET_MS: Final = 5.0
_SETTLE_S: Final = 3.0
_AFTERMATH_S: Final = 1.0
_PATIENCE_S: Final = 120.0
_POLL_S: Final = 0.5
_STREAM: Final = "oona.policy"
_LATE: Final = {Event.TIMEOUT_INFERENCE.value, Event.LANE_BUSY.value}
_LITTLE_MS: Final = 0.5

LOADER, POLICY, PUBLISHER, REDIS = "loader", "policy thread", "publisher", "redis-server"
OTHERS: Final = "other threads"
"""Those of the service."""
KERNEL_WORKER: Final = "kworker"
"""The kernel's own work; some of it comes of memory that was freed."""
MACHINE: Final = "the machine"
"""An idle core that has yet to begin."""
HOST: Final = "the host"
"""A virtual machine's core that its host gives to others meanwhile."""
BY_UPDATE: Final = (LOADER, POLICY, REDIS, OTHERS, ASLEEP, KERNEL_WORKER)
"""What an update may make a decision wait for; the latter four do so without one, too."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one telemetry packet says of a decision; its time is when Redis took it.

    `edges_s` are the wall-clock times at which it was read, given to the network, back and ready.
    """

    at_s: float
    step_ms: float
    stages_ms: dict[str, float]
    events: frozenset[str]
    edges_s: tuple[float, float, float, float]

    @property
    def is_late(self) -> bool:
        """Whether it was over the budget or had to do without the network."""
        return self.step_ms > _BUDGET_MS or bool(_LATE & self.events)


@dataclass(frozen=True, slots=True)
class Update:
    """One update: when it was on the stream, when it was applied, and by its own account."""

    version: str
    published_s: float
    publish_ms: float
    applied_s: float
    took_ms: float


@dataclass(frozen=True, slots=True)
class Run:
    """All that was measured."""

    pid: int
    publisher: int
    updates: list[Update]
    controls: list[tuple[float, float]]
    told: list[Told]
    resident_mb: dict[str, dict[str, int]]
    clock_offset_s: float
    """What the wall clock shows more than the monotonic one."""
    update_mb: float


def main() -> None:
    """Measure and print one JSON document."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--updates", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=8.0, help="of each control window")
    arguments.add_argument("--record", action="store_true", help="what late decisions waited for")
    chosen = arguments.parse_args()
    sys.setswitchinterval(5e-4)
    torch.set_num_threads(1)
    secret = secrets.token_hex(32)
    redis_port, port = free_port(0), free_port(0)
    # As between containers, not over the socket that `server.url` names.
    url = f"redis://127.0.0.1:{redis_port}"
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(port=redis_port),
        recording() if chosen.record else nullcontext() as record,
    ):
        environment = {
            **os.environ,
            "REDIS_URL": url,
            "ESPER_LEYLINE_SECRET": secret,
            "URZA_DATABASE_URL": f"sqlite:///{workload.CATALOG}",
            "TAMIYO_STATE_DIR": folder,
            "TAMIYO_HTTP_HOST": "127.0.0.1",
            "TAMIYO_HTTP_PORT": str(port),
            "TAMIYO_STEP_TIMEOUT_MS": str(_BUDGET_MS),
            # On a busy machine the network has to run on although it is late now and then.
            "TAMIYO_BREAKER_FAILURES": "1000000",
            "TAMIYO_POLICY_PROBATION_DECISIONS": "0",
            "OMP_NUM_THREADS": "1",
        }
        log_file = Path(folder, "service.log")
        with child_service(environment, log_file, f"http://127.0.0.1:{port}") as service:
            run = _measure(url, secret, service.pid, chosen.updates, chosen.seconds)
            stop(service)
    print(json.dumps(_figures(run, record), indent=1))


def _measure(url: str, secret: str, pid: int, count: int, seconds: float) -> Run:
    keyring = Keyring(secret.encode())
    resident = {"started": _resident_mb(pid)}
    controls: list[tuple[float, float]] = []
    updates: list[Update] = []
    with (
        Redis.from_url(url) as redis,
        _publisher(url, secret) as (publisher_pid, publisher),
        _load(url, keyring),
    ):
        for turn in range(1, count + 1):
            version = f"full-{turn}"
            publisher.send(version)
            size = publisher.recv()
            time.sleep(_SETTLE_S)
            before_s = time.time()
            time.sleep(seconds)
            published_s = time.time()
            publisher.send(None)
            publish_ms = publisher.recv()
            resident[f"largest during {turn}"] = _await_version(redis, version, pid)
            time.sleep(_SETTLE_S)
            after_s = time.time()
            time.sleep(seconds)
            controls += [(before_s, published_s), (after_s, time.time())]
            applied_s, took_ms = _applied(redis, keyring, version)
            updates.append(Update(version, published_s, publish_ms, applied_s, took_ms))
            resident[f"after {turn}"] = _resident_mb(pid)
        told = list(_telemetry(redis, keyring))
    return Run(
        pid=pid,
        publisher=publisher_pid,
        updates=updates,
        controls=controls,
        told=told,
        resident_mb=resident,
        clock_offset_s=time.time() - time.monotonic(),
        update_mb=round(size / 1e6, 1),
    )


def _publish(url: str, secret: str, pipe: Connection) -> None:
    """Seal a policy per version received, say its size, and publish it when told to."""
    take_idle_time_only()
    torch.set_num_threads(1)
    policy = replace(build_policy("untrained"), policy_id="full")
    with open_stream(url) as redis:
        while (version := pipe.recv()) is not None:
            with torch.no_grad():
                policy.network.get_parameter("heads.value.weight").normal_()
            payload = write_policy(policy, Vocabularies(), "2026-01-01T00:00:00Z")
            update = leyline.PolicyUpdate(
                version=1, policy_id="full", tamiyo_policy_version=version, payload=payload
            )
            update.issued_at.FromNanoseconds(time.time_ns())
            sealed = seal(update, Keyring(secret.encode()))
            pipe.send(len(payload))
            pipe.recv()
            started = time.perf_counter()
            publish_update(redis, _STREAM, sealed)
            pipe.send((time.perf_counter() - started) * 1e3)


@contextmanager
def _publisher(url: str, secret: str) -> Iterator[tuple[int, Connection]]:
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_publish, args=(url, secret, there))
    process.start()
    assert process.pid is not None
    try:
        yield process.pid, here
        here.send(None)
        process.join()
    finally:
        process.kill()


@contextmanager
def _load(url: str, keyring: Keyring) -> Iterator[None]:
    load = Load(1, _RATE_PER_S, seeds=workload.SEEDS, blueprints=(workload.BLUEPRINT,))
    client = TamiyoClient(url, keyring, "load")
    trainer = VirtualTrainer(client, load)
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            trainer.run(1.0, 0.0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        client.close()


def _await_version(redis: Redis, version: str, pid: int) -> dict[str, int]:
    """Wait until a version serves; the largest resident memory meanwhile."""
    largest: dict[str, int] = {}
    deadline_s = time.monotonic() + _PATIENCE_S
    while not any(status.version == version for status in read_statuses(redis)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{version} is not served after {_PATIENCE_S:.0f} s")
        for name, size_mb in _resident_mb(pid).items():
            largest[name] = max(size_mb, largest.get(name, 0))
        time.sleep(_POLL_S)
    return largest


def _packets(redis: Redis, keyring: Keyring) -> Iterator[tuple[float, leyline.TelemetryPacket]]:
    for stream in ("oona.telemetry", "oona.emergency"):
        entries: Any = redis.xrange(stream)
        for entry_id, fields in entries:
            message = parse_payload(open_envelope(fields, keyring))
            if isinstance(message, leyline.TelemetryPacket):
                yield int(entry_id.partition(b"-")[0]) / 1e3, message


def _applied(redis: Redis, keyring: Keyring, version: str) -> tuple[float, float]:
    """When a version was applied, and after how many milliseconds by the service's account."""
    for at_s, packet in _packets(redis, keyring):
        for event in packet.events:
            if event.attributes.get("version") == version:
                return at_s, float(event.attributes["took_ms"])
    raise RuntimeError(f"nothing told of {version}")


def _telemetry(redis: Redis, keyring: Keyring) -> Iterator[Told]:
    for at_s, packet in _packets(redis, keyring):
        values = {metric.name: metric.value for metric in packet.metrics}
        step_ms = values.get("tamiyo.step.latency_ms")
        if step_ms is not None:
            stages_ms = {
                "lane": values["tamiyo.inference.latency_ms"],
                "build": values.get("tamiyo.graph.build_ms", -1.0),
                "forward": values.get("tamiyo.gnn.inference.latency_ms", -1.0),
            }
            events = frozenset(event.description for event in packet.events)
            yield Told(at_s, step_ms, stages_ms, events, _edges_s(packet))


def _edges_s(packet: leyline.TelemetryPacket) -> tuple[float, float, float, float]:
    spans = {span.name: span for span in packet.spans}
    decode, risk = spans[f"tamiyo.{Stage.DECODE}"], spans[f"tamiyo.{Stage.RISK}"]
    read, infer, back, ready = (
        moment.ToNanoseconds() / 1e9
        for moment in (decode.start_time, decode.end_time, risk.start_time, risk.end_time)
    )
    return read, infer, back, ready


def _figures(run: Run, record: Record | None) -> dict[str, Any]:
    blame = None
    if record is not None:
        inferred = [
            (edges_s[1] - run.clock_offset_s, edges_s[2] - run.clock_offset_s)
            for edges_s in (each.edges_s for each in run.told)
        ]
        blame = Blame.of(record, run.pid, run.publisher, inferred)
    windows = [(update.published_s, update.applied_s + _AFTERMATH_S) for update in run.updates]
    return {
        "machine": machine(),
        "update_mb": run.update_mb,
        "publish_ms": [round(update.publish_ms) for update in run.updates],
        "applied_after_ms": [round(update.took_ms) for update in run.updates],
        "control": _of_windows(run, run.controls, blame),
        "during": _of_windows(run, windows, blame),
        "resident_mb": run.resident_mb,
    }


def _of_windows(
    run: Run, windows: list[tuple[float, float]], blame: Blame | None
) -> dict[str, Any]:
    """Latencies of the decisions in some windows, and where in them the late ones lie, with those
    that had to do without the network.
    """
    chosen = [
        (round((each.at_s - start_s) * 1e3), each)
        for start_s, end_s in windows
        for each in run.told
        if start_s <= each.at_s < end_s
    ]
    steps_ms = Distribution.of([each.step_ms for _, each in chosen])
    figures: dict[str, Any] = {
        "decisions": steps_ms.count,
        "p50_ms": round(steps_ms.p50, 2),
        "p99_ms": round(steps_ms.p99, 2),
        "max_ms": round(steps_ms.worst, 2),
        "over_budget": sum(each.step_ms > _BUDGET_MS for _, each in chosen),
        "without_network": sum(bool(_LATE & each.events) for _, each in chosen),
    }
    spent = [
        blame.spent(tuple(edge_s - run.clock_offset_s for edge_s in each.edges_s))
        if blame is not None
        else {}
        for _, each in chosen
    ]
    if blame is not None:
        figures["lost_events"] = blame.record.lost
        ran_ms = Distribution.of([each.get(RUNS, 0.0) for each in spent])
        figures |= {"ran_p50_ms": round(ran_ms.p50, 2), "ran_p99_ms": round(ran_ms.p99, 2)}
        figures["late_by_the_update"] = sum(
            each.is_late and is_by_update(each.step_ms, where)
            for (_, each), where in zip(chosen, spent, strict=True)
        )
        figures["mean_ms"] = {
            name: round(sum(each.get(name, 0.0) for each in spent) / len(spent), 4)
            for name in sorted({name for each in spent for name in each})
        }
    return figures | {
        "late": [
            {
                "at_ms": at_ms,
                "step_ms": round(each.step_ms, 1),
                **{name: round(value, 1) for name, value in each.stages_ms.items()},
                "events": sorted(_LATE & each.events),
                **({"by_update": is_by_update(each.step_ms, where)} if blame is not None else {}),
                "spent_ms": {name: round(value, 2) for name, value in sorted(where.items())},
            }
            for (at_ms, each), where in zip(chosen, spent, strict=True)
            if each.is_late
        ],
    }


def is_by_update(step_ms: float, spent_ms: Mapping[str, float]) -> bool:
    """Whether a late decision would have been in time but for what the update made it wait.

    One that had no answer of the network in time would have had it by so much earlier; that this
    is too little is not known unless it is little.
    """
    waited_ms = sum(spent_ms.get(name, 0.0) for name in BY_UPDATE)
    return waited_ms > _LITTLE_MS and step_ms - waited_ms <= _BUDGET_MS


@dataclass(frozen=True, slots=True)
class Blame:
    """Says from the kernel's record what a decision spent its time on."""

    record: Record
    loop: int
    lane: int
    policy: frozenset[int]
    others: frozenset[int]
    who: dict[int, str]
    """What to call the threads that are in the way."""

    @classmethod
    def of(
        cls, record: Record, service: int, publisher: int, inferred: Sequence[tuple[float, float]]
    ) -> Blame:
        """Tell the service's threads apart: by priority, and the lane by running while it has a
        decision, of which it is told when.
        """
        own = {thread for thread, process in record.process_of.items() if process == service}
        policy = own & record.nice
        loader = record.family(service) - {service}
        who = {
            **{
                thread: LOADER if process in loader else PUBLISHER
                for thread, process in record.process_of.items()
                if process in loader or process == publisher
            },
            **dict.fromkeys(own, "service"),
            **dict.fromkeys(policy, POLICY),
            0: MACHINE,
        }
        lane = max(
            own - policy - {service},
            key=lambda thread: sum(record.ran_s(thread, *span) for span in inferred),
        )
        others = own - policy - {service, lane}
        return cls(record, service, lane, frozenset(policy), frozenset(others), who)

    def spent(self, edges_s: tuple[float, ...]) -> dict[str, float]:
        """Milliseconds of a decision by what it did or waited for.

        From the second to the third edge the lane has it, or the loop while the lane sleeps.
        """
        read_s, infer_s, back_s, ready_s = edges_s
        spent: dict[str, float] = defaultdict(float)
        watched = {self.loop, self.lane, *self.policy, *self.others}
        times = {infer_s, back_s, *self.record.changes(watched, read_s, ready_s)}
        for core in self.record.on_core:
            times.update(self.record.switches(core, read_s, ready_s))
        for start_s, end_s in pairwise(sorted(times)):
            middle_s = (start_s + end_s) / 2
            state, core = self.record.state(self.loop, middle_s)
            if infer_s <= middle_s < back_s:
                lane = self.record.state(self.lane, middle_s)
                state, core = (state, core) if lane[0] == ASLEEP else lane
            took_ms = (end_s - start_s) * 1e3
            if state == RUNS:
                stolen_ms = self.record.stolen_s(core, start_s, end_s) * 1e3
                spent[HOST] += stolen_ms
                took_ms -= stolen_ms
            spent[self._name(state, core, middle_s)] += took_ms
        return {name: took_ms for name, took_ms in spent.items() if took_ms > 0}

    def _name(self, state: str, core: int, at_s: float) -> str:
        if state == READY:
            if core == NO_CORE:
                return MACHINE
            thread = self.record.occupant(core, at_s)
            name = self.who.get(thread) or self.record.names.get(thread, str(thread))
            return name.partition("/")[0]
        if state == ASLEEP:
            # For the interpreter, perhaps, or a lock of the allocator's.
            for threads, name in ((self.policy, POLICY), (self.others, OTHERS)):
                if any(self.record.state(thread, at_s)[0] != ASLEEP for thread in threads):
                    return name
        return state


def _resident_mb(pid: int) -> dict[str, int]:
    """Resident memory of the service and of the processes it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "service": _status_mb(pid),
        "loader": sum(_status_mb(int(child)) for child in children),
    }


def _status_mb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) // 1000 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
