"""`tamiyo dlq`: look at dead letters, put them back, or remove them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis
from rich.table import Table

from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.adapters.oona.inspection import merged, scan, server_time_ms
from tamiyo_svc.adapters.oona.letters import DeadLetter, LetterMover
from tamiyo_svc.cli.bus_message import BusMessage, decode, plain, shown_time
from tamiyo_svc.cli.duration import parse_start
from tamiyo_svc.cli.letter_prospect import Prospects
from tamiyo_svc.cli.tail import page_for, reading_keyring
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.taxonomy import DeadLetterReason

TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters are meant; without ids and filters all of them, which acting must ask for."""

    ids: tuple[str, ...] = ()
    reason: str | None = None
    stream: str | None = None
    since: str | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        if self.reason is not None and self.reason not in list(DeadLetterReason):
            raise ConfigurationError(
                f"--reason: got {self.reason!r}, takes one of {', '.join(DeadLetterReason)}"
            )

    def require_choice(self) -> None:
        """Refuse to act on every letter unless that was asked for.

        Raises:
            ConfigurationError: nothing was chosen.
        """
        if not (self.ids or self.reason or self.stream or self.since or self.everything):
            raise ConfigurationError(
                "name the letters by id, by --reason, --stream or --since, or take --all of them"
            )

    def matches(self, letter: DeadLetter) -> bool:
        """Whether a letter is one of those meant; `since` is the reader's business."""
        return (
            (not self.ids or letter.entry_id in self.ids)
            and (self.reason is None or letter.reason == self.reason)
            and (self.stream is None or letter.original.stream == self.stream)
        )


@dataclass(frozen=True, slots=True)
class Action:
    """One letter and what is, or would be, done about it."""

    letter: DeadLetter
    result: str
    changed: bool = True


def listed(settings: Settings, selection: Selection, *, as_json: bool) -> str | Table:
    """The chosen letters, oldest first.

    Raises:
        BusError: Redis does not answer.
    """

    async def read() -> list[DeadLetter]:
        async with client(settings.redis_url, TIMEOUT_S) as redis:
            return await _chosen(redis, settings, selection)

    letters = asyncio.run(read())
    if as_json:
        return json.dumps([_document(letter, settings) for letter in letters], indent=2)
    table = Table(title=f"Dead letters ({len(letters)})", title_justify="left")
    table.add_column("Id", no_wrap=True)
    for name in ("Reason", "From", "What"):
        table.add_column(name, overflow="fold")
    for letter in letters:
        original = letter.original
        origin = f"{original.stream} {original.entry_id}".strip() or "unknown"
        cells = (letter.entry_id, letter.reason or "unknown", origin, _what(letter, settings))
        table.add_row(*map(_escaped, cells))
    return table


def shown(settings: Settings, entry_id: str) -> str:
    """Everything about one letter, as JSON.

    Raises:
        BusError: Redis does not answer.
        ConfigurationError: there is no such letter.
    """

    async def read() -> list[DeadLetter]:
        async with client(settings.redis_url, TIMEOUT_S) as redis:
            return await _chosen(redis, settings, Selection(ids=(entry_id,)))

    return json.dumps(_document(asyncio.run(read())[0], settings), indent=2)


def requeue(settings: Settings, selection: Selection, *, act: bool) -> list[Action]:
    """Put letters back on the streams they came from; without `act` only say what would become
    of them.

    Raises:
        BusError: Redis does not answer; those moved before that stay moved.
        ConfigurationError: nothing was chosen, or an id is none of a letter.
    """
    selection.require_choice()
    return asyncio.run(_requeue(settings, selection, act=act))


def purge(settings: Settings, selection: Selection, *, act: bool) -> list[Action]:
    """Remove letters for good; without `act` only say which.

    Raises:
        BusError, ConfigurationError: as for `requeue`.
    """
    selection.require_choice()
    return asyncio.run(_purge(settings, selection, act=act))


def actions_text(actions: Sequence[Action], *, act: bool, done: str, todo: str) -> str:
    """One line for each letter and one that sums up."""
    lines = [plain(f"{one.letter.entry_id}  {one.letter.reason}  {one.result}") for one in actions]
    changed = sum(one.changed for one in actions)
    count = f"{changed} {'letter' if changed == 1 else 'letters'}"
    lines.append(f"{count} {done}" if act else f"{count} would be {todo}; --yes does it")
    return "\n".join(lines)


async def _requeue(settings: Settings, selection: Selection, *, act: bool) -> list[Action]:
    actions = []
    async with client(settings.redis_url, TIMEOUT_S) as redis:
        mover = LetterMover(redis)
        committer = Committer(redis, settings.consumer_group)
        prospects = Prospects(settings, committer, await server_time_ms(redis))
        for letter in await _chosen(redis, settings, selection):
            stream = letter.original.stream
            prospect = await prospects.of(letter)
            if not prospect.safe:
                result = f"left: {prospect.text}"
            elif not act:
                result = f"back to {stream}: {prospect.text}"
            else:
                entry_id = await mover.requeue(letter)
                result = f"back on {stream} as {entry_id}" if entry_id else "was gone already"
            actions.append(Action(letter, result, changed=prospect.safe))
    return actions


async def _purge(settings: Settings, selection: Selection, *, act: bool) -> list[Action]:
    async with client(settings.redis_url, TIMEOUT_S) as redis:
        letters = await _chosen(redis, settings, selection)
        if act:
            await LetterMover(redis).purge(letters)
    return [Action(letter, _what(letter, settings)) for letter in letters]


async def _chosen(redis: Redis, settings: Settings, selection: Selection) -> list[DeadLetter]:
    start = "-"
    if selection.since is not None:
        start = parse_start("--since", selection.since, await server_time_ms(redis))
    streams = settings.in_partitions(settings.dead_letter_stream)
    letters = []
    async for entry in merged(
        [scan(redis, stream, start, page=page_for(stream, settings)) for stream in streams]
    ):
        letter = DeadLetter.of(entry)
        if selection.matches(letter):
            letters.append(letter)
    missing = set(selection.ids) - {letter.entry_id for letter in letters}
    if missing:
        raise ConfigurationError(f"no such dead letter: {', '.join(sorted(missing))}")
    return letters


def _what(letter: DeadLetter, settings: Settings) -> str:
    message = _decoded(letter, settings)
    what = f"{message.type_name} {message.run_id}".strip()
    return what or letter.detail or message.problem


def _decoded(letter: DeadLetter, settings: Settings) -> BusMessage:
    return decode(letter.original, reading_keyring(settings), settings.max_message_bytes)


def _document(letter: DeadLetter, settings: Settings) -> Mapping[str, Any]:
    original = letter.original
    message = _decoded(letter, settings)
    return {
        "id": letter.entry_id,
        "stream": letter.stream,
        "buried": _buried(letter),
        "reason": letter.reason,
        "detail": letter.detail,
        "deliveries": original.deliveries,
        "original": {
            "stream": original.stream,
            "id": original.entry_id,
            "type": message.type_name or None,
            "verification": message.verification.value,
            **message.content(),
        },
    }


def _buried(letter: DeadLetter) -> str:
    return shown_time(int(letter.entry_id.partition("-")[0]))


def _escaped(text: str) -> str:
    """Text that rich prints as it is, square brackets included."""
    return plain(text).replace("[", "\\[")
