"""Scikit-learn's handwritten digits: 1,797 grey images of 8 by 8 pixels that ship with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES: Final = 10
_VALIDATION: Final = 250
_TEST: Final = 350
_MAX_PIXEL: Final = 16.0


@dataclass(frozen=True, slots=True)
class Samples:
    """Images (n, 1, 8, 8) in [0, 1] and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Samples]:
        """One epoch in random order; a remainder smaller than `size` is left out."""
        order = torch.randperm(len(self), generator=generator)
        for chunk in torch.split(order, size):
            if len(chunk) == size:
                yield Samples(self.images[chunk], self.labels[chunk])


@dataclass(frozen=True, slots=True)
class Digits:
    """The three parts of the data set, without overlap."""

    training: Samples
    validation: Samples
    test: Samples


def load(generator: torch.Generator) -> Digits:
    """Load the digits and split them at random."""
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / _MAX_PIXEL
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=generator)
    test, validation, training = torch.split(
        order, [_TEST, _VALIDATION, len(order) - _TEST - _VALIDATION]
    )

    def part(indices: Tensor) -> Samples:
        return Samples(images[indices], labels[indices])

    return Digits(part(training), part(validation), part(test))
