"""The distributions as wheels, and environments that have nothing else of this project."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
CLIENT: Final = ROOT / "packages" / "client"
CONSTRAINTS: Final = ROOT / "constraints.txt"
_PIP: Final = ("-m", "pip", "--quiet", "--disable-pip-version-check", "install")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; the Python path of this process does not reach it.

    Raises:
        AssertionError: it failed, with everything that it printed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder: Path, *kinds: str) -> list[Path]:
    """Build both distributions into a folder: the client's files, then the service's.

    `kinds` are options of `python -m build`; without any, sources and from them a wheel.
    """
    files = []
    for source in (CLIENT, ROOT):
        before = set(folder.glob("*"))
        options = (*kinds, "--no-isolation", "--outdir", str(folder))
        run(sys.executable, "-m", "build", *options, source, cwd=folder)
        files += sorted(set(folder.glob("*")) - before)
    return files


def make_environment(folder: Path) -> Path:
    """The Python of a new, empty environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def install(python: Path, *requirements: str | Path) -> None:
    """Install requirements into an environment."""
    run(python, *_PIP, *requirements, cwd=python.parent)
