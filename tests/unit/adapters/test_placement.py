"""Moving a thread: it may run where it might before, and waiting is no running."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from tamiyo_svc.adapters.placement import ThreadPlacement

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems move no threads")


class Worker(threading.Thread):
    """Waits, or works for some processor time when asked to."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.work, self.worked = threading.Event(), threading.Event()
        self.left = threading.Event()
        self.placement: SimpleQueue[ThreadPlacement | None] = SimpleQueue()

    def run(self) -> None:
        self.placement.put(ThreadPlacement.of_this_thread())
        self.work.wait(10)
        while time.thread_time() < 0.05:
            pass
        self.worked.set()
        self.left.wait(10)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.work.set()
    worker.left.set()
    worker.join(10)


def test_only_time_on_a_core_counts(worker: Worker) -> None:
    worker.start()
    placement = worker.placement.get(timeout=10)
    assert placement is not None
    assert placement.ran_s() < 0.05

    worker.work.set()
    assert worker.worked.wait(10)

    assert placement.ran_s() >= 0.05


def test_it_is_confined_to_the_callers_core_and_let_go_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    confined: list[tuple[int, set[int]]] = []
    confine = os.sched_setaffinity

    def note(thread: int, cores: set[int]) -> None:
        confined.append((thread, cores))
        confine(thread, cores)

    monkeypatch.setattr(os, "sched_setaffinity", note)
    worker.start()
    placement = worker.placement.get(timeout=10)
    assert placement is not None
    assert worker.native_id is not None
    before = os.sched_getaffinity(worker.native_id)

    placement.move_here()

    (first, here), (second, after) = confined
    assert first == second == worker.native_id
    assert len(here) == 1
    assert here <= before == after == os.sched_getaffinity(worker.native_id)


def test_a_thread_that_may_not_run_here_stays_where_it_is(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {1 << 20})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: pytest.fail("moved"))
    worker.start()
    placement = worker.placement.get(timeout=10)
    assert placement is not None

    placement.move_here()


def test_a_thread_that_has_ended_is_no_error(worker: Worker) -> None:
    worker.start()
    placement = worker.placement.get(timeout=10)
    assert placement is not None
    worker.work.set()
    worker.left.set()
    worker.join(10)
    # It leaves Python before it leaves the system.
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/self/task/{worker.native_id}").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)

    placement.move_here()
    assert placement.ran_s() == math.inf


def test_a_system_that_moves_no_threads_has_no_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")

    assert ThreadPlacement.of_this_thread() is None
