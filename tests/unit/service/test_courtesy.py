from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import psutil
import pytest
from support.networks import random_graph, random_network

from tamiyo_svc.policy.engines import Engines
from tamiyo_svc.policy.network import KeptNetwork, NetworkConfig
from tamiyo_svc.service.courtesy import ThreadTurns, courteous_executor


def _work() -> int:
    return sum(len(str(number)) for number in range(20))


@contextmanager
def _thread(run: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(10)


def _is_waiting(thread: threading.Thread) -> bool:
    """Whether a thread stands back."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "hook":
        frame = frame.f_back
    return frame is not None


def _await_waiting(thread: threading.Thread) -> None:
    deadline = time.monotonic() + 10
    while not _is_waiting(thread):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def _standing_back(turns: ThreadTurns) -> None:
    with turns.standing_back():
        _work()


def test_work_waits_while_a_packet_is_in_flight() -> None:
    turns = ThreadTurns(patience_s=60)
    turns.stand_back()
    with _thread(lambda: _standing_back(turns)) as thread:
        _await_waiting(thread)
        turns.go_on()
        thread.join(10)

        assert not thread.is_alive()


def test_work_comes_to_an_end_although_packets_never_do() -> None:
    turns = ThreadTurns(patience_s=0.001)
    turns.stand_back()
    with turns.standing_back():
        assert [_work() for _ in range(500)] == [30] * 500


def test_nothing_waits_once_closed() -> None:
    turns = ThreadTurns(patience_s=60)
    turns.stand_back()
    with _thread(lambda: _standing_back(turns)) as thread:
        _await_waiting(thread)
        turns.close()
        turns.stand_back()
        thread.join(10)

        assert not thread.is_alive()
    _standing_back(turns)


class _LookedUp(KeptNetwork):
    """Lets the test go on while a thread that stands back looks this up."""

    def __init__(self) -> None:
        config = NetworkConfig(sage_hidden_dim=4, gat_hidden_dim=2, attention_heads=1)
        super().__init__(lambda: random_network(config, 1))
        # Unlike events, these are never locked while the thread stands back.
        self.begun, self.ended = SimpleQueue[None](), SimpleQueue[None]()

    def __hash__(self) -> int:
        if sys.getprofile() is not None:
            self.begun.put(None)
            self.ended.get(timeout=10)
        return id(self)


def test_a_decision_does_not_wait_for_a_thread_that_stands_back_amid_the_engines() -> None:
    turns = ThreadTurns(patience_s=60)
    network = _LookedUp()
    graph = random_graph((1, 1, 1, 1, 1, 1), 1.0, 1)
    engines = Engines()
    engines.evaluate(network, [graph])

    def prepare() -> None:
        with turns.standing_back():
            engines.engine(network)

    with _thread(prepare) as preparing:
        network.begun.get(timeout=10)
        turns.stand_back()
        network.ended.put(None)
        _await_waiting(preparing)
        with _thread(lambda: engines.evaluate(network, [graph])) as lane:
            lane.join(10)
            is_done = not lane.is_alive()
            turns.go_on()

    assert is_done


def test_others_get_the_interpreter_without_asking_for_it() -> None:
    turns = ThreadTurns()
    has_begun = threading.Event()
    steps = 0

    def run() -> None:
        nonlocal steps
        with turns.standing_back():
            has_begun.set()
            while steps < 20_000:
                _work()
                steps += 1

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        with _thread(run):
            assert has_begun.wait(10)
            seen = steps
    finally:
        sys.setswitchinterval(interval_s)

    assert seen < 10_000


def test_standing_back_is_not_counted_as_work() -> None:
    turns = ThreadTurns(patience_s=0.001)
    turns.stand_back()
    with turns.standing_back():
        before_s, worked_before_s = time.perf_counter(), turns.clock()
        for _ in range(500):
            _work()
        worked_s, took_s = turns.clock() - worked_before_s, time.perf_counter() - before_s

    assert 0 < worked_s < took_s


def test_nothing_waits_after_the_block() -> None:
    turns = ThreadTurns(patience_s=60)
    with pytest.raises(ZeroDivisionError), turns.standing_back():
        print(1 // 0)
    turns.stand_back()
    _work()

    assert sys.getprofile() is None


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such class")
def test_a_process_can_be_left_with_what_nobody_else_wants() -> None:
    code = (
        "import os; from tamiyo_svc.service.courtesy import take_idle_time_only;"
        "take_idle_time_only(); print(os.sched_getscheduler(0))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert int(answer.stdout) == os.SCHED_IDLE


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_only_the_working_thread_lowers_its_priority() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine = priority()
    executor = courteous_executor("test")
    theirs = executor.submit(priority).result()
    executor.shutdown()

    assert theirs == min(19, mine + 5)
    assert priority() == mine


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
@pytest.mark.parametrize("frees_much", [False, True])
def test_what_a_thread_frees_is_returned_to_the_system_if_it_is_much(*, frees_much: bool) -> None:
    parts = [bytes(b"x" * 100_000) for _ in range(600)]
    # What lies last would be returned anyway.
    last = parts.pop()
    before = psutil.Process().memory_info().rss
    with ThreadTurns().standing_back(frees_much=frees_much):
        parts.clear()
    assert (psutil.Process().memory_info().rss < before - 40_000_000) == frees_much
    assert last
