"""Writes Urza's blueprint catalogue: a SQLite file with one row a blueprint.

Whoever reads the file meanwhile sees what was there before or what is there afterwards.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format

from tamiyo_svc.leyline import leyline_pb2 as leyline

Row = tuple[str, str, str, str, str]

_TABLE: Final = """
CREATE TABLE blueprints (
    blueprint_id VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    tier VARCHAR NOT NULL,
    artifact_path VARCHAR NOT NULL,
    metadata_json TEXT NOT NULL,
    PRIMARY KEY (blueprint_id)
)
"""
_INSERT: Final = "INTO blueprints VALUES (?, ?, ?, ?, ?)"
_LOCK_WAIT_S: Final = 5.0


def catalog_row(
    descriptor: leyline.BlueprintDescriptor,
    graph_metadata: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> Row:
    """The row of one blueprint; without graph metadata its inside counts as unknown."""
    document = json_format.MessageToDict(descriptor, preserving_proto_field_name=True)
    document["_urza"] = {"guard_digest": None, "prewarm_samples": [], "tags": list(tags)}
    if graph_metadata is not None:
        document["_urza"]["graph_metadata"] = graph_metadata
    return (
        descriptor.blueprint_id,
        descriptor.name,
        leyline.BlueprintTier.Name(descriptor.tier),
        f"artifacts/{descriptor.blueprint_id}.pt",
        json.dumps(document, separators=(",", ":")),
    )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a catalogue of these rows, replacing the file as a whole.

    Raises:
        OSError, sqlite3.Error: it cannot be written; what was there is still there.
    """
    staged = path.with_name(f"{path.name}.{os.getpid()}.new")
    staged.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(staged)) as database, database:
            database.execute(_TABLE)
            database.executemany(f"INSERT {_INSERT}", rows)
        # What a file that goes away left in these would be read into the new one.
        for beside in ("-journal", "-shm", "-wal"):
            path.with_name(path.name + beside).unlink(missing_ok=True)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def add_row(path: Path, row: Row, *, replace: bool = False) -> None:
    """Add a row to the catalogue at `path`, in place of one with its id if that may be.

    Raises:
        FileNotFoundError: there is no file.
        sqlite3.IntegrityError: the id is taken and may not be replaced.
        OSError, sqlite3.Error: it is no catalogue or cannot be written.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    url = f"{path.resolve().as_uri()}?mode=rw"
    with closing(sqlite3.connect(url, uri=True, timeout=_LOCK_WAIT_S)) as database, database:
        database.execute(f"{verb} {_INSERT}", row)
