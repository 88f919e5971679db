"""Two gloo processes: the same commands at the same steps, the same weights in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.faulty_bus import Fault, FaultyBus

pytestmark = pytest.mark.redis

TESTS = Path(__file__).parents[1]
STEPS = 60


def train(fault: Fault, store: Path, cut_at: int = 0, breaks_at: int = 0) -> list[Any]:
    """Run both ranks; what each printed."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    with FaultyBus(fault) as bus:
        arguments = (str(store), bus.url, str(STEPS), str(cut_at), str(breaks_at))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "support.parallel_trainer", str(rank), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        results = []
        try:
            for process in ranks:
                printed, complained = process.communicate(timeout=100)
                assert process.returncode == 0, complained
                results.append(json.loads(printed.strip().splitlines()[-1]))
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    return results


def test_both_ranks_apply_every_command_at_its_step_and_agree_on_the_weights(
    tmp_path: Path,
) -> None:
    first, second = train(Fault.GROWS, tmp_path / "store")
    assert first == second
    applied, _, stage = first
    assert [step for step, _ in applied] == [*range(1, STEPS + 1)]
    assert len({command_id for _, command_id in applied}) == STEPS
    assert stage == "FOSSILIZED"


def test_losing_rank_0s_connection_costs_the_commands_and_nothing_else(tmp_path: Path) -> None:
    first, second = train(Fault.SLOWS_DOWN, tmp_path / "store", cut_at=STEPS // 2)
    assert first == second
    assert [step for step, _ in first[0]] == [*range(1, STEPS // 2)]


@pytest.mark.parametrize(
    "breaks_at",
    [pytest.param(10, id="in isolated training"), pytest.param(35, id="when it has joined")],
)
def test_a_seed_that_fails_on_one_rank_is_taken_out_on_both(tmp_path: Path, breaks_at: int) -> None:
    first, second = train(Fault.GROWS, tmp_path / "store", breaks_at=breaks_at)
    assert first == second
    applied, _, stage = first
    assert [step for step, _ in applied] == [*range(1, STEPS + 1)]
    assert stage == "CULLED"
