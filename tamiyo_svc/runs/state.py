"""What a training run carries from one packet to the next, and its stored form."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import isfinite
from typing import Final

from tamiyo_svc.decision.observation import Observation, ObservationWindow
from tamiyo_svc.decision.record import command_id_for
from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.graph import normalizer
from tamiyo_svc.graph.normalizer import METRICS, Statistics
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.mode import INACTIVE, ConservativeMode
from tamiyo_svc.risk.signals import hook_latency_ms, loss_delta, validation_loss
from tamiyo_svc.runs.windows import (
    MAX_WINDOWS,
    WINDOW_FORMAT,
    Windows,
    add_window,
    observe,
    pack_windows,
    settle,
    unpack_windows,
)
from tamiyo_svc.taxonomy import Severity

DIGEST_BYTES: Final = 8
MAX_DECIDED: Final = 64
"""How many decisions are remembered."""

_VERSION: Final = 1
_NANOS: Final = 1_000_000_000
_NOTHING_HEARD: Final = bytes(DIGEST_BYTES)
_HEADER: Final = struct.Struct(f"<B?dQ{DIGEST_BYTES}sBIBB")
_PAIR: Final = struct.Struct("<dd")


@dataclass(frozen=True, slots=True)
class RunState:
    """One run's memory, immutable.

    `statistics` are those of `graph.normalizer`, `decided` the digests of the last decisions
    with the newest last, `newest_timestamp_ns` the newest packet's, on the trainer's clock.
    `heard` is the mark of the emergency for all runs that this one was last told of.
    """

    last_validation_loss: float | None = None
    statistics: Statistics = field(default_factory=dict)
    mode: ConservativeMode = INACTIVE
    decided: tuple[bytes, ...] = ()
    newest_timestamp_ns: int = 0
    heard: bytes = _NOTHING_HEARD
    windows: Windows = ()

    def to_bytes(self) -> bytes:
        """The state in at most some 1.5 KB; the first byte is the version of the format."""
        mode = self.mode.to_bytes()
        kept = [metric in self.statistics for metric in METRICS]
        header = _HEADER.pack(
            _VERSION,
            self.last_validation_loss is not None,
            self.last_validation_loss or 0.0,
            self.newest_timestamp_ns,
            self.heard,
            len(mode),
            sum(1 << index for index, there in enumerate(kept) if there),
            len(self.decided),
            len(self.windows),
        )
        pairs = (
            _PAIR.pack(*self.statistics[metric])
            for metric, there in zip(METRICS, kept, strict=True)
            if there
        )
        return b"".join((header, mode, *pairs, *self.decided, pack_windows(self.windows)))

    @classmethod
    def from_bytes(cls, data: bytes) -> RunState:
        """The inverse of `to_bytes`.

        Raises:
            StoredStateError: another version wrote it, or it is damaged.
        """
        if data[:1] != bytes([_VERSION]):
            found = data[0] if data else "none"
            raise StoredStateError(f"run state of version {found}, this release reads {_VERSION}")
        try:
            return _parse(data)
        except struct.error as error:
            raise StoredStateError(f"run state: {error}") from None


EMPTY: Final = RunState()


@dataclass(frozen=True, slots=True)
class Advanced:
    """A state after a decision, the windows to report on, and events about windows given up."""

    state: RunState
    closed: Windows = ()
    events: tuple[FiredEvent, ...] = ()


def packet_digest(payload: bytes) -> bytes:
    """Digest of a packet's serialized bytes, by which a repeated one is known."""
    return blake2b(payload, digest_size=DIGEST_BYTES).digest()


def is_duplicate(state: RunState, digest: bytes, timestamp_ns: int, replay_window_s: float) -> bool:
    """Whether a packet was decided before, or is too old for that to be known.

    A timestamp of 0 is absent, as proto3 has it: then the digest alone tells.
    """
    if digest in state.decided:
        return True
    oldest_ns = state.newest_timestamp_ns - int(replay_window_s * _NANOS)
    return 0 < timestamp_ns < oldest_ns


