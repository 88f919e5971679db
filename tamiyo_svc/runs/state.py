"""What a training run carries from one packet to the next, and its stored form."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import inf, isfinite
from typing import Final

from tamiyo_svc.decision.observation import Observation, ObservationWindow
from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.graph import normalizer
from tamiyo_svc.graph.normalizer import METRICS, Statistics
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.latency import KEPT, NO_LATENCIES, Latencies, Series
from tamiyo_svc.risk.mode import INACTIVE, ConservativeMode
from tamiyo_svc.risk.signals import hook_latency_ms, loss_delta, validation_loss
from tamiyo_svc.runs.windows import (
    MAX_WINDOWS,
    Windows,
    add_window,
    observe,
    pack_windows,
    settle,
    unpack_windows,
    unpack_windows_of_version_1,
)
from tamiyo_svc.taxonomy import Severity

DIGEST_BYTES: Final = 8
MAX_DECIDED: Final = 64
"""How many decisions are remembered."""

_VERSION: Final = 2
_READABLE: Final = (1, _VERSION)
_NANOS: Final = 1_000_000_000
_NOTHING_HEARD: Final = bytes(DIGEST_BYTES)
_HEADER: Final = struct.Struct(f"<B?dQ{DIGEST_BYTES}sBIBB")
_SINCE_VERSION_2: Final = struct.Struct("<QBB")
_PAIR: Final = struct.Struct("<dd")
_LATENCY_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class RunState:
    """One run's memory, immutable.

    `statistics` are those of `graph.normalizer`, `decided` the digests of the last decisions
    with the newest last, `newest_timestamp_ns` the newest packet's, on the trainer's clock,
    `newest_step` the step of the last packet that named one.
    `heard` is the mark of the emergency for all runs that this one was last told of.
    """

    last_validation_loss: float | None = None
    statistics: Statistics = field(default_factory=dict)
    mode: ConservativeMode = INACTIVE
    decided: tuple[bytes, ...] = ()
    newest_timestamp_ns: int = 0
    newest_step: int = 0
    heard: bytes = _NOTHING_HEARD
    latencies: Latencies = NO_LATENCIES
    windows: Windows = ()

    def latencies_before(self, packet: leyline.SystemStatePacket) -> Latencies:
        """The latencies that a packet's are compared with.

        A run that went back to an earlier step was started again, perhaps on another machine or
        with another model: what was usual before is not asked of it.
        """
        if 0 < packet.global_step < self.newest_step:
            return NO_LATENCIES
        return self.latencies

    def to_bytes(self) -> bytes:
        """The state; the first byte is the version of the format.

        At most 1.3 KB and some 0.15 KB for each open window, of which there are none by default.
        """
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
        step, hook = self.latencies.step, self.latencies.hook
        since_2 = _SINCE_VERSION_2.pack(self.newest_step, len(step), len(hook))
        pairs = (
            _PAIR.pack(*self.statistics[metric])
            for metric, there in zip(METRICS, kept, strict=True)
            if there
        )
        latencies = struct.pack(f"<{len(step) + len(hook)}f", *step, *hook)
        windows = pack_windows(self.windows)
        return b"".join((header, since_2, mode, *pairs, *self.decided, latencies, windows))

    @classmethod
    def from_bytes(cls, data: bytes) -> RunState:
        """The inverse of `to_bytes`.

        Raises:
            StoredStateError: another version wrote it, or it is damaged.
        """
        if not data or data[0] not in _READABLE:
            found = data[0] if data else "none"
            raise StoredStateError(
                f"run state of version {found}, this release reads up to {_VERSION}"
            )
        try:
            return _parse(data)
        except (struct.error, UnicodeDecodeError) as error:
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
    window_max_age_s: float,
    opened: ObservationWindow | None = None,
    heard: bytes | None = None,
) -> Advanced:
    """The state after a decision.

    `mode` and `severity` are what the step made of conservative mode and its worst event,
    `opened` the observation window of its command and `heard` the mark of the emergency for all
    runs, where there is one.
    """
    observed = _observed(state, packet, critical=severity is Severity.CRITICAL)
    # A packet that names no step is no step back.
    place = packet.current_epoch, observed.newest_step
    settled = settle(observed.windows, *place, now_ns, window_max_age_s)
    windows, closed = settled.open, settled.closed
    if opened is not None:
        windows, early = add_window(windows, opened)
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
            loss_delta=loss_delta(packet, state.last_validation_loss),
            hook_latency_ms=hook_latency_ms(packet),
            critical=critical,
        )
        windows = observe(windows, seen)
    return replace(
        state,
        last_validation_loss=state.last_validation_loss if loss is None else loss,
        statistics=normalizer.observe(packet, state.statistics),
        newest_step=packet.global_step or state.newest_step,
        latencies=state.latencies_before(packet).observe(packet),
        windows=windows,
    )


def _parse(data: bytes) -> RunState:
    header = _HEADER.unpack_from(data)
    version, has_loss, loss, newest_ns, heard, mode_bytes, present, decided, windows = header
    newest_step, steps, hooks = 0, 0, 0
    mode_start = _HEADER.size
    if version > 1:
        newest_step, steps, hooks = _SINCE_VERSION_2.unpack_from(data, mode_start)
        mode_start += _SINCE_VERSION_2.size
    if (
        present >> len(METRICS)
        or decided > MAX_DECIDED
        or windows > MAX_WINDOWS
        or max(steps, hooks) > KEPT
    ):
        raise StoredStateError("run state: a count is out of range")
    metrics = [metric for index, metric in enumerate(METRICS) if present >> index & 1]
    mode_end = mode_start + mode_bytes
    pairs_end = mode_end + _PAIR.size * len(metrics)
    decided_end = pairs_end + DIGEST_BYTES * decided
    windows_start = decided_end + _LATENCY_BYTES * (steps + hooks)
    if len(data) < windows_start:
        raise StoredStateError("run state: wrong length")
    pairs = _PAIR.iter_unpack(data[mode_end:pairs_end])
    latencies = struct.unpack_from(f"<{steps + hooks}f", data, decided_end)
    unpack = unpack_windows if version > 1 else unpack_windows_of_version_1
    state = RunState(
        last_validation_loss=loss if has_loss else None,
        statistics=dict(zip(metrics, pairs, strict=True)),
        mode=ConservativeMode.from_bytes(data[mode_start:mode_end]),
        decided=tuple(
            data[start : start + DIGEST_BYTES]
            for start in range(pairs_end, decided_end, DIGEST_BYTES)
        ),
        newest_timestamp_ns=newest_ns,
        newest_step=newest_step,
        heard=heard,
        latencies=Latencies(latencies[:steps], latencies[steps:]),
        windows=unpack(data[windows_start:], windows),
    )
    if not _is_finite(state.statistics, loss, state.windows):
        raise StoredStateError("run state: a number is not finite")
    if not (_are_lengths(state.latencies.step) and _are_lengths(state.latencies.hook)):
        raise StoredStateError("run state: a latency is no length of time")
    return state


def _are_lengths(series: Series) -> bool:
    return all(0.0 < latency < inf for latency in series)


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
            isfinite(sums.loss_delta_total + sums.loss_delta_min + sums.loss_delta_max)
            and isfinite(sums.hook_latency_total_ms)
            for sums in (window.sums for window in windows)
        )
    )
