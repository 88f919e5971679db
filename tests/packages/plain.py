"""What a plain installation of the client brings, and what of this environment it does not."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[2]
CLIENT: Final = ROOT / "packages" / "client" / "pyproject.toml"


@cache
def example_needs() -> dict[str, tuple[Requirement, ...]]:
    """By the name of an example's file: what the examples' README says that it needs."""
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.py` \|.*\| (.+) \|$", table, re.MULTILINE)
    return {name: tuple(map(Requirement, re.findall(r"`(.+?)`", needs))) for name, needs in rows}


def hidden_beside(*requirements: Requirement) -> str:
    """The modules and distributions that these requirements do not bring, for `wall.py`.

    They are other distributions with their modules, and what of ours is not the client's.
    """
    present = {*_closure(requirements), "tamiyo-client", "tamiyo-svc"}
    owners_by_module = {
        module: {canonicalize_name(owner) for owner in owners}
        for module, owners in metadata.packages_distributions().items()
    }
    hidden = {module for module, owners in owners_by_module.items() if not owners & present}
    hidden |= set().union(*owners_by_module.values()) - present
    kept = {Path(path).stem for path in _client()["tool"]["hatch"]["build"]["only-include"]}
    service = {path.stem for path in (ROOT / "tamiyo_svc").iterdir()} - kept
    return ",".join(sorted(hidden | {f"tamiyo_svc.{name}" for name in service}))


def _closure(requirements: Iterable[Requirement]) -> set[str]:
    """The canonical names of the distributions that requirements bring with what these need."""
    found: set[str] = set()
    waiting = [(requirement, frozenset(requirement.extras)) for requirement in requirements]
    seen = set()
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        for need in _needs(name, extras):
            waiting.append((need, frozenset(need.extras)))
    return found


def _needs(name: str, extras: frozenset[str]) -> list[Requirement]:
    if name == "tamiyo-client":
        project = _client()["project"]
        optional = project["optional-dependencies"]
        texts = [*project["dependencies"], *(text for extra in extras for text in optional[extra])]
        return [Requirement(text) for text in texts]
    try:
        needs = [Requirement(text) for text in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        # Needed on another kind of machine.
        return []
    return [
        need
        for need in needs
        if need.marker is None
        or any(need.marker.evaluate({"extra": extra}) for extra in (*extras, ""))
    ]


@cache
def _client() -> dict[str, Any]:
    return tomllib.loads(CLIENT.read_text(encoding="utf-8"))
