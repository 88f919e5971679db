"""The seeds of one network: attached by name, trained, described, saved, and taken out again."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from tamiyo_svc.client.seeds.blending import Mixing, Schedule
from tamiyo_svc.client.seeds.blueprints import BLUEPRINTS, Build
from tamiyo_svc.client.seeds.lifecycle import CULLED, JOINED, TRAINING, Seed, describe_seed
from tamiyo_svc.client.seeds.ranks import average, average_gradients, is_shared
from tamiyo_svc.client.seeds.slot import Slot
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import BlendMode

_LOG: Final = logging.getLogger("tamiyo.client")
_MAX_GRADIENT_NORM: Final = 5.0
_CARRIED: Final = (
    "stage",
    "blueprint_id",
    "blend_steps",
    "steps_in_stage",
    "germinated_epoch",
    "gradient_norm",
    "loss_fast",
    "loss_slow",
    "impact",
)


class SeedBank:
    """Seeds in `model`, which stays itself: hooks are all it gains, and `detach` removes them.

    A seed in isolated training has its own optimizer and its own pass through the network, in
    which everything else is frozen; the host's weights, gradients, buffers and random numbers
    are the same as without it. A seed that joined the network gets its gradients from the host's
    own backward pass. `model` is the bare network, not its data-parallel wrapper; with
    `torch.distributed` running the seeds' gradients, losses and worth are averaged over all ranks,
    which must give the same `random_seed`. `evaluate` gives the validation loss of the network as
    it is; without it no gate asks whether a seed helps. A seed that raises an error is taken out
    again, as if it had been culled.
    """

    def __init__(
        self,
        model: nn.Module,
        blueprints: Mapping[str, Build] | None = None,
        *,
        random_seed: int = 0,
        evaluate: Callable[[], float] | None = None,
    ) -> None:
        self.model = model
        self.blueprints = dict(BLUEPRINTS if blueprints is None else blueprints)
        self.seeds: list[Seed] = []
        self.isolation_violations = 0
        self._slots: list[Slot] = []
        self._random_seed = random_seed
        self._evaluate = evaluate

    def attach(self, name: str, seed_id: str = "", channel_dim: int | None = None) -> Seed:
        """Open a slot behind the submodule of this dotted name.

        Raises:
            AttributeError: the network has no such submodule.
            ValueError: the seed id is taken.
        """
        module = self.model.get_submodule(name)
        index = len(self.seeds)
        seed_id = seed_id or f"seed-{index}"
        if any(seed.seed_id == seed_id for seed in self.seeds):
            raise ValueError(f"there is a seed {seed_id!r} already")
        slot = Slot(module, channel_dim)
        seed = Seed(index, slot, seed_id)
        self._slots.append(slot)
        self.seeds.append(seed)
        return seed

    def detach(self) -> None:
        """Take every seed and every hook out; the network is as it was before `attach`."""
        for slot in self._slots:
            slot.detach()
        self._slots.clear()
        self.seeds.clear()

    def build(self, seed: Seed, blueprint_id: str) -> nn.Module:
        """A fresh module, tried in the seed's place; the global random numbers stay as they were.

        Raises:
            KeyError: no such blueprint.
            ValueError: no features have passed the place, or it does not fit them.
            Exception: whatever the blueprint or its module raises.
        """
        slot = self._slots[seed.index]
        if not slot.channels:
            raise ValueError("no tensor has passed this place yet")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._random_seed + seed.index)
            module = self.blueprints[blueprint_id](slot.channels)
            slot.check(module)
        return module

    @property
    def wants_isolated_pass(self) -> bool:
        """Whether a seed is in isolated training."""
        return any(seed.stage == TRAINING for seed in self.seeds)

    def train_isolated(self, loss: Callable[[], Tensor]) -> None:
        """Train each seed in isolation by one step on `loss`, a pass through the bare network."""
        for seed in self.seeds:
            if seed.stage != TRAINING:
                continue
            reached, failure = math.nan, None
            try:
                with self._isolated(seed):
                    with torch.enable_grad():
                        value = loss()
                    if value.requires_grad:
                        value.backward()  # type: ignore[no-untyped-call]
                reached = float(value.detach())
            # A seed's error must not end its host's training.
            except Exception as error:
                failure = error
            _step(seed, reached, failure)
            # Its traceback holds this frame, and so all tensors of the step in a cycle.
            del failure

    def step(self, loss: float) -> None:
        """Train the seeds that joined the network with the gradients of its backward pass."""
        for seed, slot in zip(self.seeds, self._slots, strict=True):
            if seed.stage in JOINED:
                _step(seed, loss, slot.failure)

    def advance(self, *, blend: bool) -> None:
        """Count one training step; while blending, and if `blend`, alphas follow their schedule."""
        for seed in self.seeds:
            seed.advance(blend=blend)

    def impact(self, seed: Seed) -> float:
        """Validation loss with the seed in full minus that without it, 0 if nobody evaluates."""
        if self._evaluate is None:
            return 0.0
        slot = self._slots[seed.index]
        with self._undisturbed(), torch.no_grad():
            slot.isolated = seed.stage not in JOINED
            try:
                present = self._evaluate()
                slot.silent = True
                difference = present - self._evaluate()
            finally:
                slot.isolated = slot.silent = False
        if is_shared():
            (difference,) = average((difference,), seed.parameters)
        return difference

    def states(
        self, epoch: int, risks: Mapping[str, float] | None = None
    ) -> list[leyline.SeedState]:
        """Every seed as a packet describes it; `risks` are those of the blueprints."""
        return [
            describe_seed(seed, epoch, (risks or {}).get(seed.blueprint_id)) for seed in self.seeds
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything about the seeds, to be saved with a checkpoint."""
        return {seed.seed_id: _save(seed) for seed in self.seeds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the same seeds must be attached.

        Raises:
            KeyError: a seed or its blueprint is missing.
        """
        for seed in self.seeds:
            saved = state[seed.seed_id]
            seed.slot.clear()
            seed.optimizer = None
            if saved["module"] is not None:
                self._replant(seed, saved)
            for name in _CARRIED:
                setattr(seed, name, saved[name])
            seed.schedule = Schedule(**saved["schedule"])
            mixing = dict(saved["mixing"])
            seed.slot.mixing = Mixing(
                **{
                    **mixing,
                    "mode": BlendMode(mixing["mode"]),
                    "alpha_vec": tuple(mixing["alpha_vec"]),
                }
            )
            seed.slot.alpha = saved["alpha"]

    def _replant(self, seed: Seed, saved: Mapping[str, Any]) -> None:
        seed.slot.channels = saved["channels"]
        seed.slot.channel_dim = saved["channel_dim"]
        module = self.build(seed, saved["blueprint_id"])
        seed.germinate(saved["blueprint_id"], module, saved["learning_rate"], 1)
        # The host's device; the slot knows it only after the first pass.
        module.to(next(self.model.parameters()).device)
        module.load_state_dict(saved["module"])
        if seed.optimizer is not None:
            seed.optimizer.load_state_dict(saved["optimizer"])

    @contextmanager
    def _isolated(self, seed: Seed) -> Iterator[None]:
        slot = self._slots[seed.index]
        own = set(seed.parameters)
        others = [p for p in self._all_parameters() if p not in own]
        frozen = [p for p in others if p.requires_grad]
        before = [_gradient_mark(p) for p in others]
        with self._undisturbed():
            for parameter in frozen:
                parameter.requires_grad = False
            slot.isolated = True
            try:
                yield
            finally:
                slot.isolated = False
                for parameter in frozen:
                    parameter.requires_grad = True
        marks = zip(others, before, strict=True)
        self.isolation_violations += sum(_gradient_mark(p) != mark for p, mark in marks)

    def _all_parameters(self) -> list[nn.Parameter]:
        joined = [p for seed in self.seeds for p in seed.parameters]
        return [*self.model.parameters(), *joined]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Run passes through the network that leave its buffers and random numbers alone."""
        buffers = list(self.model.buffers())
        saved = [buffer.clone() for buffer in buffers]
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            try:
                yield
            finally:
                with torch.no_grad():
                    for buffer, value in zip(buffers, saved, strict=True):
                        buffer.copy_(value)


def _step(seed: Seed, loss: float, failure: Exception | None) -> None:
    if seed.optimizer is None:
        return
    failed = failure is not None
    if is_shared():
        average_gradients(seed.parameters)
        # A gate must open on all ranks or on none, and a seed that failed on one leave them all.
        loss, share = average((loss, float(failed)), seed.parameters)
        failed = share > 0.0
    if failed:
        _LOG.error("seed %s failed and is taken out: %s", seed.seed_id, failure, exc_info=failure)
        seed.remove(CULLED)
        return
    norm = float(nn.utils.clip_grad_norm_(seed.parameters, _MAX_GRADIENT_NORM))
    seed.observe(loss, norm)
    if math.isfinite(norm):
        seed.optimizer.step()
    seed.optimizer.zero_grad(set_to_none=True)


def _gradient_mark(parameter: nn.Parameter) -> tuple[int, int]:
    gradient = parameter.grad
    return (0, 0) if gradient is None else (id(gradient), gradient._version)


def _save(seed: Seed) -> dict[str, Any]:
    module, optimizer = seed.slot.seed, seed.optimizer
    return {
        **{name: getattr(seed, name) for name in _CARRIED},
        "stage": int(seed.stage),
        "alpha": seed.slot.alpha,
        "channels": seed.slot.channels,
        "channel_dim": seed.slot.channel_dim,
        "learning_rate": seed.learning_rate,
        "schedule": dataclasses.asdict(seed.schedule),
        "mixing": {**dataclasses.asdict(seed.slot.mixing), "mode": str(seed.slot.mixing.mode)},
        "module": None if module is None else module.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }
