"""The page of verdicts, written and read back."""

from __future__ import annotations

from stacks.cells import ALL, read_cell
from stacks.page import read_page, write_page


def test_a_page_gives_back_what_was_written() -> None:
    kinds = ("works", "refused: gate: no_gradient", "framework refuses: no (16-mixed)", "works")
    verdicts = {cell: kinds[index % len(kinds)] for index, cell in enumerate(ALL)}
    page = write_page(verdicts, {"torch": "2.9"})
    assert read_page(page) == verdicts
    assert "torch 2.9" in page
    assert "{" not in page


def test_a_cells_name_gives_it_back() -> None:
    assert [read_cell(str(cell)) for cell in ALL] == [*ALL]
    assert len(ALL) == 180
