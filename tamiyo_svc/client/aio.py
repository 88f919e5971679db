"""The asyncio client, for trainers that run on an event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

from tamiyo_svc.client.core import ClientCore
from tamiyo_svc.client.interpreter import PROMPT_RETURN
from tamiyo_svc.client.verification import VerifiedCommand


class AsyncTamiyoClient(ClientCore):
    """Client of one training run for one event loop.

    Publishing, polling and acknowledging are as in the synchronous client: they only queue.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None:
        """The command for this step, the last one published; None when there is none in time."""
        if not self._enabled:
            return None
        timeout_s = min(timeout_s, self.settings.max_wait_s)
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def arrived() -> None:
            # A loop that was closed meanwhile has nobody left to tell.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

        deadline_s = self._exchange.begin(step, timeout_s, arrived)
        command = None
        try:
            with PROMPT_RETURN:
                command = await self._arrival(step, deadline_s, changed)
        finally:
            self._exchange.end(timeout_s, missed=command is None)
        if command is None:
            self._ask()
        return command

    async def _arrival(
        self, step: int, deadline_s: float, changed: asyncio.Event
    ) -> VerifiedCommand | None:
        while (command := self._exchange.poll()) is None:
            left_s = deadline_s - self._monotonic()
            if left_s <= 0.0 or not self._exchange.may_come(step):
                break
            try:
                async with asyncio.timeout(left_s):
                    await changed.wait()
            except TimeoutError:
                continue
            changed.clear()
        return command

    async def aclose(self) -> None:
        """Send what is queued within the settings' `close_timeout_s`, then let go of the bus."""
        # Not the loop's own executor, whose end needs a thread more.
        with ThreadPoolExecutor(1) as executor:
            try:
                await asyncio.get_running_loop().run_in_executor(executor, self._stop)
            # Where there is no thread for it there was none to send either.
            except RuntimeError:
                self._stop()
