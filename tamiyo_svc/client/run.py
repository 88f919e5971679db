"""Tamiyo's part of a training step: measure, publish, wait, apply, report; for any loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from tamiyo_svc.client.gradients import ConflictMeter, LossScale, total_norm
from tamiyo_svc.client.meters import StepMeter
from tamiyo_svc.client.packets import State
from tamiyo_svc.client.rates import OptimizerRate
from tamiyo_svc.client.seeds.bank import SeedBank
from tamiyo_svc.client.seeds.executor import PAUSED, CommandExecutor, Execution, Refusal
from tamiyo_svc.client.seeds.lifecycle import Seed
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import AckOutcome

_LOG: Final = logging.getLogger("tamiyo.client")

_GIVE_SCHEDULER: Final = "give what sets the rate as `scheduler`"

Batch = TypeVar("Batch")


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
    """What Tamiyo said to a step, None without an answer, and what became of that.

    `latency_ms` is from publishing the step's packet to holding the command, None unless waited.
    """

    verified: VerifiedCommand | None = None
    outcome: AckOutcome | None = None
    reason: str = ""
    latency_ms: float | None = None


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
        scaler: Any = None,
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
            impact=self._impact,
            optimizer_ids=self._optimizer_ids,
            blend_steps=self.settings.blend_steps,
        )
        self._clock = clock
        self._scale = LossScale()
        self._conflict = ConflictMeter()
        self._looked_at_gradients = False
        self._paused_at: int | None = None
        self._said: set[str] = set()
        self._complaints: set[tuple[str, type[Exception]]] = set()
        self.use_optimizer(optimizer, scheduler, scaler)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()

    def use_optimizer(
        self,
        optimizer: torch.optim.Optimizer | None,
        scheduler: Any = None,
        scaler: Any = None,
    ) -> None:
        """Let commands change this optimizer's learning rate.

        `scheduler` is whatever sets that rate from step to step, or a list of such; `scaler` the
        `GradScaler` that scales its gradients.
        """
        self.rate.use(optimizer, scheduler)
        self._optimizer_ids.clear()
        self._optimizer_ids.update(self.settings.optimizer_ids, {self.rate.family} - {""})
        self._scale = LossScale(scaler)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches; how long each was waited for and its size go into the packet."""
        batches = iter(loader)
        while True:
            started_s = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.meter.note_batch(1e3 * (self._clock() - started_s), count_rows(batch))
            yield batch

    def end_step(
        self,
        step: int,
        loss: float | Tensor | None,
        *,
        epoch: int = 1,
        epochs_total: int | None = None,
        validation_loss: float | None = None,
        validation_accuracy: float | None = None,
        gradient_norm: float | Tensor | None = None,
        batch_size: int = 0,
        metrics: Mapping[str, float] | None = None,
        isolated_loss: Callable[[], Tensor] | None = None,
        blueprint_ids: Sequence[str] | None = None,
    ) -> StepEnd:
        """Do Tamiyo's part after optimizer step `step` (from 1) of `epoch` (from 1).

        `gradient_norm` is measured if the gradients are still there and none is given; after
        clipping that is what clipping left. `metrics` are added to those measured;
        `isolated_loss` is a pass of this batch through the bare network, called only while a seed
        trains in isolation; `blueprint_ids` are those on offer, the best first, all of the bank's
        unless given. A step whose loss is None, because it was skipped or its loss cannot
        be seen, is left out, the first time with a warning.
        """
        self.meter.begin_hook()
        # The training loop, too, would wait for the device here.
        with self.meter.aside("device_sync_ms"):
            loss = self._read_loss(loss)
            scale, overflowed = self._scale.end_step()
        if loss is None:
            self._say("no loss", "step %d is left out, as are others without a loss", step)
            self.meter.end_hook()
            return StepEnd()
        self._train_seeds(loss, scale, isolated_loss)
        measured = self._measure(
            loss,
            validation_loss,
            gradient_norm,
            batch_size,
            overflowed=overflowed,
        )
        if epochs_total is not None:
            measured["epochs_total"] = float(epochs_total)
        if self._scale.scaler is not None:
            measured["loss_scale"] = scale
        state = State(
            training_loss=loss,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            epoch=epoch,
            metrics={**measured, **(metrics or {})},
            seeds=self._describe_seeds(epoch),
            hardware=self.meter.hardware,
        )
        wait_s = self.settings.wait_s
        verified = self.client.poll() if wait_s <= 0.0 else None
        if blueprint_ids is None:
            blueprint_ids = tuple(self.bank.blueprints) if self.bank else ()
        published_s = self._clock()
        self.client.publish(state, step, blueprint_ids=blueprint_ids)
        latency_ms = None
        if wait_s > 0.0:
            with self.meter.aside("command_wait_ms"):
                verified = self.client.wait(step, wait_s)
            latency_ms = None if verified is None else 1e3 * (self._clock() - published_s)
        ended = replace(self._apply(verified, epoch), latency_ms=latency_ms)
        self._tell(ended, step)
        self.meter.end_hook()
        return ended

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> float | None:
        """The norm of all gradients together if it is wanted, there are any and it can be had.

        To be called before the optimizer's step; a scaler's scale is taken out unless it has
        been.
        """
        norm = self._look_at_gradients(parameters)
        return None if norm is None else norm / self._scale.of_gradients(self.rate.optimizer)

    def restart(self) -> None:
        """Measure anew, for a training that begins after another ended or was broken off."""
        self.meter = StepMeter(enrich=self.settings.enrich, clock=self._clock)
        self._conflict = ConflictMeter()
        self._looked_at_gradients = False

    def state_dict(self) -> dict[str, Any]:
        """The client's and the seeds' state, for a checkpoint.

        A changed learning rate is in those of the optimizer and its scheduler.
        """
        return {
            "client": self.client.state_dict(),
            "breaker": int(self.executor.breaker),
            "seeds": self.bank.state_dict() if self.bank else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.client.load_state_dict(state["client"])
        self.executor.breaker = state["breaker"]
        self._scale.refresh()
        if self.bank is not None:
            self.bank.load_state_dict(state["seeds"])

    def _read_loss(self, loss: float | Tensor | None) -> float | None:
        try:
            return _number(loss)
        # Such as a loss of several elements.
        except (TypeError, ValueError, RuntimeError) as error:
            self.complain("reading the loss", error)
            return None

    def _train_seeds(
        self, loss: float, scale: float, isolated_loss: Callable[[], Tensor] | None
    ) -> None:
        if self.bank is None:
            return
        # A guest's error must not end its host's training.
        try:
            if self.rate.optimizer is not None:
                self.bank.follow(self.rate.learning_rate)
            self.bank.step(loss, scale=scale)
            if isolated_loss is None and self.bank.wants_isolated_pass:
                self._say("isolated", "a seed is to train in isolation, which needs isolated_loss")
            elif isolated_loss is not None and self.bank.wants_isolated_pass:
                with self.meter.aside("isolated_pass_ms"):
                    self.bank.train_isolated(isolated_loss, scale=scale)
        except Exception as error:
            self.complain("training seeds", error)

    def _describe_seeds(self, epoch: int) -> Sequence[leyline.SeedState]:
        try:
            return self.bank.states(epoch) if self.bank else ()
        except Exception as error:
            self.complain("describing seeds", error)
            return ()

    def _impact(self, seed: Seed) -> Any:
        if self.bank is None:
            return None
        # The user's own evaluation, twice.
        with self.meter.aside("gate_evaluation_ms"):
            return self.bank.impact(seed)

    def _look_at_gradients(self, parameters: Iterable[nn.Parameter]) -> float | None:
        if not self.settings.enrich:
            return None
        self._looked_at_gradients = True
        try:
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._conflict.observe(gradients)
            return total_norm(gradients)
        # There are many kinds of gradients, and training goes on without their norm.
        except Exception as error:
            self.complain("measuring gradients", error)
            return None

    def _measure(
        self,
        loss: float,
        validation_loss: float | None,
        gradient_norm: float | Tensor | None,
        batch_size: int,
        *,
        overflowed: bool,
    ) -> dict[str, float]:
        optimizer = self.rate.optimizer
        looked, self._looked_at_gradients = self._looked_at_gradients, False
        try:
            if self.rate.watch():
                self._say("rate", "a commanded learning rate was overwritten; %s", _GIVE_SCHEDULER)
            # Also after an overflow, which not all ranks need to have seen.
            if optimizer is not None and not (looked and gradient_norm is not None):
                groups = optimizer.param_groups
                own = self._look_at_gradients(p for group in groups for p in group["params"])
                self._looked_at_gradients = False
                gradient_norm = own if gradient_norm is None else gradient_norm
            # What overflowed its scale was not used and says nothing.
            if overflowed:
                gradient_norm = None
            return self.meter.observe(
                loss,
                validation_loss=validation_loss,
                gradient_norm=_number(gradient_norm),
                grad_conflict_rate=self._conflict.rate,
                learning_rate=None if optimizer is None else self.rate.learning_rate,
                optimizer_family=self.rate.family,
                batch_size=batch_size,
                isolation_violations=self.bank.isolation_violations if self.bank else 0,
            )
        # What cannot be measured, such as a foreign optimizer's rate, must not end training.
        except Exception as error:
            self.complain("measuring", error)
            return {"loss": loss}

    def _apply(self, verified: VerifiedCommand | None, epoch: int) -> StepEnd:
        started_s, aside_ms = self._clock(), self.meter.aside_ms
        execution = Execution()
        ended = StepEnd()
        if verified is not None:
            try:
                execution = self.executor.apply(verified.command, epoch)
                reason = execution.reason
            # A guest's error must not end its host's training; it is reported instead.
            except Exception as error:
                self.complain("applying command", error)
                execution, reason = PAUSED, f"failed: {error}"
            outcome = AckOutcome.REJECTED if reason else AckOutcome.APPLIED
            ended = StepEnd(verified, outcome, reason)
        applied_s, aside_ms = self._clock(), self.meter.aside_ms - aside_ms
        if self.bank is not None:
            self.bank.advance(blend=execution.advances_blend)
        if ended.verified is not None and ended.outcome is not None:
            self.client.ack(ended.verified, ended.outcome, ended.reason)
        self.meter.apply_ms = max(1e3 * (applied_s - started_s) - aside_ms, 0.0)
        self.meter.finalize_ms = max(1e3 * (self._clock() - applied_s), 0.0)
        return ended

    def _tell(self, ended: StepEnd, step: int) -> None:
        """Log the first pause and the first refusal for each reason, and when a told pause ends."""
        if ended.verified is None:
            return
        command = ended.verified.command
        if command.command_type == leyline.COMMAND_PAUSE:
            reason = command.annotations.get("risk_reason", "") or "no reason given"
            told = self._say(
                f"paused: {reason}",
                "paused from step %d: %s; training goes on, seeds and learning rate stay as they"
                ' are; see "Why am I paused" in the guide',
                step,
                reason,
            )
            self._paused_at = step if told and self._paused_at is None else self._paused_at
            return
        if self._paused_at is not None:
            _LOG.warning("no longer paused, after %d steps", step - self._paused_at)
            self._paused_at = None
        # Gates refuse in the ordinary course of a seed's life.
        if ended.reason and not ended.reason.startswith(Refusal.GATE):
            hint = f"; {_GIVE_SCHEDULER}" if ended.reason.endswith("set_elsewhere") else ""
            self._say(
                f"refused: {ended.reason}",
                "command refused at step %d: %s%s",
                step,
                ended.reason,
                hint,
            )

    def _say(self, key: str, message: str, *values: object) -> bool:
        """Log a warning once for each key; whether this was the first time."""
        if key in self._said:
            return False
        self._said.add(key)
        _LOG.warning(message, *values)
        return True

    def complain(self, about: str, error: Exception) -> None:
        """Log each kind of error once, as it may come back with every step."""
        kind = (about, type(error))
        if kind not in self._complaints:
            self._complaints.add(kind)
            _LOG.error("%s failed, for the first time: %s", about, error, exc_info=error)


def _number(value: float | Tensor | None) -> float | None:
    return None if value is None else float(value.detach() if isinstance(value, Tensor) else value)


def count_rows(batch: Any) -> int:
    """The length of the first tensor in a batch, 0 if none is found."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping | list | tuple):
        return 0
    return next((size for part in parts if (size := count_rows(part))), 0)


def _no_build(_: Any, blueprint_id: str) -> nn.Module:
    raise KeyError(blueprint_id)
