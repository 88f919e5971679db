"""`tamiyo serve`: check, start, serve, stop on a signal."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import time
from types import FrameType
from typing import Final

from tamiyo_svc.adapters.http import open_server
from tamiyo_svc.adapters.logs import LogWriter, configure_logging
from tamiyo_svc.cli.doctor import (
    Status,
    check_device,
    check_policy,
    check_redis,
    check_secret,
    check_state_dir,
)
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.service.settings import Settings

_START_TIMEOUT_S: Final = 1.5


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; a second signal exits at once.

    Raises:
        ConfigurationError: a setting keeps the service from starting.
    """
    check_start(settings)
    log_session = configure_logging(
        settings.log_level, settings.log_format, secrets=settings.secret_texts()
    )
    # select() has microsecond timeouts; epoll rounds ours up to whole milliseconds.
    with log_session as writer, asyncio.Runner(loop_factory=_event_loop) as runner:
        runner.run(_serve(settings, writer))
    return 0


def check_start(settings: Settings) -> None:
    """Look at what most often keeps a start from working, before anything heavy is loaded.

    Raises:
        ConfigurationError: one line with what is wrong and how to mend it.
    """
    checks = [check_secret(settings), check_policy(settings.policy)]
    checks.append(check_state_dir(settings.state_dir))
    open_server(settings.http_host, settings.http_port, {}).server_close()
    checks += check_redis(settings.redis_url, settings.input_streams, _START_TIMEOUT_S, time.time)
    if settings.device.startswith("cuda"):
        checks.append(check_device(settings.device))
    for check in checks:
        if check.status is Status.FAILED:
            raise ConfigurationError(f"{check.name}: {check.detail}; {check.mend}")


def _event_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def _serve(settings: Settings, writer: LogWriter) -> None:
    from tamiyo_svc.adapters.metrics import Metrics
    from tamiyo_svc.service.wiring import open_service

    stop = asyncio.Event()
    _stop_on_signals(stop)
    metrics = Metrics(settings.input_streams)
    metrics.watch_log_drops(lambda: writer.dropped)
    async with open_service(settings, metrics) as service:
        await service.run(stop)


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first signal asks to stop, the second one exits without waiting."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int, _: FrameType | None = None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
