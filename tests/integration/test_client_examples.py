"""Every example runs with what its README asks for, and grows its seed for good."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packages.plain import example_needs, hidden_beside

EXAMPLES = Path(__file__).parents[2] / "examples"
WALL = Path(__file__).parents[1] / "packages" / "wall.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def behind_a_wall(name: str) -> tuple[str, ...]:
    """The arguments of Python that run an example with nothing but what it needs."""
    return (str(WALL), hidden_beside(*example_needs()[name]), f"examples/{name}.py")


def run(*command: str) -> str:
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=110,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("name", "steps"),
    [("plain_pytorch", 120), ("lightning_trainer", 120), ("huggingface_trainer", 80)],
)
def test_example_grows_a_seed(name: str, steps: int) -> None:
    printed = run(*behind_a_wall(name), "--steps", str(steps))
    assert f"of {steps} packets answered in time" in printed
    assert "seed stage FOSSILIZED, alpha 1.00" in printed


def test_every_example_says_what_it_needs() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")} - {"connection"}
    assert set(example_needs()) == files


def test_the_data_parallel_example_ends_with_equal_weights() -> None:
    printed = run(*TORCHRUN, "2", *behind_a_wall("data_parallel"), "--steps", "80")
    lines = dict(line.split(": ", 1) for line in printed.splitlines() if line.startswith("rank"))
    assert set(lines) == {"rank 0", "rank 1"}
    assert lines["rank 0"] == lines["rank 1"]
    assert "FOSSILIZED" in lines["rank 0"]


def test_the_data_parallel_example_leaves_no_thread_of_its_group_behind(tmp_path: Path) -> None:
    # A process that ends while a thread of the group lets go of a tensor aborts.
    script = f"""
        import runpy, sys, threading
        from pathlib import Path
        sys.argv[1:] = ["--steps", "2"]
        sys.path.insert(0, {str(EXAMPLES)!r})
        runpy.run_path({str(EXAMPLES / "data_parallel.py")!r}, run_name="__main__")
        threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
        print("threads:", *threads)
        print("of Python:", *(thread.name for thread in threading.enumerate()))
    """
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(script))
    rank, threads, of_python = run(*TORCHRUN, "1", str(program)).splitlines()
    assert rank.startswith("rank 0: ")
    assert of_python == "of Python: MainThread"
    assert len(threads.split()) == 2, threads
