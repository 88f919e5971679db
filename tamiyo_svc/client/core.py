"""What the synchronous and the asyncio client share: everything but the waiting."""

from __future__ import annotations

import logging
import math
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, Final

from tamiyo_svc.client.counters import ClientCounters
from tamiyo_svc.client.drafts import Draft, Origin, PacketDraft, ReportDraft
from tamiyo_svc.client.exchange import Exchange
from tamiyo_svc.client.interpreter import PROMPT_RETURN
from tamiyo_svc.client.notices import note
from tamiyo_svc.client.packets import State, freeze
from tamiyo_svc.client.spool import Spool
from tamiyo_svc.client.transport import Link, Transport, TransportOptions
from tamiyo_svc.client.verification import CommandVerifier, VerifiedCommand
from tamiyo_svc.client.worker import Worker
from tamiyo_svc.errors import in_brief
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.partition import reply_prefix, tag_of_run
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import AckOutcome, ClientMode, Direction

NORMAL_STREAM: Final = "oona.normal"
_STATE_VERSION: Final = 1
_CURSOR: Final = re.compile(r"(\d+(-\d+)?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How a client behaves.

    `max_wait_s` caps every wait, whatever its timeout. The queue holds at most `max_entries`
    entries and `max_queue_bytes`, estimated until they are built. `spool` is the capture file of
    offline mode. `partitions` is the service's OONA_PARTITIONS; the streams are named without
    their tags. `close_timeout_s` is how long closing may take to send what is queued.

    Raises:
        ValueError: no such mode, or a bound that bounds nothing.
    """

    mode: ClientMode = ClientMode.ONLINE
    stream: str = NORMAL_STREAM
    report_stream: str = NORMAL_STREAM
    partitions: int = 1
    experiment: str = ""
    max_wait_s: float = 1.0
    max_entries: int = 256
    max_queue_bytes: int = 4 << 20
    close_timeout_s: float = 0.5
    spool: Path = Path("tamiyo-spool.jsonl")
    transport: TransportOptions = field(default_factory=TransportOptions)

    def __post_init__(self) -> None:
        # Names of modes and paths are as good as what they name.
        object.__setattr__(self, "mode", ClientMode(self.mode))
        object.__setattr__(self, "spool", Path(self.spool))
        if self.max_entries < 1 or self.max_queue_bytes < 1:
            raise ValueError("the queue must hold at least one entry and one byte")
        if not (self.max_wait_s >= 0.0 and self.close_timeout_s >= 0.0):
            raise ValueError("max_wait_s and close_timeout_s must be at least 0")


class ClientCore:
    """One training run's client, but for its way of waiting; not to be shared between threads.

    Nothing here blocks and nothing raises because of the bus, the service or what they send, of a
    system that gives no thread or memory, or of a state that was saved by something else.
    `clock` is Unix time, `monotonic` measures waiting, both in seconds; `make_link` makes what
    stands in for the bus.

    A copy, in this process or unpickled in another one, is a new client of the same run that has
    sent nothing and refuses the commands that this one has accepted. The pickle holds the secret
    and the URL with its password, without which the copy could not work: it is as secret as they.

    Raises:
        ValueError: no run id, or a URL or a number of partitions that cannot be one.
        TypeError: the keyring is none.
    """

    def __init__(
        self,
        redis_url: str,
        keyring: Keyring | None,
        run_id: str,
        settings: ClientSettings | None = None,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        make_link: Callable[[], Link] | None = None,
    ) -> None:
        if not run_id:
            raise ValueError("a client needs a run id")
        if not isinstance(keyring, Keyring | None):
            raise TypeError("a client needs Keyring(secret) or, to sign and verify nothing, None")
        self.settings = settings or ClientSettings()
        self.run_id = run_id
        self._tag = tag_of_run(run_id, self.settings.partitions)
        self.reply_stream = reply_prefix(self._tag) + run_id
        self._redis_url = redis_url
        self._keyring = keyring
        self._make_link = make_link
        self._given_clock = clock
        self._given_monotonic = monotonic
        self._begin()

    def _begin(self) -> None:
        """Make what is this object's alone."""
        self._clock = _reliable(self._given_clock, time.time)
        self._monotonic = _reliable(self._given_monotonic, time.monotonic)
        self._exchange = Exchange(
            CommandVerifier(self._keyring, self.run_id),
            max_entries=self.settings.max_entries,
            max_bytes=self.settings.max_queue_bytes,
            hands_out=self.settings.mode is ClientMode.ONLINE,
            clock=self._clock,
            monotonic=self._monotonic,
        )
        self._enabled = self.settings.mode is not ClientMode.DISABLED
        self._link: Link | None = None
        self._worker: Worker | None = None
        self._finalizer: weakref.finalize[..., ClientCore] | None = None
        self._threadless = False
        if self._enabled:
            self._renew()
            _LIVE.add(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name not in _OWN}
        return {**kept, "_saved": self.state_dict()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        saved = vars(self).pop("_saved")
        self._begin()
        self.load_state_dict(saved)

    def _renew(self) -> None:
        """Take a new identity and a new, unopened link."""
        self._incarnation = os.urandom(4).hex()
        self._origin = Origin(
            keyring=self._keyring,
            run_id=self.run_id,
            experiment=self.settings.experiment,
            stream=self.settings.stream + self._tag,
            report_stream=self.settings.report_stream + self._tag,
            reply_stream=self.reply_stream,
            trace_id=os.urandom(16).hex(),
        )
        cursor = "" if self._link is None else self._link.cursor
        self._link = self._new_link()
        self._link.cursor = cursor
        self._worker = None

    def _new_link(self) -> Link:
        if self._make_link is not None:
            return self._make_link()
        if self.settings.mode is ClientMode.OFFLINE:
            return Spool(self.settings.spool, self._clock)
        return Transport(self._redis_url, self.reply_stream, self.settings.transport)

    @property
    def mode(self) -> ClientMode:
        """What the client does with packets and commands."""
        return self.settings.mode

    @property
    def counters(self) -> ClientCounters:
        """What became of packets and commands so far."""
        return self._exchange.counters

    def publish(
        self,
        state: State,
        step: int,
        *,
        blueprint_ids: Sequence[str] = (),
        traceparent: str = "",
    ) -> str:
        """Queue the packet of a step; its id, empty when there is none.

        From here on it is this step's command that `wait` and `poll` give. The values are copied
        now; the packet is built and signed in the client's own thread. A value that does not fit
        costs the packet, is logged once and counts as unpublished.
        """
        if not self._enabled:
            return ""
        try:
            number = index(step)
            draft = PacketDraft(
                freeze(state),
                f"{self.run_id}-{number}-{self._incarnation}",
                number,
                int(self._clock() * 1e9),
                tuple(blueprint_ids),
                traceparent,
            )
            return draft.packet_id if self._post(draft) else ""
        # Whatever these hold, training goes on.
        except Exception as error:
            self._exchange.refuse(step, in_brief(error))
            return ""

    def publish_packet(
        self,
        packet: leyline.SystemStatePacket,
        *,
        blueprint_ids: Sequence[str] = (),
        traceparent: str = "",
    ) -> bool:
        """Queue a copy of a packet built elsewhere; False when it cannot be sent.

        Raises:
            ValueError: the packet has no id or is of another run, a programming error.
        """
        if not self._enabled:
            return False
        if not packet.packet_id or packet.training_run_id != self.run_id:
            raise ValueError(f"not a packet of run {self.run_id!r}")
        try:
            return self._post(
                PacketDraft(
                    packet.SerializeToString(deterministic=True),
                    packet.packet_id,
                    packet.global_step,
                    packet.timestamp_ns,
                    tuple(blueprint_ids),
                    traceparent,
                )
            )
        except Exception as error:
            self._exchange.refuse(packet.global_step, in_brief(error))
            return False

    def poll(self) -> VerifiedCommand | None:
        """The command for the step published last if it is there, without waiting."""
        return self._exchange.poll()

    def ack(self, verified: VerifiedCommand, outcome: AckOutcome, reason: str = "") -> None:
        """Report what became of a command."""
        if not self._enabled:
            return
        try:
            command = leyline.AdaptationCommand()
            command.CopyFrom(verified.command)
            self._post(
                ReportDraft(
                    command,
                    verified.packet_id,
                    verified.step_index,
                    outcome,
                    reason,
                    int(self._clock() * 1e9),
                )
            )
        except Exception as error:
            note(logging.WARNING, "a command cannot be acknowledged: %s", in_brief(error))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs so that no command is applied twice; plain values."""
        return {
            "version": _STATE_VERSION,
            "run_id": self.run_id,
            "cursor": "" if self._link is None else self._link.cursor,
            "accepted_s": self._exchange.verifier.accepted(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; what that is not, or of another run, is left alone."""
        problem = self._taken_over(state)
        if problem:
            note(logging.WARNING, "the client's saved state is left alone: %s", problem)

    def _taken_over(self, state: Mapping[str, Any]) -> str:
        """Take over a state; empty, or why it was not."""
        try:
            if state["version"] != _STATE_VERSION:
                return f"it is of version {state['version']!r:.20}"
            if state["run_id"] != self.run_id:
                return f"it is of run {state['run_id']!r:.100}"
            accepted_s = {str(name): float(at_s) for name, at_s in state["accepted_s"].items()}
            cursor = state["cursor"]
            if not _CURSOR.fullmatch(cursor) or not all(map(math.isfinite, accepted_s.values())):
                return "it holds no ids and times"
            self._exchange.restore(accepted_s)
            if self._link is not None and self._worker is None:
                self._link.cursor = cursor
        # It comes out of a file that anything may have been done to.
        except Exception as error:
            return in_brief(error)
        return ""

    def _post(self, draft: Draft) -> bool:
        if not self._exchange.post(draft):
            return False
        if self._worker is None or not self._worker.alive:
            self._start()
        if self._worker is not None:
            self._worker.wake()
        return True

    def _start(self) -> None:
        """Start the threads; without any what is queued waits until the next call gets them."""
        assert self._link is not None
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._threadless:
            self._exchange.restarted()
        try:
            self._worker = Worker(self._exchange, self._link, self._origin)
        # The system has none to give, or the interpreter is about to end.
        except (RuntimeError, MemoryError) as error:
            self._worker = None
            self._exchange.failed(Direction.OUT, fault=True)
            if not self._threadless:
                note(logging.WARNING, "going on without Tamiyo: %s", error)
            self._threadless = True
            return
        self._finalizer = weakref.finalize(self, self._worker.stop, self.settings.close_timeout_s)
        if self._threadless:
            self._threadless = False
            note(logging.WARNING, "there are threads for Tamiyo again")

    def _ask(self) -> None:
        """Let the client's thread look why no command comes, if there is reason to."""
        if self._worker is not None and self._exchange.is_doubtful:
            self._worker.wake()

    def _stop(self) -> None:
        try:
            if self._worker is not None:
                if self._finalizer is not None:
                    self._finalizer.detach()
                self._worker.stop(self.settings.close_timeout_s)
                self._renew()
            else:
                self._exchange.discard()
        except Exception as error:
            note(logging.WARNING, "closing: %s", in_brief(error))

    def _forked(self) -> None:
        """Leave the parent's thread, connections and queue to the parent."""
        if self._finalizer is not None:
            self._finalizer.detach()
        _ABANDONED.append(self._link)
        self._exchange.reset()
        self._renew()


def _reliable(clock: Callable[[], float], system: Callable[[], float]) -> Callable[[], float]:
    """The clock, or the system's where it raises."""
    if clock is system:
        return system

    def read() -> float:
        try:
            return clock()
        except Exception:
            return system()

    return read


_OWN: Final = frozenset(
    {
        "_clock", "_monotonic", "_exchange", "_enabled", "_link", "_worker", "_finalizer",
        "_threadless", "_incarnation", "_origin",
    }
)  # fmt: skip
"""What a copy of a client makes for itself."""

_LIVE: Final[weakref.WeakSet[ClientCore]] = weakref.WeakSet()
_ABANDONED: Final[list[Link | None]] = []
"""Kept so that a forked child never closes, and so never says anything on, its parent's links."""


def _after_fork_in_child() -> None:
    PROMPT_RETURN.reset()
    for client in list(_LIVE):
        client._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
