"""A TCP proxy before Redis that delays, cuts, swallows replies and goes silent."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 16


class FaultyProxy:
    """Forwards one loopback port to another from a thread of its own.

    Faults are plain attributes that may be set at any time: `delay_s` before each chunk in both
    directions, `stall_share` of the chunks held for `stall_s`, `silent` accepts and forwards
    nothing, `swallow` is asked for each request chunk and answers whether to drop its reply by
    closing the connection instead, `hold` is asked for each reply chunk, again and again until it
    may pass.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.delay_s = 0.0
        self.stall_share = 0.0
        self.stall_s = 0.0
        self.silent = False
        self.refusing = False
        self.swallow: Callable[[bytes], bool] = lambda request: False
        self.hold: Callable[[bytes], bool] = lambda reply: False
        self.swallowed = 0
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, name="faulty-proxy", daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def cut(self) -> None:
        """Close every connection there is."""

        def close() -> None:
            for writer in tuple(self._writers):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(close)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connect, "127.0.0.1", self.port)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, up_writer}
        self._writers |= pair
        doomed = asyncio.Event()
        try:
            await asyncio.gather(
                self._forward(reader, up_writer, doomed, request=True),
                self._forward(up_reader, writer, doomed, request=False),
            )
        except (OSError, asyncio.CancelledError):
            pass  # a cut connection, or the end of the proxy
        finally:
            self._writers -= pair
            for one in pair:
                one.transport.abort()

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        doomed: asyncio.Event,
        *,
        request: bool,
    ) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.stall_share and random.random() < self.stall_share:
                await asyncio.sleep(self.stall_s)
            while self.silent or (not request and self.hold(chunk)):
                await asyncio.sleep(0.01)
            if request and self.swallow(chunk):
                self.swallowed += 1
                doomed.set()
            if not request and doomed.is_set():
                raise ConnectionResetError("the reply is swallowed")
            writer.write(chunk)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()
        raise ConnectionResetError("the peer closed")
