"""`tamiyo tail`: what passes over the bus, verified and decoded, as text or JSON lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from redis.asyncio import Redis

from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.adapters.oona.entries import Entry, id_order
from tamiyo_svc.adapters.oona.inspection import (
    PAGE,
    READING_CONNECTIONS,
    last_id,
    merged,
    read_after,
    scan,
    scan_back,
    server_time_ms,
    streams_under,
)
from tamiyo_svc.cli.bus_message import REPLY_TO, TYPES, BusMessage, decode
from tamiyo_svc.cli.duration import parse_start
from tamiyo_svc.cli.stream import streams_of
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline.partition import REPLY_STREAMS
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import Settings

_BLOCK_MS: Final = 1000
_TIMEOUT_S: Final = 10.0
_LARGE_PAGE: Final = 10
_SCANNED_BACK: Final = 20_000
"""Entries of a stream that are looked through for the newest that match."""


class OutputFormat(StrEnum):
    """How messages are printed."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be shown; no streams are all but the policy stream, those for replies too."""

    streams: tuple[str, ...] = ()
    run_id: str | None = None
    type_part: str | None = None
    since: str | None = None
    newest: int = 10

    def __post_init__(self) -> None:
        part = self.type_part
        if part is not None and not any(part in name for name in TYPES):
            raise ConfigurationError(
                f"--type: got {part!r}, takes part of one of {', '.join(TYPES)}"
            )

    def matches(self, message: BusMessage) -> bool:
        """Whether a message is one of those."""
        if self.run_id is not None and message.run_id != self.run_id:
            return False
        return self.type_part is None or self.type_part in message.type_name


Show = Callable[[str], None]


def tail(
    settings: Settings, wanted: Wanted, output: OutputFormat, *, follow: bool, show: Show
) -> int:
    """Show what is there and, with `follow`, what comes until interrupted.

    Raises:
        BusError: Redis does not answer.
        ConfigurationError: a filter is no filter.
    """
    try:
        asyncio.run(_tail(settings, wanted, output, follow=follow, show=show))
    except KeyboardInterrupt:
        return 0
    return 0


def output_format(name: str) -> OutputFormat:
    """The format of that name.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return OutputFormat(name)
    except ValueError:
        raise ConfigurationError(
            f"--output: got {name!r}, takes {' or '.join(OutputFormat)}"
        ) from None


def reading_keyring(settings: Settings) -> Keyring | None:
    """The keys to verify with; None where there is no secret, which is fine for looking."""
    return settings.keyring() if settings.secret is not None else None


def page_for(stream: str, settings: Settings) -> int:
    """How many entries of a stream to ask for at once; some are megabytes each."""
    if stream == settings.policy_stream:
        return 1
    dead = settings.in_partitions(settings.dead_letter_stream)
    return _LARGE_PAGE if stream in dead else PAGE


async def _tail(
    settings: Settings, wanted: Wanted, output: OutputFormat, *, follow: bool, show: Show
) -> None:
    keyring = reading_keyring(settings)

    def print_entry(entry: Entry) -> None:
        message = decode(entry, keyring, settings.max_message_bytes)
        reply_to = message.attributes.get(REPLY_TO, "")
        if not wanted.streams and reply_to.startswith(REPLY_STREAMS):
            # An answer is never older than its packet, and reading begins after a position.
            positions.setdefault(reply_to, f"{max(0, entry.added_ms - 1)}-0")
        if not wanted.matches(message):
            return
        if output is OutputFormat.JSON:
            show(json.dumps(message.document()))
        else:
            show(message.line())

    positions: dict[str, str] = {}
    async with client(settings.redis_url, _TIMEOUT_S, READING_CONNECTIONS) as redis:
        streams = wanted.streams
        if not streams:
            usual = (name for name in streams_of(settings) if name != settings.policy_stream)
            streams = (*usual, *await streams_under(redis, REPLY_STREAMS))
        for stream in streams:
            positions[stream] = await last_id(redis, stream)
        if wanted.since is not None:
            start = parse_start("--since", wanted.since, await server_time_ms(redis))
            sources = [
                scan(redis, stream, start, end, page_for(stream, settings))
                for stream, end in dict(positions).items()
            ]
            async for entry in merged(sources):
                print_entry(entry)
        else:
            for entry in await _newest(redis, positions, wanted, settings, keyring):
                print_entry(entry)
        count = min(page_for(stream, settings) for stream in streams)
        while follow:
            for entry in await read_after(redis, positions, _BLOCK_MS, count):
                positions[entry.stream] = entry.entry_id
                print_entry(entry)


async def _newest(
    redis: Redis,
    positions: Mapping[str, str],
    wanted: Wanted,
    settings: Settings,
    keyring: Keyring | None,
) -> list[Entry]:
    """The newest matching entries of all streams together, oldest first."""
    found: list[Entry] = []
    for stream, end in positions.items():
        matching = scanned = 0
        async for entry in scan_back(redis, stream, end, page_for(stream, settings)):
            if wanted.matches(decode(entry, keyring, settings.max_message_bytes)):
                found.append(entry)
                matching += 1
            scanned += 1
            if matching == wanted.newest or scanned == _SCANNED_BACK:
                break
    found.sort(key=lambda entry: id_order(entry.entry_id))
    return found[max(0, len(found) - wanted.newest) :]
