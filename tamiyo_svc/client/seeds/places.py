"""Where in a network a seed can be: which module holds its slot, and whose formats it has."""

from __future__ import annotations

from collections import Counter
from typing import Final

from torch import nn

from tamiyo_svc.client.seeds.slot import Slot

_CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that run through their children, and would run through a slot too."""


def find_home(model: nn.Module, name: str) -> str:
    """The dotted name of the module that holds the slot behind the submodule `name`.

    The submodule itself, or if it is a container its last module that is none and is in the
    network once.

    Raises:
        AttributeError: the network has no such submodule.
        ValueError: nothing in it can hold a slot.
    """
    host = model.get_submodule(name)
    if not isinstance(host, _CONTAINERS):
        return name
    held = Counter(id(child) for parent in model.modules() for child in parent.children())
    for inner, module in reversed(list(host.named_modules())):
        if not isinstance(module, (*_CONTAINERS, Slot)) and held[id(module)] == 1:
            return f"{name}.{inner}" if name else inner
    raise ValueError(f"no module in {name or 'the network'} can hold a seed: attach elsewhere")


def find_neighbour(model: nn.Module, home: str) -> tuple[nn.Module, str] | None:
    """The module and the name of the floating-point parameter nearest to `home`, if there is one.

    In it, else around it, from the inside out.
    """
    path = home.split(".") if home else []
    for depth in range(len(path), -1, -1):
        for module in model.get_submodule(".".join(path[:depth])).modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point():
                    return module, name
    return None
