"""Tamiyo's part of a training step: measure, publish, wait, apply, report; for any loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, Self

import torch
from torch import Tensor, nn

from tamiyo_svc.client.meters import StepMeter
from tamiyo_svc.client.packets import State
from tamiyo_svc.client.rates import OptimizerRate
from tamiyo_svc.client.seeds.bank import SeedBank
from tamiyo_svc.client.seeds.executor import PAUSED, CommandExecutor, Execution
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.taxonomy import AckOutcome

_LOG: Final = logging.getLogger("tamiyo.client")


class StepClient(Protocol):
    """What a run needs of a client: `TamiyoClient`, `RankedClient` or a fake."""

    def publish(self, state: State, step: int, *, blueprint_ids: Sequence[str] = ()) -> str: ...

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None: ...

    def poll(self) -> VerifiedCommand | None: ...

    def ack(self, verified: VerifiedCommand, outcome: AckOutcome, reason: str = "") -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a run deals with Tamiyo.

    `wait_s` is how long a step waits for its command; with 0 it does not wait and the command
    for the step before is applied if it came. `enrich` measures gradients and pressure too.
    """

    wait_s: float = 0.025
    enrich: bool = True
    blend_steps: int = 20
    optimizer_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepEnd:
    """What Tamiyo said to a step, None without an answer, and what became of that."""

    verified: VerifiedCommand | None = None
    outcome: AckOutcome | None = None
    reason: str = ""


