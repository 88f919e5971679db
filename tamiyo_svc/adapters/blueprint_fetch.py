"""Looks up blueprints that a trainer asked for and the snapshot lacks, beside its step."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import structlog

log = structlog.get_logger("tamiyo.blueprints")

_MAX_RUNNING: Final = 4
_MAX_REMEMBERED: Final = 1024
_RETRY_S: Final = 1.0
"""How soon a look-up that failed may be tried again."""

_LOCKED: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Fetch(Protocol):
    """Reads one blueprint, waiting at most so many seconds for a lock; whether it is known now."""

    def __call__(self, blueprint_id: str, lock_wait_s: float) -> Awaitable[bool]: ...


class Record(Protocol):
    """Hears how each look-up ended."""

    def __call__(self, *, success: bool) -> None: ...


class BlueprintFetches:
    """Bounded on-demand look-ups; nobody waits for one.

    What is found is there for the run's next packet. One that misses its budget is remembered
    for the run that asked until `told`. `budget_ms` 0 is no limit; `absent_s` is how long an id
    that the catalogue does not have is not asked for again.
    """

    def __init__(
        self,
        fetch: Fetch,
        budget_ms: float,
        absent_s: float,
        *,
        admit: Callable[[], bool],
        record: Record,
        on_timeout: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._fetch = fetch
        self._budget_s = budget_ms / 1e3 if budget_ms > 0 else None
        self._absent_s = absent_s
        self._admit = admit
        self._record = record
        self._on_timeout = on_timeout
        self._clock = clock
        self._not_before_s: OrderedDict[str, float] = OrderedDict()
        self._overdue: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self, run_id: str, blueprint_ids: Sequence[str]) -> None:
        """Look ids up in the background, as many as there is room for; returns at once."""
        for blueprint_id in blueprint_ids:
            if blueprint_id in self._running or len(self._running) >= _MAX_RUNNING:
                continue
            if self._clock() < self._not_before_s.get(blueprint_id, float("-inf")):
                continue
            if not self._admit():
                return
            task = asyncio.create_task(self._look_up(run_id, blueprint_id), name="tamiyo-fetch")
            self._running[blueprint_id] = task

    def is_overdue(self, run_id: str) -> bool:
        """Whether a look-up for this run missed its budget and the run was not told yet."""
        return run_id in self._overdue

    def told(self, run_id: str) -> None:
        """Note that a run was told of its missed look-up."""
        self._overdue.pop(run_id, None)

    async def wait(self) -> None:
        """Wait until no look-up runs."""
        while self._running:
            await asyncio.wait(tuple(self._running.values()))

    async def close(self) -> None:
        """Give up what runs; a thread that still reads ends by itself."""
        for task in tuple(self._running.values()):
            task.cancel()
        await self.wait()

    async def _look_up(self, run_id: str, blueprint_id: str) -> None:
        wait_s = _RETRY_S
        try:
            async with asyncio.timeout(self._budget_s):
                known = await self._fetch(blueprint_id, self._budget_s or _RETRY_S)
        except TimeoutError:
            self._missed(run_id, blueprint_id)
        except (sqlite3.Error, OSError) as error:
            # The low byte of an extended code is the code itself.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _LOCKED:
                self._missed(run_id, blueprint_id)
            else:
                log.warning("blueprint.fetch_failed", blueprint_id=blueprint_id, error=str(error))
                self._record(success=False)
        else:
            self._record(success=True)
            wait_s = 0.0 if known else self._absent_s
        finally:
            del self._running[blueprint_id]
            _remember(self._not_before_s, blueprint_id, self._clock() + wait_s)

    def _missed(self, run_id: str, blueprint_id: str) -> None:
        log.warning("blueprint.fetch_timed_out", blueprint_id=blueprint_id, run_id=run_id)
        self._record(success=False)
        self._on_timeout()
        self._overdue[run_id] = None
        while len(self._overdue) > _MAX_REMEMBERED:
            self._overdue.popitem(last=False)


def _remember(times: OrderedDict[str, float], key: str, value: float) -> None:
    times[key] = value
    times.move_to_end(key)
    while len(times) > _MAX_REMEMBERED:
        times.popitem(last=False)
