"""Urza's blueprint catalogue as an in-memory snapshot, refreshed off the step path."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from google.protobuf import json_format

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import Event

_URL_PREFIX: Final = "sqlite:///"
_LOCK_WAIT_S: Final = 0.1


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

    text: str
    blueprint: Blueprint


class UrzaCatalog:
    """Reads the catalogue file now and then and keeps the newest good snapshot.

    A missing file is an empty catalogue. A locked, truncated or otherwise unreadable one leaves
    the last snapshot in place; `on_event` hears once that it degraded and once that it recovered.
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
        self._rows: dict[str, _Row] = {}
        self._skipped: Counter[str] = Counter()
        self._sheets: dict[str, leyline.BSDS] = {}
        self._stamp: tuple[object, ...] | None = None
        self._changed = asyncio.Event()
        self.degraded: str | None = None
        self.snapshot = CatalogSnapshot()

    async def run(self) -> None:
        """Refresh on every interval and whenever the bus announced a change, until cancelled."""
        while True:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_s):
                    await self._changed.wait()
            await self.refresh()

    def announce(self) -> None:
        """Note that the catalogue changed, so that it is read again soon."""
        self._stamp = None
        self._changed.set()

    def add_sheet(self, sheet: leyline.BSDS) -> None:
        """Take a safety sheet from the bus; it counts unless a newer one is known."""
        known = self._sheets.get(sheet.blueprint_id)
        if known is None or _issued_ns(known) <= _issued_ns(sheet):
            self._sheets[sheet.blueprint_id] = sheet
            self._publish()

    async def refresh(self) -> None:
        """Read the file again if it changed; never raises for what is wrong with it."""
        try:
            changed = await asyncio.to_thread(self._read)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            self._degrade(f"{type(error).__name__}: {error}")
            return
        if self.degraded is not None:
            self.degraded = None
            self._on_event(Event.CATALOG_RECOVERED, {"blueprints": str(len(self._rows))})
        if changed:
            self._publish()

    def _degrade(self, reason: str) -> None:
        self._stamp = None
        if self.degraded is None:
            self._on_event(Event.CATALOG_DEGRADED, {"reason": reason})
        self.degraded = reason

    def _read(self) -> bool:
        """Read changed rows into the cache; runs in a worker thread."""
        stamp = _file_stamp(self._path)
        if stamp == self._stamp:
            return False
        rows = _select(self._path) if stamp is not None else []
        parsed: dict[str, _Row] = {}
        skipped: Counter[str] = Counter()
        for blueprint_id, text in rows:
            known = self._rows.get(blueprint_id)
            if known is not None and known.text == text:
                parsed[blueprint_id] = known
                continue
            try:
                parsed[blueprint_id] = _Row(text, parse_blueprint(blueprint_id, text, skipped))
            except ValueError:
                skipped["row"] += 1
        self._rows, self._skipped, self._stamp = parsed, skipped, stamp
        return True

    def _publish(self) -> None:
        blueprints = []
        current = self.snapshot.blueprints
        for blueprint_id, row in self._rows.items():
            sheet = self._sheets.get(blueprint_id)
            own = row.blueprint.bsds
            if sheet is None or (own is not None and _issued_ns(own) > _issued_ns(sheet)):
                blueprints.append(row.blueprint)
                continue
            previous = current.get(blueprint_id)
            if (
                previous is not None
                and previous.bsds is sheet
                and previous.descriptor is row.blueprint.descriptor
            ):
                blueprints.append(previous)
            else:
                blueprints.append(replace(row.blueprint, bsds=sheet))
        self.snapshot = CatalogSnapshot.of(blueprints, self._skipped)


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


def parse_blueprint(blueprint_id: str, text: str, skipped: Counter[str]) -> Blueprint:
    """Parse one `metadata_json`; parts that do not fit are left out and counted in `skipped`.

    Raises:
        ValueError: not even the descriptor can be read.
    """
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("metadata_json is not an object")
    extras = data.pop("_urza", None)
    if not isinstance(extras, dict):
        extras = {}
    try:
        descriptor = json_format.ParseDict(
            data, leyline.BlueprintDescriptor(), ignore_unknown_fields=True
        )
    except json_format.ParseError as error:
        raise ValueError(str(error)) from None
    if not math.isfinite(descriptor.risk):
        raise ValueError("risk is not finite")
    descriptor.blueprint_id = blueprint_id
    return Blueprint(
        descriptor=descriptor,
        bsds=_sheet(blueprint_id, extras.get("bsds"), skipped),
        graph_metadata=_typed(extras, "graph_metadata", dict, skipped),
        guard_spec=_typed(extras, "guard_spec", list, skipped),
        tags=tuple(str(tag) for tag in _typed(extras, "tags", list, skipped) or ()),
    )


def _typed(extras: Mapping[str, Any], name: str, kind: type, skipped: Counter[str]) -> Any:
    value = extras.get(name)
    if value is None or isinstance(value, kind):
        return value
    skipped[name] += 1
    return None


def _sheet(blueprint_id: str, value: Any, skipped: Counter[str]) -> leyline.BSDS | None:
    if value is None:
        return None
    try:
        risk = float(value["risk_score"])
        if not math.isfinite(risk):
            raise ValueError("risk_score is not finite")
        sheet = leyline.BSDS(
            version=1,
            blueprint_id=blueprint_id,
            risk_score=min(1.0, max(0.0, risk)),
            hazard_band=_member("HAZARD_BAND", value.get("hazard_band")),
            handling_class=_member("HANDLING_CLASS", value.get("handling_class")),
            resource_profile=_member("RESOURCE_PROFILE", value.get("resource_profile")),
            provenance=_member("PROVENANCE", value.get("provenance")),
            recommendation=str(value.get("recommendation") or ""),
        )
        if value.get("issued_at"):
            sheet.issued_at.FromJsonString(str(value["issued_at"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        skipped["bsds"] += 1
        return None
    return sheet


def _member(prefix: str, value: Any) -> str | None:
    """The full enum name for one given with or without its prefix, in any case."""
    if value is None:
        return None
    name = str(value).upper()
    return name if name.startswith(prefix) else f"{prefix}_{name}"


def _issued_ns(sheet: leyline.BSDS) -> int:
    return sheet.issued_at.ToNanoseconds() if sheet.HasField("issued_at") else 0


def _file_stamp(path: Path) -> tuple[object, ...] | None:
    """What changes when the file or its write-ahead log does; None without a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    log = Path(f"{path}-wal")
    try:
        log_status = log.stat()
    except FileNotFoundError:
        return (status.st_ino, status.st_mtime_ns, status.st_size)
    return (
        status.st_ino,
        status.st_mtime_ns,
        status.st_size,
        log_status.st_mtime_ns,
        log_status.st_size,
    )


def _select(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=_LOCK_WAIT_S
    )
    try:
        return [
            (str(blueprint_id), str(text))
            for blueprint_id, text in connection.execute(
                "SELECT blueprint_id, metadata_json FROM blueprints ORDER BY blueprint_id"
            )
        ]
    finally:
        connection.close()
