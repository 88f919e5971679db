from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from support.catalogs import copy_sample, locked

from tamiyo_svc.adapters.blueprint_fetch import BlueprintFetches
from tamiyo_svc.adapters.urza import UrzaCatalog


class Bench:
    """Look-ups with a reader whose behaviour each test chooses, and what was recorded."""

    def __init__(self, budget_ms: float = 60_000.0, absent_s: float = 5.0) -> None:
        self.asked: list[str] = []
        self.recorded: list[bool] = []
        self.timeouts = 0
        self.admitting = True
        self.now_s = 0.0
        self.gate = asyncio.Event()
        self.answer: bool | Exception = True
        self.fetches = BlueprintFetches(
            self.fetch,
            budget_ms,
            absent_s,
            admit=lambda: self.admitting,
            record=self.record,
            on_timeout=self.on_timeout,
            clock=lambda: self.now_s,
        )

    async def fetch(self, blueprint_id: str, lock_wait_s: float) -> bool:
        self.asked.append(blueprint_id)
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def record(self, *, success: bool) -> None:
        self.recorded.append(success)

    def on_timeout(self) -> None:
        self.timeouts += 1

    async def ask(self, *blueprint_ids: str, run_id: str = "run-1") -> None:
        self.gate.set()
        self.fetches.start(run_id, blueprint_ids)
        await self.fetches.wait()


async def test_starting_returns_while_the_reader_still_waits() -> None:
    bench = Bench()
    bench.fetches.start("run-1", ["a", "b", "a"])
    assert bench.asked == []
    assert not bench.fetches.is_overdue("run-1")
    bench.gate.set()
    await bench.fetches.wait()
    assert (bench.asked, bench.recorded) == (["a", "b"], [True, True])


async def test_no_more_than_a_few_run_at_once() -> None:
    bench = Bench()
    bench.fetches.start("run-1", [f"bp-{number}" for number in range(100)])
    bench.gate.set()
    await bench.fetches.wait()
    assert len(bench.asked) == 4


async def test_what_the_catalogue_lacks_is_not_asked_again_for_a_while() -> None:
    bench = Bench(absent_s=5.0)
    bench.answer = False
    await bench.ask("a")
    bench.now_s = 4.9
    await bench.ask("a")
    assert bench.asked == ["a"]
    bench.now_s = 5.0
    await bench.ask("a")
    assert bench.asked == ["a", "a"]
    assert bench.recorded == [True, True]


async def test_a_missed_budget_is_remembered_for_the_run_until_told() -> None:
    bench = Bench(budget_ms=1.0)
    bench.fetches.start("run-1", ["a"])
    await bench.fetches.wait()
    assert (bench.recorded, bench.timeouts) == ([False], 1)
    assert bench.fetches.is_overdue("run-1")
    assert not bench.fetches.is_overdue("run-2")
    bench.fetches.told("run-1")
    assert not bench.fetches.is_overdue("run-1")


async def test_a_lock_that_outlasts_the_budget_is_a_missed_budget(tmp_path: Path) -> None:
    catalog = UrzaCatalog(f"sqlite:///{copy_sample(tmp_path / 'catalog.db')}", 600.0)
    recorded: list[bool] = []
    fetches = BlueprintFetches(
        catalog.fetch,
        10.0,
        5.0,
        admit=lambda: True,
        record=lambda *, success: recorded.append(success),
        on_timeout=lambda: None,
        clock=lambda: 0.0,
    )
    with locked(tmp_path / "catalog.db"):
        fetches.start("run-1", ["demo-safe"])
        await fetches.wait()
    assert fetches.is_overdue("run-1")
    assert recorded == [False]


async def test_another_failure_is_recorded_without_a_timeout() -> None:
    bench = Bench()
    bench.answer = sqlite3.DatabaseError("file is not a database")
    await bench.ask("a")
    assert (bench.recorded, bench.timeouts) == ([False], 0)
    assert not bench.fetches.is_overdue("run-1")


async def test_an_open_breaker_keeps_the_file_alone() -> None:
    bench = Bench()
    bench.admitting = False
    await bench.ask("a")
    assert (bench.asked, bench.recorded) == ([], [])


async def test_closing_gives_up_what_runs() -> None:
    bench = Bench(budget_ms=0.0)
    bench.fetches.start("run-1", ["a"])
    await asyncio.sleep(0)
    await bench.fetches.close()
    assert bench.asked == ["a"]
    assert bench.recorded == []
