"""The device lane: one thread that owns the network and answers by a deadline or not at all.

A deadline ends the waiting, never the thread. Until an overrun job is over the lane takes no more
work, so nothing queues behind it; its result is dropped when it comes. What queued while a job
ran within its time goes to the thread as one batch, or the part of it that can be expected to be
done by the first deadline.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from tamiyo_svc.adapters.keep_warm import KeepWarm
from tamiyo_svc.adapters.placement import ThreadPlacement
from tamiyo_svc.errors import InferenceError, LaneBusyError

Request = TypeVar("Request", contravariant=True)
Result = TypeVar("Result", covariant=True)
T = TypeVar("T")
R = TypeVar("R")

_END_WAIT_S: Final = 1.0
_FIRST_LOOK: Final = 0.4
"""Share of the time until a batch's first deadline after which its thread should have run."""
_NEXT_LOOK: Final = 0.2
"""The same from one look to the next."""
_COST_SHARE: Final = 0.2
"""Weight of the newest batch in what a request is expected to take."""


class Placement(Protocol):
    """Where a thread runs; see `ThreadPlacement`."""

    def ran_s(self) -> float:
        """Processor time of the thread in seconds."""

    def move_here(self) -> None:
        """Have the thread go on on the caller's core."""


class LaneWorker(Protocol[Request, Result]):
    """What runs in the lane's thread; it is synchronous and knows nothing of deadlines."""

    def warm_up(self) -> None:
        """Prepare the thread and run once on minimal input."""

    def evaluate(self, requests: Sequence[Request]) -> Sequence[Result | InferenceError]:
        """Answer whole requests, one result each, in order."""


@dataclass(slots=True, eq=False)
class _Job(Generic[T, R]):
    request: T
    deadline: float
    future: asyncio.Future[R]
    timer: asyncio.TimerHandle | None = None


_Work = list[_Job[T, R]] | Callable[[], None] | None
"""A batch, something to call between two batches, or the end."""


@dataclass(slots=True, eq=False)
class _Thread(Generic[T, R]):
    """One generation of the lane's thread with the queue it takes batches from."""

    generation: int
    worker: LaneWorker[T, R]
    batches: queue.SimpleQueue[_Work[T, R]] = field(default_factory=queue.SimpleQueue)
    system: threading.Thread | None = None
    placement: Placement | None = None


