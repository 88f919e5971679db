"""Cancelling tasks, also those that swallow a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from tamiyo_svc.adapters.cancellation import cancel


async def test_task_that_swallows_its_first_cancellation_ends_all_the_same() -> None:
    swallowed = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await cancel([task])
    assert swallowed.is_set()
    assert task.cancelled()


async def test_finished_and_failed_tasks_are_left_as_they_are() -> None:
    async def fail() -> None:
        raise ValueError("its own")

    tasks = [asyncio.create_task(asyncio.sleep(0, "done")), asyncio.create_task(fail())]
    await asyncio.wait(tasks)
    await cancel(tasks)
    assert tasks[0].result() == "done"
    with pytest.raises(ValueError, match="its own"):
        tasks[1].result()
