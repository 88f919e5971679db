"""`tamiyo capture`: a window of the bus in a file, with what replaying it needs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from google.protobuf.message import DecodeError
from redis.asyncio import Redis

from tamiyo_svc.adapters.oona.commit import run_key
from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.inspection import (
    READING_CONNECTIONS,
    last_id,
    merged,
    read_after,
    run_states,
    scan,
    server_time_ms,
)
from tamiyo_svc.cli.bus_message import REPLY_TO
from tamiyo_svc.cli.duration import parse_duration_ms, parse_start
from tamiyo_svc.cli.stream import streams_of
from tamiyo_svc.client.capture import CapturedEntry, write_capture
from tamiyo_svc.errors import BusError, ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import PAYLOAD_FIELD
from tamiyo_svc.leyline.partition import REPLY_STREAMS
from tamiyo_svc.service.settings import Settings

_BLOCK_MS: Final = 200
_TIMEOUT_S: Final = 10.0


class Recording:
    """An open capture file; it follows packets to the reply streams they name.

    `states` are those of the runs by the keys they are kept under. The state a run had when the
    recording began goes in front of its first packet.
    """

    def __init__(
        self, file: IO[str], states: dict[str, bytes], began: str, counts: Counter[str]
    ) -> None:
        self._file = file
        self._states = states
        self._began = began
        self._counts = counts
        self.reply_streams: set[str] = set()

    def add(self, entries: Iterable[Entry]) -> None:
        """Write entries; those of other systems, without a payload, are left out."""
        lines = []
        for entry in entries:
            if PAYLOAD_FIELD not in entry.fields:
                continue
            run_id = self._look_into(entry)
            state = self._states.pop(run_key(run_id, entry.tag), None)
            if state is not None:
                lines.append(CapturedEntry(run_key(run_id), self._began, state, b""))
            lines.append(CapturedEntry.of(entry.stream, entry.entry_id, entry.fields))
            self._counts[entry.stream] += 1
        write_capture(self._file, lines)

    def _look_into(self, entry: Entry) -> str:
        """The run of a state packet, empty for anything else; notes where its answer goes."""
        try:
            envelope = leyline.BusEnvelope.FromString(entry.fields[PAYLOAD_FIELD])
            if envelope.message_type != leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE:
                return ""
            packet = leyline.SystemStatePacket.FromString(envelope.payload)
        except DecodeError:
            return ""
        reply_to = envelope.attributes.get(REPLY_TO, "")
        if reply_to.startswith(REPLY_STREAMS):
            self.reply_streams.add(reply_to)
        return packet.training_run_id


def capture(settings: Settings, path: Path, *, duration: str | None, since: str | None) -> str:
    """Record the service's streams to a new file and say what is in it.

    With `since` what is there from then on is recorded, with `duration` what comes; an
    interruption ends the recording early.

    Raises:
        ConfigurationError: the file exists or cannot be made, or a time is none.
        BusError: Redis does not answer; what was recorded stays.
    """
    for_ms = None if duration is None else parse_duration_ms("--for", duration)
    if for_ms is None and since is None:
        raise ConfigurationError("give --for to record what comes, --since for what is there")
    try:
        # Never over a recording that may be the only one.
        file = path.open("x", encoding="utf-8", newline="\n")
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    counts: Counter[str] = Counter()
    try:
        with file, suppress(KeyboardInterrupt):
            asyncio.run(_record(settings, file, for_ms, since, counts))
    except (BusError, ConfigurationError):
        if not counts:
            path.unlink()
        raise
    if not counts:
        return f"{path}: nothing came"
    parts = ", ".join(f"{stream} {count}" for stream, count in sorted(counts.items()))
    return f"{path}: entries recorded: {counts.total()} ({parts})"


async def _record(
    settings: Settings, file: IO[str], for_ms: int | None, since: str | None, counts: Counter[str]
) -> None:
    left_out = (settings.policy_stream, *settings.in_partitions(settings.dead_letter_stream))
    streams = [stream for stream in streams_of(settings) if stream not in left_out]
    async with client(settings.redis_url, _TIMEOUT_S, READING_CONNECTIONS) as redis:
        now_ms = await server_time_ms(redis)
        positions = {stream: await last_id(redis, stream) for stream in streams}
        began = f"{now_ms}-0" if since is None else parse_start("--since", since, now_ms)
        # States from now say nothing of a past window. Read after the positions, they may know
        # the first packets already, which shows when they are replayed.
        states = await run_states(redis) if since is None else {}
        recording = Recording(file, states, began, counts)
        if since is not None:
            past = [scan(redis, stream, began, end) for stream, end in positions.items()]
            async for entry in merged(past):
                recording.add([entry])
        until_s = time.monotonic() + (for_ms or 0) / 1e3
        while (left_ms := int((until_s - time.monotonic()) * 1e3)) > 0:
            await _step(redis, recording, positions, began, min(_BLOCK_MS, left_ms))
        # Answers to the last packets, where they have a stream of their own.
        positions = {stream: positions.get(stream, began) for stream in recording.reply_streams}
        while positions and await _step(redis, recording, positions, began, None):
            pass


async def _step(
    redis: Redis,
    recording: Recording,
    positions: dict[str, str],
    began: str,
    block_ms: int | None,
) -> int:
    """Record what came since the last step; returns how many entries that were."""
    for stream in recording.reply_streams - positions.keys():
        positions[stream] = began
    entries = await read_after(redis, positions, block_ms)
    for entry in entries:
        positions[entry.stream] = entry.entry_id
    recording.add(entries)
    return len(entries)