class DeviceLane(Generic[T, R]):
    """Runs requests on one dedicated thread, each until its deadline.

    `make_worker` is called for the first thread and again if a hung one has to be replaced.
    `on_hung` hears of a hang, `on_batch` of each batch's size, `on_late` of each result that came
    after its request had been given up; with `keep_warm` an idle thread touches the weights before
    work is expected. A thread with work that waits for a core is moved to the loop's by what it got
    from `place`. Deadlines are values of `clock` in seconds. Everything but the worker and the
    warming runs on the event loop, so no state here is locked.
    """

    def __init__(
        self,
        make_worker: Callable[[], LaneWorker[T, R]],
        *,
        max_batch: int = 64,
        hang_s: float = 5.0,
        on_hung: Callable[[], None] = lambda: None,
        on_batch: Callable[[int], None] = lambda size: None,
        on_late: Callable[[], None] = lambda: None,
        keep_warm: KeepWarm | None = None,
        place: Callable[[], Placement | None] = ThreadPlacement.of_this_thread,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make_worker = make_worker
        self._max_batch = max_batch
        self._hang_s = hang_s
        self._on_hung = on_hung
        self._on_batch = on_batch
        self._on_late = on_late
        self._keep_warm = keep_warm
        self._place = place
        self._clock = clock
        self._thread: _Thread[T, R] | None = None
        self._generation = 0
        self._waiting: list[_Job[T, R]] = []
        self._running: list[_Job[T, R]] = []
        self._dispatched_s = 0.0
        self._request_s = 0.0
        """What one request of a batch takes, a moving average."""
        self._overrun = False
        self._look_timer: asyncio.TimerHandle | None = None
        self._hang_timer: asyncio.TimerHandle | None = None
        self._hangs = 0
        self._replacement: asyncio.Task[None] | None = None
        self.ready = False
        self.failed = False
        """Whether a replacement hung too; only a restart of the process helps."""
        self.late_results = 0

    @property
    def busy(self) -> bool:
        """Whether the thread is at work."""
        return bool(self._running)

    async def start(self) -> None:
        """Start the thread and wait until its worker is warm.

        Raises:
            Whatever the worker's `warm_up` raises.
        """
        await self._spawn()
        self.ready = True

    async def submit(self, request: T, deadline: float) -> R:
        """Have one request answered by `deadline`.

        Raises:
            TimeoutError: it ran and was not answered in time, or came too late to run.
            LaneBusyError: it could not run in time because others occupy the thread.
            InferenceError: the worker could not answer this request.
        """
        if self._overrun or not self.ready:
            raise LaneBusyError("the device lane is occupied by a job that overran its deadline")
        remaining = deadline - self._clock()
        if remaining <= 0:
            raise TimeoutError
        loop = asyncio.get_running_loop()
        job: _Job[T, R] = _Job(request, deadline, loop.create_future())
        if remaining < math.inf:
            job.timer = loop.call_later(remaining, self._expire, job)
        self._waiting.append(job)
        if not self._running:
            self._dispatch()
        try:
            return await job.future
        finally:
            if job.timer is not None:
                job.timer.cancel()

    async def call(self, function: Callable[[LaneWorker[T, R]], object]) -> None:
        """Run `function` with the worker in the lane's thread between two batches.

        Raises:
            Whatever `function` raises.
        """
        thread = self._require_thread()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def run() -> None:
            try:
                function(thread.worker)
            except Exception as error:  # handed to the caller, which decides
                loop.call_soon_threadsafe(_resolve, done, error)
            else:
                loop.call_soon_threadsafe(_resolve, done, None)

        thread.batches.put(run)
        await done

    async def close(self) -> None:
        """End the thread without waiting for a job that still runs; its result is dropped."""
        self.ready = False
        for timer in (self._look_timer, self._hang_timer):
            if timer is not None:
                timer.cancel()
        if self._replacement is not None:
            self._replacement.cancel()
        for job in (*self._waiting, *self._running):
            if not job.future.done():
                job.future.set_exception(LaneBusyError("the device lane is closed"))
        self._waiting.clear()
        thread, idle = self._thread, not self._running
        self._thread = None
        self._generation += 1
        if thread is None:
            return
        thread.batches.put(None)
        if idle and thread.system is not None:
            # The interpreter aborts when it ends while a daemon is still inside of torch.
            await asyncio.to_thread(thread.system.join, _END_WAIT_S)

    def _require_thread(self) -> _Thread[T, R]:
        if self._thread is None:
            raise RuntimeError("the device lane has not been started")
        return self._thread

    async def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        self._generation += 1
        thread: _Thread[T, R] = _Thread(self._generation, self._make_worker())
        warm: asyncio.Future[None] = loop.create_future()
        # A daemon: a job that never ends must not keep the process from exiting.
        thread.system = threading.Thread(
            target=self._run,
            args=(thread, loop, warm),
            name=f"tamiyo-lane-{thread.generation}",
            daemon=True,
        )
        thread.system.start()
        self._thread = thread
        await warm

    def _run(
        self,
        thread: _Thread[T, R],
        loop: asyncio.AbstractEventLoop,
        warm: asyncio.Future[None],
    ) -> None:
        """The thread's life: warm up, then batch after batch until told to stop."""
        thread.placement = self._place()
        try:
            thread.worker.warm_up()
        except Exception as error:  # start() raises it on the loop
            _post(loop, _resolve, warm, error)
            return
        _post(loop, _resolve, warm, None)
        while (batch := self._next(thread.batches)) is not None:
            if callable(batch):
                batch()
                continue
            try:
                results = list(thread.worker.evaluate([job.request for job in batch]))
            except Exception as error:  # one broken batch must not end the lane
                results = [InferenceError(repr(error))] * len(batch)
            if not _post(loop, self._finished, thread.generation, batch, results):
                return

    def _next(self, batches: queue.SimpleQueue[_Work[T, R]]) -> _Work[T, R]:
        """Wait for work, warm the weights once meanwhile if it is foreseen when."""
        warm = self._keep_warm
        if warm is None:
            return batches.get()
        due_s = warm.due_s()
        work: _Work[T, R] = None
        try:
            wait_s = None if due_s is None else max(0.0, due_s - self._clock())
            work = batches.get(timeout=wait_s)
        except queue.Empty:
            for part in range(warm.parts):
                if not batches.empty():
                    break
                warm.touch(part, warm.parts)
            work = batches.get()
        if isinstance(work, list):
            warm.arrived(self._clock())
        return work

    def _dispatch(self) -> None:
        while self._waiting and self._waiting[0].future.done():
            self._waiting.pop(0)
        if not self._waiting:
            return
        batch = self._take_batch()
        self._running = batch
        self._dispatched_s = self._clock()
        self._on_batch(len(batch))
        thread = self._require_thread()
        self._see_to_its_running(thread, min(job.deadline for job in batch))
        thread.batches.put(batch)

    def _see_to_its_running(self, thread: _Thread[T, R], deadline: float) -> None:
        """Look now and then whether the thread has a core."""
        placement = thread.placement
        if placement is None or deadline == math.inf:
            return
        loop = asyncio.get_running_loop()
        time_s = deadline - self._dispatched_s

        def look(ran_before_s: float, after_s: float) -> None:
            ran_s = placement.ran_s()
            if ran_s - ran_before_s < after_s / 2:
                placement.move_here()
            if self._clock() < deadline:
                look_after(_NEXT_LOOK * time_s, ran_s)

        def look_after(after_s: float, ran_s: float) -> None:
            self._look_timer = loop.call_later(after_s, look, ran_s, after_s)

        look_after(_FIRST_LOOK * time_s, placement.ran_s())

    def _take_batch(self) -> list[_Job[T, R]]:
        """The next requests, as many as can be expected to be answered by the first deadline."""
        now_s = self._clock()
        deadline_s = math.inf
        batch: list[_Job[T, R]] = []
        taken = 0
        for job in self._waiting[: self._max_batch]:
            deadline_s = min(deadline_s, job.deadline)
            if batch and now_s + (len(batch) + 1) * self._request_s > deadline_s:
                break
            taken += 1
            if not job.future.done():
                batch.append(job)
        del self._waiting[:taken]
        return batch

    def _finished(
        self, generation: int, batch: list[_Job[T, R]], results: list[R | InferenceError]
    ) -> None:
        if generation != self._generation:
            for _ in batch:
                self._late()
            return
        for job, result in zip(batch, results, strict=True):
            if job.future.done():
                self._late()
            elif isinstance(result, InferenceError):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)
        took_s = (self._clock() - self._dispatched_s) / len(batch)
        self._request_s += _COST_SHARE * (took_s - self._request_s)
        if self._look_timer is not None:
            self._look_timer.cancel()
        self._running = []
        self._overrun = False
        self._hangs = 0
        if self._hang_timer is not None:
            self._hang_timer.cancel()
            self._hang_timer = None
        self._dispatch()

    def _late(self) -> None:
        self.late_results += 1
        self._on_late()

    def _expire(self, job: _Job[T, R]) -> None:
        if job.future.done():
            return
        if job not in self._running:
            # It never ran, so this says nothing about inference.
            job.future.set_exception(LaneBusyError("the device lane was occupied until too late"))
            return
        job.future.set_exception(TimeoutError())
        if self._overrun:
            return
        self._overrun = True
        for waiting in self._waiting:
            if not waiting.future.done():
                waiting.future.set_exception(LaneBusyError("the job ahead overran its deadline"))
        self._waiting.clear()
        loop = asyncio.get_running_loop()
        self._hang_timer = loop.call_later(self._hang_s, self._hung, self._generation)

    def _hung(self, generation: int) -> None:
        if generation != self._generation:
            return
        self._hangs += 1
        self._on_hung()
        self.ready = False
        if self._hangs > 1:
            self.failed = True
            return
        self._require_thread().batches.put(None)
        self._running = []
        self._replacement = asyncio.create_task(self._replace(), name="lane-replacement")

    async def _replace(self) -> None:
        try:
            async with asyncio.timeout(self._hang_s):
                await self._spawn()
        except Exception:  # a replacement that cannot even warm up is a hung one
            self.failed = True
            self._on_hung()
            return
        self._overrun = False
        self.ready = True


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> bool:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:  # the loop is closed; nobody is left to hear
        return False
    return True


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
