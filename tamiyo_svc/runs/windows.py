"""The observation windows of one run: opened by commands, bounded, closed by epochs, expiring."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from tamiyo_svc.decision.observation import Observation, ObservationWindow
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.taxonomy import Event, Severity

MAX_WINDOWS: Final = 8
"""Most windows that are open in one run."""

WINDOW_FORMAT: Final = struct.Struct("<16sIIQIIdddId?")
_NANOS: Final = 1_000_000_000

Windows = tuple[ObservationWindow, ...]
"""Open windows, the oldest first."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The windows that stay open, those to report on, and events for those given up."""

    open: Windows
    closed: Windows = ()
    events: tuple[FiredEvent, ...] = ()


def observe(windows: Windows, seen: Observation) -> Windows:
    """Every open window with one more step in it."""
    return tuple(window.observe(seen) for window in windows)


def settle(windows: Windows, epoch: int, now_ns: int, max_age_s: float) -> Settled:
    """Close the windows whose epochs are over and give up those that can never be.

    A run that resumed before a window's start will not reach its end in the same history, and a
    window older than `max_age_s` says nothing about its command any more.
    """
    kept: list[ObservationWindow] = []
    closed: list[ObservationWindow] = []
    events: list[FiredEvent] = []
    for window in windows:
        if now_ns - window.opened_at_ns > max_age_s * _NANOS:
            events.append(_dropped(window, "expired"))
        elif epoch < window.start_epoch:
            events.append(_dropped(window, "run_rewound"))
        elif window.is_over(epoch):
            closed.append(window)
        else:
            kept.append(window)
    return Settled(tuple(kept), tuple(closed), tuple(events))


def add_window(windows: Windows, window: ObservationWindow) -> tuple[Windows, Windows]:
    """The windows with a new one, and those closed early to make room."""
    room = MAX_WINDOWS - 1
    surplus = max(0, len(windows) - room)
    early = tuple(replace(old, closed_early=True) for old in windows[:surplus])
    return (*windows[surplus:], window), early


def pack_windows(windows: Sequence[ObservationWindow]) -> bytes:
    """Open windows one after the other; how many there are is not part of it."""
    return b"".join(
        WINDOW_FORMAT.pack(
            uuid.UUID(window.command_id).bytes,
            window.start_epoch,
            window.epochs,
            window.opened_at_ns,
            window.steps,
            window.losses,
            window.loss_delta_total,
            window.loss_delta_min,
            window.loss_delta_max,
            window.hooks,
            window.hook_latency_total_ms,
            window.critical,
        )
        for window in windows
    )


def unpack_windows(data: bytes) -> Windows:
    """The inverse of `pack_windows`.

    Raises:
        struct.error: the length does not fit.
    """
    return tuple(
        ObservationWindow(str(uuid.UUID(bytes=command_id)), *rest)
        for command_id, *rest in WINDOW_FORMAT.iter_unpack(data)
    )


def _dropped(window: ObservationWindow, reason: str) -> FiredEvent:
    attributes = {
        "reason": reason,
        "command_id": window.command_id,
        "start_epoch": str(window.start_epoch),
    }
    return FiredEvent(Event.OBSERVATION_WINDOW_DROPPED, Severity.INFO, attributes)
