"""Writes verdicts as a page of the docs, and reads them back from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from stacks.cells import ALL, STEPS, Cell, Framework, Precision, Spread, Variant

_HEAD: Final = Path(__file__).with_name("head.md")


def write_page(verdicts: Mapping[Cell, str], versions: Mapping[str, str]) -> str:
    """The page for the verdicts of all cells."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    words: list[str] = []
    parts = [_HEAD.read_text().format(count=len(ALL), steps=STEPS, versions=named)]
    for framework in Framework:
        lines = [f"## {_title(framework)}", "", f"| | | {' | '.join(Variant)} |", "|---" * 7 + "|"]
        for spread in Spread:
            for precision in Precision:
                row = (Cell(framework, precision, spread, variant) for variant in Variant)
                said = " | ".join(_shorten(verdicts[cell], words) for cell in row)
                lines.append(f"| {spread} | {precision} | {said} |")
        parts.append("\n".join(lines) + "\n")
    if words:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(words, 1))
        parts.append(f"## Words\n\n{listed}\n")
    return "\n".join(parts)


def read_page(text: str) -> dict[Cell, str]:
    """The verdicts that `write_page` has written."""
    words = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    verdicts = {}
    for framework in Framework:
        (table,) = re.findall(rf"^## {_title(framework)}\n\n((?:\|.*\n)+)", text, re.MULTILINE)
        for line in table.splitlines()[2:]:
            spread, precision, *said = (part.strip() for part in line.strip("|").split("|"))
            for variant, short in zip(Variant, said, strict=True):
                cell = Cell(framework, Precision(precision), Spread(spread), variant)
                kind, _, number = short.rstrip(")").partition(" (")
                verdicts[cell] = f"{kind}: {words[number]}" if number else kind
    return verdicts


def _title(framework: Framework) -> str:
    return "A plain loop" if framework is Framework.PLAIN else str(framework)


def _shorten(verdict: str, words: list[str]) -> str:
    kind, _, said = verdict.partition(": ")
    if not said:
        return kind
    said = " ".join(said.split())
    if said not in words:
        words.append(said)
    return f"{kind} ({words.index(said) + 1})"
