"""What the callbacks for PyTorch Lightning and for Transformers have in common."""

from __future__ import annotations

import copy
import functools
import io
import logging
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.core import ClientSettings
from tamiyo_svc.client.run import RunSettings, StepClient, StepEnd, TamiyoRun
from tamiyo_svc.client.seeds.bank import SeedBank
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import AckOutcome, ClientMode

_LOG: Final = logging.getLogger("tamiyo.client")
_MAX_EPOCHS: Final = 1_000_000
"""Frameworks write a number beyond any run for training that ends by steps alone."""

OnStep = Callable[[int, StepEnd], None]
"""Told of each step's number and of how it ended."""

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def guarded(hook: _Hook) -> _Hook:
    """A method whose errors are given to its object's `complain` instead of ending the training.

    It returns None then. What is no `Exception`, such as KeyboardInterrupt, passes.
    """

    @functools.wraps(hook)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self.complain(hook.__name__, error)
            return None

    return cast("_Hook", call)


class RunCallback:
    """A `TamiyoRun` and what a framework's hooks need to feed it.

    Nothing here looks at ranks or devices before training begins, so that it can be made in front
    of the framework's trainer. A copy, pickled for a spawned process or deep, is a callback before
    its first step. What of it cannot be pickled is left out of the copy, with a warning: without
    its client it sends nothing, without its bank it has no seeds.
    """

    def __init__(
        self,
        client: StepClient,
        *,
        bank: SeedBank | None,
        settings: RunSettings | None,
        on_step: OnStep | None,
    ) -> None:
        self.run = TamiyoRun(client, bank=bank, settings=settings)
        self._on_step = on_step
        self._begin()

    def complain(self, about: str, error: Exception) -> None:
        """Log an error of Tamiyo's part, each kind once."""
        self.run.complain(f"{type(self).__name__}.{about}", error)

    def _begin(self) -> None:
        """Forget what was measured of a training that ended or was broken off."""
        self.run.restart()
        self._ended = StepEnd()
        self._counts: Counter[str] = Counter()
        self._left_s: float | None = None

    def _check_bank(self, model: nn.Module) -> None:
        bank = self.run.bank
        if bank is not None and all(module is not bank.model for module in model.modules()):
            _LOG.warning("the seeds are not in the network that is trained, but in another one")

    def _data_arrived(self) -> None:
        """Note that the data of a step is there."""
        if self._left_s is not None:
            self.run.meter.note_batch(1e3 * (time.perf_counter() - self._left_s), 0)
            self._left_s = None

    def _pass_over(self) -> None:
        """Note that what was done since the last step is part of none, as an evaluation."""
        if self._left_s is not None:
            now_s = time.perf_counter()
            self.run.meter.pass_over(now_s - self._left_s)
            self._left_s = now_s

    def _end_step(
        self, step: int, loss: float | None, *, epochs_total: int | None, **values: Any
    ) -> None:
        """Do Tamiyo's part of a step and tell `on_step`."""
        if epochs_total is not None and not 0 < epochs_total < _MAX_EPOCHS:
            epochs_total = None
        ended = self._ended = self.run.end_step(step, loss, epochs_total=epochs_total, **values)
        self._count(ended)
        self._call_on_step(step, ended)

    def _count(self, ended: StepEnd) -> None:
        if ended.verified is None:
            return
        self._counts["applied" if ended.outcome is AckOutcome.APPLIED else "refused"] += 1
        # What follows the first words of a failure is different every time.
        refusal = "failed" if ended.reason.startswith("failed") else ended.reason
        reason = refusal or ended.verified.command.annotations.get("risk_reason", "")
        if reason:
            self._counts["reason/" + re.sub(r"\W+", "_", reason)] += 1

    @guarded
    def _call_on_step(self, step: int, ended: StepEnd) -> None:
        if self._on_step is not None:
            self._on_step(step, ended)

    def _log_values(self) -> dict[str, float]:
        """What a framework's loggers are given, by the names they show."""
        ended = self._ended
        command = ended.verified.command if ended.verified else leyline.AdaptationCommand()
        values: dict[str, float] = {
            "command": command.command_type,
            "operation": command.seed_operation.operation,
            "applied": self._counts["applied"],
            "refused": self._counts["refused"],
            **self._counts,
        }
        if ended.latency_ms is not None:
            values["latency_ms"] = ended.latency_ms
        for seed in self._seeds():
            values[f"{seed.seed_id}/stage"] = seed.stage
            values[f"{seed.seed_id}/alpha"] = seed.slot.alpha
        return {f"tamiyo/{name}": float(value) for name, value in values.items()}

    def _seeds(self) -> Sequence[Any]:
        return self.run.bank.seeds if self.run.bank else ()

    @guarded
    def _close(self) -> None:
        self.run.client.close()

    def __getstate__(self) -> dict[str, Any]:
        parts = self._parts()
        for name, value in parts.items():
            try:
                _Probe(io.BytesIO()).dump(value)
            except Exception as error:
                _LOG.warning("a pickled callback is without its %s: %s", name.strip("_"), error)
                parts[name] = None
        return parts

    def __setstate__(self, parts: dict[str, Any]) -> None:
        client, bank, settings = (parts.pop(name) for name in ("client", "bank", "settings"))
        self.__dict__.update(parts)
        self.run = TamiyoRun(client or _silent_client(), bank=bank, settings=settings)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        parts = self._parts()
        for name, value in parts.items():
            try:
                parts[name] = copy.deepcopy(value, memo)
            except Exception as error:
                _LOG.warning("a callback's copy shares its %s: %s", name.strip("_"), error)
        twin.__setstate__(parts)
        return twin

    def _parts(self) -> dict[str, Any]:
        """What a copy is made of, by name."""
        run = self.run
        return {
            "client": run.client,
            "bank": run.bank,
            "settings": run.settings,
            "_on_step": self._on_step,
        }


