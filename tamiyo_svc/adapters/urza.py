"""Urza's blueprint catalogue as an in-memory snapshot, refreshed off the step path."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tamiyo_svc.adapters.blueprint_rows import MAX_ROW_BYTES, parse_blueprint
from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import Event

_URL_PREFIX: Final = "sqlite:///"
_LOCK_WAIT_S: Final = 0.1
_RETRY_S: Final = 0.5
"""How soon a catalogue that could not be read is tried again."""

_SELECT: Final = "SELECT blueprint_id, metadata_json FROM blueprints"


@dataclass(frozen=True)
class CatalogSnapshot:
    """Every blueprint known at one moment; `ranked` holds those a run may be given unasked."""

    blueprints: Mapping[str, Blueprint] = field(default_factory=dict)
    ranked: tuple[Blueprint, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, blueprints: Iterable[Blueprint], skipped: Mapping[str, int]) -> CatalogSnapshot:
        """A snapshot with its ranking: best candidate score first, ties by id, no quarantine."""
        known = {blueprint.blueprint_id: blueprint for blueprint in blueprints}
        usable = [one for one in known.values() if not one.is_quarantined]
        usable.sort(key=lambda one: (-one.candidate_score, one.blueprint_id))
        return cls(known, tuple(usable), dict(skipped))

    def candidates(
        self, requested: Sequence[str], packet_id: str, run_id: str, limit: int
    ) -> tuple[Blueprint, ...]:
        """The blueprints one decision chooses from.

        Those the trainer asked for by id, else the one named like the packet or the run, else the
        best `limit` of the catalogue.
        """
        if requested:
            found = (self.blueprints.get(blueprint_id) for blueprint_id in requested)
            return tuple(blueprint for blueprint in found if blueprint is not None)[:limit]
        named = self.blueprints.get(packet_id) or self.blueprints.get(run_id)
        return (named,) if named is not None else self.ranked[:limit]


@dataclass(frozen=True, slots=True)
class _Row:
    """One catalogue row as read; equal text means nothing has to be parsed again."""

    text: object
    blueprint: Blueprint | None
    skipped: Mapping[str, int]


_Rows = Mapping[str, _Row]
_Stamp = tuple[object, ...]


class UrzaCatalog:
    """Reads the catalogue file now and then and keeps the newest good snapshot.

    A file that is missing, locked, truncated or otherwise unreadable leaves the last snapshot in
    place; `on_event` hears once that the catalogue degraded and once that it recovered.
    """

    def __init__(
        self,
        url: str,
        refresh_s: float,
        on_event: Callable[[Event, Mapping[str, str]], None] = lambda event, attributes: None,
    ) -> None:
        self._path = catalog_path(url)
        self._refresh_s = refresh_s
        self._on_event = on_event
        self._rows: _Rows = {}
        self._sheets: dict[str, leyline.BSDS] = {}
        self._stamp: _Stamp | None = None
        self._changed = asyncio.Event()
        # Its own threads: a file system that hangs must not hold up anything else.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tamiyo-catalog")
        self.degraded: str | None = None
        self.snapshot = CatalogSnapshot()

    async def run(self) -> None:
        """Refresh on every interval and whenever the bus announced a change, until cancelled."""
        while True:
            wait_s = self._refresh_s
            if self.degraded is not None:
                wait_s = min(wait_s, _RETRY_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            self._changed.clear()
            await self.refresh()

    def announce(self) -> None:
        """Note that the catalogue changed, so that it is read again soon."""
        self._stamp = None
        self._changed.set()

    def add_sheets(self, sheets: Iterable[leyline.BSDS]) -> None:
        """Take safety sheets from the bus; each counts unless a newer one is known."""
        changed = False
        for sheet in sheets:
            known = self._sheets.get(sheet.blueprint_id)
            if known is None or (known != sheet and _issued_ns(known) <= _issued_ns(sheet)):
                self._sheets[sheet.blueprint_id] = sheet
                changed = True
        if changed:
            self._publish()

    async def refresh(self) -> None:
        """Read the file again if it changed; never raises for what is wrong with it."""
        known, stamp = self._rows, self._stamp
        try:
            found, rows = await asyncio.get_running_loop().run_in_executor(
                self._threads, _read, self._path, stamp, known
            )
        except (sqlite3.Error, OSError) as error:
            self._degrade(f"{type(error).__name__}: {error}")
            return
        # A change that was announced meanwhile must be read again.
        if self._stamp == stamp:
            self._stamp = found
        if self.degraded is not None:
            self.degraded = None
            blueprints = len(self._rows if rows is None else rows)
            self._on_event(Event.CATALOG_RECOVERED, {"blueprints": str(blueprints)})
        if rows is not None:
            self._rows = rows
            self._publish()

    async def fetch(self, blueprint_id: str, lock_wait_s: float = _LOCK_WAIT_S) -> bool:
        """Read one blueprint now; whether the snapshot has it afterwards.

        Raises:
            sqlite3.Error, OSError: the file cannot be read, or stays locked for `lock_wait_s`.
        """
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, _read_one, self._path, blueprint_id, lock_wait_s
        )
        if found is None:
            return False
        if blueprint_id not in self._rows:
            self._rows = {**self._rows, blueprint_id: found}
            self._publish()
        return blueprint_id in self.snapshot.blueprints

    def close(self) -> None:
        """Let the threads go; one that still reads ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _degrade(self, reason: str) -> None:
        self._stamp = None
        if self.degraded is None:
            self._on_event(Event.CATALOG_DEGRADED, {"reason": reason})
        self.degraded = reason

    def _publish(self) -> None:
        skipped: Counter[str] = Counter()
        blueprints = []
        for row in self._rows.values():
            skipped.update(row.skipped)
            if row.blueprint is not None:
                blueprints.append(self._with_newest_sheet(row.blueprint))
        self.snapshot = CatalogSnapshot.of(blueprints, skipped)

    def _with_newest_sheet(self, blueprint: Blueprint) -> Blueprint:
        """The blueprint with the sheet of the bus, unless its own is newer.

        What did not change stays the same object, because graphs are cached by it.
        """
        sheet = self._sheets.get(blueprint.blueprint_id)
        own = blueprint.bsds
        if sheet is None or (own is not None and _issued_ns(own) > _issued_ns(sheet)):
            return blueprint
        previous = self.snapshot.blueprints.get(blueprint.blueprint_id)
        if (
            previous is not None
            and previous.bsds is sheet
            and previous.descriptor is blueprint.descriptor
        ):
            return previous
        return replace(blueprint, bsds=sheet)


