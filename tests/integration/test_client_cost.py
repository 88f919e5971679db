"""What the client costs a step, under every fault; run with RUN_PERF_TESTS=1 and -s."""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.faulty_bus import Fault, FaultyBus
from torch import nn
from torch.nn import functional

from tamiyo_svc.client import ClientMode, ClientSettings, State, TamiyoClient
from tamiyo_svc.client.packets import build_packet
from tamiyo_svc.client.testing import KEYRING
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal

OUTAGE_PACKETS = 60_000
"""Ten minutes at a hundred packets a second."""
STEPS = 300
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
        queued = len(client._exchange._queue)
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
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", list(ClientMode))
def test_cost_of_a_step(fault: Fault, mode: ClientMode, tmp_path: Path) -> None:
    settings = ClientSettings(mode=mode, spool=tmp_path / "spool.jsonl", close_timeout_s=0.1)
    added_s: list[float] = []
    control_s: list[float] = []
    waited_s: list[float] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    inputs, labels = torch.randn(128, 256), torch.randint(0, 10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with FaultyBus(fault) as bus, TamiyoClient(bus.url, KEYRING, "cost", settings) as client:
        for step in range(2 * STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step == STEPS // 2:
                bus.tell("strike")
            if step < STEPS:
                # The noise of the machine: the same packet, built and signed, going nowhere.
                started_s = time.perf_counter()
                seal(
                    build_packet(STATE, run_id="r", packet_id="p", step=1, timestamp_ns=1), KEYRING
                )
                control_s.append(time.perf_counter() - started_s)
                started_s = time.perf_counter()
                client.poll()
                client.publish(STATE, step)
                added_s.append(time.perf_counter() - started_s)
            else:
                client.publish(STATE, step)
                started_s = time.perf_counter()
                client.wait(step, BUDGET_S)
                waited_s.append(time.perf_counter() - started_s)
        bus.tell("heal") if fault is Fault.DIES else None
    over = [spent_s - BUDGET_S for spent_s in waited_s]
    print(
        f"\n{fault:14s} {mode:8s} us: added p50 {_us(added_s, 0.5)} p99 {_us(added_s, 0.99)}, "
        f"control p50 {_us(control_s, 0.5)} p99 {_us(control_s, 0.99)}; over the wait budget "
        f"p99 {_us(over, 0.99)} max {_us(over, 1.0)}"
    )
    assert _us(added_s, 0.99) - _us(control_s, 0.99) < 200
    assert _us(over, 0.99) < 1000


def _us(values_s: list[float], share: float) -> int:
    ordered = sorted(values_s)
    return round(1e6 * ordered[min(int(share * len(ordered)), len(ordered) - 1)])
