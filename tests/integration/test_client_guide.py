"""The code blocks of the trainer guide, run in order as one program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from packages.plain import hidden_beside
from packaging.requirements import Requirement

PACKAGES = Path(__file__).parents[1] / "packages"
GUIDE = Path(__file__).parents[2] / "docs" / "trainer-guide.md"


def test_the_guides_code_runs_where_only_the_client_and_torch_are() -> None:
    hidden = hidden_beside(Requirement("tamiyo-client[torch]"))
    assert {"pytest", "structlog", "tamiyo_svc.service"} <= set(hidden.split(","))
    done = subprocess.run(
        [sys.executable, PACKAGES / "wall.py", hidden, PACKAGES / "guide.py", GUIDE],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran, _, _ = done.stdout.splitlines()[-1].partition(" blocks ran")
    assert int(ran) >= 8
