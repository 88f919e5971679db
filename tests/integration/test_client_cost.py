"""What the client costs a step, under every fault; run with RUN_PERF_TESTS=1 and -s."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.faulty_bus import Fault, FaultyBus
from torch import nn
from torch.nn import functional

from tamiyo_svc.client import ClientMode, ClientSettings, State, TamiyoClient
from tamiyo_svc.client.testing import KEYRING
from tamiyo_svc.leyline import leyline_pb2 as leyline

OUTAGE_PACKETS = 60_000
"""Ten minutes at a hundred packets a second."""
STEPS = 300
PACE_S = 0.02
"""A trainer's pace; between two steps everything of the client's has gone cold."""
WAITS = 100
BUDGET_S = 0.002
FAULTS = [fault for fault in Fault if fault not in (Fault.GROWS, Fault.SLOWS_DOWN)]
SEEDS = [
    leyline.SeedState(
        seed_id=f"seed-{n}", stage=leyline.SEED_STAGE_TRAINING, metrics={"alpha": 0.5}
    )
    for n in range(4)
]
STATE = State(1.0, 1.0, 0.5, 1, {f"metric_{n}": float(n) for n in range(20)}, SEEDS)

perf = pytest.mark.skipif(
    os.environ.get("RUN_PERF_TESTS") != "1", reason="measures time; RUN_PERF_TESTS=1 runs it"
)


def test_an_outage_of_ten_minutes_holds_no_more_than_the_queue_may() -> None:
    settings = ClientSettings(max_entries=256, max_queue_bytes=256 << 10, close_timeout_s=0.0)
    with TamiyoClient("unix:///nonexistent/redis.sock", KEYRING, "outage", settings) as client:
        for step in range(2000):
            client.publish(STATE, step)
        gc.collect()
        tracemalloc.start()
        before_bytes, _ = tracemalloc.get_traced_memory()
        for step in range(2000, 2000 + OUTAGE_PACKETS):
            client.publish(STATE, step)
        gc.collect()
        after_bytes, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        queued = len(client._exchange._outbox)
        assert client._exchange.queued_bytes <= 256 << 10
        assert client.counters.dropped + queued == 2000 + OUTAGE_PACKETS
    grown_kib = (after_bytes - before_bytes) / 1024
    print(f"\n{OUTAGE_PACKETS} packets into a dead bus: {queued} queued, {grown_kib:.0f} KiB held")
    # All that was allocated since and is still held: the queue and the packets expected.
    assert after_bytes - before_bytes < 1 << 20
    assert peak_bytes - before_bytes < 2 << 20


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@perf
@pytest.mark.perf
@pytest.mark.redis
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", list(ClientMode))
@pytest.mark.parametrize("fault", FAULTS)
def test_cost_of_a_step(fault: Fault, mode: ClientMode, tmp_path: Path) -> None:
    settings = ClientSettings(mode=mode, spool=tmp_path / "spool.jsonl", close_timeout_s=0.1)
    with FaultyBus(fault) as bus, TamiyoClient(bus.url, KEYRING, "cost", settings) as client:
        steps = _train(STEPS + 2 * WAITS)
        trained_s, added_s, cpu_s, over_s, machine_s = [], [], [], [], []
        for step, step_s in islice(steps, STEPS):
            trained_s.append(step_s)
            if step == STEPS // 2:
                bus.tell("strike")
            began_s, started_s = time.thread_time(), time.perf_counter()
            client.poll()
            client.publish(STATE, step)
            added_s.append(time.perf_counter() - started_s)
            cpu_s.append(time.thread_time() - began_s)
        for step, _ in steps:
            if step % 2:
                started_s = time.perf_counter()
                client.publish(STATE, step)
                client.wait(step, BUDGET_S)
                over_s.append(time.perf_counter() - started_s - BUDGET_S)
            else:
                started_s = time.perf_counter()
                threading.Event().wait(BUDGET_S)
                machine_s.append(time.perf_counter() - started_s - BUDGET_S)
        bus.tell("heal") if fault is Fault.DIES else None
    print(
        f"\n{fault:14s} {mode:8s} us: added p50 {_us(added_s, 0.5)} p99 {_us(added_s, 0.99)} max "
        f"{_us(added_s, 1.0)}, processor p99 {_us(cpu_s, 0.99)}; beyond the wait budget max "
        f"{_us(over_s, 1.0)}, an idle wait max {_us(machine_s, 1.0)}; training p50 "
        f"{_us(trained_s, 0.5)}"
    )
    assert _us(added_s, 0.99) < 200
    assert _us(over_s, 1.0) < 1000


def _train(steps: int) -> Iterator[tuple[int, float]]:
    """Steps of a small network, one each `PACE_S`; their number and what each took, in seconds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    inputs, labels = torch.randn(128, 256), torch.randint(0, 10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    begin_s = time.perf_counter()
    for step in range(steps):
        time.sleep(max(0.0, begin_s + step * PACE_S - time.perf_counter()))
        started_s = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield step, time.perf_counter() - started_s


def _us(values_s: list[float], share: float) -> int:
    ordered = sorted(values_s)
    return round(1e6 * ordered[min(int(share * len(ordered)), len(ordered) - 1)])
