"""The seeds of one network: attached by name, trained, described, saved, and taken out again."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from tamiyo_svc.client.seeds.bake import bake
from tamiyo_svc.client.seeds.blueprints import BLUEPRINTS, Build
from tamiyo_svc.client.seeds.gates import Impact
from tamiyo_svc.client.seeds.lifecycle import CULLED, JOINED, TRAINING, Seed, describe_seed
from tamiyo_svc.client.seeds.places import find_home, find_neighbour
from tamiyo_svc.client.seeds.ranks import WORLD, RanksApartError
from tamiyo_svc.client.seeds.slot import CHILD, Slot, leave_out_missing
from tamiyo_svc.client.seeds.snapshot import restore_place, restore_seed, save_seed
from tamiyo_svc.client.seeds.undisturbed import (
    kept_gradients,
    undisturbed,
    undisturbed_generators,
)
from tamiyo_svc.client.seeds.worth import measure
from tamiyo_svc.leyline import leyline_pb2 as leyline

_LOG: Final = logging.getLogger("tamiyo.client")
_MAX_GRADIENT_NORM: Final = 5.0
_NO_GRADIENT: Final = (
    "the isolated pass of seed {} gave no gradient: its loss does not depend on the seed, or the "
    "seed is in a block that is recomputed with use_reentrant=True, which needs use_reentrant=False"
)


class SeedBank:
    """Seeds in `model`, which stays itself: slots are all it gains, and `detach` removes them.

    A seed in isolated training has its own optimizer and its own pass through the network, cut off
    from what made its input; the host's weights, gradients, buffers, modes and random numbers are
    the same as without it. A seed that joined the network gets its gradients from the host's own
    backward pass. `model` is the bare network, not its data-parallel wrapper; with
    `torch.distributed` running the seeds' gradients, losses and worth are averaged over all ranks,
    which must give the same `random_seed`. `evaluate` gives the validation loss of the network as
    it is; without it no gate asks whether a seed helps. `risks` are those of the blueprints, in 0
    to 1. A seed that raises an error is taken out again, as if it had been culled.
    """

    def __init__(
        self,
        model: nn.Module,
        blueprints: Mapping[str, Build] | None = None,
        *,
        random_seed: int = 0,
        evaluate: Callable[[], float] | None = None,
        risks: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.blueprints = dict(BLUEPRINTS if blueprints is None else blueprints)
        self.risks = dict(risks or {})
        self.seeds: list[Seed] = []
        self.learning_rate = 1e-3
        """That of seeds whose own is not known."""
        self.isolation_violations = 0
        """How many parameters' gradients isolated training has changed in this step."""
        self._slots: list[Slot] = []
        self._places: list[tuple[str, str]] = []
        self._random_seed = random_seed
        self._evaluate = evaluate
        self._told: set[str] = set()
        self._loading = model._register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            leave_out_missing, with_module=True
        )

    def attach(self, name: str, seed_id: str = "", channel_dim: int | None = None) -> Seed:
        """Open a slot behind the submodule of this dotted name.

        Raises:
            AttributeError: the network has no such submodule.
            ValueError: the seed id is taken, or the place can hold no slot.
        """
        host = self.model.get_submodule(name)
        index = len(self.seeds)
        seed_id = seed_id or f"seed-{index}"
        if any(seed.seed_id == seed_id for seed in self.seeds):
            raise ValueError(f"there is a seed {seed_id!r} already")
        home_name = find_home(self.model, name)
        home = self.model.get_submodule(home_name)
        child, number = CHILD, 1
        while hasattr(home, child):
            number += 1
            child = f"{CHILD}_{number}"
        slot = Slot(host, child, find_neighbour(self.model, home_name), channel_dim)
        slot.bank = weakref.ref(self)
        home.add_module(child, slot)
        seed = Seed(index, slot, seed_id)
        self._slots.append(slot)
        self._places.append((name, home_name))
        self.seeds.append(seed)
        return seed

    def detach(self) -> None:
        """Take every seed and every slot out; the network is as it was before `attach`."""
        for slot, (_, home) in zip(self._slots, self._places, strict=True):
            slot.clear()
            slot.unhook()
            del self.model.get_submodule(home)._modules[slot.child]
        self._loading.remove()
        self._slots.clear()
        self._places.clear()
        self.seeds.clear()

    def bake(self) -> nn.Module:
        """A copy of the network without Tamiyo, what has joined built in: equal bit for bit.

        It is made of torch's modules and the network's own, so that it can be saved, loaded where
        Tamiyo is not installed, traced, exported and compiled. The network's own modules keep
        their classes and names; a module with a seed behind it has one more child, `grown`.

        Raises:
            Exception: whatever copying the network raises.
        """
        return bake(self.model, list(zip(self._places, self._slots, strict=True)))

    def average(self, averaged: nn.Module, weight: float) -> None:
        """Move the seeds of a copy of the network towards the present ones by `weight`, 0 to 1.

        To be called beside whatever averages the weights of a copy, such as
        `AveragedModel.update_parameters`, with 1 minus its decay: averages know parameters of the
        host alone. A seed the copy has not yet is put in as it is.
        """
        for twin in averaged.modules():
            if isinstance(twin, Slot) and (original := twin.copied_from()) in self._slots:
                assert original is not None
                twin.move_towards(original, weight)

    def build(self, seed: Seed, blueprint_id: str) -> nn.Module:
        """A fresh module, tried in the seed's place; all random generators stay as they were.

        Raises:
            KeyError: no such blueprint.
            ValueError: no features have passed the place, or it does not fit them.
            Exception: whatever the blueprint or its module raises.
        """
        slot = self._slots[seed.index]
        if not slot.channels:
            raise ValueError(
                "no tensor, nor a tuple that begins with one, has passed behind "
                f"{self._places[seed.index][0] or 'the network'} yet"
            )
        with undisturbed_generators(p.device for p in self.model.parameters()):
            torch.manual_seed(self._random_seed + seed.index)
            module = self.blueprints[blueprint_id](slot.channels)
            slot.check(module)
        return module

    @property
    def _apart(self) -> bool:
        """Whether ranks lost each other, so that whatever changed would differ between them."""
        return WORLD.shared and WORLD.apart

    @property
    def wants_isolated_pass(self) -> bool:
        """Whether a seed is in isolated training."""
        return not self._apart and any(seed.stage == TRAINING for seed in self.seeds)

    def follow(self, learning_rate: float) -> None:
        """Train with the host's learning rate from now on."""
        self.learning_rate = learning_rate
        for seed in self.seeds:
            seed.follow(learning_rate)

    def train_isolated(self, loss: Callable[[], Tensor], *, scale: float = 1.0) -> None:
        """Train each seed in isolation by one step on `loss`, a pass through the bare network.

        `scale` is that of a gradient scaler, which small float16 gradients need here too.
        """
        for seed, slot in zip(self.seeds, self._slots, strict=True):
            if seed.stage != TRAINING:
                continue
            reached = math.nan
            try:
                with self._pass_for(seed, slot, trains=True):
                    reached = _backward(seed, loss, scale)
            # What the network or the caller's function raises ends neither the seed nor training.
            except Exception as error:
                self._tell(f"the isolated pass of seed {seed.seed_id} failed", error)
            else:
                if slot.failure is None and all(p.grad is None for p in seed.parameters):
                    self._tell(_NO_GRADIENT.format(seed.seed_id))
            self._step(seed, slot, reached, scale)

    def step(self, loss: float, *, scale: float = 1.0) -> None:
        """Train the seeds that joined the network with the gradients of its backward pass.

        `scale` is what the loss was multiplied by for that, as gradient scalers do.
        """
        self.isolation_violations = 0
        for seed, slot in zip(self.seeds, self._slots, strict=True):
            if seed.stage in JOINED:
                self._step(seed, slot, loss, scale)

    def advance(self, *, blend: bool) -> None:
        """Count one training step; while blending, and if `blend`, alphas follow their schedule."""
        if not self._apart:
            for seed in self.seeds:
                seed.advance(blend=blend)

    def impact(self, seed: Seed) -> Impact | None:
        """What the seed in full is worth, None if nobody evaluates; the same on all ranks.

        Where two evaluations of the same network differ it is measured several times.

        Raises:
            Exception: whatever `evaluate` or the seed raises, here or on another rank.
        """
        if self._evaluate is None:
            return None
        slot = self._slots[seed.index]
        measured, failure = Impact(math.nan), None
        try:
            with self._pass_for(seed, slot, trains=False), torch.no_grad():
                measured = measure(self._evaluate, slot)
            failure = slot.failure
        except Exception as error:
            failure = error
        difference, noise, loss, failed = WORLD.average(
            [measured.difference, measured.noise, measured.loss, float(failure is not None)]
        )
        if failed:
            raise failure or RuntimeError("evaluation failed on another rank")
        return Impact(difference, noise, loss)

    def states(
        self, epoch: int, risks: Mapping[str, float] | None = None
    ) -> list[leyline.SeedState]:
        """Every seed as a packet describes it; `risks` replace the bank's own."""
        known = self.risks if risks is None else risks
        return [
            describe_seed(seed, epoch, known.get(seed.blueprint_id, 0.0)) for seed in self.seeds
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything about the seeds as plain values and tensors, to be saved with a checkpoint."""
        pairs = zip(self.seeds, self._slots, strict=True)
        return {seed.seed_id: save_seed(seed, slot) for seed, slot in pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the same seeds must be attached.

        Raises:
            KeyError: a seed or its blueprint is missing.
        """
        missing = [seed.seed_id for seed in self.seeds if seed.seed_id not in state]
        if missing:
            raise KeyError(f"no seed {', '.join(missing)} was saved, only {', '.join(state)}")
        for seed, slot in zip(self.seeds, self._slots, strict=True):
            saved = state[seed.seed_id]
            restore_place(slot, saved)
            planted = saved["module"] is not None
            module = self.build(seed, saved["blueprint_id"]) if planted else None
            restore_seed(seed, slot, saved, module)

    def restore(
        self, slot: Slot, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Give a slot the seed that its network's own state dict holds.

        Raises:
            KeyError: no such blueprint.
            Exception: whatever building it raises.
        """
        seed = self.seeds[self._slots.index(slot)]
        blueprint_id = description["blueprint_id"]
        if slot.seed is None or slot.blueprint_id != blueprint_id:
            restore_place(slot, description)
            module = self.build(seed, blueprint_id)
            seed.germinate(blueprint_id, module, self.learning_rate, 1)
            seed.had_gradient = seed.moved = True
            seed.enter(description["stage"])
        elif seed.stage in JOINED and not description["alpha"]:
            _LOG.warning(
                "the weights that were loaded are from before seed %s joined: it has no part in "
                "the network any more",
                seed.seed_id,
            )
        slot.take(description, tensors)

    @contextmanager
    def _pass_for(self, seed: Seed, slot: Slot, *, trains: bool) -> Iterator[None]:
        """Passes with the seed in full that leave the host and whatever they do not train alone."""
        others = [other for other in self.seeds if other is not seed]
        named = [
            *self.model.named_parameters(),
            *((f"{other.seed_id}.{name}", p) for other in others for name, p in other.named()),
        ]
        kept = [buffer for other in (others if trains else self.seeds) for buffer in other.buffers]
        with undisturbed(self.model, kept), kept_gradients(named, self._violated):
            slot.isolated = seed.stage not in JOINED
            try:
                yield
            finally:
                slot.isolated = False

    def _violated(self, name: str) -> None:
        self.isolation_violations += 1
        self._tell(f"a pass for seeds alone has changed the gradient of {name}")

    def _step(self, seed: Seed, slot: Slot, loss: float, scale: float) -> None:
        if seed.optimizer is None or self._apart:
            return
        _divide_gradients(seed, scale)
        try:
            WORLD.average_gradients(seed.parameters)
            WORLD.take_from_first(seed.buffers)
            # A gate must open on all ranks or none, and a seed that failed on one leave them all.
            loss, failed = WORLD.average((loss, float(slot.failure is not None)))
        except RanksApartError:
            return
        if failed:
            error = slot.failure
            _LOG.error(
                "seed %s failed and is taken out: %s",
                seed.seed_id,
                error or "on another rank",
                exc_info=error,
            )
            # Its traceback holds this frame, and so all tensors of the step in a cycle.
            del error
            seed.remove(CULLED)
            return
        norm = float(nn.utils.clip_grad_norm_(seed.parameters, _MAX_GRADIENT_NORM))
        seed.observe(loss, norm)
        if math.isfinite(norm):
            seed.learn()
        seed.optimizer.zero_grad(set_to_none=True)

    def _tell(self, what: str, error: Exception | None = None) -> None:
        """Log each thing once, as it may come back with every step."""
        if what not in self._told:
            self._told.add(what)
            _LOG.warning("%s, as may happen again%s", what, f": {error}" if error else "")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for slot, (_, home) in zip(self._slots, self._places, strict=True):
            slot.bank = weakref.ref(self)
            slot.settle(find_neighbour(self.model, home))


def _backward(seed: Seed, loss: Callable[[], Tensor], scale: float) -> float:
    """The loss of a pass whose gradients reach the seed and nothing else."""
    with torch.enable_grad():
        value = loss()
    parameters = [p for p in seed.parameters if p.requires_grad]
    if value.requires_grad:
        gradients = torch.autograd.grad(value * scale, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return float(value.detach())


def _divide_gradients(seed: Seed, scale: float) -> None:
    if scale != 1.0:
        for parameter in seed.parameters:
            if parameter.grad is not None:
                parameter.grad /= scale
