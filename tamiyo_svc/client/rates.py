"""The learning rate of somebody else's optimizer, as far as commands may change it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import getattr_static
from types import FunctionType
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

MIN_LEARNING_RATE: Final = 1e-8
MAX_LEARNING_RATE: Final = 1.0

_GROUP_RATES: Final = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_RATES: Final = (
    *("base_lrs", "max_lrs", "min_lrs", "default_min_lr", "eta_min", "eps", "_last_lr"),
)
"""Every quantity of torch's schedulers that is a rate. Each schedule is proportional to all of
them together, so scaling all scales the schedule, whichever of them it computes from."""
_TORCH_SCHEDULERS: Final = frozenset({"torch.optim.lr_scheduler", "torch.optim.swa_utils"})
_WRAPPERS: Final = ("accelerate.", "lightning.", "pytorch_lightning.")
_FACTOR: Final = "tamiyo_lr_factor"
_HELD: Final = "_tamiyo_held"
_INITIAL_ONLY: Final = frozenset({"rprop"})
"""Optimizers whose rate is the size of their first step alone."""


class OptimizerRate:
    """Scales the learning rates of an optimizer so that its scheduler keeps to the change.

    Torch's own schedulers have the rates they compute from scaled, in themselves and in the
    optimizer's groups, nested ones too; nothing else remains of a command, and checkpoints of
    optimizer and scheduler carry it. Another scheduler object has its methods named `step...`
    wrapped: the change is lifted while they run, whatever they compute from. The factor then is
    kept in the optimizer's groups, and so in its checkpoints. `scheduler` may also be a list;
    without one, torch schedulers of the optimizer are looked for when the first command comes.
    """

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        self.optimizer: Any = None
        self._schedulers: list[Any] = []
        self._searched = False
        self._set_elsewhere = False
        self._changed = False
        self._marks: list[Any] | None = None
        self._hook: Any = None
        self.use(optimizer, scheduler)

    def use(self, optimizer: Any, scheduler: Any = None) -> None:
        """Change this optimizer's rates from now on, and no other's."""
        if self._hook is not None:
            self._hook.remove()
        self.optimizer = unwrap_optimizer(optimizer)
        self._schedulers = list(_flatten(scheduler))
        self._searched = self._set_elsewhere = self._changed = False
        register = getattr(self.optimizer, "register_load_state_dict_post_hook", None)
        self._hook = None if register is None else register(self._loaded)
        self._resume()
        self._marks = _mark(self.optimizer)

    @property
    def family(self) -> str:
        """The optimizer's class name in lower case, such as `adamw`."""
        return "" if self.optimizer is None else type(self.optimizer).__name__.lower()

    @property
    def learning_rate(self) -> float:
        """The first group's rate now, 0 if it has none."""
        if self.optimizer is None:
            return 0.0
        rate = self.optimizer.param_groups[0].get("lr")
        return 0.0 if rate is None else float(rate)

    def change_learning_rate(self, delta: float) -> str:
        """Multiply every rate by 1 + `delta`, from now on, as far as the bounds allow.

        All groups keep their proportions. A rate beyond the bounds by the user's own choice stays
        there. Returns why nothing was changed, empty when it was; a delta of 0 is no change.
        """
        if self.optimizer is not None and delta == 0.0:
            return ""
        obstacle = self.find_obstacle()
        if obstacle:
            return obstacle
        factor = self._within_bounds(1.0 + delta)
        if factor == 1.0:
            return "at_bound"
        before = _mark(self.optimizer)
        obstacle = self._scale(factor)
        after = _mark(self.optimizer)
        # Groups may be copies, or forget what is written into them.
        if not obstacle and after == before and self.learning_rate != 0.0:
            obstacle = "read_only"
        if not obstacle:
            self._changed = True
        self._marks = after
        return obstacle

    def watch(self) -> bool:
        """Note the rates at the end of a step; whether a change was overwritten by somebody else.

        Without a scheduler only commands should move them.
        """
        if self.optimizer is None or self._schedulers:
            return False
        marks, before = _mark(self.optimizer), self._marks
        self._marks = marks
        if before is None or marks == before:
            return False
        self._set_elsewhere = True
        return self._changed

    def find_obstacle(self) -> str:
        """Why rates cannot be changed, as far as that is known without trying; else empty."""
        if self.optimizer is None:
            return "no_optimizer"
        groups = self.optimizer.param_groups
        # What stands for optimizers that are elsewhere has groups that nobody trains with.
        if "dummy" in self.family or any(group.get("lr") is None for group in groups):
            return "no_learning_rate"
        if self.family in _INITIAL_ONLY:
            return "rate_is_only_initial"
        if not all(math.isfinite(float(group["lr"])) for group in groups):
            return "not_finite"
        if not self._schedulers and not self._searched:
            self._searched = True
            self._schedulers = _find_schedulers(self.optimizer)
        if not self._schedulers and self._set_elsewhere:
            return "set_elsewhere"
        for scheduler in self._schedulers:
            other = getattr(scheduler, "optimizer", self.optimizer)
            if isinstance(other, torch.optim.Optimizer) and (
                unwrap_optimizer(other) is not self.optimizer
            ):
                return "scheduler_of_another_optimizer"
        return ""

    def _within_bounds(self, factor: float) -> float:
        lowest, highest = 0.0, math.inf
        for group in self.optimizer.param_groups:
            rate = float(group["lr"]) or float(group.get("initial_lr", 0.0))
            if rate > 0.0:
                lowest = max(lowest, min(MIN_LEARNING_RATE / rate, 1.0))
                highest = min(highest, max(MAX_LEARNING_RATE / rate, 1.0))
        if highest == math.inf:
            return 1.0
        return min(max(factor, lowest), highest)

    def _scale(self, factor: float) -> str:
        groups = self.optimizer.param_groups
        schedulers = self._schedulers
        if not all(map(_is_torch, schedulers)):
            for scheduler in schedulers:
                if not self._hold(scheduler):
                    return "scheduler_cannot_be_held"
            for group in groups:
                group[_FACTOR] = group.get(_FACTOR, 1.0) * factor
            _scale_groups(groups, [factor] * len(groups))
            return ""
        _scale_groups(groups, [factor] * len(groups), _GROUP_RATES)
        for scheduler in _with_nested(schedulers):
            for name in _SCHEDULER_RATES:
                if hasattr(scheduler, name):
                    setattr(scheduler, name, _times(getattr(scheduler, name), factor))
        return ""

    def _hold(self, scheduler: Any) -> bool:
        """Lift the change whenever the scheduler steps, by a class of its own for it."""
        kind = type(scheduler)
        if hasattr(kind, _HELD):
            return True
        methods = {
            name: method
            for name in dir(kind)
            if name.startswith("step") or name == "__call__"
            if isinstance(method := getattr_static(kind, name), FunctionType)
        }
        # What an instance overrides, its class cannot wrap.
        if not methods or not methods.keys().isdisjoint(getattr(scheduler, "__dict__", ())):
            return False

        plain_reduce: Any = kind.__reduce_ex__

        def reduce(held: Any, protocol: Any) -> Any:
            made_by, arguments, *rest = plain_reduce(held, protocol)
            if arguments and arguments[0] is type(held):
                made_by, arguments = object.__new__, (kind,)
            return made_by, arguments, *rest

        namespace = {
            "__slots__": (),
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            # Copies and pickles are of the scheduler's own class.
            "__reduce_ex__": reduce,
            _HELD: True,
            **{name: _lifting(method, self.optimizer) for name, method in methods.items()},
        }
        try:
            scheduler.__class__ = type(kind.__name__, (kind,), namespace)
        except TypeError:
            return False
        return True

    def _loaded(self, _: object) -> None:
        # A method, unlike a lambda, can be pickled for a process that is spawned.
        self._resume()

    def _resume(self) -> None:
        """Hold the scheduler again where a checkpoint brings a change that needs it."""
        self._marks = None
        groups = getattr(self.optimizer, "param_groups", ())
        if any(_FACTOR in group for group in groups):
            for scheduler in self._schedulers:
                if not _is_torch(scheduler):
                    self._hold(scheduler)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer within what frameworks put around it."""
    inner = getattr(optimizer, "optimizer", None)
    return optimizer if inner is None or inner is optimizer else unwrap_optimizer(inner)


def _flatten(scheduler: Any) -> Iterator[Any]:
    if scheduler is None:
        return
    if isinstance(scheduler, list | tuple):
        for one in scheduler:
            yield from _flatten(one)
    elif isinstance(scheduler, dict):
        yield from _flatten(scheduler.get("scheduler"))
    elif hasattr(scheduler, "scheduler") and (
        type(scheduler).__module__.startswith(_WRAPPERS) or not hasattr(scheduler, "step")
    ):
        yield from _flatten(scheduler.scheduler)
    else:
        yield scheduler


def _with_nested(schedulers: list[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    waiting = list(schedulers)
    while waiting:
        scheduler = waiting.pop()
        if id(scheduler) not in found:
            found[id(scheduler)] = scheduler
            waiting.extend(getattr(scheduler, "_schedulers", ()))
    return list(found.values())


def _is_torch(scheduler: Any) -> bool:
    return all(type(one).__module__ in _TORCH_SCHEDULERS for one in _with_nested([scheduler]))


def _find_schedulers(optimizer: Any) -> list[Any]:
    # Torch marks the step of an optimizer that has a scheduler, and keeps no way to it.
    if not hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched"):
        return []
    return [
        thing
        for thing in gc.get_objects()
        # The type, since instances may be proxies that act when asked.
        if issubclass(type(thing), LRScheduler)
        and unwrap_optimizer(getattr(thing, "optimizer", None)) is optimizer
    ]


def _lifting(method: Callable[..., Any], optimizer: Any) -> Callable[..., Any]:
    @wraps(method)
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        with _lifted(optimizer.param_groups):
            result = method(scheduler, *args, **kwargs)
        if hasattr(scheduler, "_last_lr"):
            scheduler._last_lr = [_times(group["lr"], 1.0) for group in optimizer.param_groups]
        return result

    return step


@contextmanager
def _lifted(groups: list[dict[str, Any]]) -> Iterator[None]:
    # A step within a step finds the factors taken out already.
    held = [group for group in groups if _FACTOR in group]
    factors = [group.pop(_FACTOR) for group in held]
    _scale_groups(held, [1.0 / factor for factor in factors])
    try:
        yield
    finally:
        _scale_groups(held, factors)
        for group, factor in zip(held, factors, strict=True):
            group[_FACTOR] = factor


@torch.no_grad()
def _scale_groups(
    groups: list[dict[str, Any]], factors: list[float], names: tuple[str, ...] = ("lr",)
) -> None:
    """Scale rates, tensors in place, as captured graphs and compiled steps hold them."""
    scaled: set[int] = set()
    for group, factor in zip(groups, factors, strict=True):
        for name in names:
            rate = group.get(name)
            if isinstance(rate, Tensor):
                # One tensor may be the rate of several groups.
                if id(rate) not in scaled:
                    scaled.add(id(rate))
                    rate.mul_(factor)
            elif rate is not None:
                group[name] = rate * factor


def _times(rates: Any, factor: float) -> Any:
    if isinstance(rates, list | tuple):
        return [_times(rate, factor) for rate in rates]
    return rates if rates is None else rates * factor


def _mark(optimizer: Any) -> list[Any]:
    """What tells whether rates were set, without waiting for a device."""
    rates = [group.get("lr") for group in getattr(optimizer, "param_groups", ())]
    return [(id(r), r._version) if isinstance(r, Tensor) else r for r in rates]
