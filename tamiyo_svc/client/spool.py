"""Where the packets of a trainer without a bus go: a capture file, to be replayed later."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from tamiyo_svc.client.capture import CapturedEntry, write_capture
from tamiyo_svc.client.drafts import Outgoing
from tamiyo_svc.client.transport import Entry
from tamiyo_svc.errors import BusError


class Spool:
    """Appends entries to a capture file and never receives any.

    Ids are made as Redis makes them, from `clock` (Unix time in seconds), and rise strictly.
    """

    receives = False

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.cursor = ""
        self._path = path
        self._clock = clock
        self._file: IO[str] | None = None
        self._last = (0, 0)

    def connect(self) -> None:
        """Open the file for appending, unless it is open."""
        if self._file is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise BusError(f"spooling to {self._path}: {error}") from error

    def send(self, batch: Sequence[Outgoing]) -> None:
        """Append entries and flush them to the operating system."""
        if self._file is None:
            raise BusError(f"spooling to {self._path}: not open")
        entries = [
            CapturedEntry.of(entry.stream, self._next_id(), entry.envelope.fields())
            for entry in batch
        ]
        try:
            write_capture(self._file, entries)
        except OSError as error:
            self.disconnect()
            raise BusError(f"spooling to {self._path}: {error}") from error

    def disconnect(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                raise BusError(f"spooling to {self._path}: {error}") from error

    def listen(self) -> None:
        """Do nothing."""

    def receive(self) -> list[Entry]:
        """Nothing, at once."""
        return []

    def stop_listening(self) -> None:
        """Do nothing."""

    def interrupt(self) -> None:
        """Do nothing."""

    def readers(self, stream: str) -> str:
        """Nobody: it is a file."""
        return f"{stream} is spooled to {self._path}"

    def _next_id(self) -> str:
        now_ms = int(self._clock() * 1e3)
        last_ms, number = self._last
        self._last = (now_ms, 0) if now_ms > last_ms else (last_ms, number + 1)
        return f"{self._last[0]}-{self._last[1]}"