def catalog_path(url: str) -> Path:
    """The file an `URZA_DATABASE_URL` names.

    Raises:
        ConfigurationError: it is not a SQLite URL.
    """
    if not url.startswith(_URL_PREFIX) or len(url) == len(_URL_PREFIX):
        raise ConfigurationError(
            f"URZA_DATABASE_URL is {url!r}, it takes sqlite:///relative/path or "
            "sqlite:////absolute/path"
        )
    return Path(url.removeprefix(_URL_PREFIX))


def _issued_ns(sheet: leyline.BSDS) -> int:
    return sheet.issued_at.ToNanoseconds() if sheet.HasField("issued_at") else 0


def _file_stamp(path: Path) -> _Stamp:
    """What changes when the file or its write-ahead log does.

    Raises:
        OSError: there is no file.
    """
    status = path.stat()
    stamp: _Stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
    with suppress(FileNotFoundError):
        log = Path(f"{path}-wal").stat()
        stamp = (*stamp, log.st_mtime_ns, log.st_size)
    return stamp


def _read(path: Path, stamp: _Stamp | None, known: _Rows) -> tuple[_Stamp, _Rows | None]:
    """The file's stamp, and its rows if the stamp is another than before."""
    found = _file_stamp(path)
    if found == stamp:
        return found, None
    rows = {}
    for raw_id, text in _select(path, f"{_SELECT} ORDER BY blueprint_id", (), _LOCK_WAIT_S):
        row_id = _decoded(raw_id)
        before = known.get(row_id)
        same = before is not None and before.text == text
        rows[row_id] = before if same and before is not None else _parse(row_id, text)
    return found, rows


def _read_one(path: Path, blueprint_id: str, lock_wait_s: float) -> _Row | None:
    if not path.exists():
        return None
    query = f"{_SELECT} WHERE blueprint_id = ?"
    for _, text in _select(path, query, (blueprint_id,), lock_wait_s):
        return _parse(blueprint_id, text)
    return None


def _parse(blueprint_id: str, text: object) -> _Row:
    skipped: Counter[str] = Counter()
    blueprint = None
    try:
        if not isinstance(text, bytes) or len(text) > MAX_ROW_BYTES:
            raise ValueError("metadata_json is not text, or too long")
        blueprint = parse_blueprint(blueprint_id, text.decode(), skipped)
    except ValueError:
        skipped.clear()
        skipped["row"] = 1
    return _Row(text, blueprint, skipped)


def _decoded(raw_id: object) -> str:
    return raw_id.decode(errors="replace") if isinstance(raw_id, bytes) else str(raw_id)


def _select(
    path: Path, query: str, values: tuple[str, ...], lock_wait_s: float
) -> list[tuple[Any, Any]]:
    url = f"file:{quote(str(path.absolute()))}?mode=ro"
    with closing(sqlite3.connect(url, uri=True, timeout=lock_wait_s)) as connection:
        # One row that is not UTF-8 must not cost the others.
        connection.text_factory = bytes
        return connection.execute(query, values).fetchall()
