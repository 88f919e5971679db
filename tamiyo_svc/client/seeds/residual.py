"""What a seed's module makes of the features in its place, in a plain pass and in a traced one."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

_JIT: Final[Any] = torch._C
_CONTROL_FLOW: Final = (
    "torch.utils.checkpoint",
    "torch._dynamo",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch._subclasses",
    "torch.export",
    "torch.fx",
    "torch.jit",
    "torch.onnx",
    "functorch",
)
"""Where exceptions are defined by which torch steers recomputation, tracing and compilation."""


def residual_of(seed: nn.Module, features: Tensor) -> Tensor:
    """What the seed adds to the features, of their shape and number format.

    Raises:
        ValueError: what it returns is not one tensor of that shape.
        Exception: whatever the seed raises.
    """
    residual = seed(_in_its_format(seed, features))
    if not isinstance(residual, Tensor) or residual.shape != features.shape:
        found = tuple(getattr(residual, "shape", ())) or type(residual).__name__
        raise ValueError(f"the seed returns {found} for features of shape {tuple(features.shape)}")
    return residual.to(features.dtype)


def traced_residual_of(seed: nn.Module, features: Any, dtype: Any) -> Any:
    """The same where a tracer looks on, which has `features` of its own kind.

    What is exported takes the seed's tensors as constants, since they are none of the network's
    own parameters.

    Raises:
        RuntimeError: `torch.export` runs with `strict=True`, which takes parameters alone.
    """
    source = features if isinstance(features, fx.Proxy) else _in_its_format(seed, features)
    if _is_traced_by_jit():
        return _untraced_constant(seed)(source).to(dtype)
    if _is_exporting():
        named = (*seed.named_parameters(), *seed.named_buffers())
        constants = {name: tensor.detach() for name, tensor in named}
        return torch.func.functional_call(seed, constants, (source,)).to(dtype)
    return seed(source).to(dtype)


def is_traced(features: Any) -> bool:
    """Whether a tracer or compiler runs the pass, whose exceptions are its own affair."""
    return (
        torch.compiler.is_compiling()
        or _is_traced_by_jit()
        or isinstance(features, fx.Proxy)
        or is_symbolic(features)
    )


def is_symbolic(features: Any) -> bool:
    """Whether these stand for features without being any."""
    return isinstance(features, Tensor) and type(features).__module__.startswith(
        ("torch._subclasses", "torch._functorch")
    )


def is_control_flow(error: Exception) -> bool:
    """Whether torch raised this to steer its own course, and not the seed because it failed."""
    return type(error).__module__.startswith(_CONTROL_FLOW)


def own_saved_tensors() -> AbstractContextManager[Any]:
    """Keep what a seed saves for its backward pass out of the hooks that others have set.

    Recomputation counts the tensors saved, which must not depend on whether a seed fails.
    """
    ignore_is_tracing = True
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(ignore_is_tracing) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _in_its_format(seed: nn.Module, features: Tensor) -> Tensor:
    parameter = next(seed.parameters(), None)
    # A network that casts by itself, as mixed precision of FSDP does, has features in another
    # format than its weights; autocast sees to that itself.
    if (
        parameter is None
        or features.dtype == parameter.dtype
        or torch.is_autocast_enabled(features.device.type)
    ):
        return features
    return features.to(parameter.dtype)


def _is_traced_by_jit() -> bool:
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


def _is_exporting() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", None)
    if exporting is None or not exporting():
        return False
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "a network with seeds needs torch.export with strict=False, or bank.bake()"
        )
    return True


def _untraced_constant(seed: nn.Module) -> nn.Module:
    """A copy whose tensors a trace takes as constants, made while it does not look on."""
    tracing = _JIT._get_tracing_state()
    _JIT._set_tracing_state(None)
    try:
        return copy.deepcopy(seed).requires_grad_(requires_grad=False)
    finally:
        _JIT._set_tracing_state(tracing)


def _same(tensor: Tensor) -> Tensor:
    return tensor
