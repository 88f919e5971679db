"""Urza's blueprint catalogue as an in-memory snapshot, refreshed off the step path.

Where no catalogue is configured, a blueprint that a trainer asks for by name is taken as it is.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import structlog

from tamiyo_svc.adapters.blueprint_rows import MAX_ROW_BYTES, parse_blueprint
from tamiyo_svc.catalog import MAX_NAME_CHARACTERS, Blueprint, is_name, neutral_descriptor
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import Event

log = structlog.get_logger("tamiyo.catalog")

_URL_PREFIX: Final = "sqlite:///"
_LOCK_WAIT_S: Final = 0.1
_RETRY_S: Final = 0.5
"""How soon a catalogue that could not be read is tried again."""

_MAX_OFFERED: Final = 256
"""Blueprints known by name alone that are remembered; what is forgotten is made again, the same."""

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

    With `optional` there need be no file. Until one is there, the catalogue is absent, which is
    no degradation, and what a trainer asks for by name is taken with neutral metadata. A file
    that was there once is a catalogue for good: its loss must not admit what it did not list.
    """

    def __init__(
        self,
        url: str,
        refresh_s: float,
        on_event: Callable[[Event, Mapping[str, str]], None] = lambda event, attributes: None,
        *,
        optional: bool = False,
    ) -> None:
        self._path = catalog_path(url)
        self._refresh_s = refresh_s
        self._on_event = on_event
        self._rows: _Rows = {}
        self._sheets: dict[str, leyline.BSDS] = {}
        self._stamp: _Stamp | None = None
        self._offered: OrderedDict[str, Blueprint] = OrderedDict()
        self._refused_name = False
        self._changed = asyncio.Event()
        # Its own threads: a file system that hangs must not hold up anything else.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tamiyo-catalog")
        self.absent = optional
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

    def candidates(
        self, requested: Sequence[str], packet_id: str, run_id: str, limit: int
    ) -> tuple[Blueprint, ...]:
        """The blueprints one decision chooses from, at most `limit`."""
        if not self.absent:
            return self.snapshot.candidates(requested, packet_id, run_id, limit)
        names = filter(self._is_acceptable, dict.fromkeys(requested))
        return tuple(self._offer(name) for name in islice(names, limit))

    def missing(self, requested: Sequence[str]) -> list[str]:
        """The ids that the file may have and the snapshot does not."""
        if self.absent:
            return []
        return [name for name in requested if name not in self.snapshot.blueprints]

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
        except FileNotFoundError as error:
            if not self.absent:
                self._degrade(f"{type(error).__name__}: {error}")
            return
        except (sqlite3.Error, OSError) as error:
            self.absent = False
            self._degrade(f"{type(error).__name__}: {error}")
            return
        self.absent = False
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
        self.snapshot = _snapshot(self._rows, self._with_newest_sheet)

    def _is_acceptable(self, name: str) -> bool:
        acceptable = is_name(name)
        if not acceptable and not self._refused_name:
            self._refused_name = True
            log.warning("catalog.name_refused", name=ascii(name[:MAX_NAME_CHARACTERS]))
        return acceptable

    def _offer(self, name: str) -> Blueprint:
        """A blueprint of which nothing is known but its name and, if there is one, its sheet.

        It stays the same object until its sheet changes, because graphs are cached by it.
        """
        sheet = self._sheets.get(name)
        blueprint = self._offered.get(name)
        if blueprint is None or blueprint.bsds is not sheet:
            blueprint = self._offered[name] = Blueprint(neutral_descriptor(name), sheet)
            if len(self._offered) > _MAX_OFFERED:
                self._offered.popitem(last=False)
        self._offered.move_to_end(name)
        return blueprint

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


def read_catalog(path: Path) -> CatalogSnapshot:
    """What is in a catalogue file.

    Raises:
        sqlite3.Error, OSError: it cannot be read.
    """
    _, rows = _read(path, None, {})
    return _snapshot(rows or {})


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


def _snapshot(
    rows: _Rows, completed: Callable[[Blueprint], Blueprint] = lambda blueprint: blueprint
) -> CatalogSnapshot:
    skipped: Counter[str] = Counter()
    blueprints = []
    for row in rows.values():
        skipped.update(row.skipped)
        if row.blueprint is not None:
            blueprints.append(completed(row.blueprint))
    return CatalogSnapshot.of(blueprints, skipped)


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
