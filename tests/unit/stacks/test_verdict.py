"""What is seen of a cell, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from stacks.cells import LEARNING_RATE, LR_DELTA, STEPS, Cell, Framework, Precision, Spread, Variant
from stacks.observation import Observation
from stacks.verdict import WORKS, judge, judge_raised

CELL = Cell(Framework.PLAIN, Precision.FP32, Spread.SINGLE, Variant.RESUMED)
VALUES: list[tuple[int, float, float | None]] = [
    (step, 2.0 - step / STEPS, 0.5) for step in range(1, STEPS + 1)
]
RIGHT = Observation(
    packets=VALUES,
    trained=VALUES,
    stage="FOSSILIZED",
    moved=True,
    seed_format="torch.float32",
    place_format="torch.float32",
    host_weights="h",
    seed_weights="s",
    learning_rate=LEARNING_RATE * (1 + LR_DELTA),
    effect=[1.0, 1.0, 2.0],
    outputs=["same", "same"],
    joined_gradient=0.1,
    reasons={"gate: min_steps": 30},
)


def test_what_is_right_everywhere_works() -> None:
    assert judge(CELL, [RIGHT, replace(RIGHT, packets=[])]) == WORKS


WRONG: dict[str, dict[str, Any]] = {
    "packets of steps": {"packets": VALUES[1:]},
    "loss 9": {"packets": [(1, 9.0, 0.5), *VALUES[1:]]},
    "gradient norm 9": {"packets": [(1, VALUES[0][1], 9.0), *VALUES[1:]]},
    "gradient norm None": {"packets": [(1, VALUES[0][1], None), *VALUES[1:]]},
    "not fallen": {"trained": VALUES[::-1], "packets": VALUES[::-1]},
    "have not moved": {"moved": False},
    "no gradient from the host": {"joined_gradient": 0.0},
    "the seed does nothing": {"effect": [1.0, 1.0, 1.0]},
    "as trained": {"effect": [2.0, 1.0, 2.0]},
    "a seed in torch.bfloat16": {"seed_format": "torch.bfloat16"},
    "a learning rate of 0.01": {"learning_rate": LEARNING_RATE},
    "other outputs when resumed": {"outputs": ["same", "other"]},
    "2 gradients changed": {"violations": 2.0},
    "ERROR something": {"complaints": [["ERROR", "something"]]},
    "nothing says why": {"stage": "CULLED"},
}


@pytest.mark.parametrize("words", WRONG)
def test_whatever_is_wrong_is_named(words: str) -> None:
    verdict = judge(CELL, [replace(RIGHT, **WRONG[words])])
    assert verdict.startswith("FAILS: ")
    assert words in verdict


@pytest.mark.parametrize("part", ["host_weights", "seed_weights"])
def test_ranks_that_differ_fail(part: str) -> None:
    changed: dict[str, Any] = {part: "other"}
    other = replace(RIGHT, packets=[], **changed)
    assert "the ranks have different" in judge(CELL, [RIGHT, other])


def test_a_refusal_is_told_with_its_words() -> None:
    seen = replace(RIGHT, stage="TRAINING", reasons={"gate: min_steps": 2, "gate: no_gradient": 3})
    assert judge(CELL, [seen]) == "refused: gate: no_gradient"


def test_what_a_framework_raises_without_tamiyo_too_is_its_own() -> None:
    raised = replace(RIGHT, raised="no such precision")
    assert judge_raised([raised], [raised]) == "framework refuses: no such precision"
    assert judge_raised([raised], [RIGHT]).startswith("FAILS: ")
    assert judge_raised([raised], None).startswith("FAILS: ")
