"""A bus and a service with one thing wrong, in a process of their own.

`python -m support.faulty_bus <fault>` prints the URL to connect to, then obeys lines on its
standard input: `strike` does what the fault does in the middle of a run, `heal` undoes it. Being
a process it takes no time from the trainer whose steps are measured.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis
from redis.exceptions import RedisError
from support.proxy import FaultyProxy

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.client.testing import (
    KEYRING,
    FakeService,
    Script,
    always_pause,
    grow,
    make_optimizer_command,
)
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import EnvelopeRejectedError, open_envelope, parse_payload
from tamiyo_svc.leyline.signing import Keyring

_TESTS = Path(__file__).parents[1]
_DELAY_S = 0.05


class Fault(StrEnum):
    """What is wrong."""

    NONE = "none"
    GROWS = "grows"
    """Nothing; commands grow seeds."""
    SLOWS_DOWN = "slows_down"
    """Nothing; commands lower the learning rate."""
    DOWN = "down"
    DIES = "dies"
    SLOW = "slow"
    FULL = "full"
    WRONG_SECRET = "wrong_secret"
    SILENT_SERVICE = "silent_service"
    LATE_ANSWERS = "late_answers"
    GARBAGE = "garbage"


class FaultyBus:
    """The other process, seen from the test."""

    def __init__(self, fault: Fault) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.faulty_bus", fault],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_TESTS)},
        )
        self.url = self._line()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=30)

    def tell(self, order: str) -> None:
        """Strike or heal, and return when it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        assert self._line() == order

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _slow_down(_: leyline.SystemStatePacket) -> Iterator[leyline.AdaptationCommand]:
    yield make_optimizer_command(-0.1)


_SCRIPTS: Mapping[Fault, Script] = {
    Fault.GROWS: grow("seed-residual-mlp"),
    Fault.SLOWS_DOWN: _slow_down,
}


def _answers(
    fault: Fault, service: FakeService, packet: leyline.SystemStatePacket, last: list[Any]
) -> Iterator[dict[bytes, bytes]]:
    if fault is Fault.LATE_ANSWERS:
        # The answer to a packet leaves when the next one is there.
        yield from (service.sign(command, p) for p in last for command in service.script(p))
        last[:] = [packet]
    elif fault is Fault.GARBAGE:
        yield {b"payload": os.urandom(200), b"signature": b"\xff\xfe"}
        yield {b"bootstrap": b"1"}
        good = service.sign(next(iter(service.script(packet))), packet)
        yield {**good, b"payload": good[b"payload"][:-3]}
        yield {**good, b"payload": good[b"payload"] + bytes(2 << 20)}
        yield {b"payload": good[b"payload"]}
    elif fault is not Fault.SILENT_SERVICE:
        yield from (service.sign(command, packet) for command in service.script(packet))


def _respond(url: str, fault: Fault, stop: threading.Event) -> None:
    service = FakeService(
        _SCRIPTS.get(fault, always_pause),
        Keyring(b"another secret than theirs") if fault is Fault.WRONG_SECRET else KEYRING,
    )
    cursor: Any = b"$"
    last: list[Any] = []
    while not stop.is_set():
        try:
            with Redis.from_url(url, protocol=2) as redis:
                cursor = b"0-0" if cursor == b"$" else cursor
                while not stop.is_set():
                    reply: Any = redis.xread({"oona.normal": cursor}, block=50)
                    for entry_id, fields in reply[0][1] if reply else ():
                        cursor = entry_id
                        envelope = open_envelope(fields, KEYRING)
                        packet = parse_payload(envelope)
                        if not isinstance(packet, leyline.SystemStatePacket):
                            continue
                        for answer in _answers(fault, service, packet, last):
                            entry: Any = answer
                            redis.xadd(envelope.attributes["reply_to"], entry, maxlen=64)
        except (RedisError, EnvelopeRejectedError):
            time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(fault: Fault) -> None:
    """Serve until standard input ends."""
    stop = threading.Event()
    with ExitStack() as stack:
        url = "unix:///nonexistent/redis.sock"
        server = None
        if fault is not Fault.DOWN:
            port = _free_port() if fault is Fault.SLOW else 0
            options = ("--maxmemory", "1") if fault is Fault.FULL else ()
            server = stack.enter_context(EmbeddedRedis(port=port, options=options))
            url = server.url
            if fault is Fault.SLOW:
                proxy = stack.enter_context(FaultyProxy(port))
                proxy.delay_s = _DELAY_S
                url = f"redis://127.0.0.1:{proxy.port}/0"
            thread = threading.Thread(target=_respond, args=(server.url, fault, stop))
            thread.start()
            stack.callback(thread.join)
            stack.callback(stop.set)
        print(url, flush=True)
        for line in sys.stdin:
            order = line.strip()
            if server is not None and fault is Fault.DIES:
                if order == "strike":
                    server.kill()
                else:
                    server.start()
            print(order, flush=True)


if __name__ == "__main__":
    main(Fault(sys.argv[1]))
