"""`tamiyo top`: every run's newest decision, the replicas behind them, and the streams.

All of it is read off the bus, telemetry for runs and replicas and the consumer group for the
streams, so it works from any machine that reaches Redis and has the secret. It only reads.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS, ServerClock, client
from tamiyo_svc.adapters.oona.housekeeping import StreamStatus, read_status
from tamiyo_svc.errors import BusError, ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import EnvelopeRejectedError, open_envelope, parse_payload
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.taxonomy import BreakerName, BreakerState

_TIMEOUT_S: Final = 2.0
_FIRST_LOOK_ENTRIES: Final = 500
"""How far back the first look goes, on each stream."""
_READ_ENTRIES: Final = 500
_STALE_S: Final = 30.0
"""A run that was silent this long is shown dim."""
_BREAKERS: Final = (BreakerName.INFERENCE, BreakerName.METADATA)
"""Those that telemetry tells of; the bus breaker says nothing while the bus is away."""

_MAX_RUNS: Final = 10_000
_WIDTH: Final = 100
"""Columns of a picture."""

_FONTS: Final = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""What a picture would load from elsewhere."""

_COLORS: Final[Mapping[int, str]] = {
    leyline.TELEMETRY_LEVEL_CRITICAL: "bold red",
    leyline.TELEMETRY_LEVEL_ERROR: "red",
    leyline.TELEMETRY_LEVEL_WARNING: "yellow",
}
_STATES: Final = {
    BreakerState.CLOSED: "[green]closed[/]",
    BreakerState.OPEN: "[red]open[/]",
    BreakerState.HALF_OPEN: "[yellow]half open[/]",
}


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run's newest decision; `decided_ms` is when it was made, on the server's clock."""

    run_id: str
    step: int
    command: str
    reason: str
    level: int
    conservative: bool
    step_ms: float
    replica: str
    decided_ms: float


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """A replica as its newest telemetry shows it; a breaker it does not tell of is left out."""

    replica: str
    version: str
    device: str
    breakers: Mapping[BreakerName, BreakerState]
    heard_ms: float


@dataclass(slots=True)
class Board:
    """What telemetry has told so far; packets may come in any order."""

    runs: dict[str, RunRow] = field(default_factory=dict)
    replicas: dict[str, ReplicaRow] = field(default_factory=dict)
    refused: int = 0
    """Entries whose signature or form was wrong."""

    def take(self, added_ms: float, attributes: Mapping[str, str], packet: Any) -> None:
        """Note one telemetry packet that was added to its stream at a server time."""
        indicators = packet.system_health.indicators
        metrics = {metric.name: metric.value for metric in packet.metrics}
        name = indicators.get("replica", "")
        known = self.replicas.get(name)
        if name and (known is None or known.heard_ms <= added_ms):
            self.replicas[name] = ReplicaRow(
                name,
                indicators.get("policy_version", ""),
                indicators.get("device", ""),
                {
                    breaker: BreakerState(int(state))
                    for breaker in _BREAKERS
                    if (state := metrics.get(f"tamiyo.breaker.{breaker}_state")) is not None
                },
                added_ms,
            )
        run_id = attributes.get("training_run_id", "")
        # Notices, such as one about expired packets, name a run but decide nothing.
        if not run_id or "step_index" not in indicators:
            return
        before = self.runs.get(run_id)
        if before is not None and before.decided_ms > added_ms:
            return
        if before is None and len(self.runs) >= _MAX_RUNS:
            del self.runs[min(self.runs, key=lambda run: self.runs[run].decided_ms)]
        self.runs[run_id] = RunRow(
            run_id,
            int(indicators["step_index"]),
            indicators.get("command", "-"),
            indicators.get("reason", "-"),
            packet.level,
            indicators.get("mode") == "1",
            metrics.get("tamiyo.step.latency_ms", 0.0),
            name,
            added_ms,
        )


class TelemetryReader:
    """Follows the telemetry on several streams into a board, without a consumer group."""

    def __init__(self, redis: Redis, streams: Iterable[str], keyring: Keyring | None) -> None:
        self._redis = redis
        self._streams = tuple(dict.fromkeys(streams))
        self._keyring = keyring
        self._after: dict[str, bytes] = {}

    async def read(self, board: Board) -> None:
        """Take what is new; the first time, the newest entries of each stream.

        Raises:
            BusError: Redis did not answer.
        """
        try:
            for stream in self._streams:
                after = self._after.get(stream)
                if after is None:
                    newest: Any = await self._redis.xrevrange(stream, count=_FIRST_LOOK_ENTRIES)
                    self._after[stream] = b"0-0"
                    self._take(board, stream, newest[::-1])
                    continue
                answer: Any = await self._redis.xread({stream: after}, count=_READ_ENTRIES)
                for _, entries in answer or ():
                    self._take(board, stream, entries)
        except (*OUTAGE_ERRORS, RedisError) as error:
            raise BusError(f"reading telemetry: {error!r}") from error

    def _take(self, board: Board, stream: str, entries: Iterable[Any]) -> None:
        for entry_id, fields in entries:
            self._after[stream] = entry_id
            try:
                envelope = open_envelope(fields, self._keyring)
                if envelope.message_type == leyline.BUS_MESSAGE_TYPE_TELEMETRY:
                    added_ms = float(entry_id.partition(b"-")[0])
                    board.take(added_ms, envelope.attributes, parse_payload(envelope))
            except EnvelopeRejectedError:
                board.refused += 1


def top(
    settings: Settings,
    *,
    rows: int = 20,
    interval_s: float = 1.0,
    once: bool = False,
    picture: Path | None = None,
) -> int:
    """Show the board until interrupted, or once; the exit code is 1 when Redis does not answer.

    `picture` is an SVG file that one look is written to.

    Raises:
        ConfigurationError: no secret to verify telemetry with.
    """
    keyring = settings.keyring()
    with suppress(KeyboardInterrupt):
        return asyncio.run(_top(settings, keyring, rows, interval_s, picture, once=once))
    return 0


async def _top(
    settings: Settings,
    keyring: Keyring | None,
    rows: int,
    interval_s: float,
    picture: Path | None,
    *,
    once: bool,
) -> int:
    console = Console(record=picture is not None, width=_WIDTH if picture else None)
    board = Board()
    async with client(settings.redis_url, _TIMEOUT_S) as redis:
        streams = settings.in_partitions(settings.telemetry_stream, settings.emergency_stream)
        reader = TelemetryReader(redis, streams, keyring)
        if once or picture is not None or not sys.stdout.isatty():
            try:
                console.print(await _look(settings, redis, reader, board, rows))
            except BusError as error:
                raise ConfigurationError(f"REDIS_URL: {error}") from None
            if picture is not None:
                svg = _FONTS.sub("", console.export_svg(title="tamiyo top"))
                await asyncio.to_thread(picture.write_text, svg)
            return 0
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    shown = await _look(settings, redis, reader, board, rows)
                except BusError as error:
                    shown = Text(f"{error}; trying again", style="red")
                live.update(shown, refresh=True)
                await asyncio.sleep(interval_s)


async def _look(
    settings: Settings, redis: Redis, reader: TelemetryReader, board: Board, rows: int
) -> RenderableType:
    clock = ServerClock()
    try:
        await clock.sync(redis)
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"Redis does not answer: {error!r}") from error
    await reader.read(board)
    statuses = {
        stream: await read_status(redis, stream, settings.consumer_group)
        for stream in settings.in_partitions(settings.normal_stream, settings.emergency_stream)
    }
    return board_view(board, statuses, clock.now_ms(), rows)


def board_view(
    board: Board, statuses: Mapping[str, StreamStatus], now_ms: float, rows: int
) -> RenderableType:
    """The board as tables: streams, replicas, and the runs heard of last."""
    shown = sorted(board.runs.values(), key=lambda run: -run.decided_ms)[:rows]
    parts: list[RenderableType] = [
        _streams_table(statuses, now_ms),
        _replicas_table(board.replicas.values(), now_ms),
        _runs_table(shown, len(board.runs), now_ms),
    ]
    if board.refused:
        text = f"{board.refused} entries were refused: is this the service's secret?"
        parts.append(Text(text, style="red"))
    return Group(*parts)


def _streams_table(statuses: Mapping[str, StreamStatus], now_ms: float) -> Table:
    table = _table("Streams", "Stream", "Entries", "Lag", "Pending", "Oldest pending")
    for stream, status in statuses.items():
        oldest = "-"
        if status.oldest_unacked_id is not None:
            oldest = _age(now_ms, float(status.oldest_unacked_id.partition("-")[0]))
        table.add_row(
            Text(stream), str(status.length), _known(status.lag), _known(status.pending), oldest
        )
    return table


def _replicas_table(replicas: Iterable[ReplicaRow], now_ms: float) -> Table:
    breakers = [str(name) for name in _BREAKERS]
    table = _table("Replicas", "Replica", "Policy", "Device", *breakers, "Age")
    for row in sorted(replicas, key=lambda row: row.replica):
        states = [
            _STATES[row.breakers[name]] if name in row.breakers else "-" for name in _BREAKERS
        ]
        table.add_row(
            Text(row.replica),
            Text(row.version),
            Text(row.device),
            *states,
            _age(now_ms, row.heard_ms),
        )
    return table


def _runs_table(runs: Iterable[RunRow], known: int, now_ms: float) -> Table:
    columns = ("Run", "Step", "Age", "Command", "Because", "Latency", "Replica")
    table = _table(f"Runs ({known})", *columns)
    for row in runs:
        stale = now_ms - row.decided_ms > _STALE_S * 1e3
        table.add_row(
            Text(row.run_id),
            str(row.step),
            _age(now_ms, row.decided_ms),
            Text(row.command, style="red" if row.conservative else ""),
            Text(row.reason, style=_COLORS.get(row.level, "")),
            f"{row.step_ms:.1f} ms",
            Text(row.replica),
            style="dim" if stale else "",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    for column in columns:
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    return table


def _known(count: int | None) -> str:
    return "unknown" if count is None else str(count)


def _age(now_ms: float, then_ms: float) -> str:
    """How long ago, in the largest unit that is not 0."""
    seconds = max(0.0, (now_ms - then_ms) / 1e3)
    for size_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.1f} s"
