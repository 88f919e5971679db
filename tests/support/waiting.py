"""Trainers that measure how long their waits take, beside others that wait for nothing.

Each is a process of its own. What a wait takes beyond its budget is the client's doing or that of
a busy machine; the control, which builds and signs the same packets and then waits on a condition
that nobody notifies, shows the latter.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Final, Self

from support.bus import SECRET, state_packet
from support.replica import fork_server

from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring

_TRAINERS: Final = 4
_BUDGETS_S: Final = (0.025, 0.8)
"""The first is over before an answer can be there on a network with 50 ms delay."""
_CONTROL_BUDGETS_S: Final = (0.025,)
_BETWEEN_S: Final = 0.05
"""A training step between two waits."""
_CONTROL_BETWEEN_S: Final = 0.005
_END_S: Final = 30.0

Step = Callable[[int, float], None]
"""Publishes a packet and waits for its command at most so many seconds."""


@dataclass
class Waits:
    """What several processes measured, in milliseconds beyond the budget; less than 0 is early."""

    over_ms: list[float] = field(default_factory=list)
    answered: int = 0
    skipped: int = 0
    """Waits that did not wait, because the bus or the service had been silent."""

    def add(self, other: Waits) -> None:
        """Take another's measurements in."""
        self.over_ms += other.over_ms
        self.answered += other.answered
        self.skipped += other.skipped


class WaitingTrainers:
    """Trainers and as many controls, at work until `finish` or the end of the block."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = fork_server().Event()
        self._processes: list[tuple[Waits, Connection, ForkServerProcess]] = []
        self.trainers = Waits()
        self.control = Waits()

    def __enter__(self) -> Self:
        for number in range(_TRAINERS):
            self._start(self.trainers, _train, self._url, f"waiting-{number}")
            self._start(self.control, _wait_for_nothing, self._url, f"control-{number}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, _, process in self._processes:
            process.kill()
            process.join()

    def finish(self) -> None:
        """Let every process end, and take in what it measured.

        Raises:
            TimeoutError: one did not end.
            EOFError: one died.
        """
        self._stop.set()
        for waits, results, process in self._processes:
            if not results.poll(_END_S):
                raise TimeoutError(f"a trainer is blocked for more than {_END_S:g} s")
            waits.add(results.recv())
            process.join(_END_S)

    def _start(self, waits: Waits, work: Callable[..., None], url: str, run_id: str) -> None:
        context = fork_server()
        results, send = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(url, run_id, self._stop, send), daemon=True)
        process.start()
        send.close()
        self._processes.append((waits, results, process))


def _train(url: str, run_id: str, stop: Event, results: Connection) -> None:
    logging.getLogger("tamiyo.client").setLevel(logging.ERROR)
    with TamiyoClient(url, Keyring(SECRET.encode()), run_id) as client:

        def step(number: int, budget_s: float) -> None:
            client.publish_packet(state_packet(run_id, number))
            client.wait(number, budget_s)

        over_ms = _measure(step, _BUDGETS_S, _BETWEEN_S, stop)
        counters = client.counters
        results.send(Waits(over_ms, counters.received, counters.waits_skipped))


def _wait_for_nothing(url: str, run_id: str, stop: Event, results: Connection) -> None:
    keyring = Keyring(SECRET.encode())
    condition = threading.Condition()

    def step(number: int, budget_s: float) -> None:
        seal(state_packet(run_id, number), keyring)
        with condition:
            condition.wait(budget_s)

    results.send(Waits(_measure(step, _CONTROL_BUDGETS_S, _CONTROL_BETWEEN_S, stop)))


def _measure(
    step: Step, budgets_s: tuple[float, ...], between_s: float, stop: Event
) -> list[float]:
    over_ms: list[float] = []
    for budget_s in itertools.cycle(budgets_s):
        if stop.is_set():
            break
        started = time.perf_counter()
        step(len(over_ms) + 1, budget_s)
        over_ms.append((time.perf_counter() - started - budget_s) * 1e3)
        time.sleep(between_s)
    return over_ms
