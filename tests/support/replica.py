"""Service processes that can be killed, stopped and woken, started quickly from a warm parent."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import selectors
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tamiyo_svc.errors import InferenceError
    from tamiyo_svc.policy.evaluator import PolicyRequest
    from tamiyo_svc.policy.proposal import Proposal
    from tamiyo_svc.service.wiring import Worker

_READY_TIMEOUT_S = 60.0
_EXIT_TIMEOUT_S = 30.0


def fork_server() -> ForkServerContext:
    """A fork server that has the service imported, so that a start takes a fraction of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tamiyo_svc.service.wiring", "support.replica", "support.waiting"]
    )
    return context


@dataclass
class Replica:
    """One service process.

    `clock_offset_s` shifts its wall clock. `hang_after` has, for the first lane thread and each
    one that replaces it, after how many batches it hangs for good; further ones never do.
    """

    settings: Mapping[str, object]
    clock_offset_s: float = 0.0
    hang_after: tuple[int, ...] = ()
    process: ForkServerProcess | None = None
    http_port: int = 0
    _ready: Event | None = field(default=None, repr=False)

    def start(self) -> Replica:
        """Start the process; `wait_ready` waits until it reads."""
        context = fork_server()
        self._ready = context.Event()
        port = context.Value("i", 0)
        self.process = context.Process(
            target=_serve,
            args=(dict(self.settings), self.clock_offset_s, self.hang_after, self._ready, port),
            daemon=True,
        )
        self.process.start()
        self._port = port
        return self

    def wait_ready(self) -> Replica:
        """Wait until the service has joined its consumer group."""
        assert self._ready is not None
        if not self._ready.wait(_READY_TIMEOUT_S):
            raise TimeoutError(f"replica not ready, exit code {self.running.exitcode}")
        self.http_port = self._port.value
        return self

    @property
    def running(self) -> ForkServerProcess:
        """The process."""
        assert self.process is not None
        return self.process

    def kill(self) -> None:
        """End the process with SIGKILL."""
        self.running.kill()
        self.running.join()

    def freeze(self) -> None:
        """Stop the process from running."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def stop(self) -> int:
        """Ask it to stop with SIGTERM and return its exit code."""
        self._signal(signal.SIGTERM)
        self.running.join(_EXIT_TIMEOUT_S)
        if self.running.exitcode is None:
            self.kill()
            raise TimeoutError("the replica did not stop")
        return self.running.exitcode

    def _signal(self, number: signal.Signals) -> None:
        assert self.running.pid is not None
        os.kill(self.running.pid, number)


def _serve(
    values: dict[str, object],
    clock_offset_s: float,
    hang_after: tuple[int, ...],
    ready: Event,
    port: object,
) -> None:
    from tamiyo_svc.adapters.logs import configure_logging
    from tamiyo_svc.adapters.metrics import Metrics
    from tamiyo_svc.service.settings import Settings
    from tamiyo_svc.service.wiring import open_service

    settings = Settings(**values)  # type: ignore[arg-type]

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        metrics = Metrics(settings.input_streams)

        hangs = iter(hang_after)

        def wrap(worker: Worker) -> Worker:
            batches = next(hangs, None)
            return worker if batches is None else _Hanging(worker, batches)

        def on_ready() -> None:
            port.value = service.http_port  # type: ignore[attr-defined]
            ready.set()

        async with open_service(
            settings, metrics, wrap, lambda: time.time_ns() + int(clock_offset_s * 1e9)
        ) as service:
            await service.run(stop, on_ready)

    log_session = configure_logging(settings.log_level, settings.log_format)
    with (
        log_session,
        asyncio.Runner(
            loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
        ) as runner,
    ):
        runner.run(run())


class _Hanging:
    """Works for a while and then never comes back."""

    def __init__(self, worker: Worker, batches: int) -> None:
        self._worker = worker
        self._left = batches

    def warm_up(self) -> None:
        self._worker.warm_up()

    def evaluate(self, requests: Sequence[PolicyRequest]) -> Sequence[Proposal | InferenceError]:
        if self._left == 0:
            threading.Event().wait()
        self._left -= 1
        return self._worker.evaluate(requests)
