"""A grown network without Tamiyo: plain modules that give the same outputs, bit for bit."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor, fx, nn

from tamiyo_svc.client.seeds.slot import Slot, leave_out_missing

_NOTHING: Final = inspect.Parameter.empty
_PLAIN: Final = (type(None), bool, int, float, str)


def bake(model: nn.Module, places: Sequence[tuple[tuple[str, str], Slot]]) -> nn.Module:
    """A copy of the network in which what has grown is part of it.

    `places` gives the dotted names of each slot's host and of its home, and the slot. A host with a
    seed in the network becomes a module of generated code that holds it as `host` and the seed as
    `seed`; it is called as the host has been called so far.

    Raises:
        Exception: whatever copying the network raises.
    """
    baked = copy.deepcopy(model)
    hooks: Any = baked._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook.hook is leave_out_missing]:
        del hooks[key]
    twins = []
    for (name, home), slot in places:
        twin = baked.get_submodule(home)._modules.pop(slot.child)
        assert isinstance(twin, Slot)
        twin.unhook()
        twins.append((name, twin))
    # The innermost first, since a host that is replaced may hold others.
    twins.sort(key=lambda place: place[0].count(".") if place[0] else -1, reverse=True)
    for name, twin in twins:
        if twin.seed is None or not twin.alpha or twin.failure is not None:
            continue
        grown = _grown(baked.get_submodule(name), twin.seed, twin)
        if not name:
            baked = grown
            continue
        parent, _, child = name.rpartition(".")
        baked.get_submodule(parent)._modules[child] = grown
    return baked


def _grown(host: nn.Module, seed: nn.Module, slot: Slot) -> nn.Module:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    args, kwargs = _arguments(graph, host, slot)
    mix: Any = slot.mixing.mix
    output: Any = fx.Proxy(graph.call_module("host", args, kwargs), tracer)
    whole = slot.output_kind is Tensor
    features = output if whole else output[0]
    source = features.clone() if slot.copies_input else features
    residual = fx.Proxy(graph.call_module("seed", (source.node,)), tracer).to(features.dtype)
    mixed = mix(features, residual, slot.alpha, rank=len(slot.shape))
    if whole:
        graph.output(mixed.node)
    elif hasattr(slot.output_kind, "_fields"):
        first = slot.output_kind._fields[0]
        graph.output(graph.call_method("_replace", (output.node,), {first: mixed.node}))
    else:
        graph.output(graph.call_function(operator.add, ((mixed.node,), output[1:].node)))
    module = fx.GraphModule({"host": host, "seed": seed}, graph, "Grown")
    module.training = host.training
    return module


def _arguments(
    graph: fx.Graph, host: nn.Module, slot: Slot
) -> tuple[tuple[fx.Node, ...], dict[str, Any]]:
    """Placeholders for what the host has been called with so far."""
    count, names = slot.called_with
    parameters = inspect.signature(host.forward).parameters
    positional = [
        parameter.name
        for parameter in parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    given = [*positional[:count], *(f"argument_{n}" for n in range(len(positional), count))]
    args = []
    for name in given:
        default = parameters[name].default if name in parameters else _NOTHING
        args.append(_placeholder(graph, name, default))
    kwargs: dict[str, Any] = {}
    for name in names:
        default = parameters[name].default if name in parameters else None
        if name not in given:
            kwargs[name] = _placeholder(graph, name, None if default is _NOTHING else default)
    return tuple(args), kwargs


def _placeholder(graph: fx.Graph, name: str, default: Any) -> fx.Node:
    if default is _NOTHING:
        return graph.placeholder(name)
    return graph.placeholder(name, default_value=default if isinstance(default, _PLAIN) else None)
