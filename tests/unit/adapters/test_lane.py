"""The device lane: deadlines, overruns, batches, hangs."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest

from tamiyo_svc.adapters.keep_warm import KeepWarm
from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.errors import InferenceError, LaneBusyError

FAR_S = 30.0


class GatedWorker:
    """Doubles numbers; negative ones wait for the gate, 0 fails, 13 breaks the whole batch."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.warmed = False

    def warm_up(self) -> None:
        self.warmed = True

    def evaluate(self, requests: Sequence[int]) -> list[int | InferenceError]:
        self.batches.append(list(requests))
        self.threads.add(threading.get_ident())
        if 13 in requests:
            raise RuntimeError("broken")
        if min(requests) < 0:
            self.entered.set()
            self.gate.wait(FAR_S)
        return [InferenceError("zero") if number == 0 else 2 * number for number in requests]


@asynccontextmanager
async def running(
    *workers: GatedWorker, hang_s: float = FAR_S, on_hung: Callable[[], None] = lambda: None
) -> AsyncIterator[DeviceLane[int, int]]:
    supply = iter(workers)
    lane: DeviceLane[int, int] = DeviceLane(lambda: next(supply), hang_s=hang_s, on_hung=on_hung)
    await lane.start()
    try:
        yield lane
    finally:
        for worker in workers:
            worker.gate.set()
        await lane.close()


def soon() -> float:
    return time.perf_counter() + 0.005


def far() -> float:
    return time.perf_counter() + FAR_S


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_answers_on_one_thread_of_its_own_after_warming_up() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        assert worker.warmed
        assert [await lane.submit(number, far()) for number in (1, 2, 3)] == [2, 4, 6]
        assert len(worker.threads) == 1
        assert threading.get_ident() not in worker.threads


async def test_overrun_times_out_and_the_next_are_refused_at_once() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        with pytest.raises(TimeoutError):
            await lane.submit(-1, soon())
        for _ in range(3):
            with pytest.raises(LaneBusyError):
                await lane.submit(1, far())
        assert worker.batches == [[-1]]


async def test_late_result_is_dropped_counted_and_frees_the_lane() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        with pytest.raises(TimeoutError):
            await lane.submit(-1, soon())
        worker.gate.set()
        await until(lambda: not lane.busy)
        assert lane.late_results == 1
        assert await lane.submit(5, far()) == 10
        assert worker.batches == [[-1], [5]]


class FakePlacement:
    """A thread that has a core for some share of the time, or loses it after some looks."""

    def __init__(self, share: float, looks: int = 1 << 30) -> None:
        self._share = share
        self._looks = looks
        self._ran_s = 0.0
        self.moves = 0

    def ran_s(self) -> float:
        self._looks -= 1
        if self._looks >= 0:
            self._ran_s = self._share * time.perf_counter()
        return self._ran_s

    def move_here(self) -> None:
        self.moves += 1


@pytest.mark.parametrize(("share", "is_moved"), [(0.0, True), (0.1, True), (0.9, False)])
async def test_a_thread_that_does_not_get_to_run_is_moved_before_it_is_late(
    share: float, is_moved: bool
) -> None:
    worker, placement = GatedWorker(), FakePlacement(share)
    lane: DeviceLane[int, int] = DeviceLane(lambda: worker, place=lambda: placement)
    await lane.start()
    try:
        with pytest.raises(TimeoutError):
            await lane.submit(-1, soon())
        assert bool(placement.moves) == is_moved
    finally:
        worker.gate.set()
        await lane.close()


async def test_a_thread_that_loses_its_core_later_is_moved_as_well() -> None:
    worker, placement = GatedWorker(), FakePlacement(1.0, looks=2)
    lane: DeviceLane[int, int] = DeviceLane(lambda: worker, place=lambda: placement)
    await lane.start()
    try:
        with pytest.raises(TimeoutError):
            await lane.submit(-1, time.perf_counter() + 0.5)
        assert placement.moves > 0
    finally:
        worker.gate.set()
        await lane.close()


