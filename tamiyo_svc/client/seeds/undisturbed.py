"""Random numbers, buffers and modes of a network that a pass for Tamiyo's sake leaves alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def generators(devices: Iterable[torch.device]) -> tuple[Any, ...]:
    """The states of all global random generators, comparable with each other."""
    numpy = sys.modules.get("numpy")
    drawn = None
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        drawn = (name, keys.tobytes(), *rest)
    on_devices = tuple(
        bytes(torch.cuda.get_rng_state(device).tolist())
        for device in devices
        if device.type == "cuda"
    )
    return random.getstate(), drawn, bytes(torch.get_rng_state().tolist()), on_devices


@contextmanager
def undisturbed_generators(devices: Iterable[torch.device]) -> Iterator[None]:
    """Let code draw random numbers and leave Python's, numpy's and torch's generators alone."""
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    state = random.getstate()
    on_devices = list({device for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=on_devices):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(drawn)


@contextmanager
def undisturbed(model: nn.Module, other_buffers: Iterable[Tensor] = ()) -> Iterator[None]:
    """Run passes through a network that leave its buffers, modes and all generators alone."""
    buffers = [*model.buffers(), *other_buffers]
    saved = [buffer.clone() for buffer in buffers]
    modes = [(module, module.training) for module in model.modules()]
    with undisturbed_generators({parameter.device for parameter in model.parameters()}):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, saved, strict=True):
                    buffer.copy_(value)
            for module, training in modes:
                module.training = training


@contextmanager
def kept_gradients(
    named: Sequence[tuple[str, nn.Parameter]], changed: Callable[[str], None]
) -> Iterator[None]:
    """Give parameters back the gradients they had, and name those that were changed meanwhile.

    Whoever clears gradients before a pass has not let that pass reach them. What was added to a
    gradient in place stays.
    """
    before = [(parameter.grad, _version(parameter)) for _, parameter in named]
    try:
        yield
    finally:
        for (name, parameter), (gradient, version) in zip(named, before, strict=True):
            now = parameter.grad
            if now is gradient and _version(parameter) == version:
                continue
            parameter.grad = gradient
            if now is not None and now.any():
                changed(name)


def _version(parameter: nn.Parameter) -> int:
    return 0 if parameter.grad is None else parameter.grad._version
