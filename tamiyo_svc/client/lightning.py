"""A callback for PyTorch Lightning; needs `tamiyo-svc[lightning]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tamiyo_svc.client.run import RunSettings, StepClient, StepEnd, TamiyoRun
from tamiyo_svc.client.seeds.bank import SeedBank

IsolatedLoss = Callable[[LightningModule, Any], Tensor]
"""Loss of a batch, `(module, batch) -> loss`, without logging anything."""


class TamiyoCallback(Callback):  # type: ignore[misc]
    """Publishes every optimizer step and applies what is commanded.

    `bank` holds the seeds of the module that is trained; seeds train in isolation only where
    `isolated_loss` is given. With several ranks pass a `RankedClient`. `on_step` is told how each
    step ended. The callback's state goes into Lightning's checkpoints.
    """

    def __init__(
        self,
        client: StepClient,
        *,
        bank: SeedBank | None = None,
        settings: RunSettings | None = None,
        isolated_loss: IsolatedLoss | None = None,
        on_step: Callable[[int, StepEnd], None] | None = None,
        validation_metric: str = "val_loss",
    ) -> None:
        self.run = TamiyoRun(client, bank=bank, settings=settings)
        self._isolated_loss = isolated_loss
        self._on_step = on_step
        self._validation_metric = validation_metric
        self._gradient_norm: float | None = None
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer and its scheduler."""
        if trainer.optimizers:
            configs = trainer.lr_scheduler_configs
            self.run.use_optimizer(trainer.optimizers[0], configs[0].scheduler if configs else None)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the gradients while they are there."""
        self._gradient_norm = self.run.gradient_norm(pl_module.parameters())

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Do Tamiyo's part of a step, unless gradients are still being accumulated."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        isolated = self._isolated_loss
        ended = self.run.end_step(
            step,
            None if loss is None else float(loss),
            epoch=trainer.current_epoch + 1,
            validation_loss=self._validation_loss(trainer),
            gradient_norm=self._gradient_norm,
            isolated_loss=None if isolated is None else lambda: isolated(pl_module, batch),
        )
        self._gradient_norm = None
        if self._on_step is not None:
            self._on_step(step, ended)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the client."""
        self.run.client.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the client."""
        self.run.client.close()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves with a checkpoint."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning restores from a checkpoint."""
        self.run.load_state_dict(state_dict)

    def _validation_loss(self, trainer: Trainer) -> float | None:
        value = trainer.callback_metrics.get(self._validation_metric)
        return None if value is None else float(value)