class TamiyoRun:
    """One training run's conversation with Tamiyo; a context manager that closes the client.

    Without a command nothing of the run changes: not its weights, its gradients or its random
    numbers. An error in Tamiyo's part ends here, logged and reported. `clock` is in seconds.
    """

    def __init__(
        self,
        client: StepClient,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        bank: SeedBank | None = None,
        settings: RunSettings | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.client = client
        self.bank = bank
        self.settings = settings or RunSettings()
        self.rate = OptimizerRate()
        self.meter = StepMeter(enrich=self.settings.enrich, clock=clock)
        self._optimizer_ids = set(self.settings.optimizer_ids)
        self.executor = CommandExecutor(
            bank.seeds if bank else [],
            self.rate,
            blueprint_ids=bank.blueprints if bank else (),
            build=bank.build if bank else _no_build,
            impact=bank.impact if bank else _nobody_evaluates,
            optimizer_ids=self._optimizer_ids,
            blend_steps=self.settings.blend_steps,
        )
        self._clock = clock
        self._loss_missed = False
        self._complaints: set[tuple[str, type[Exception]]] = set()
        self.use_optimizer(optimizer, scheduler)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()

    def use_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: Any = None) -> None:
        """Let commands change this optimizer's learning rate."""
        self.rate.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.rate.scheduler = getattr(scheduler, "scheduler", scheduler)
        if optimizer is not None:
            self._optimizer_ids.add(self.rate.family)

    def end_step(
        self,
        step: int,
        loss: float | Tensor | None,
        *,
        epoch: int = 1,
        validation_loss: float | None = None,
        validation_accuracy: float | None = None,
        gradient_norm: float | None = None,
        batch_size: int = 0,
        metrics: Mapping[str, float] | None = None,
        isolated_loss: Callable[[], Tensor] | None = None,
    ) -> StepEnd:
        """Do Tamiyo's part after optimizer step `step` (from 1) of `epoch` (from 1).

        `gradient_norm` is measured if the gradients are still there and none is given; `metrics`
        are added to those measured; `isolated_loss` is a pass of this batch through the bare
        network, called only while a seed trains in isolation. A step whose loss is None, because
        it was skipped or its loss cannot be seen, is left out, the first time with a warning.
        """
        if loss is None:
            if not self._loss_missed:
                _LOG.warning("step %d is left out, as are others without a loss", step)
            self._loss_missed = True
            return StepEnd()
        self.meter.begin_hook()
        loss = float(loss.detach()) if isinstance(loss, Tensor) else loss
        self._train_seeds(loss, isolated_loss)
        measured = self._measure(loss, validation_loss, gradient_norm, batch_size)
        state = State(
            training_loss=loss,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            epoch=epoch,
            metrics={**measured, **(metrics or {})},
            seeds=self.bank.states(epoch) if self.bank else (),
        )
        wait_s = self.settings.wait_s
        verified = self.client.poll() if wait_s <= 0.0 else None
        blueprint_ids = tuple(self.bank.blueprints) if self.bank else ()
        self.client.publish(state, step, blueprint_ids=blueprint_ids)
        if wait_s > 0.0:
            verified = self.client.wait(step, wait_s)
        ended = self._apply(verified, epoch)
        self.meter.end_hook()
        return ended

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> float | None:
        """The norm of all gradients together if it is wanted, there are any and it can be had."""
        if not self.settings.enrich:
            return None
        try:
            return total_norm(parameters)
        # There are many kinds of gradients, and training goes on without their norm.
        except Exception as error:
            self._complain("measuring gradients", error)
            return None

    def state_dict(self) -> dict[str, Any]:
        """The client's and the seeds' state, for a checkpoint."""
        return {
            "client": self.client.state_dict(),
            "breaker": int(self.executor.breaker),
            "seeds": self.bank.state_dict() if self.bank else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.client.load_state_dict(state["client"])
        self.executor.breaker = state["breaker"]
        if self.bank is not None:
            self.bank.load_state_dict(state["seeds"])

    def _train_seeds(self, loss: float, isolated_loss: Callable[[], Tensor] | None) -> None:
        if self.bank is None:
            return
        self.bank.step(loss)
        if isolated_loss is not None and self.bank.wants_isolated_pass:
            self.bank.train_isolated(isolated_loss)

    def _measure(
        self,
        loss: float,
        validation_loss: float | None,
        gradient_norm: float | None,
        batch_size: int,
    ) -> dict[str, float]:
        optimizer = self.rate.optimizer
        if gradient_norm is None and optimizer is not None:
            groups = optimizer.param_groups
            gradient_norm = self.gradient_norm(p for group in groups for p in group["params"])
        return self.meter.observe(
            loss,
            validation_loss=validation_loss,
            gradient_norm=gradient_norm,
            learning_rate=None if optimizer is None else self.rate.learning_rate,
            optimizer_family=self.rate.family,
            batch_size=batch_size,
            isolation_violations=self.bank.isolation_violations if self.bank else 0,
        )

    def _apply(self, verified: VerifiedCommand | None, epoch: int) -> StepEnd:
        started_s = self._clock()
        execution = Execution()
        ended = StepEnd()
        if verified is not None:
            try:
                execution = self.executor.apply(verified.command, epoch)
                reason = ": ".join(part for part in (execution.refusal, execution.gate) if part)
            # A guest's error must not end its host's training; it is reported instead.
            except Exception as error:
                self._complain("applying command", error)
                execution, reason = PAUSED, f"failed: {error}"
            outcome = AckOutcome.REJECTED if reason else AckOutcome.APPLIED
            ended = StepEnd(verified, outcome, reason)
        applied_s = self._clock()
        if self.bank is not None:
            self.bank.advance(blend=execution.advances_blend)
        if ended.verified is not None and ended.outcome is not None:
            self.client.ack(ended.verified, ended.outcome, ended.reason)
        self.meter.apply_ms = 1e3 * (applied_s - started_s)
        self.meter.finalize_ms = 1e3 * (self._clock() - applied_s)
        return ended

    def _complain(self, about: str, error: Exception) -> None:
        """Log each kind of error once, as it may come back with every step."""
        kind = (about, type(error))
        if kind not in self._complaints:
            self._complaints.add(kind)
            _LOG.error("%s failed, for the first time: %s", about, error, exc_info=error)


def total_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """The norm of all gradients together, None without any; waits for the device."""
    gradients = [
        p.grad.coalesce().values() if p.grad.is_sparse else p.grad
        for p in parameters
        if p.grad is not None
    ]
    if not gradients:
        return None
    norms = torch._foreach_norm(gradients)
    total = float(torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms])))
    return total if math.isfinite(total) else math.nan


def _nobody_evaluates(_: Any) -> None:
    return None


def _no_build(_: Any, blueprint_id: str) -> nn.Module:
    raise KeyError(blueprint_id)
