"""What became of a cell, in words, from what its ranks have seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from stacks.cells import LEARNING_RATE, LR_DELTA, STEPS, Cell, Variant
from stacks.observation import Observation

WORKS: Final = "works"
_ORDINARY: Final = {"gate: min_steps", "gate: alpha_incomplete"}
"""What a seed is told on its way by an impatient service."""
_TOLERANCE: Final = 1e-4
"""Relative; of means taken in another order."""

_ENDS: Final = 5
"""Steps at the beginning and at the end whose losses are compared."""
_LEAST_EFFECT: Final = 0.01
_SHARE_OF_EFFECT: Final = 0.1
"""Of what the seed does to a loss: how far the trained network, such as a compiled one, may be from
the bare one by rounding."""


def judge(cell: Cell, seen: Sequence[Observation]) -> str:
    """The verdict on a cell that came to its end on every rank."""
    first = seen[0]
    problems = list(_find_problems(cell, seen))
    if problems:
        return f"FAILS: {'; '.join(problems)}"
    refusals = [reason for reason in first.reasons if reason not in _ORDINARY]
    if first.stage == "FOSSILIZED" and not refusals:
        return WORKS
    words = [*refusals, *(text for _, text in first.complaints)]
    if words:
        return f"refused: {'; '.join(dict.fromkeys(words))}"
    return f"FAILS: the seed is {first.stage} in the end and nothing says why"


def judge_raised(seen: Sequence[Observation], bare: Sequence[Observation] | None) -> str:
    """The verdict on a cell that raised, from what the same cell without Tamiyo did."""
    words = next(each.raised for each in seen if each.raised)
    if bare is None or not any(each.raised for each in bare):
        return f"FAILS: with Tamiyo alone it raises {words}"
    return f"framework refuses: {next(each.raised for each in bare if each.raised)}"


def _find_problems(cell: Cell, seen: Sequence[Observation]) -> list[str]:
    first = seen[0]
    problems = [
        f"{level} {text}"
        for each in seen
        for level, text in each.complaints
        if level in ("ERROR", "CRITICAL")
    ]
    if len({each.host_weights for each in seen}) > 1:
        problems.append("the ranks have different weights")
    if len({each.seed_weights for each in seen}) > 1:
        problems.append("the ranks have different seeds")
    if [step for step, _, _ in first.packets] != [*range(1, STEPS + 1)]:
        problems.append(f"packets of steps {[step for step, _, _ in first.packets]}")
    else:
        problems += _compare_values(first)
    losses = [loss for _, loss, _ in first.trained]
    if not sum(losses[-_ENDS:]) < sum(losses[:_ENDS]):
        problems.append("the loss has not fallen")
    if first.violations:
        problems.append(f"{first.violations:g} gradients changed by isolated training")
    if first.stage == "FOSSILIZED":
        problems += _look_at_seed(first)
    if not math.isclose(first.learning_rate, LEARNING_RATE * (1 + LR_DELTA), rel_tol=1e-6):
        problems.append(f"a learning rate of {first.learning_rate:g} in the end")
    if cell.variant is Variant.RESUMED:
        for each in seen:
            if len(each.outputs) != 2 or each.outputs[0] != each.outputs[1]:
                problems.append("other outputs when resumed")
                break
    return problems


def _look_at_seed(first: Observation) -> list[str]:
    problems = []
    if not first.moved:
        problems.append("the seed's weights have not moved")
    if not first.joined_gradient:
        problems.append("the seed gets no gradient from the host's backward pass")
    trained, bare, without = first.effect
    if abs(bare - without) < _LEAST_EFFECT * abs(bare):
        problems.append(f"the seed does nothing: a loss of {bare:g} with it, {without:g} without")
    elif abs(trained - bare) > _SHARE_OF_EFFECT * abs(bare - without):
        problems.append(f"a loss of {trained:g} as trained, {bare:g} by the bare network")
    if first.seed_format != first.place_format:
        problems.append(f"a seed in {first.seed_format} where the host is {first.place_format}")
    return problems


def _compare_values(first: Observation) -> list[str]:
    problems = []
    trained = {step: (loss, norm) for step, loss, norm in first.trained}
    for step, loss, norm in first.packets:
        own_loss, own_norm = trained.get(step, (math.nan, None))
        if not math.isclose(loss, own_loss, rel_tol=_TOLERANCE):
            problems.append(f"loss {loss:g} of step {step}, which had {own_loss:g}")
        if own_norm is None and norm is None:
            continue
        if norm is None or not math.isfinite(norm):
            problems.append(f"gradient norm {norm} of step {step}")
        elif own_norm is not None and not math.isclose(norm, own_norm, rel_tol=1e-2):
            problems.append(f"gradient norm {norm:g} of step {step}, which had {own_norm:g}")
    return problems[:2]
