"""Cancelling tasks so that they end."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, Final

_AGAIN_S: Final = 0.05


async def cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until every one has ended.

    `asyncio.wait_for` before Python 3.12 swallows a cancellation that arrives just as its work
    completes, and redis-py sends every command through it. So a task that goes on is cancelled
    again.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
