from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.catalogs import copy_sample, descriptor, locked, write_rows

from tamiyo_svc.adapters.urza import UrzaCatalog, catalog_path
from tamiyo_svc.catalog import is_name
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import Event

DEGRADED, RECOVERED = Event.CATALOG_DEGRADED, Event.CATALOG_RECOVERED


class Watched(UrzaCatalog):
    """A catalogue that keeps its events."""

    def __init__(self, path: Path, refresh_s: float = 600.0, *, optional: bool = False) -> None:
        self.events: list[Event] = []
        super().__init__(
            f"sqlite:///{path}",
            refresh_s,
            lambda event, attributes: self.events.append(event),
            optional=optional,
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return copy_sample(tmp_path / "catalog.db")


def sheet(blueprint_id: str, band: leyline.HazardBand, issued_s: int) -> leyline.BSDS:
    made = leyline.BSDS(blueprint_id=blueprint_id, hazard_band=band, risk_score=0.5)
    made.issued_at.FromSeconds(issued_s)
    return made


async def test_the_sample_is_read_and_ranked_without_quarantine(path: Path) -> None:
    catalog = Watched(path)
    await catalog.refresh()
    snapshot = catalog.snapshot
    assert len(snapshot.blueprints) == 7
    assert "demo-quarantine" not in {one.blueprint_id for one in snapshot.ranked}
    scores = [one.candidate_score for one in snapshot.ranked]
    assert scores == sorted(scores, reverse=True)
    assert catalog.events == []


async def test_candidates_are_the_requested_then_the_namesake_then_the_best(path: Path) -> None:
    catalog = Watched(path)
    await catalog.refresh()

    def names(requested: list[str], packet_id: str = "", run_id: str = "") -> list[str]:
        found = catalog.snapshot.candidates(requested, packet_id, run_id, 2)
        return [one.blueprint_id for one in found]

    assert names(["demo-elevated", "nothing", "demo-safe"]) == ["demo-elevated", "demo-safe"]
    assert names(["nothing"]) == []
    assert names([], packet_id="demo-elevated", run_id="demo-safe") == ["demo-elevated"]
    assert names([], run_id="demo-safe") == ["demo-safe"]
    assert names([]) == [one.blueprint_id for one in catalog.snapshot.ranked[:2]]


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    path.write_bytes(b"no database at all, " * 400)


@pytest.mark.parametrize("damage", [remove, truncate, empty, overwrite])
async def test_damage_keeps_the_last_good_state_is_told_once_and_heals(
    path: Path, damage: Callable[[Path], None]
) -> None:
    catalog = Watched(path)
    await catalog.refresh()
    damage(path)
    for _ in range(3):
        await catalog.refresh()
    assert catalog.events == [DEGRADED]
    assert len(catalog.snapshot.blueprints) == 7
    if damage is not remove:
        remove(path)
    write_rows(path, {"other": descriptor()})
    await catalog.refresh()
    await catalog.refresh()
    assert catalog.events == [DEGRADED, RECOVERED]
    assert set(catalog.snapshot.blueprints) == {"other"}


async def test_a_missing_file_is_told_once_even_if_the_reason_changes(tmp_path: Path) -> None:
    path = tmp_path / "late.db"
    catalog = Watched(path)
    await catalog.refresh()
    path.write_bytes(b"junk" * 1000)
    await catalog.refresh()
    path.unlink()
    await catalog.refresh()
    assert catalog.events == [DEGRADED]
    assert catalog.snapshot.blueprints == {}


async def test_a_lock_matters_only_when_there_is_something_new(path: Path) -> None:
    catalog = Watched(path)
    await catalog.refresh()
    with locked(path):
        await catalog.refresh()
        assert catalog.events == []
        catalog.announce()
        await catalog.refresh()
        await catalog.refresh()
        assert catalog.events == [DEGRADED]
    await catalog.refresh()
    assert catalog.events == [DEGRADED, RECOVERED]


async def test_a_replaced_file_is_read_again(path: Path, tmp_path: Path) -> None:
    catalog = Watched(path)
    await catalog.refresh()
    write_rows(tmp_path / "next.db", {"only": descriptor()}).replace(path)
    await catalog.refresh()
    assert set(catalog.snapshot.blueprints) == {"only"}
    assert catalog.events == []


async def test_rows_nobody_can_read_are_skipped_and_counted_every_time(path: Path) -> None:
    bad: dict[str, Any] = {
        "text": "{",
        "bytes": b"\xff\xfe",
        "number": 7,
        "long": '{"description": "' + "x" * (1 << 20) + '"}',
        "part": descriptor(_urza={"bsds": "none"}),
    }
    write_rows(path, bad)
    catalog = Watched(path)
    await catalog.refresh()
    expected = {"row": 4, "bsds": 1}
    assert catalog.snapshot.skipped == expected
    assert len(catalog.snapshot.blueprints) == 8
    write_rows(path, {"more": descriptor()})
    await catalog.refresh()
    assert catalog.snapshot.skipped == expected
    assert len(catalog.snapshot.blueprints) == 9


async def test_an_unchanged_row_stays_the_same_object(path: Path) -> None:
    catalog = Watched(path)
    await catalog.refresh()
    catalog.add_sheets([sheet("demo-elevated", leyline.HAZARD_BAND_LOW, 100)])
    before = dict(catalog.snapshot.blueprints)
    write_rows(path, {"more": descriptor()})
    await catalog.refresh()
    after = catalog.snapshot.blueprints
    assert all(after[name] is blueprint for name, blueprint in before.items())


async def test_of_two_sheets_the_newer_counts_wherever_it_came_from(path: Path) -> None:
    catalog = Watched(path)
    await catalog.refresh()

    def band(blueprint_id: str) -> int:
        bsds = catalog.snapshot.blueprints[blueprint_id].bsds
        return bsds.hazard_band if bsds is not None else 0

    catalog.add_sheets([sheet("demo-bsds-critical", leyline.HAZARD_BAND_LOW, 100)])
    assert band("demo-bsds-critical") == leyline.HAZARD_BAND_CRITICAL
    catalog.add_sheets([sheet("demo-bsds-critical", leyline.HAZARD_BAND_HIGH, 2_000_000_000)])
    assert band("demo-bsds-critical") == leyline.HAZARD_BAND_HIGH
    catalog.add_sheets([sheet("demo-bsds-critical", leyline.HAZARD_BAND_LOW, 1_900_000_000)])
    assert band("demo-bsds-critical") == leyline.HAZARD_BAND_HIGH
    catalog.add_sheets([sheet("demo-safe", leyline.HAZARD_BAND_CRITICAL, 100)])
    assert band("demo-safe") == leyline.HAZARD_BAND_CRITICAL
    catalog.add_sheets([sheet("unheard-of", leyline.HAZARD_BAND_HIGH, 100)])
    write_rows(path, {"unheard-of": descriptor()})
    await catalog.refresh()
    assert band("unheard-of") == leyline.HAZARD_BAND_HIGH


async def test_a_fresh_row_can_be_fetched_before_the_next_refresh(path: Path) -> None:
    catalog = Watched(path)
    await catalog.refresh()
    write_rows(path, {"fresh": descriptor(), "broken": "{"})
    assert await catalog.fetch("fresh")
    assert catalog.snapshot.blueprints["fresh"].risk == pytest.approx(0.1)
    assert not await catalog.fetch("broken")
    assert not await catalog.fetch("nowhere")
    assert len(catalog.snapshot.blueprints) == 8


async def test_an_announced_change_is_read_at_once_whatever_the_interval(path: Path) -> None:
    catalog = Watched(path)
    running = asyncio.create_task(catalog.run())
    catalog.announce()
    try:
        async with asyncio.timeout(20):
            while not catalog.snapshot.blueprints:
                await asyncio.sleep(0.001)
    finally:
        running.cancel()
    assert len(catalog.snapshot.blueprints) == 7


@pytest.mark.parametrize("url", ["", "sqlite:///", "postgresql://x/y", "catalog.db"])
def test_another_kind_of_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="URZA_DATABASE_URL"):
        catalog_path(url)


