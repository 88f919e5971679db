"""Some cells of the matrix of training stacks, trained again: the page says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from stacks.cells import ALL, Cell, read_cell
from stacks.launch import run_cells
from stacks.page import read_page

PAGE = Path(__file__).parents[2] / "docs" / "training-stacks.md"
ALONE = (
    "plain, fp16 with GradScaler, single, recomputation",
    "Lightning, autocast bf16, single, accumulated",
    "Transformers, bf16 weights, single, resumed",
)
TOGETHER = (
    "plain, autocast bf16, DDP two ranks, resumed",
    "plain, fp32, FSDP2 two ranks, compiled",
    "Lightning, fp16 with GradScaler, DDP two ranks, resumed",
    "Lightning, bf16 weights, FSDP2 two ranks, recomputation",
    "Transformers, fp32, DDP two ranks, accumulated",
)


@pytest.fixture(scope="module")
def told() -> dict[Cell, str]:
    return read_page(PAGE.read_text())


def test_the_page_is_silent_about_no_cell_and_none_fails(told: dict[Cell, str]) -> None:
    assert set(told) == set(ALL)
    assert [cell for cell, verdict in told.items() if verdict.startswith("FAILS")] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "names", [pytest.param(ALONE, id="alone"), pytest.param(TOGETHER, id="together")]
)
def test_cells_do_what_the_page_says(names: tuple[str, ...], told: dict[Cell, str]) -> None:
    cells = [read_cell(name) for name in names]
    assert run_cells(cells) == {cell: told[cell] for cell in cells}
