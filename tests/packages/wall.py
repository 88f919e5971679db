"""`python wall.py HIDDEN SCRIPT ...` runs a script as if what is in HIDDEN were not installed.

HIDDEN are names of modules and of distributions, separated by commas. They are not found rather
than refused: whoever only looks whether something is there must get the answer no.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import DistributionFinder, PathDistribution
from pathlib import Path
from types import ModuleType


def hide(names: frozenset[str]) -> None:
    """Let nobody find modules and distributions of these names any more."""

    class Wall(PathFinder):
        """Finds what is on the path, but not these."""

        @classmethod
        def find_spec(
            cls,
            fullname: str,
            path: Sequence[str] | None = None,
            target: ModuleType | None = None,
        ) -> ModuleSpec | None:
            return None if fullname in names else super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(
            cls, context: DistributionFinder.Context | None = None
        ) -> Iterator[PathDistribution]:
            for one in super().find_distributions(context or DistributionFinder.Context()):
                if re.sub(r"[-_.]+", "-", one.name).lower() not in names:
                    yield one

    sys.meta_path[:] = [Wall if finder is PathFinder else finder for finder in sys.meta_path]


if __name__ == "__main__":
    _, hidden, script, *arguments = sys.argv
    hide(frozenset(hidden.split(",")))
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
