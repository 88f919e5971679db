"""`tamiyo catalog` on files."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.bus import CATALOG
from support.catalogs import copy_sample, locked
from typer.testing import CliRunner

from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.cli.main import app
from tamiyo_svc.client.seeds.blueprints import BLUEPRINTS
from tamiyo_svc.errors import ConfigurationError


def run(*arguments: str | Path, code: int = 0) -> str:
    """What `tamiyo catalog <arguments>` prints, all of it."""
    result = CliRunner().invoke(app, ["catalog", *map(str, arguments)])
    if isinstance(result.exception, ConfigurationError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def listed(path: Path) -> dict[str, Any]:
    return {row["blueprint"]: row for row in json.loads(run("ls", path, "--json"))}


def columns(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("PRAGMA table_info(blueprints)").fetchall()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of the seed library; not to be written to."""
    path = tmp_path_factory.mktemp("library") / "new" / "catalog.db"
    run("init", path)
    return path


@pytest.fixture
def path(library: Path, tmp_path: Path) -> Path:
    path = tmp_path / "catalog.db"
    path.write_bytes(library.read_bytes())
    return path


async def test_a_new_catalogue_has_the_whole_seed_library(library: Path) -> None:
    catalog = UrzaCatalog(f"sqlite:///{library}", 600.0)
    await catalog.refresh()
    assert catalog.degraded is None
    assert set(catalog.snapshot.blueprints) == set(BLUEPRINTS)
    assert {one.blueprint_id for one in catalog.snapshot.ranked} == set(BLUEPRINTS)
    assert not any(catalog.snapshot.skipped.values())
    assert columns(library) == columns(CATALOG)
    assert [file.name for file in library.parent.iterdir()] == [library.name]


def test_what_is_known_of_a_seed_is_its_inside(library: Path) -> None:
    for row in listed(library).values():
        assert (row["tier"], row["risk"], row["described"]) == ("unspecified", 0.25, True)


def test_the_same_library_makes_the_same_rows(library: Path, tmp_path: Path) -> None:
    run("init", tmp_path / "again.db")

    def rows(path: Path) -> list[Any]:
        with closing(sqlite3.connect(path)) as database:
            return database.execute("SELECT * FROM blueprints").fetchall()

    assert rows(tmp_path / "again.db") == rows(library)


def test_nothing_is_overwritten_unless_forced(path: Path) -> None:
    run("add", path, "mine")
    with pytest.raises(ConfigurationError, match="exists already"):
        run("init", path)
    assert "mine" in listed(path)
    run("init", path, "--force")
    assert set(listed(path)) == set(BLUEPRINTS)


def test_what_a_replaced_file_left_beside_it_is_not_read_into_the_new_one(tmp_path: Path) -> None:
    path = copy_sample(tmp_path / "catalog.db")
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("DELETE FROM blueprints")
        database.commit()
        left = Path(f"{path}-wal").read_bytes()
    Path(f"{path}-wal").write_bytes(left)
    run("init", path, "--force")
    assert set(listed(path)) == set(BLUEPRINTS)


def test_a_blueprint_of_ones_own_is_what_was_said_of_it(path: Path) -> None:
    options = ("--risk", "0.5", "--tier", "high_risk", "--name", "Mine", "--quarantine")
    run("add", path, "mine", *options)
    assert listed(path)["mine"] == {
        "blueprint": "mine",
        "name": "Mine",
        "tier": "high_risk",
        "risk": 0.5,
        "described": False,
        "quarantined": True,
    }
    assert set(listed(path)) == {*BLUEPRINTS, "mine"}


def test_an_id_is_taken_once_unless_it_is_to_be_replaced(path: Path) -> None:
    run("add", path, "mine", "--risk", "0.1")
    with pytest.raises(ConfigurationError, match=r"has mine already, takes another, or --replace"):
        run("add", path, "mine", "--risk", "0.2")
    assert listed(path)["mine"]["risk"] == 0.1
    run("add", path, "mine", "--risk", "0.2", "--replace")
    assert listed(path)["mine"]["risk"] == 0.2


@pytest.mark.parametrize("name", ["", " mine", "a,b", "line\nbreak", "\x1b[2J", "x" * 129])
def test_an_id_that_no_trainer_can_ask_for_is_refused(path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="BLUEPRINT_ID"):
        run("add", path, name)
    assert set(listed(path)) == set(BLUEPRINTS)


@pytest.mark.parametrize("arguments", [("--tier", "fine"), ("--risk", "1.5"), ("--risk", "nan")])
def test_what_an_option_does_not_take_is_refused(path: Path, arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["catalog", "add", str(path), "mine", *arguments])
    assert result.exit_code != 0
    assert set(listed(path)) == set(BLUEPRINTS)


def test_a_reader_in_the_middle_of_reading_holds_a_writer_up_only_for_that_long(
    path: Path,
) -> None:
    with closing(sqlite3.connect(path)) as reader:
        rows = reader.execute("SELECT blueprint_id FROM blueprints")
        assert rows.fetchone()
        rows.close()
        run("add", path, "mine")
        assert reader.execute("SELECT count(*) FROM blueprints").fetchone() == (3,)


def test_a_file_that_stays_locked_is_one_clear_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tamiyo_svc.catalog_file._LOCK_WAIT_S", 0.01)
    with locked(path), pytest.raises(ConfigurationError, match=r"catalog\.db: database is locked"):
        run("add", path, "mine")


def junk(path: Path) -> None:
    path.write_bytes(b"no database at all, " * 400)


def another_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE users (name VARCHAR)")


@pytest.mark.parametrize("make", [junk, another_table, Path.touch, Path.mkdir, None])
@pytest.mark.parametrize("command", [("add", "mine"), ("ls",)])
def test_what_is_no_catalogue_is_said_to_be_none(
    tmp_path: Path, make: Any, command: tuple[str, ...]
) -> None:
    path = tmp_path / "other.db"
    if make is not None:
        make(path)
    with pytest.raises(ConfigurationError, match=r"other\.db: "):
        run(command[0], path, *command[1:])


def test_a_file_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ConfigurationError, match=r"catalog\.db: "):
        run("init", blocked / "catalog.db")
