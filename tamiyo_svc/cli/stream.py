"""`tamiyo stream status`: how far every stream has come, who reads it, and what is wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.adapters.oona.entries import id_order
from tamiyo_svc.adapters.oona.inspection import (
    ConsumerView,
    GroupView,
    StreamView,
    server_time_ms,
    streams_under,
    view_stream,
)
from tamiyo_svc.cli.bus_message import plain
from tamiyo_svc.cli.duration import shown_duration
from tamiyo_svc.leyline.partition import tag_in
from tamiyo_svc.service.settings import Settings

TIMEOUT_S: Final = 5.0
UNKNOWN: Final = "unknown"
_BEHIND_MS: Final = 1000.0


class Examiner:
    """Says in plain words what is the matter with a stream, by the service's settings."""

    def __init__(self, settings: Settings, now_ms: int) -> None:
        self._now_ms = now_ms
        self._group = settings.consumer_group
        self._inputs = settings.input_streams
        self._normal = settings.normal_stream
        self._dead = settings.in_partitions(settings.dead_letter_stream)
        self._claim_idle_ms = settings.claim_idle_ms
        # A consumer that waits asks again after every block.
        self._gone_ms = max(settings.claim_idle_ms, 3 * settings.block_ms)

    def age_ms(self, entry_id: str | None) -> int | None:
        """How long ago an entry was added."""
        return None if entry_id is None else max(0, self._now_ms - id_order(entry_id)[0])

    def diagnose(self, view: StreamView) -> list[str]:
        """What there is to say about a stream; nothing when all is well."""
        if view.stream in self._dead:
            if not view.length:
                return []
            return [f"{_entries(view.length)} could not be processed; `tamiyo dlq ls` lists them"]
        if view.stream not in self._inputs:
            if is_partition_of(self._normal, view.stream) and not view.groups:
                differ = "trainers and service differ in OONA_PARTITIONS"
                return [f"{_entries(view.length)} that no service reads: {differ}"]
            return [line for group in view.groups for line in self._diagnose(group)]
        if not view.exists:
            return ["the stream does not exist; a service makes it when it starts"]
        if all(group.name != self._group for group in view.groups):
            return [f"no consumer group {self._group!r}: no service has read this stream"]
        return [line for group in view.groups for line in self._diagnose(group)]

    def _diagnose(self, group: GroupView) -> list[str]:
        prefix = "" if group.name == self._group else f"{group.name}: "
        alive = [each for each in group.consumers if each.idle_ms < self._gone_ms]
        gone = [each for each in group.consumers if each.idle_ms >= self._gone_ms]
        lines = []
        # Up to Redis 7.0 a read that found nothing does not count as being seen; our own
        # consumers claim now and then, of others silence on a quiet stream says nothing.
        if not alive and (group.name == self._group or group.oldest_id is not None):
            lines.append(_nobody(gone))
        lines += [self._abandoned(each, alive) for each in gone if each.pending]
        lines += self._waiting(group, alive)
        if alive and group.pending and not any(each.pending for each in gone):
            age_ms = self.age_ms(group.pending_id) or 0
            if age_ms > self._claim_idle_ms:
                lines.append(
                    f"{_entries(group.pending)} in work, the oldest for {shown_duration(age_ms)}; "
                    "one that keeps failing becomes a dead letter"
                )
        return [f"{prefix}{line}" for line in lines]

    def _abandoned(self, consumer: ConsumerView, alive: Sequence[ConsumerView]) -> str:
        what = (
            f"{_entries(consumer.pending)} pending for {consumer.name}, which has been gone for "
            f"{shown_duration(consumer.idle_ms)}"
        )
        if alive:
            after = shown_duration(self._claim_idle_ms)
            return f"{what}; they are claimed by another consumer after {after}"
        return f"{what}; they stay until any consumer of the group is started"

    def _waiting(self, group: GroupView, alive: Sequence[ConsumerView]) -> list[str]:
        if group.waiting_id is None:
            return []
        age_ms = self.age_ms(group.waiting_id) or 0
        many = "entries" if group.lag is None else _entries(group.lag)
        unknown = ", how many cannot be told" if group.lag is None else ""
        what = f"{many} not delivered yet{unknown}, the oldest for {shown_duration(age_ms)}"
        if not alive:
            return [what]
        return [f"{what}: the consumers do not keep up"] if age_ms > _BEHIND_MS else []