def fold(state: RunState, packet: leyline.SystemStatePacket) -> RunState:
    """The state after a packet that gets no decision: its metrics count, nothing else does.

    Windows take the packet's step in but are closed by the next decision, which can report.
    """
    return _observed(state, packet, critical=False)


def advance(
    state: RunState,
    packet: leyline.SystemStatePacket,
    digest: bytes,
    *,
    mode: ConservativeMode,
    severity: Severity,
    now_ns: int,
    window_epochs: int,
    window_max_age_s: float,
    heard: bytes | None = None,
) -> Advanced:
    """The state after a decision.

    `mode` and `severity` are what the step made of conservative mode and its worst event,
    `heard` the mark of the emergency for all runs, if there is one.
    With `window_epochs` above 1 the command opens an observation window.
    """
    observed = _observed(state, packet, critical=severity is Severity.CRITICAL)
    settled = settle(observed.windows, packet.current_epoch, now_ns, window_max_age_s)
    windows, closed = settled.open, settled.closed
    if window_epochs > 1:
        command_id = command_id_for(packet.training_run_id, digest)
        window = ObservationWindow(command_id, packet.current_epoch, window_epochs, now_ns)
        windows, early = add_window(windows, window)
        closed = (*closed, *early)
    # A trainer's clock that once ran ahead must not turn all its later packets into replays.
    timestamp_ns = min(packet.timestamp_ns, now_ns)
    after = replace(
        observed,
        mode=mode,
        decided=(*state.decided, digest)[-MAX_DECIDED:],
        newest_timestamp_ns=max(state.newest_timestamp_ns, timestamp_ns),
        heard=state.heard if heard is None else heard,
        windows=windows,
    )
    return Advanced(after, closed, settled.events)


def _observed(state: RunState, packet: leyline.SystemStatePacket, *, critical: bool) -> RunState:
    loss = validation_loss(packet)
    windows = state.windows
    if windows:
        seen = Observation(
            epoch=packet.current_epoch,
            loss_delta=loss_delta(packet, state.last_validation_loss),
            hook_latency_ms=hook_latency_ms(packet),
            critical=critical,
        )
        windows = observe(windows, seen)
    return replace(
        state,
        last_validation_loss=state.last_validation_loss if loss is None else loss,
        statistics=normalizer.observe(packet, state.statistics),
        windows=windows,
    )


def _parse(data: bytes) -> RunState:
    header = _HEADER.unpack_from(data)
    _, has_loss, loss, newest_ns, heard, mode_bytes, present, decided, windows = header
    if present >> len(METRICS) or decided > MAX_DECIDED or windows > MAX_WINDOWS:
        raise StoredStateError("run state: a count is out of range")
    metrics = [metric for index, metric in enumerate(METRICS) if present >> index & 1]
    mode_end = _HEADER.size + mode_bytes
    pairs_end = mode_end + _PAIR.size * len(metrics)
    decided_end = pairs_end + DIGEST_BYTES * decided
    if len(data) != decided_end + WINDOW_FORMAT.size * windows:
        raise StoredStateError("run state: wrong length")
    pairs = _PAIR.iter_unpack(data[mode_end:pairs_end])
    state = RunState(
        last_validation_loss=loss if has_loss else None,
        statistics=dict(zip(metrics, pairs, strict=True)),
        mode=ConservativeMode.from_bytes(data[_HEADER.size : mode_end]),
        decided=tuple(
            data[start : start + DIGEST_BYTES]
            for start in range(pairs_end, decided_end, DIGEST_BYTES)
        ),
        newest_timestamp_ns=newest_ns,
        heard=heard,
        windows=unpack_windows(data[decided_end:]),
    )
    if not _is_finite(state.statistics, loss, state.windows):
        raise StoredStateError("run state: a number is not finite")
    return state


def _is_finite(
    statistics: Mapping[str, tuple[float, float]], loss: float, windows: Windows
) -> bool:
    return (
        isfinite(loss)
        and all(
            isfinite(mean) and isfinite(variance) and variance >= 0.0
            for mean, variance in statistics.values()
        )
        and all(
            isfinite(window.loss_delta_total + window.loss_delta_min + window.loss_delta_max)
            and isfinite(window.hook_latency_total_ms)
            for window in windows
        )
    )
