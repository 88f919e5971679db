"""The client's own thread: everything that could block happens here."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from tamiyo_svc.client.circuit import Circuit
from tamiyo_svc.client.exchange import Exchange
from tamiyo_svc.client.transport import Link
from tamiyo_svc.errors import BusError

_LOG: Final = logging.getLogger("tamiyo.client")
_BATCH: Final = 64
_IDLE_S: Final = 0.5
"""A wake ends a sleep; this bounds one whose wake was lost."""
_JOIN_S: Final = 1.0


class Worker:
    """Carries entries between an exchange and a link until it is stopped.

    After a failure the link is left alone for a while, twice as long after each further one.
    `monotonic` is in seconds.
    """

    def __init__(
        self,
        exchange: Exchange,
        link: Link,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exchange = exchange
        self._link = link
        self._monotonic = monotonic
        self._circuit = Circuit()
        self._stopping = threading.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="tamiyo-client", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, in this process."""
        return self._pid == os.getpid() and self._thread.is_alive()

    def wake(self) -> None:
        """Say that there is something to send."""
        self._link.wake()

    def stop(self, flush_s: float) -> None:
        """Send what is queued within `flush_s` seconds, then end the thread and drop the rest."""
        if self._pid != os.getpid():
            return
        if self._thread.is_alive():
            self._exchange.flush(flush_s)
            self._stopping.set()
            self._link.wake()
            self._thread.join(_JOIN_S)
        self._exchange.discard()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except BusError as error:
                self._failed(error)
            # The last boundary of the training job's guest: an error nobody foresaw ends as one.
            except Exception:
                _LOG.exception("the client's thread failed")
                self._exchange.faulted()
                self._link.close()
                self._back_off()
        try:
            self._link.close()
        except (BusError, OSError) as error:
            _LOG.warning("closing: %s", error)

    def _turn(self) -> None:
        # The read must know where the stream ends before an answer can be on it.
        self._link.open()
        batch = self._exchange.take(_BATCH)
        if batch:
            try:
                self._link.send([posted.outgoing for posted in batch])
            except BaseException:
                self._exchange.unsent(batch)
                raise
            self._exchange.sent(batch)
        self._recovered()
        self._exchange.deliver(self._link.receive(_IDLE_S))

    def _recovered(self) -> None:
        if self._exchange.reachable is False:
            _LOG.info("connected again")
        self._exchange.set_reachable(True)
        self._circuit.succeeded()

    def _failed(self, error: BusError) -> None:
        if self._exchange.reachable is not False:
            _LOG.warning("going on without Tamiyo: %s", error)
        self._exchange.bus_failed()
        self._back_off()

    def _back_off(self) -> None:
        self._exchange.set_reachable(False)
        now_s = self._monotonic()
        self._circuit.failed(now_s)
        self._stopping.wait(self._circuit.wait_s(now_s))
