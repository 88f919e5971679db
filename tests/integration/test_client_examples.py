"""Every example runs as its README says and grows its seed for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"lightning_trainer": "lightning", "huggingface_trainer": "transformers"}


TORN_DOWN = "terminate called without an active exception"
"""What a rank now and then aborts with at exit, after its group has been destroyed."""


def run(*command: str, tolerated: str = "") -> str:
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=110,
        capture_output=True,
        text=True,
        check=False,
    )
    if not (tolerated and tolerated in ended.stderr):
        assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("name", "steps"),
    [("plain_pytorch", 120), ("lightning_trainer", 120), ("huggingface_trainer", 80)],
)
def test_example_grows_a_seed(name: str, steps: int) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    printed = run(f"examples/{name}.py", "--steps", str(steps))
    assert f"of {steps} packets answered in time" in printed
    assert "seed stage FOSSILIZED, alpha 1.00" in printed


def test_the_data_parallel_example_ends_with_equal_weights() -> None:
    printed = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("examples/data_parallel.py", "--steps", "80"),
        tolerated=TORN_DOWN,
    )
    lines = dict(line.split(": ", 1) for line in printed.splitlines() if line.startswith("rank"))
    assert set(lines) == {"rank 0", "rank 1"}
    assert lines["rank 0"] == lines["rank 1"]
    assert "FOSSILIZED" in lines["rank 0"]
