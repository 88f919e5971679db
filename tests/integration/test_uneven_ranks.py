"""Two ranks of which one cannot do what the other can: they act alike, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


def run(trouble: str, store: Path) -> tuple[list[Any], list[Any], str]:
    """What both ranks printed, and what they complained of."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "support.uneven_ranks", rank, store, trouble],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    printed, complaints = [], ""
    try:
        for process in ranks:
            out, complained = process.communicate(timeout=220)
            assert process.returncode == 0, complained
            printed.append(json.loads(out.strip().splitlines()[-1]))
            complaints += complained
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return printed[0], printed[1], complaints


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("trouble", "stage", "words"),
    [
        ("build", "DORMANT", "no memory left"),
        ("evaluate", "TRAINING", "a broken shard"),
        ("isolated pass", "FOSSILIZED", "no memory left"),
        ("statistics", "FOSSILIZED", ""),
        ("absence", "", "every rank must call end_step"),
    ],
)
def test_both_ranks_end_with_the_same_seeds_weights_and_outputs(
    trouble: str, stage: str, words: str, tmp_path: Path
) -> None:
    first, second, complaints = run(trouble, tmp_path / "store")
    assert first[:3] == second[:3]
    assert first[1] == stage or not stage
    assert words in complaints
