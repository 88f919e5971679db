"""The settings as an operator reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path

from pydantic import SecretStr
from rich.console import Console

from tamiyo_svc.cli.config import settings_json, settings_markdown, settings_table
from tamiyo_svc.service.settings import VARIABLES, Settings

SECRET = "correct-horse-battery-staple"
PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def printed(settings: Settings) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(settings_table(settings))
    return stream.getvalue()


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_markdown(), (
        "run `tamiyo config docs > docs/settings.md`"
    )


def test_the_page_has_one_row_for_every_variable() -> None:
    rows = [line for line in settings_markdown().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [variable.name for variable in VARIABLES]
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}


def test_the_table_shows_value_and_origin() -> None:
    text = printed(Settings(http_port=1234, state_dir=Path("/var/[odd]/name")))
    (row,) = [line for line in text.splitlines() if "TAMIYO_HTTP_PORT" in line]
    assert "1234" in row
    assert "flag" in row
    assert "/var/[odd]/name" in text
    assert all(variable.name in text for variable in VARIABLES)


def test_the_table_says_what_an_unset_value_means() -> None:
    assert "(last known good, else untrained)" in printed(Settings())


def test_json_has_native_values_and_origins() -> None:
    rows = json.loads(settings_json(Settings(http_port=1234)))
    assert rows["TAMIYO_HTTP_PORT"] == {"value": 1234, "from": "flag"}
    assert rows["TAMIYO_VERIFY_UPDATES"] == {"value": True, "from": "default"}
    assert rows["TAMIYO_POLICY"] == {"value": None, "from": "default"}
    assert rows.keys() == {variable.name for variable in VARIABLES}


def test_secrets_are_shown_nowhere() -> None:
    settings = Settings(secret=SecretStr(SECRET), redis_url=f"redis://u:{SECRET}@host")
    for text in (printed(settings), settings_json(settings)):
        assert SECRET not in text
        assert "********" in text
