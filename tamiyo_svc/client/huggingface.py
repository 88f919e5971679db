"""A callback for the Trainer of Hugging Face Transformers; needs `tamiyo-svc[transformers]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tamiyo_svc.client.run import RunSettings, StepClient, StepEnd, TamiyoRun
from tamiyo_svc.client.seeds.bank import SeedBank

_ITEMS: Final = "num_items_in_batch"


class TamiyoCallback(TrainerCallback):  # type: ignore[misc]
    """Publishes every optimizer step and applies what is commanded.

    The loss is that of the model's own output (`labels` among its inputs), seen by a hook; a loss
    that is computed elsewhere, as label smoothing's, cannot be seen, and such a step is left out.
    The step's last micro-batch is also what seeds train on in isolation. With several ranks pass a
    `RankedClient`. `on_step` is told how each step ended. Save `run.state_dict()` beside your
    checkpoints and give it to `run.load_state_dict` before resuming.
    """

    def __init__(
        self,
        client: StepClient,
        *,
        bank: SeedBank | None = None,
        settings: RunSettings | None = None,
        on_step: Callable[[int, StepEnd], None] | None = None,
    ) -> None:
        self.run = TamiyoRun(client, bank=bank, settings=settings)
        self._on_step = on_step
        self._gradient_norm: float | None = None
        self._validation_loss: float | None = None
        self._losses: list[Tensor] = []
        self._inputs: dict[str, Any] = {}
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer and begin to watch the model's output."""
        self.run.use_optimizer(kwargs.get("optimizer"), kwargs.get("lr_scheduler"))
        model: nn.Module = kwargs["model"]
        self._hook = model.register_forward_hook(self._seen, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the gradients while they are there."""
        self._gradient_norm = self.run.gradient_norm(kwargs["model"].parameters())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do Tamiyo's part of a step."""
        losses, self._losses = self._losses, []
        model: nn.Module = kwargs["model"]
        inputs = {name: value for name, value in self._inputs.items() if name != _ITEMS}

        def isolated_loss() -> Tensor:
            loss: Tensor = model(**inputs).loss
            return loss

        ended = self.run.end_step(
            state.global_step,
            _loss_of_step(losses, shares=self._inputs.get(_ITEMS) is not None),
            epoch=int(state.epoch or 0.0) + 1,
            validation_loss=self._validation_loss,
            gradient_norm=self._gradient_norm,
            batch_size=args.train_batch_size * len(losses),
            isolated_loss=isolated_loss if "labels" in inputs else None,
        )
        # Isolated passes have been seen too.
        self._losses.clear()
        self._gradient_norm = None
        if self._on_step is not None:
            self._on_step(state.global_step, ended)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the newest validation loss."""
        loss = (kwargs.get("metrics") or {}).get("eval_loss")
        self._validation_loss = None if loss is None else float(loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching and close the client."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._losses, self._inputs = [], {}
        self.run.client.close()

    def _seen(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and torch.is_grad_enabled() and loss is not None:
            self._losses.append(loss.detach())
            self._inputs = dict(kwargs)


def _loss_of_step(losses: list[Tensor], *, shares: bool) -> float | None:
    """From those of its micro-batches: shares of it if the number of items was given, or means."""
    if not losses:
        return None
    total = float(torch.stack(losses).sum())
    return total if shares else total / len(losses)
