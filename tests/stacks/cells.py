"""The cells of the matrix of training stacks: what is combined with what."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tamiyo_svc.client.run import RunSettings

STEPS: Final = 60
HALF: Final = 30
"""Where a training that is resumed stops first; its seed has joined by then, in part."""
LEARNING_RATE: Final = 1e-2
LR_DELTA: Final = -0.25
"""What one command does to the learning rate."""
PARTS: Final = 2
"""Micro-batches of a step whose gradients are accumulated."""
WAITING: Final = RunSettings(wait_s=30.0, blend_steps=10)


class Framework(StrEnum):
    """Whose training loop it is."""

    PLAIN = "plain"
    LIGHTNING = "Lightning"
    TRANSFORMERS = "Transformers"


class Precision(StrEnum):
    """In which number formats it computes and keeps its weights."""

    FP32 = "fp32"
    AUTOCAST = "autocast bf16"
    WEIGHTS = "bf16 weights"
    SCALED = "fp16 with GradScaler"


class Spread(StrEnum):
    """Over which ranks."""

    SINGLE = "single"
    DDP = "DDP two ranks"
    FSDP2 = "FSDP2 two ranks"


class Variant(StrEnum):
    """What else is special."""

    FRESH = "fresh"
    RESUMED = "resumed"
    ACCUMULATED = "accumulated"
    RECOMPUTED = "recomputation"
    COMPILED = "compiled"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    framework: Framework
    precision: Precision
    spread: Spread
    variant: Variant

    @property
    def ranks(self) -> int:
        """How many processes train together."""
        return 1 if self.spread is Spread.SINGLE else 2

    @property
    def parts(self) -> int:
        """Micro-batches a step."""
        return PARTS if self.variant is Variant.ACCUMULATED else 1

    def __str__(self) -> str:
        return ", ".join((self.framework, self.precision, self.spread, self.variant))


ALL: Final = tuple(
    Cell(framework, precision, spread, variant)
    for framework, spread, precision, variant in itertools.product(
        Framework, Spread, Precision, Variant
    )
)


def read_cell(text: str) -> Cell:
    """The cell that `str` has written.

    Raises:
        ValueError: there is none.
    """
    framework, precision, spread, variant = text.split(", ")
    return Cell(Framework(framework), Precision(precision), Spread(spread), Variant(variant))