class _Probe(pickle.Pickler):
    """Finds out whether something can be pickled, without its tensors."""

    def persistent_id(self, obj: Any) -> str | None:
        return "tensor" if isinstance(obj, Tensor) else None


def _silent_client() -> TamiyoClient:
    return TamiyoClient(
        "redis://unused:1/0", None, "copied", ClientSettings(mode=ClientMode.DISABLED)
    )


def read_together(
    values: Sequence[Tensor | float | None],
    average: Callable[[Tensor], Tensor] | None = None,
) -> list[float | None]:
    """The values in one wait for the device, over all ranks if `average` gives a tensor's mean.

    What is None on every rank stays None; the others' mean is over the ranks that have a value.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    present = [float(value is not None) for value in values]
    scalars = [
        torch.as_tensor(0.0 if value is None else value, dtype=torch.float32).to(device)
        for value in values
    ]
    both = torch.cat([torch.stack(scalars), torch.tensor(present, device=device)])
    if average is not None:
        both = average(both)
    numbers = both.tolist()
    pairs = zip(numbers[: len(values)], numbers[len(values) :], strict=True)
    return [value / share if share else None for value, share in pairs]


def scalar(value: Any) -> Tensor | None:
    """A number or a tensor of them as one detached number in full precision; None without."""
    if value is None:
        return None
    detached = torch.as_tensor(value).detach()
    detached = detached.full_tensor() if hasattr(detached, "full_tensor") else detached
    return detached.float().mean()


def find_metric(metrics: Mapping[str, Any], name: str, of_sets: str) -> float | None:
    """The metric of this name, or the mean of several sets', whose names match `of_sets`."""
    names = [name] if name in metrics else [key for key in metrics if re.fullmatch(of_sets, key)]
    values = [float(metrics[key]) for key in names]
    return sum(values) / len(values) if values else None
