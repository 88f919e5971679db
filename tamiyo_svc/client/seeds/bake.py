"""A grown network without Tamiyo: plain modules that give the same outputs, bit for bit."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor, fx, nn

from tamiyo_svc.client.seeds.slot import CHILD, Slot, leave_out_missing

GROWN: Final = "grown"
"""Name of what has grown among its home's children, and so in the baked network's state dict."""


def bake(model: nn.Module, places: Sequence[tuple[tuple[str, str], Slot]]) -> nn.Module:
    """A copy of the network in which what has grown is part of it.

    `places` gives the dotted names of each slot's host and of its home, and the slot. The slot is
    replaced by a module of generated code that holds the seed, as child of the home and hook of the
    host; so classes, attributes and names of the network's own modules stay what they were.

    Raises:
        Exception: whatever copying the network raises.
    """
    baked = copy.deepcopy(model)
    hooks: Any = baked._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook.hook is leave_out_missing]:
        del hooks[key]
    for (host_name, home_name), slot in places:
        home = baked.get_submodule(home_name)
        twin = home._modules.pop(slot.child)
        assert isinstance(twin, Slot)
        twin.unhook()
        if twin.seed is not None and twin.alpha and twin.failure is None:
            grown = _grown(twin.seed, twin)
            home.add_module(slot.child.replace(CHILD, GROWN), grown)
            baked.get_submodule(host_name).register_forward_hook(grown)
    return baked


def _grown(seed: nn.Module, slot: Slot) -> nn.Module:
    """A hook `(host, arguments, output) -> output` of torch's operations alone."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    graph.placeholder("host")
    graph.placeholder("arguments")
    output: Any = fx.Proxy(graph.placeholder("output"), tracer)
    whole = slot.output_kind is Tensor
    features = output if whole else output[0]
    source = features.clone() if slot.copies_input else features
    residual = fx.Proxy(graph.call_module("seed", (source.node,)), tracer).to(features.dtype)
    mix: Any = slot.mixing.mix
    mixed = mix(features, residual, slot.alpha, rank=len(slot.shape))
    if whole:
        graph.output(mixed.node)
    elif hasattr(slot.output_kind, "_fields"):
        first = slot.output_kind._fields[0]
        graph.output(graph.call_method("_replace", (output.node,), {first: mixed.node}))
    else:
        graph.output(graph.call_function(operator.add, ((mixed.node,), output[1:].node)))
    module = fx.GraphModule({"seed": seed}, graph, "Grown")
    module.training = seed.training
    return module
