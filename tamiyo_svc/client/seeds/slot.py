"""A place for a seed behind any submodule: a child module of the network that is also its hook."""

from __future__ import annotations

import copy
import json
import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Final, Protocol

import torch
from torch import Tensor, fx, nn

from tamiyo_svc.client.seeds.blending import CONVEX, Mixing
from tamiyo_svc.client.seeds.residual import (
    is_control_flow,
    is_symbolic,
    is_traced,
    own_saved_tensors,
    residual_of,
    traced_residual_of,
)
from tamiyo_svc.client.seeds.undisturbed import generators, undisturbed_generators
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import BlendMode

CHILD: Final = "tamiyo"
"""Name of a slot among its home's children, and so in the network's state dict."""
_SEED: Final = "seed."
_ABOUT: Final = "about"
_LOG: Final = logging.getLogger("tamiyo.client")


class Bank(Protocol):
    """Who plants what a state dict holds for a slot."""

    def restore(
        self, slot: Slot, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Give the slot this seed, or raise what prevents it."""


class Slot(nn.Module):
    """The place behind `host`, whose output is a tensor or a tuple that begins with one.

    With alpha 0, and in an empty slot, the output is left alone: the very same object. The
    channels are dimension 1 of images and volumes, else the last, unless `channel_dim` says so.

    A slot is a submodule of the network, so that its seed moves, changes its number format, is
    copied and is saved with it; but the seed is not among the network's parameters, buffers and
    modules. Optimizers, data-parallel wrappers and averages, made before or after it grew, see the
    host they know. The seed has the device, number format and memory format of the parameter
    `name` of `neighbour`, a module of the network next to the place. `child` is the slot's own name
    where it is a child.
    """

    def __init__(
        self,
        host: nn.Module,
        child: str = CHILD,
        neighbour: tuple[nn.Module, str] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.child = child
        self.channels = 0
        self.channel_dim = -1 if channel_dim is None else channel_dim
        self.alpha = 0.0
        self.mixing: Mixing = CONVEX
        self.blueprint_id = ""
        self.stage: leyline.SeedLifecycleStage = leyline.SEED_STAGE_DORMANT
        self.isolated = False
        """Whether the seed takes full part, cut off from what made its input."""
        self.silent = False
        """Whether the seed is left out, to see what it is worth."""
        self.failure: Exception | None = None
        """What the seed raised in the network's own pass; it is left out from then on."""
        self.output_kind: type = Tensor
        """Tensor, or the class of the tuple that holds it."""
        self.shape: tuple[int, ...] = ()
        self.copies_input = False
        """Whether the seed writes into its input."""
        self.bank: weakref.ref[Bank] | None = None
        self._channel_dim_given = channel_dim is not None
        self._draws = False
        # In a tuple, so that it does not become part of the network through this module.
        self._planted: tuple[nn.Module, ...] = ()
        self._neighbour: tuple[weakref.ref[nn.Module], str] | None = None
        self.settle(neighbour)
        self._original: weakref.ref[Slot] | None = None
        self._warns = False
        self._seen_version = 0
        self._changes = 0
        self._copied_changes = 0
        self._handle = host.register_forward_hook(self)
        _notice_hooks_when_compiling()

    @property
    def seed(self) -> nn.Module | None:
        """The module planted here."""
        return self._planted[0] if self._planted else None

    @property
    def about(self) -> Tensor:
        """What else than the seed's tensors gives back the network's outputs: JSON in bytes."""
        mixing = {name: getattr(self.mixing, name) for name in self.mixing.__slots__}
        description = {
            "blueprint_id": self.blueprint_id,
            "stage": int(self.stage),
            "alpha": self.alpha,
            "channels": self.channels,
            "channel_dim": self.channel_dim,
            "shape": self.shape,
            "mixing": {**mixing, "mode": str(self.mixing.mode)},
        }
        return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)

    def __getattr__(self, name: str) -> Any:
        # What torch.jit asks every hook for; without it no more is said than that it is missing.
        if name == "__name__":
            raise AttributeError(
                "torch.jit.script takes no network with places for seeds, as they are hooks: "
                "use torch.jit.trace or torch.export"
            )
        return super().__getattr__(name)

    def settle(self, neighbour: tuple[nn.Module, str] | None) -> None:
        """Follow this parameter's device and formats, given by its module and name."""
        self._neighbour = neighbour and (weakref.ref(neighbour[0]), neighbour[1])

    def _followed(self) -> Tensor | None:
        # By name, since sharding and parametrization replace the parameters of a module.
        if self._neighbour is None or (module := self._neighbour[0]()) is None:
            return None
        tensor = getattr(module, self._neighbour[1], None)
        return tensor if isinstance(tensor, Tensor) else None

    def plant(self, seed: nn.Module) -> None:
        """Put a seed in, taking no part yet, in its place's number format and on its device."""
        self.clear()
        self._planted = (self.suited(seed),)
        self._changes += 1

    def suited(self, seed: nn.Module) -> nn.Module:
        """The same module, with the device, number format and memory format of its place."""
        followed = self._followed()
        if followed is not None:
            seed.to(device=followed.device, dtype=followed.dtype)
            if _is_channels_last(followed):
                seed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return seed

    def check(self, seed: nn.Module) -> None:
        """Try a copy of a seed on zeros in the shape of the features seen here.

        Raises:
            ValueError: what it returns is not one residual of the same shape.
            Exception: whatever it raises itself.
        """
        trial = self.suited(copy.deepcopy(seed))
        # A single sample has no variance to normalize by.
        shape = (max(self.shape[0], 2), *self.shape[1:]) if len(self.shape) > 1 else self.shape
        features = torch.zeros(shape)
        if (parameter := next(trial.parameters(), None)) is not None:
            features = features.to(parameter)
        writes = draws = False
        with torch.no_grad(), undisturbed_generators([features.device]):
            for training in (False, True):
                before, version = generators([features.device]), features._version
                residual_of(trial.train(training), features)
                writes |= features._version != version
                draws |= generators([features.device]) != before
        self.copies_input, self._draws = writes, draws

    def clear(self) -> None:
        """Take the seed out."""
        self._changes += bool(self._planted)
        self._planted = ()
        self.failure = None
        self.alpha = 0.0
        self.mixing = CONVEX

    def unhook(self) -> None:
        """No longer act behind the host."""
        self._handle.remove()

    def forward(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The host's output with the seed's part in it, None to leave it as it is."""
        if not self.channels:
            self._note(output)
        if self._warns and not torch.compiler.is_compiling():
            self._warn_of_change()
        if not self._planted or self.silent or not (self.isolated or self.alpha):
            return None
        if self.failure is not None:
            return None
        features = _features_of(output)
        if features is None:
            return None
        seed = self._planted[0]
        if seed.training != host.training:
            seed.train(host.training)
        if self.isolated:
            features = features.detach()
        mixed = self._mixed(seed, features, 1.0 if self.isolated else self.alpha)
        return None if mixed is None else put_back(output, mixed)

    def _mixed(self, seed: nn.Module, features: Tensor, alpha: float) -> Tensor | None:
        if is_traced(features):
            source = features.clone() if self.copies_input else features
            residual = traced_residual_of(seed, source, features.dtype)
            return self.mixing.mix(features, residual, alpha, rank=len(self.shape))
        generators_kept = (
            undisturbed_generators([features.device]) if self._draws else nullcontext()
        )
        try:
            with generators_kept, own_saved_tensors():
                source = features.clone() if self.copies_input else features
                return self.mixing.mix(features, residual_of(seed, source), alpha)
        # A seed's error must not end its host's training.
        except Exception as error:
            if is_control_flow(error):
                raise
            self.failure = error
            return None

    def _note(self, output: Any) -> None:
        features = _features_of(output)
        if not isinstance(features, Tensor) or is_symbolic(features):
            return
        if not self._channel_dim_given:
            self.channel_dim = 1 if features.ndim in (4, 5) else -1
        self.shape = tuple(features.shape)
        self.channels = self.shape[self.channel_dim]
        self.output_kind = type(output) if isinstance(output, tuple) else Tensor

    def _warn_of_change(self) -> None:
        """Say once that a copy whose weights have changed since keeps its seeds as they were."""
        original, followed = self.copied_from(), self._followed()
        if original is None or followed is None:
            self._warns = False
            return
        grown = original._changes != self._copied_changes or original.alpha != self.alpha
        if grown and followed._version != self._seen_version:
            self._warns = False
            _LOG.warning(
                "a copy of the network has changed weights but its seed %s is as it was when the "
                "copy was made: after averaging call bank.average(copy, weight)",
                original.blueprint_id or self.blueprint_id,
            )

    def copied_from(self) -> Slot | None:
        """The slot of which this is a copy, if that is still there."""
        return None if self._original is None else self._original()

    def move_towards(self, slot: Slot, weight: float) -> None:
        """Take on this share of another slot's seed, or all of it where there is another seed."""
        self._warns = False
        if slot._changes != self._copied_changes or not self._planted or not slot._planted:
            self._planted = copy.deepcopy(slot._planted)
            self.alpha, weight = slot.alpha, 1.0
        self.alpha += weight * (slot.alpha - self.alpha)
        self.mixing, self.blueprint_id, self.stage = slot.mixing, slot.blueprint_id, slot.stage
        self.copies_input, self._draws = slot.copies_input, slot._draws
        self._copied_changes = slot._changes
        with torch.no_grad():
            for mine, theirs in zip(self._tensors(), slot._tensors(), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(theirs.to(mine), weight)
                else:
                    mine.copy_(theirs)

    def _tensors(self) -> list[Tensor]:
        return [t for seed in self._planted for t in (*seed.parameters(), *seed.buffers())]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for seed in self._planted:
            seed._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not the bank's any more, nor is a failure's traceback part of the network.
        own = {"bank": None, "_original": None, "_neighbour": None, "failure": None}
        return {**self.__dict__, **own}

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        twin._original, twin._warns = weakref.ref(self), True
        twin._copied_changes = self._changes
        original = None if self._neighbour is None else self._neighbour[0]()
        if self._neighbour is not None and original is not None:
            # Hooks are copied before children. Only what is small is copied early for that.
            small = not any(original.children())
            neighbour = copy.deepcopy(original, memo) if small else memo.get(id(original))
            if isinstance(neighbour, nn.Module):
                twin._neighbour = (weakref.ref(neighbour), self._neighbour[1])
                followed = twin._followed()
                twin._seen_version = 0 if followed is None else followed._version
        return twin

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for seed in self._planted:
            seed.state_dict(destination=destination, prefix=prefix + _SEED, keep_vars=keep_vars)
            destination[prefix + _ABOUT] = self.about

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        about = state_dict.get(prefix + _ABOUT)
        if about is None:
            # What of the network's own is there is not shown here; see `leave_out_missing`.
            return
        tensors = {
            name.removeprefix(prefix + _SEED): tensor
            for name, tensor in state_dict.items()
            if name.startswith(prefix + _SEED)
        }
        try:
            description = json.loads(bytes(about.tolist()))
            bank = None if self.bank is None else self.bank()
            if bank is not None:
                bank.restore(self, description, tensors)
                return
            if not self._planted or description["blueprint_id"] != self.blueprint_id:
                unexpected_keys += [prefix + _SEED + name for name in tensors]
                return
            self.take(description, tensors)
        # Of all that may be wrong with somebody's file nothing is worth more than being told.
        except Exception as error:
            error_msgs.append(f"the seed at {prefix.removesuffix('.')} cannot be restored: {error}")

    def take(self, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Give the seed planted here these tensors, and its place what `about` describes.

        Raises:
            RuntimeError, KeyError, ValueError: something is missing or does not fit.
        """
        self._planted[0].load_state_dict(tensors)
        self.mixing = mixing_from(description["mixing"])
        self.alpha = float(description["alpha"])
        self._copied_changes = self._changes


def leave_out_missing(
    network: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Take out the seeds that a state dict of the network does not hold, before it is loaded.

    A state dict that has nothing of the modules around a seed's place says nothing of the seed.
    """
    for name, slot in list(network.named_modules()):
        if not isinstance(slot, Slot) or f"{prefix}{name}.{_ABOUT}" in state_dict:
            continue
        around = name.rpartition(".")[0]
        while around and not _has_state(network.get_submodule(around)):
            around = around.rpartition(".")[0]
        beginning = f"{prefix}{around}." if around else prefix
        if slot.seed is not None and any(key.startswith(beginning) for key in state_dict):
            _LOG.warning(
                "the weights that were loaded have no seed at %s: seed %s is taken out",
                name,
                slot.blueprint_id,
            )
            slot.clear()
            slot.blueprint_id, slot.stage = "", leyline.SEED_STAGE_DORMANT


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def mixing_from(saved: Mapping[str, Any]) -> Mixing:
    """The way to mix that was saved as plain values."""
    return Mixing(
        **{**saved, "mode": BlendMode(saved["mode"]), "alpha_vec": tuple(saved["alpha_vec"])}
    )


def put_back(output: Any, mixed: Any) -> Any:
    """The host's output with its first tensor replaced."""
    if not isinstance(output, tuple):
        return mixed
    if hasattr(output, "_replace"):
        return type(output)(mixed, *output[1:])
    return (mixed, *output[1:])


def _features_of(output: Any) -> Any:
    features = output[0] if isinstance(output, tuple) and output else output
    if isinstance(features, fx.Proxy):
        return features
    return features if isinstance(features, Tensor) and features.ndim else None


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.ndim != 4 or hasattr(tensor, "to_local"):
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _notice_hooks_when_compiling() -> None:
    """Let what is compiled for a module without hooks serve no module that has some.

    Modules of one class share compiled code where each block of a network is compiled, or sharded,
    on its own; torch checks by default everything but their hooks.
    """
    # Takes a second to import, as does any optimizer; `torch.compile` has no other way to be told.
    from torch._dynamo import config

    config.skip_nnmodule_hook_guards = False