async def test_without_a_file_names_are_taken_as_they_are(tmp_path: Path) -> None:
    catalog = Watched(tmp_path / "none.db", optional=True)
    await catalog.refresh()
    assert catalog.absent
    assert catalog.events == []
    assert catalog.missing(["mine"]) == []
    offered = catalog.candidates(["mine", "other", "mine"], "packet", "run", 8)
    assert [one.blueprint_id for one in offered] == ["mine", "other"]
    assert catalog.candidates([], "packet", "run", 8) == ()
    assert len(catalog.candidates([str(number) for number in range(50)], "", "", 3)) == 3


async def test_a_name_stays_the_same_object_until_its_sheet_changes(tmp_path: Path) -> None:
    catalog = Watched(tmp_path / "none.db", optional=True)
    (before,) = catalog.candidates(["mine"], "", "", 8)
    assert catalog.candidates(["mine"], "", "", 8) == (before,)
    newest = sheet("mine", leyline.HAZARD_BAND_HIGH, 100)
    catalog.add_sheets([newest])
    (after,) = catalog.candidates(["mine"], "", "", 8)
    assert after.bsds is newest
    assert catalog.candidates(["mine"], "", "", 8) == (after,)


async def test_a_name_that_was_forgotten_means_the_same_again(tmp_path: Path) -> None:
    catalog = Watched(tmp_path / "none.db", optional=True)
    (before,) = catalog.candidates(["mine"], "", "", 8)
    for number in range(1000):
        catalog.candidates([f"name-{number}"], "", "", 8)
    (after,) = catalog.candidates(["mine"], "", "", 8)
    assert after is not before
    assert (after.descriptor, after.bsds) == (before.descriptor, before.bsds)


@pytest.mark.parametrize("damage", [remove, truncate, empty, overwrite])
async def test_a_catalogue_that_was_there_once_admits_no_other_name_for_good(
    path: Path, damage: Callable[[Path], None]
) -> None:
    catalog = Watched(path, optional=True)
    await catalog.refresh()
    damage(path)
    await catalog.refresh()
    assert catalog.events == [DEGRADED]
    assert catalog.candidates(["mine"], "", "", 8) == ()
    assert catalog.missing(["mine"]) == ["mine"]


@given(st.text())
def test_a_name_survives_the_list_it_is_sent_in(name: str) -> None:
    assert not is_name(name) or [part.strip() for part in f"{name},other".split(",")] == [
        name,
        "other",
    ]
