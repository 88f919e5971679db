"""The documentation: fresh where generated, and true where it names files, commands, settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tamiyo_svc.cli.main import app
from tamiyo_svc.cli.reference import pages, stale_pages, write_pages
from tamiyo_svc.cli.reference_tables import EFFECTS, MEANINGS
from tamiyo_svc.risk.rules import Effect
from tamiyo_svc.service.settings import VARIABLES
from tamiyo_svc.taxonomy import Event

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"))
    if path.parent != ROOT or path.name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
SETTING = re.compile(r"\b(?:TAMIYO|OONA|ESPER|URZA)_[A-Z0-9_]*[A-Z0-9](?!\w|\*)")
COMMAND = re.compile(r"(?:^|[`(])(?:\$ )?tamiyo ([a-z]+)(?: ([a-z]+))?(?![\w.])", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {re.sub(r" +", "-", text.strip()) for text in words}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One heading\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#one-heading) [b](other.md#no-heading) [c](gone.md)\n")
    assert broken_links(page) == ["other.md#no-heading", "gone.md"]


def test_the_generated_pages_are_fresh() -> None:
    assert stale_pages(DOCS) == []


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    write_pages(tmp_path)
    assert stale_pages(tmp_path) == []
    (tmp_path / "metrics.md").write_text("old\n")
    assert stale_pages(tmp_path) == ["metrics.md"]


def test_every_event_and_effect_has_words() -> None:
    assert set(MEANINGS) == set(Event)
    assert set(EFFECTS) == set(Effect)


def test_every_page_is_in_the_navigation_and_the_other_way_round() -> None:
    def leaves(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        children = entry.values() if isinstance(entry, dict) else entry
        return set().union(*map(leaves, children))

    navigation = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert navigation == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(pages()) <= navigation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_a_page_names_exists(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    for name, following in COMMAND.findall(page.read_text()):
        assert name in root.commands, f"tamiyo {name}"
        inner = getattr(root.commands[name], "commands", None)
        if inner is not None and following:
            assert following in inner, f"tamiyo {name} {following}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_a_page_names_exists(page: Path) -> None:
    known = {variable.name for variable in VARIABLES}
    for module in (ROOT / "tamiyo_svc" / "client").rglob("*.py"):
        known |= set(SETTING.findall(module.read_text()))
    named = SETTING.findall(page.read_text())
    assert set(named) - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_a_page_names_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets
