"""`tamiyo catalog`: make a blueprint catalogue, add to it, list it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.table import Table

from tamiyo_svc.adapters.urza import CatalogSnapshot, read_catalog
from tamiyo_svc.catalog import MAX_NAME_CHARACTERS, is_name, neutral_descriptor
from tamiyo_svc.catalog_file import Row, add_row, catalog_row, write_rows
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline

TIERS: Final = {
    "unspecified": leyline.BLUEPRINT_TIER_UNSPECIFIED,
    "safe": leyline.BLUEPRINT_TIER_SAFE,
    "experimental": leyline.BLUEPRINT_TIER_EXPERIMENTAL,
    "high_risk": leyline.BLUEPRINT_TIER_HIGH_RISK,
}
"""The tiers as they are given on the command line."""

_TIER_NAMES: Final = {number: name for name, number in TIERS.items()}
_YES_OR_NO: Final = {True: "yes", False: "no"}
_DESCRIBED_CHANNELS: Final = 64


def init(path: Path, *, force: bool = False) -> int:
    """Write a catalogue of the client's seed library; the number of blueprints in it.

    Raises:
        ConfigurationError: the file exists and may not be replaced, or it cannot be written.
    """
    if path.exists() and not force:
        raise ConfigurationError(f"{path}: exists already, takes a new file, or --force")
    rows = _library_rows()
    with _file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, rows)
    return len(rows)


def add(path: Path, descriptor: leyline.BlueprintDescriptor, *, replace: bool = False) -> None:
    """Add a blueprint to an existing catalogue.

    Raises:
        ConfigurationError: its id cannot be asked for or is taken, there is no catalogue, or it
            cannot be written.
    """
    blueprint_id = descriptor.blueprint_id
    if not is_name(blueprint_id):
        raise ConfigurationError(
            f"BLUEPRINT_ID: got {blueprint_id!r}, takes at most {MAX_NAME_CHARACTERS} printable "
            "characters without a comma and without spaces around them"
        )
    try:
        with _file_errors(path):
            add_row(path, catalog_row(descriptor), replace=replace)
    except sqlite3.IntegrityError:
        raise ConfigurationError(
            f"BLUEPRINT_ID: {path} has {blueprint_id} already, takes another, or --replace"
        ) from None


def describe(
    blueprint_id: str, name: str | None, tier: str, risk: float | None, stage: int, description: str
) -> leyline.BlueprintDescriptor:
    """The descriptor that the options of the command line make.

    Raises:
        ConfigurationError: there is no such tier.
    """
    if tier not in TIERS:
        raise ConfigurationError(f"--tier: got {tier!r}, takes {', '.join(TIERS)}")
    descriptor = neutral_descriptor(blueprint_id)
    descriptor.tier = TIERS[tier]
    descriptor.stage = stage
    descriptor.description = description
    if name is not None:
        descriptor.name = name
    if risk is not None:
        descriptor.risk = risk
    return descriptor


def read(path: Path) -> CatalogSnapshot:
    """What a service would find in the file.

    Raises:
        ConfigurationError: it cannot be read.
    """
    with _file_errors(path):
        return read_catalog(path)


def listed(snapshot: CatalogSnapshot) -> list[dict[str, str | float | bool]]:
    """The blueprints in plain values, those first that a run is given unasked."""
    ranked = {blueprint.blueprint_id: blueprint for blueprint in snapshot.ranked}
    return [
        {
            "blueprint": blueprint.blueprint_id,
            "name": blueprint.descriptor.name,
            "tier": _TIER_NAMES.get(blueprint.descriptor.tier, str(blueprint.descriptor.tier)),
            "risk": round(blueprint.risk, 6),
            "described": blueprint.graph_metadata is not None,
            "quarantined": blueprint.is_quarantined,
        }
        for blueprint in {**ranked, **snapshot.blueprints}.values()
    ]


def catalog_table(snapshot: CatalogSnapshot) -> Table:
    """The same as a table."""
    table = Table()
    for title in ("blueprint", "name", "tier", "risk", "described", "quarantined"):
        table.add_column(title, overflow="fold")
    for row in listed(snapshot):
        cells = [_YES_OR_NO[one] if isinstance(one, bool) else str(one) for one in row.values()]
        table.add_row(*cells)
    return table


def _library_rows() -> list[Row]:
    import torch

    from tamiyo_svc.client.seeds.blueprints import BLUEPRINTS
    from tamiyo_svc.trainer.description import describe_module

    rows = []
    for blueprint_id, build in BLUEPRINTS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = build(_DESCRIBED_CHANNELS)
        metadata = describe_module(blueprint_id, module, _DESCRIBED_CHANNELS)
        rows.append(catalog_row(neutral_descriptor(blueprint_id), metadata, ("seed",)))
    return rows


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn what is wrong with the file into one line; a row that is taken is none of that.

    Raises:
        ConfigurationError: instead of what the file system or SQLite raised.
    """
    try:
        yield
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; `tamiyo catalog init` makes one") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise ConfigurationError(f"{path}: {error}, takes a blueprint catalogue") from None
