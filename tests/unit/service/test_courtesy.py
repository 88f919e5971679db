from __future__ import annotations

import os
import sys
import threading

import pytest

from tamiyo_svc.service.courtesy import courteous_executor, standing_back


def _work() -> int:
    return sum(len(str(number)) for number in range(20))


def test_work_waits_while_a_decision_is_made() -> None:
    busy = threading.Event()
    busy.set()
    asked = threading.Event()
    done = threading.Event()

    def is_busy() -> bool:
        asked.set()
        return busy.is_set()

    def run() -> None:
        with standing_back(is_busy, patience_s=60):
            _work()
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert asked.wait(10)
    assert not done.is_set()
    busy.clear()
    assert done.wait(10)
    thread.join()


def test_work_comes_to_an_end_although_decisions_never_do() -> None:
    with standing_back(lambda: True, patience_s=0.001):
        assert [_work() for _ in range(2000)] == [30] * 2000


def test_nothing_waits_after_the_block() -> None:
    asked = 0

    def is_busy() -> bool:
        nonlocal asked
        asked += 1
        return False

    with pytest.raises(ZeroDivisionError), standing_back(is_busy):
        print(1 // 0)
    before = asked
    _work()

    assert asked == before
    assert sys.getprofile() is None


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
