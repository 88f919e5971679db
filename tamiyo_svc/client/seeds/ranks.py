"""What the ranks of a data-parallel run agree on about their seeds; each must call at one point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn


def is_shared() -> bool:
    """Whether there are other ranks, or could be."""
    return distributed.is_available() and distributed.is_initialized()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every rank the mean of all ranks' gradients, none counting as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
        parameter.grad /= distributed.get_world_size()


def average(values: Sequence[float], parameters: Sequence[nn.Parameter]) -> list[float]:
    """The means of all ranks' values, reduced on the device of the parameters."""
    device = parameters[0].device if parameters else torch.device("cpu")
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return [float(value) / distributed.get_world_size() for value in total]
