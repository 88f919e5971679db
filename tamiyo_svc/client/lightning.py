"""A callback for PyTorch Lightning; needs `tamiyo-svc[lightning]`."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

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

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
# The two packages are one, but older ones refuse each other's callbacks.
elif "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        from pytorch_lightning import Callback, LightningModule, Trainer

_SHARDED: Final = ("FULL_SHARD", "SHARD_GRAD_OP")
"""Names of `FullyShardedDataParallel`'s ways to shard over all ranks."""

IsolatedLoss = Callable[[LightningModule, Any], Tensor]
"""Loss of a batch, `(module, batch) -> loss`, without logging anything."""


class TamiyoCallback(RunCallback, Callback):  # type: ignore[misc]
    """Publishes every optimizer step and applies what is commanded.

    `bank` holds the seeds of the module that is trained; seeds train in isolation only where
    `isolated_loss` is given. With several ranks pass a `RankedClient`. `on_step` is told how each
    step ended. `validation_metric` and `accuracy_metric` are names that the module logs. The
    callback's state goes into Lightning's checkpoints, what it sees into Lightning's loggers.

    The loss is the mean of the step's micro-batches and of all ranks. Where the module optimizes
    by hand, it is what `training_step` returns, or else what it gave to `manual_backward`. The
    gradient norm is that of the parameters of the optimizers that stepped, before clipping.
    """

    def __init__(
        self,
        client: StepClient,
        *,
        bank: SeedBank | None = None,
        settings: RunSettings | None = None,
        isolated_loss: IsolatedLoss | None = None,
        on_step: OnStep | None = None,
        validation_metric: str = "val_loss",
        accuracy_metric: str = "val_acc",
    ) -> None:
        super().__init__(client, bank=bank, settings=settings, on_step=on_step)
        self._isolated_loss = isolated_loss
        self._validation_metric = validation_metric
        self._accuracy_metric = accuracy_metric

    def _begin(self) -> None:
        super()._begin()
        self._last_step = 0
        self._losses: list[Tensor] = []
        self._backward_losses: list[Tensor] = []
        self._norms: dict[int, float | None] = {}
        self._unclipped: dict[int, float] = {}
        self._rows = 0
        self._validation: tuple[float | None, float | None] = (None, None)
        self._shown: tuple[int, dict[str, float]] | None = None

    def _parts(self) -> dict[str, Any]:
        return {
            **super()._parts(),
            "_isolated_loss": self._isolated_loss,
            "_validation_metric": self._validation_metric,
            "_accuracy_metric": self._accuracy_metric,
        }

    @guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer, its scheduler and the step that training goes on from."""
        # Steps that come again after one that was broken off must not be taken for the same ones.
        self._close()
        self._begin()
        self._last_step = trainer.global_step
        self._check_bank(pl_module)
        if trainer.optimizers:
            optimizer = trainer.optimizers[0]
            schedulers = (config.scheduler for config in trainer.lr_scheduler_configs)
            own = [each for each in schedulers if getattr(each, "optimizer", None) is optimizer]
            self.run.use_optimizer(optimizer, own, _scaler(trainer))

    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the step waited for its data."""
        self._data_arrived()

    @guarded
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss of a module that optimizes by hand."""
        if not pl_module.automatic_optimization:
            self._backward_losses.append(loss.detach().float().mean() / _scale(trainer))

    @guarded
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure gradients that a module may clip by hand before its optimizers step."""
        if pl_module.automatic_optimization:
            return
        for optimizer in trainer.optimizers:
            norm = self._measure_gradients(trainer, optimizer)
            if norm is not None:
                self._unclipped[id(optimizer)] = norm

    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the gradients while they are there, not clipped yet."""
        bare = getattr(optimizer, "optimizer", optimizer)
        norm = self._unclipped.pop(id(bare), None)
        self._norms[id(bare)] = self._measure_gradients(trainer, bare) if norm is None else norm

    @guarded
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Do Tamiyo's part of a step, unless gradients are still being accumulated."""
        self._rows += count_rows(batch)
        loss = scalar(outputs.get("loss") if isinstance(outputs, Mapping) else outputs)
        if loss is not None:
            # Lightning hands on what it divided for accumulation.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss * parts)
        step = trainer.global_step
        if step != self._last_step:
            self._last_step = step
            self._finish_step(trainer, pl_module, batch)
        self._left_s = time.perf_counter()

    def _finish_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        loss = self._mean_loss()
        norms = [norm for norm in self._norms.values() if norm is not None]
        validation_loss, validation_accuracy = self._validation
        rows = self._rows * _replicas(trainer)
        self._losses, self._backward_losses, self._norms, self._rows = [], [], {}, 0
        self._validation = (None, None)
        (mean,) = read_together([loss], _average(trainer))
        isolated = self._isolated_loss

        def isolated_loss() -> Tensor:
            assert isolated is not None
            with _precision(trainer):
                return isolated(pl_module, batch)

        self._end_step(
            trainer.global_step,
            mean,
            epoch=trainer.current_epoch + 1,
            epochs_total=trainer.max_epochs,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            gradient_norm=math.hypot(*norms) if norms else None,
            batch_size=rows,
            isolated_loss=None if isolated is None else isolated_loss,
        )
        self._log(trainer, pl_module)

    @guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what validation came to, for the step after it."""
        self._pass_over()
        # One on its own, outside of training, or to try the code in front of it does not count.
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validation = (
            self._metric(trainer, self._validation_metric),
            self._metric(trainer, self._accuracy_metric),
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the client; another `fit` opens it again."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the client."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves with a checkpoint: tensors and plain values."""
        return self._save() or {}

    @guarded
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning restores from a checkpoint."""
        self.run.load_state_dict(state_dict)

    @guarded
    def _save(self) -> dict[str, Any]:
        return self.run.state_dict()

    @guarded
    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "barebones", False):
            return
        options: dict[str, Any] = {
            "on_step": True,
            "on_epoch": False,
            "batch_size": 1,
            "rank_zero_only": True,
        }
        # Lightning takes a good part of a millisecond for each value, so none is logged in vain:
        # what it does not write would be replaced by the next, and a stage stays for the epoch.
        connector = getattr(trainer, "_logger_connector", None)
        if getattr(connector, "should_update_logs", True):
            pl_module.log_dict(self._log_values(), logger=bool(trainer.loggers), **options)
        stages = {seed.seed_id: float(seed.stage) for seed in self._seeds()}
        shown = (trainer.current_epoch, stages)
        if trainer.progress_bar_callback is not None and shown != self._shown:
            pl_module.log_dict(stages, prog_bar=True, logger=False, **options)
            self._shown = shown

    def _mean_loss(self) -> Tensor | None:
        """Over the step's micro-batches."""
        if self._losses:
            return torch.stack(self._losses).mean()
        # Each has been divided by hand already.
        return torch.stack(self._backward_losses).sum() if self._backward_losses else None

    def _measure_gradients(
        self, trainer: Trainer, optimizer: torch.optim.Optimizer
    ) -> float | None:
        groups = optimizer.param_groups
        norm = self.run.gradient_norm(p for group in groups for p in group["params"])
        sharding = getattr(getattr(trainer.strategy, "sharding_strategy", None), "name", "")
        if sharding not in _SHARDED or not self.run.settings.enrich:
            return norm
        # Each rank has a part of every gradient, in a tensor that does not say so.
        device = trainer.strategy.root_device
        squared = torch.tensor(0.0 if norm is None else norm * norm, device=device)
        return math.sqrt(float(trainer.strategy.reduce(squared, reduce_op="sum"))) or None

    def _metric(self, trainer: Trainer, name: str) -> float | None:
        of_sets = re.escape(name) + r"/dataloader_idx_\d+"
        return find_metric(trainer.callback_metrics, name, of_sets)


def _average(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Lightning's way to a tensor's mean over the ranks; None with one rank."""
    if trainer.world_size == 1:
        return None
    return lambda tensor: trainer.strategy.reduce(
        tensor.to(trainer.strategy.root_device), reduce_op="mean"
    )


def _replicas(trainer: Trainer) -> int:
    """Ranks that see data of their own."""
    sampler = getattr(trainer, "distributed_sampler_kwargs", None) or {}
    return int(sampler.get("num_replicas", trainer.world_size))


def _scale(trainer: Trainer) -> float:
    """What a `GradScaler` has multiplied the loss by."""
    scaler = _scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _scaler(trainer: Trainer) -> Any:
    return getattr(getattr(trainer, "precision_plugin", None), "scaler", None)


def _precision(trainer: Trainer) -> contextlib.AbstractContextManager[Any]:
    """The precision of a training step, such as autocast."""
    plugin = getattr(trainer, "precision_plugin", None)
    context = getattr(plugin, "train_step_context", contextlib.nullcontext)
    return context()
