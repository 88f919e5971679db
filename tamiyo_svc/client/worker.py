"""The client's own two threads: everything that takes long or could block happens here."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Final

from tamiyo_svc.client.circuit import Circuit
from tamiyo_svc.client.drafts import Origin
from tamiyo_svc.client.exchange import Exchange
from tamiyo_svc.client.notices import note
from tamiyo_svc.client.outbox import Posted
from tamiyo_svc.client.transport import Link
from tamiyo_svc.errors import BusError, in_brief
from tamiyo_svc.taxonomy import Direction

_BATCH: Final = 8
"""Entries sealed in a row. Whoever wants the interpreter meanwhile, such as a training thread whose
wait is over, gets it when these are sent."""
_JOIN_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.1
"""How soon after it fell silent the service is looked after again."""


class Worker:
    """Carries entries between an exchange and a link until it is stopped.

    One thread builds, signs and sends what is posted and sleeps until it is woken; the other
    sleeps on the link, verifies what arrives and hands it in. After a failure either leaves the
    link alone for a while, twice as long after each further one. Nothing that happens in them
    reaches whoever trains; a thread that ends all the same is replaced.

    Raises:
        RuntimeError: the system gives no thread.
    """

    def __init__(self, exchange: Exchange, link: Link, origin: Origin) -> None:
        self._exchange = exchange
        self._link = link
        self._origin = origin
        self._stopping = threading.Event()
        # Released to wake the sender. Of all ways to wake a thread this costs the one that wakes
        # least: a system call made without giving the interpreter away in between.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._ended = False
        self._batch = _BATCH
        self._faults: set[type[Exception]] = set()
        self._pid = os.getpid()
        self._receiver: threading.Thread | None = None
        self._sender = threading.Thread(target=self._send, name="tamiyo-client-out", daemon=True)
        self._sender.start()

    @property
    def alive(self) -> bool:
        """Whether it can still send."""
        return not self._ended

    def wake(self) -> None:
        """Say that there is something to send."""
        try:
            self._bell.release()
        except RuntimeError:
            # It has been rung and not yet heard.
            return

    def stop(self, flush_s: float) -> None:
        """Send what is queued within `flush_s` seconds, then end the threads and drop the rest."""
        if self._pid != os.getpid():
            return
        try:
            self._stop(flush_s)
        # It is called at the end of a block, of a process and by the garbage collector.
        except Exception as error:
            note(logging.WARNING, "closing: %s", error, error=error)

    def _stop(self, flush_s: float) -> None:
        threads = (self._sender, self._receiver)
        # The garbage collector may call this from any thread, even from these.
        if threading.current_thread() in threads:
            self._end()
            return
        if self.alive:
            self._exchange.flush(flush_s)
        self._end()
        for thread in threads:
            if thread is not None and thread.is_alive():
                thread.join(_JOIN_S)
        self._exchange.discard()

    def _end(self) -> None:
        self._stopping.set()
        self.wake()
        self._link.interrupt()

    def _send(self) -> None:
        try:
            self._repeat(Direction.OUT, self._send_turn, self._link.disconnect)
        finally:
            self._ended = True
            self._end()

    def _receive(self) -> None:
        self._repeat(Direction.IN, self._receive_turn, self._link.stop_listening)

    def _repeat(
        self, direction: Direction, turn: Callable[[], None], let_go: Callable[[], None]
    ) -> None:
        circuit = Circuit()
        while not self._stopping.is_set():
            try:
                turn()
                circuit.succeeded()
                continue
            except BusError as error:
                if self._stopping.is_set():
                    break
                if self._exchange.failed(direction):
                    note(logging.WARNING, "going on without Tamiyo: %s", error)
            # The last boundary of the training job's guest: an error nobody foresaw ends as one.
            except Exception as error:
                self._fault(direction, error)
                self._quietly(let_go)
            circuit.failed(0.0)
            self._stopping.wait(circuit.wait_s(0.0))
        if direction is Direction.OUT:
            self._quietly(self._look_after, last=True)
        self._quietly(let_go)

    def _fault(self, direction: Direction, error: Exception) -> None:
        self._exchange.failed(direction, fault=True)
        if type(error) not in self._faults:
            self._faults.add(type(error))
            note(logging.ERROR, "the client's thread failed: %s", error, error=error)

    def _quietly(self, call: Callable[..., None], **options: bool) -> None:
        try:
            call(**options)
        except Exception as error:
            note(logging.WARNING, "closing: %s", error)

    def _send_turn(self) -> None:
        self._link.connect()
        # Not before the link has seen where the answers begin.
        if self._link.receives and (self._receiver is None or not self._receiver.is_alive()):
            self._start_receiver()
        batch = self._exchange.take(self._batch)
        if batch:
            self._send_batch(batch)
        self._answered(Direction.OUT)
        if not batch:
            self._look_after()
            self._bell.acquire(timeout=_LOOK_AGAIN_S if self._exchange.is_doubtful else -1)

    def _start_receiver(self) -> None:
        receiver = threading.Thread(target=self._receive, name="tamiyo-client-in", daemon=True)
        try:
            receiver.start()
        except RuntimeError as error:
            raise BusError(f"nothing can be received: {error}") from error
        self._receiver = receiver

    def _send_batch(self, batch: list[Posted]) -> None:
        sealed = []
        try:
            sealed = [posted for posted in batch if self._seal(posted)]
            if sealed:
                self._link.send([posted.outgoing for posted in sealed if posted.outgoing])
        except BaseException:
            self._exchange.unsent(sealed)
            # One at a time next: what was taken of several before one failed would go twice.
            self._batch = 1
            raise
        self._batch = _BATCH
        self._exchange.sent(sealed)

    def _seal(self, posted: Posted) -> bool:
        if posted.outgoing is not None:
            return True
        try:
            outgoing = posted.draft.seal(self._origin)
        # Whatever a draft holds that cannot be built, it costs this entry and no other.
        except Exception as error:
            self._exchange.refuse(posted.draft.step, in_brief(error), posted)
            return False
        if self._exchange.sealed(posted, outgoing):
            return True
        self._exchange.refuse(posted.draft.step, "it is too large", posted)
        return False

    def _receive_turn(self) -> None:
        self._link.listen()
        self._answered(Direction.IN)
        self._exchange.deliver(self._link.receive())

    def _answered(self, direction: Direction) -> None:
        if self._exchange.answered(direction):
            note(logging.WARNING, "connected again")

    def _look_after(self, *, last: bool = False) -> None:
        """Say why no command comes, as far as it can be seen, when it is time to."""
        if self._link.receives and self._exchange.is_silent(last=last):
            note(
                logging.WARNING,
                "no command comes, and training goes on without: %s",
                self._link.readers(self._origin.stream),
            )
