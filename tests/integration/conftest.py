"""A real service on a real Redis, and a trainer's side of the bus to talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from support.bus import CATALOG, SECRET, Bus
from support.running import Running, StartService

from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.wiring import WrapWorker, open_service


@pytest.fixture
async def bus(redis_url: str) -> AsyncIterator[Bus]:
    async with client(redis_url, 5, connections=8) as redis:
        yield Bus(redis, Keyring(SECRET.encode()))


@pytest.fixture
async def start_service(redis_url: str, tmp_path: Path) -> AsyncIterator[StartService]:
    """Starts services with the sample catalogue, the small policy and a roomy budget.

    An override of None leaves the setting as it is without one.

    The budget is for machines that are busy with other tests; tests about it set their own.
    """
    async with AsyncExitStack() as stack:

        @asynccontextmanager
        async def run(settings: Settings, wrap_worker: WrapWorker) -> AsyncIterator[Running]:
            metrics = Metrics(settings.input_streams)
            stop, ready = asyncio.Event(), asyncio.Event()
            async with open_service(settings, metrics, wrap_worker) as service:
                task = asyncio.create_task(service.run(stop, ready.set))
                waiting = asyncio.create_task(ready.wait())
                await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if task.done():
                    task.result()
                yield Running(service, metrics, stop, task)
                stop.set()
                await task

        async def start(
            wrap_worker: WrapWorker = lambda worker: worker, **overrides: object
        ) -> Running:
            given = {
                "redis_url": redis_url,
                "secret": SECRET,
                "policy": "bootstrap",
                "urza_database_url": f"sqlite:///{CATALOG}",
                "state_dir": tmp_path,
                "http_host": "127.0.0.1",
                "http_port": 0,
                "block_ms": 100,
                "cpu_engine": "eager",
                "step_timeout_ms": 2000.0,
                "state_max_age_ms": 20_000,
                **overrides,
            }
            settings = Settings(
                **{name: value for name, value in given.items() if value is not None}  # type: ignore[arg-type]
            )
            return await stack.enter_async_context(run(settings, wrap_worker))

        yield start
