"""The observation windows of one run: opened by commands, bounded, closed by length, expiring."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tamiyo_svc.decision.observation import (
    Observation,
    ObservationWindow,
    ObservedCommand,
    Sums,
)
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.taxonomy import Event, Severity

MAX_WINDOWS: Final = 64
"""Most windows that are open in one run: one for each step, where none is longer than this."""

_NAME_BYTES: Final = 96
"""Longer names, as of seeds and blueprints, are cut when they are stored."""
_WINDOW: Final = struct.Struct("<16sIIQIIdddId?QI4s")
_WINDOW_OF_VERSION_1: Final = struct.Struct("<16sIIQIIdddId?")
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
    return tuple([window.observe(seen) for window in windows])


def settle(windows: Windows, epoch: int, step: int, now_ns: int, max_age_s: float) -> Settled:
    """Close the windows that are over and give up those that can never be.

    A run that resumed before a window's start will not reach its end in the same history, and a
    window older than `max_age_s` says nothing about its command any more.
    """
    kept: list[ObservationWindow] = []
    closed: list[ObservationWindow] = []
    events: list[FiredEvent] = []
    for window in windows:
        if now_ns - window.command.issued_at_ns > max_age_s * _NANOS:
            events.append(_dropped(window, "expired"))
        elif not window.has_begun(epoch, step):
            events.append(_dropped(window, "run_rewound"))
        elif window.is_over(epoch, step):
            closed.append(window.close(epoch, step))
        else:
            kept.append(window)
    return Settled(tuple(kept), tuple(closed), tuple(events))


def add_window(windows: Windows, window: ObservationWindow) -> tuple[Windows, Windows]:
    """The windows with a new one, and those closed early to make room."""
    surplus = max(0, len(windows) - MAX_WINDOWS + 1)
    early = tuple(
        old.close(window.start_epoch, window.start_step, early=True) for old in windows[:surplus]
    )
    return (*windows[surplus:], window), early


def pack_windows(windows: Windows) -> bytes:
    """Open windows one after the other; how many there are is not part of it.

    `Sums` lie in them in the order of their fields.
    """
    return b"".join(part for window in windows for part in _packed(window))


def unpack_windows(data: bytes, count: int) -> Windows:
    """The inverse of `pack_windows`.

    Raises:
        struct.error: the length does not fit.
        UnicodeDecodeError: a name is no text.
    """
    windows = []
    place = 0
    for _ in range(count):
        *old, start_step, steps, lengths = _WINDOW.unpack_from(data, place)
        place += _WINDOW.size
        names = []
        for length in lengths:
            name = data[place : place + length]
            names.append(name.decode())
            place += length
        windows.append(_window(old, start_step, steps, names))
    if place != len(data):
        raise struct.error("bytes are left over")
    return tuple(windows)


def unpack_windows_of_version_1(data: bytes, count: int) -> Windows:
    """The windows of the format before this one, which knew less of their commands.

    Raises:
        struct.error: the length does not fit.
    """
    if len(data) != count * _WINDOW_OF_VERSION_1.size:
        raise struct.error("wrong length")
    return tuple(_window(old) for old in _WINDOW_OF_VERSION_1.iter_unpack(data))


def _packed(window: ObservationWindow) -> Iterator[bytes]:
    command = window.command
    texts = (command.reason, command.seed_id, command.blueprint_id, command.policy_version)
    names = [_name(text) for text in texts]
    yield _WINDOW.pack(
        bytes.fromhex(command.command_id.replace("-", "")),
        window.start_epoch,
        window.epochs,
        command.issued_at_ns,
        *window.sums,
        window.start_step,
        window.steps,
        bytes(map(len, names)),
    )
    yield from names


def _window(
    old: Sequence[Any], start_step: int = 0, steps: int = 0, names: Sequence[str] = ()
) -> ObservationWindow:
    """A window from the numbers of version 1 and what came to them."""
    command_id, start_epoch, epochs, issued_at_ns, *sums = old
    command = ObservedCommand(str(uuid.UUID(bytes=command_id)), issued_at_ns, *names)
    return ObservationWindow(command, start_epoch, start_step, epochs, steps, Sums(*sums))


def _name(text: str) -> bytes:
    """At most `_NAME_BYTES` of UTF-8, without half a character at the end."""
    name = text.encode()
    if len(name) <= _NAME_BYTES:
        return name
    return name[:_NAME_BYTES].decode(errors="ignore").encode()


def _dropped(window: ObservationWindow, reason: str) -> FiredEvent:
    attributes = {
        "reason": reason,
        "command_id": window.command.command_id,
        "start_epoch": str(window.start_epoch),
        "start_step": str(window.start_step),
    }
    return FiredEvent(Event.OBSERVATION_WINDOW_DROPPED, Severity.INFO, attributes)