@pytest.mark.parametrize("placement", [FakePlacement(0.0), None])
async def test_a_thread_that_answers_soon_enough_stays_where_it_is(
    placement: FakePlacement | None,
) -> None:
    worker = GatedWorker()
    lane: DeviceLane[int, int] = DeviceLane(lambda: worker, place=lambda: placement)
    await lane.start()
    try:
        assert await lane.submit(1, far()) == 2
        assert await lane.submit(2, math.inf) == 4
        assert placement is None or placement.moves == 0
    finally:
        await lane.close()


async def test_what_queued_while_busy_runs_as_one_batch() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        first = asyncio.create_task(lane.submit(-1, far()))
        await asyncio.to_thread(worker.entered.wait)
        rest = [asyncio.create_task(lane.submit(number, far())) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        worker.gate.set()
        assert await asyncio.gather(first, *rest) == [-2, 2, 4, 6]
        assert worker.batches == [[-1], [1, 2, 3]]


async def test_waiting_behind_an_overrun_is_refused_when_it_overruns() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        first = asyncio.create_task(lane.submit(-1, time.perf_counter() + 0.05))
        await asyncio.to_thread(worker.entered.wait)
        waiting = asyncio.create_task(lane.submit(1, far()))
        with pytest.raises(TimeoutError):
            await first
        with pytest.raises(LaneBusyError):
            await waiting


async def test_expired_waiter_never_reaches_the_thread() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        first = asyncio.create_task(lane.submit(-1, far()))
        await asyncio.to_thread(worker.entered.wait)
        with pytest.raises(LaneBusyError):
            await lane.submit(1, soon())
        worker.gate.set()
        assert await first == -2
        assert await lane.submit(2, far()) == 4
        assert worker.batches == [[-1], [2]]
        assert lane.late_results == 0


async def test_deadline_in_the_past_is_a_timeout_without_work() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        with pytest.raises(TimeoutError):
            await lane.submit(1, time.perf_counter() - 1)
        assert worker.batches == []


async def test_cancelled_waiter_wedges_nothing() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        first = asyncio.create_task(lane.submit(-1, far()))
        await asyncio.to_thread(worker.entered.wait)
        second = asyncio.create_task(lane.submit(1, far()))
        third = asyncio.create_task(lane.submit(2, far()))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        worker.gate.set()
        assert await third == 4
        assert worker.batches == [[-1], [2]]


async def test_one_failed_request_fails_alone_and_a_broken_batch_as_a_whole() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        with pytest.raises(InferenceError, match="zero"):
            await lane.submit(0, far())
        with pytest.raises(InferenceError, match="broken"):
            await lane.submit(13, far())
        assert await lane.submit(1, far()) == 2


async def test_call_runs_in_the_lanes_thread() -> None:
    worker = GatedWorker()
    async with running(worker) as lane:
        seen: list[int] = []
        await lane.call(lambda _: seen.append(threading.get_ident()))
        await lane.submit(1, far())
        assert set(seen) == worker.threads


async def test_hung_thread_is_replaced_and_its_result_changes_nothing() -> None:
    hung, fresh = GatedWorker(), GatedWorker()
    reports: list[str] = []
    async with running(hung, fresh, hang_s=0.02, on_hung=lambda: reports.append("hung")) as lane:
        with pytest.raises(TimeoutError):
            await lane.submit(-1, soon())
        await until(lambda: lane.ready and bool(reports))
        assert await lane.submit(4, far()) == 8
        hung.gate.set()
        await until(lambda: lane.late_results == 1)
        assert fresh.batches == [[4]]
        assert (reports, lane.failed) == (["hung"], False)


async def test_replacement_that_hangs_too_fails_the_lane() -> None:
    reports: list[str] = []
    workers = (GatedWorker(), GatedWorker())
    async with running(*workers, hang_s=0.02, on_hung=lambda: reports.append("hung")) as lane:
        with pytest.raises(TimeoutError):
            await lane.submit(-1, soon())
        await until(lambda: lane.ready and bool(reports))
        with pytest.raises(TimeoutError):
            await lane.submit(-2, soon())
        await until(lambda: lane.failed)
        with pytest.raises(LaneBusyError):
            await lane.submit(1, far())


async def test_hang_after_good_work_is_replaced_again() -> None:
    reports: list[str] = []
    workers = (GatedWorker(), GatedWorker(), GatedWorker())
    async with running(*workers, hang_s=0.02, on_hung=lambda: reports.append("hung")) as lane:

        def reported(count: int) -> bool:
            return lane.ready and len(reports) == count

        for number in (1, 2):
            with pytest.raises(TimeoutError):
                await lane.submit(-number, soon())
            await until(partial(reported, number))
            assert await lane.submit(1, far()) == 2
        assert not lane.failed


async def test_failing_warm_up_fails_the_start() -> None:
    class Broken(GatedWorker):
        def warm_up(self) -> None:
            raise ValueError("no device")

    lane: DeviceLane[int, int] = DeviceLane(Broken)
    with pytest.raises(ValueError, match="no device"):
        await lane.start()
    assert not lane.ready


async def test_idle_lane_touches_all_weights_once_before_the_next_work_is_expected() -> None:
    touched: list[int] = []
    worker = GatedWorker()
    warm = KeepWarm(lambda part, parts: touched.append(part), parts=3, lead_s=10.0)
    lane: DeviceLane[int, int] = DeviceLane(lambda: worker, keep_warm=warm)
    await lane.start()
    for _ in range(2):
        await lane.submit(1, far())
        await asyncio.sleep(0.006)

    await until(lambda: len(touched) >= 3)
    assert await lane.submit(2, far()) == 4
    assert touched[:3] == [0, 1, 2]
    await lane.close()


async def test_touching_is_given_up_as_soon_as_work_arrives() -> None:
    touching, go_on = threading.Event(), threading.Event()
    touched: list[int] = []
    touched_before: list[list[int]] = []

    class Watching(GatedWorker):
        def evaluate(self, requests: Sequence[int]) -> list[int | InferenceError]:
            touched_before.append(touched[:])
            return super().evaluate(requests)

    def touch(part: int, parts: int) -> None:
        touched.append(part)
        touching.set()
        go_on.wait(FAR_S)

    warm = KeepWarm(touch, parts=100, lead_s=10.0)
    warm.arrived(time.perf_counter() - 0.02)
    lane: DeviceLane[int, int] = DeviceLane(Watching, keep_warm=warm)
    await lane.start()
    await lane.submit(1, far())
    await asyncio.to_thread(touching.wait)
    answer = asyncio.create_task(lane.submit(2, far()))
    await asyncio.sleep(0)
    go_on.set()

    assert await answer == 4
    await lane.close()
    # The first work may itself have come while the weights were touched for it.
    assert touched_before[1] == [*touched_before[0], 0]


async def test_a_batch_holds_no_more_than_can_be_done_by_its_first_deadline() -> None:
    now_s = 0.0

    class Slow(GatedWorker):
        def evaluate(self, requests: Sequence[int]) -> list[int | InferenceError]:
            nonlocal now_s
            results = super().evaluate(requests)
            now_s += 100.0 * len(requests)
            return results

    worker = Slow()
    lane: DeviceLane[int, int] = DeviceLane(lambda: worker, clock=lambda: now_s)
    await lane.start()
    # Long enough for the average to know what a request takes.
    for _ in range(30):
        await lane.submit(1, now_s + 1e4)
    first = asyncio.create_task(lane.submit(-1, now_s + 1e4))
    await asyncio.to_thread(worker.entered.wait)
    deadline_s = now_s + 100.0 + 350.0
    rest = [asyncio.create_task(lane.submit(number, deadline_s)) for number in range(2, 7)]
    await asyncio.sleep(0)
    worker.gate.set()

    await asyncio.gather(first, *rest)
    await lane.close()

    assert worker.batches[31] == [2, 3, 4]
