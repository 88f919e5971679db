"""Catalogue files to read: copies of the sample, rows of one's own, locks."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from support.bus import CATALOG

_TABLE = (
    "CREATE TABLE IF NOT EXISTS blueprints (blueprint_id VARCHAR NOT NULL, name VARCHAR NOT NULL, "
    "tier VARCHAR NOT NULL, artifact_path VARCHAR NOT NULL, metadata_json TEXT, "
    "PRIMARY KEY (blueprint_id))"
)


def copy_sample(path: Path) -> Path:
    """The sample catalogue at `path`."""
    shutil.copyfile(CATALOG, path)
    return path


def descriptor(**fields: Any) -> dict[str, Any]:
    """Metadata of a harmless blueprint, but for what is given; extras go under `_urza`."""
    return {"tier": "BLUEPRINT_TIER_SAFE", "risk": 0.1, "stage": 3, **fields}


def write_rows(path: Path, rows: dict[str, Any]) -> Path:
    """Add or replace rows; a value that is no mapping is stored as it is."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(_TABLE)
        for blueprint_id, value in rows.items():
            text = json.dumps(value) if isinstance(value, dict) else value
            connection.execute(
                "INSERT OR REPLACE INTO blueprints VALUES (?, ?, 't', 'p', ?)",
                (blueprint_id, blueprint_id, text),
            )
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody can read the file until the block ends."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