def status(settings: Settings, *, as_json: bool) -> str | Group:
    """The state of every stream of the service.

    Raises:
        BusError: Redis does not answer.
    """
    now_ms, views = asyncio.run(_look(settings))
    examiner = Examiner(settings, now_ms)
    if as_json:
        report = {"now_ms": now_ms, "streams": [_document(view, examiner) for view in views]}
        return json.dumps(report, indent=2)
    return Group(_table(views, examiner), *_findings(views, examiner))


def streams_of(settings: Settings) -> tuple[str, ...]:
    """Every stream the settings name, each once; reply streams are not among them."""
    partitioned = settings.in_partitions(
        settings.emergency_stream,
        settings.normal_stream,
        settings.command_stream,
        settings.field_report_stream,
        settings.telemetry_stream,
        settings.dead_letter_stream,
    )
    return (*partitioned, settings.policy_stream)


def is_partition_of(name: str, stream: str) -> bool:
    """Whether a stream is the one of that name in some partition, or the only one."""
    return stream == name + tag_in(stream)


def _table(views: Sequence[StreamView], examiner: Examiner) -> Table:
    """One row for each stream and group, with the group's consumers."""
    table = Table(title="Streams", title_justify="left")
    table.add_column("Stream", no_wrap=True)
    for name in ("Length", "Lag", "Pending", "Oldest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Group and consumers", overflow="fold")
    for view in views:
        rows = [_row(group, examiner) for group in view.groups] or [("-", "-", "-", "no group")]
        for index, (lag, pending, oldest, members) in enumerate(rows):
            stream = _escaped(view.stream) if index == 0 else ""
            length = (str(view.length) if view.exists else "-") if index == 0 else ""
            table.add_row(stream, length, lag, pending, oldest, _escaped(members))
        table.add_section()
    return table


def _findings(views: Sequence[StreamView], examiner: Examiner) -> list[Text]:
    """The diagnosis, one line for each finding."""
    lines = [
        Text(plain(f"{view.stream}: {line}"), style="yellow")
        for view in views
        for line in examiner.diagnose(view)
    ]
    return lines or [Text("All is well.", style="green")]


def _row(group: GroupView, examiner: Examiner) -> tuple[str, str, str, str]:
    oldest_ms = examiner.age_ms(group.oldest_id)
    members = [
        f" {each.name}: {each.pending} pending, {shown_duration(each.idle_ms)} ago"
        for each in group.consumers
    ]
    return (
        UNKNOWN if group.lag is None else str(group.lag),
        str(group.pending),
        "-" if oldest_ms is None else shown_duration(oldest_ms),
        "\n".join([group.name, *(members or [" no consumers"])]),
    )


def _document(view: StreamView, examiner: Examiner) -> dict[str, Any]:
    return {
        "stream": view.stream,
        "exists": view.exists,
        "length": view.length,
        "groups": [
            {
                "group": group.name,
                "lag": group.lag,
                "pending": group.pending,
                "oldest_unacked_ms": examiner.age_ms(group.oldest_id),
                "consumers": [asdict(each) for each in group.consumers],
            }
            for group in view.groups
        ],
        "diagnosis": examiner.diagnose(view),
    }


async def _look(settings: Settings) -> tuple[int, list[StreamView]]:
    async with client(settings.redis_url, TIMEOUT_S) as redis:
        streams = dict.fromkeys(streams_of(settings))
        # Where trainers publish that were told another number of partitions.
        for stream in await streams_under(redis, settings.normal_stream):
            if is_partition_of(settings.normal_stream, stream):
                streams.setdefault(stream)
        views = [await view_stream(redis, stream) for stream in streams]
        return await server_time_ms(redis), views


def _nobody(gone: Sequence[ConsumerView]) -> str:
    if not gone:
        return "no consumer is reading, and none ever did"
    last = min(gone, key=lambda each: each.idle_ms)
    ago = shown_duration(last.idle_ms)
    return f"no consumer is reading; the last one, {last.name}, was seen {ago} ago"


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _escaped(text: str) -> str:
    """Text that rich prints as it is, square brackets included."""
    return plain(text, keep="\n").replace("[", "\\[")
