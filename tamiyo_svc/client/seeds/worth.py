"""What a seed is worth: the validation loss with it and without it, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tamiyo_svc.client.seeds.gates import Impact
from tamiyo_svc.client.seeds.slot import Slot

_MEASUREMENTS: Final = 4
"""How often it is measured where the validation loss of one network is not the same twice."""


def measure(evaluate: Callable[[], float], slot: Slot) -> Impact:
    """Evaluate the network with the seed and without it, by turns."""

    def absent() -> float:
        slot.silent = True
        try:
            return float(evaluate())
        finally:
            slot.silent = False

    first, loss = float(evaluate()), absent()
    differences = [first - loss]
    if float(evaluate()) != first:
        differences += [float(evaluate()) - absent() for _ in range(_MEASUREMENTS - 1)]
    return Impact.of(differences, loss)
