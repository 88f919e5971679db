"""A callback for the Trainer of Hugging Face Transformers; needs `tamiyo-svc[transformers]`."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tamiyo_svc.client.callbacks import (
    OnStep,
    RunCallback,
    find_metric,
    guarded,
    read_together,
    scalar,
)
from tamiyo_svc.client.run import RunSettings, StepClient, count_rows
from tamiyo_svc.client.seeds.bank import SeedBank

STATE_FILE: Final = "tamiyo.pt"
"""Where in a checkpoint's folder the callback's state is."""

_LOG: Final = logging.getLogger("tamiyo.client")


class TamiyoCallback(RunCallback, TrainerCallback):  # type: ignore[misc]
    """Publishes every optimizer step and applies what is commanded.

    The Trainer tells callbacks neither the loss nor the gradient norm of a step: they are taken
    from its own `training_step` and from what clips its gradients, and so are what it logs, with
    any loss function, accumulation and number of ranks. The step's last micro-batch, put through
    the Trainer's `compute_loss` again, is what seeds train on in isolation. With several ranks pass
    a `RankedClient`. `on_step` is told how each step ended. `validation_metric` and
    `accuracy_metric` are names among the metrics of an evaluation.

    The callback's state is the file `tamiyo.pt` in every checkpoint's folder, and is restored from
    there, before the first step, when training resumes.
    """

    def __init__(
        self,
        client: StepClient,
        *,
        bank: SeedBank | None = None,
        settings: RunSettings | None = None,
        on_step: OnStep | None = None,
        validation_metric: str = "eval_loss",
        accuracy_metric: str = "eval_accuracy",
    ) -> None:
        self._watch: _Watch | None = None
        super().__init__(client, bank=bank, settings=settings, on_step=on_step)
        self._validation_metric = validation_metric
        self._accuracy_metric = accuracy_metric

    def _begin(self) -> None:
        super()._begin()
        self._evaluated: dict[str, float] = {}

    def _parts(self) -> dict[str, Any]:
        return {
            **super()._parts(),
            "_watch": None,
            "_validation_metric": self._validation_metric,
            "_accuracy_metric": self._accuracy_metric,
        }

    @guarded
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the Trainer and the optimizer, and take up the state of a resumed training."""
        # One that was broken off has not been ended, nor has the client that it had been given.
        self.end()
        self._begin()
        trainer, checkpoint = _find_trainer()
        if trainer is None:
            _LOG.error("the Trainer that calls this callback is not found; its losses are unknown")
            return
        watch = self._watch = _Watch(trainer, self)
        optimizer = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        self.run.use_optimizer(optimizer, kwargs.get("lr_scheduler"), scaler)
        self._check_bank(kwargs["model"])
        if state.global_step > 0:
            folder = Path(checkpoint) if checkpoint else _checkpoint_folder(trainer, state)
            saved = _read_state(folder, watch)
            if saved is not None:
                self.run.load_state_dict(saved)

    @guarded
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how long the step waited for its data."""
        self._data_arrived()

    @guarded
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients while they are there; their norm counts if nobody clipped them."""
        watch = self._watch
        norm = self.run.gradient_norm(kwargs["model"].parameters())
        if watch is not None and watch.norm is None and not args.max_grad_norm:
            watch.norm = norm

    @guarded
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do Tamiyo's part of a step."""
        watch = self._watch
        if watch is None:
            return
        values, inputs = [watch.loss, watch.norm], watch.inputs
        rows = watch.rows * args.world_size
        watch.clear()
        evaluated, self._evaluated = self._evaluated, {}
        loss, norm = read_together(values, watch.average)
        model: nn.Module = kwargs["model"]
        self._end_step(
            state.global_step,
            loss,
            # Whole numbers are the ends of epochs.
            epoch=max(math.ceil(state.epoch or 0.0), 1),
            epochs_total=state.num_train_epochs,
            validation_loss=_metric(evaluated, self._validation_metric),
            validation_accuracy=_metric(evaluated, self._accuracy_metric),
            gradient_norm=norm,
            batch_size=rows,
            isolated_loss=None if inputs is None else lambda: watch.compute_loss(model, inputs),
        )
        self._show_stages(watch.trainer)
        self._left_s = time.perf_counter()

    @guarded
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what an evaluation came to, for the step after it."""
        self._pass_over()
        # One on its own, outside of training, does not count.
        if self._watch is not None:
            self._evaluated |= kwargs.get("metrics") or {}

    @guarded
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the client's and the seeds' state beside the Trainer's own."""
        self._pass_over()
        if self._watch is None or not args.should_save:
            return
        folder = _checkpoint_folder(self._watch.trainer, state)
        unfinished = folder / f"{STATE_FILE}.unfinished"
        torch.save(self.run.state_dict(), unfinished)
        os.replace(unfinished, folder / STATE_FILE)

    @guarded
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching and close the client."""
        self.end()

    @guarded
    def end(self) -> None:
        """Let go of the Trainer and of the bus, at the end of training or where it breaks off."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self._close()

    @guarded
    def add_to_log(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What the Trainer logs of a training step, and what there is to say of Tamiyo."""
        return {**logs, **self._log_values()} if "loss" in logs else logs

    @guarded
    def _show_stages(self, trainer: Trainer) -> None:
        stages = {seed.seed_id: seed.stage_name.lower() for seed in self._seeds()}
        for callback in trainer.callback_handler.callbacks if stages else ():
            bar = getattr(callback, "training_bar", None)
            if isinstance(callback, ProgressCallback) and bar is not None:
                bar.set_postfix(stages, refresh=False)


class _Watch:
    """Listens to what a Trainer computes and tells no callback, until `stop`.

    It stands in front of four methods, of this one Trainer. `owner` adds to what is logged, and is
    told when a training step raises, which no callback is.
    """

    def __init__(self, trainer: Trainer, owner: TamiyoCallback) -> None:
        self.trainer = trainer
        self.complain = owner.complain
        self._owner = owner
        self._undo: list[Callable[[], None]] = []
        self._stopped = False
        self._in_step = False
        self._compute_loss = trainer.compute_loss
        self.clear()
        self._stand_in(trainer, "training_step", self._train)
        self._stand_in(trainer, "compute_loss", self._compute)
        self._stand_in(trainer, "log", self._log)
        self._stand_in(trainer.accelerator, "clip_grad_norm_", self._clip)

    def clear(self) -> None:
        """Forget the step that is over."""
        self._losses: list[Tensor | None] = []
        self.norm: Tensor | float | None = None
        self.inputs: Any = None
        self.rows = 0

    def stop(self) -> None:
        """Let go of the Trainer."""
        self._stopped = True
        while self._undo:
            self._undo.pop()()
        self.clear()

    @property
    def loss(self) -> Tensor | None:
        """The step's, the sum of its micro-batches' as the Trainer has scaled them."""
        losses = [loss for loss in self._losses if loss is not None]
        return torch.stack(losses).sum() if losses else None

    @property
    def average(self) -> Callable[[Tensor], Tensor] | None:
        """The Trainer's way to a tensor's mean over the ranks; None with one rank."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return None
        return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), "mean")

    def compute_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """Loss of a micro-batch on its own."""
        context = getattr(self.trainer, "compute_loss_context_manager", contextlib.nullcontext)
        with context():
            # It takes the labels out of what it is given.
            loss: Tensor = self._compute_loss(model, copy.copy(inputs))
        return loss

    def _stand_in(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        replaced = name in vars(owner)
        substitute = functools.update_wrapper(functools.partial(method, original), original)
        setattr(owner, name, substitute)

        def undo() -> None:
            # Whoever came later and stands in front of this one keeps what it has.
            if vars(owner).get(name) is not substitute:
                return
            if replaced:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        self._undo.append(undo)

    def _train(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._in_step = True
        try:
            loss = original(model, inputs, *args, **kwargs)
        except BaseException:
            self._owner.end()
            raise
        finally:
            self._in_step = False
        self._keep_loss(loss, inputs)
        return loss

    def _compute(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._keep_inputs(inputs)
        return original(model, inputs, *args, **kwargs)

    def _log(self, original: Callable[..., Any], logs: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self._owner.add_to_log(logs) or logs, *args, **kwargs)

    def _clip(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        self._keep_norm(norm)
        return norm

    @guarded
    def _keep_loss(self, loss: Any, inputs: Any) -> None:
        if not self._stopped:
            self._losses.append(scalar(loss))
            self.rows += count_rows(inputs)

    @guarded
    def _keep_inputs(self, inputs: Any) -> None:
        bank = self._owner.run.bank
        if self._in_step and not self._stopped and bank is not None and bank.wants_isolated_pass:
            self.inputs = copy.copy(inputs)

    @guarded
    def _keep_norm(self, norm: Any) -> None:
        if not self._stopped:
            self.norm = scalar(norm)


def _find_trainer() -> tuple[Trainer | None, str | None]:
    """The Trainer that is calling, which it does not say itself, and the folder it resumes from."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    return None, None


def _checkpoint_folder(trainer: Trainer, state: TrainerState) -> Path:
    """Where the Trainer saves the checkpoint of this step."""
    find = getattr(trainer, "_get_output_dir", None)
    # With a search for hyperparameters each trial has its own.
    base = find(getattr(trainer, "_trial", None)) if find else trainer.args.output_dir
    return Path(base, f"checkpoint-{state.global_step}")


def _read_state(folder: Path, watch: _Watch) -> dict[str, Any] | None:
    """The state saved there if every rank can read it."""
    path = folder / STATE_FILE
    state: dict[str, Any] | None = None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A file can be broken in many ways.
    except Exception as error:
        _LOG.error("%s is not restored; seeds and commands stay as they are: %s", path, error)
    (share,) = read_together([0.0 if state is None else 1.0], watch.average)
    return state if share == 1.0 else None


def _metric(metrics: Mapping[str, float], name: str) -> float | None:
    kind, _, what = name.partition("_")
    return find_metric(metrics, name, f"{re.escape(kind)}_.+_{re.escape(what)}")
