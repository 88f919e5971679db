"""One of two ranks that train with Lightning and then with Transformers.

`python -m support.framework_ranks <folder>`, in the environment that torchrun gives. Writes
`rank<n>.json` with what the packets of this rank say and what the framework logged.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from tamiyo_svc.client import huggingface, lightning
from tamiyo_svc.client.run import RunSettings
from tamiyo_svc.client.testing import FakeService

WAITING = RunSettings(wait_s=30.0)


class Known(LightningModule):  # type: ignore[misc]
    """The loss of a batch is the mean of its rows; its gradient differs between the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.net.weight)
        self.means: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss, whose mean over the ranks is kept."""
        loss: Tensor = self.net(batch).mean() + batch.mean()
        self.means.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def configure_optimizers(self) -> Any:
        """One that changes nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder: Path) -> dict[str, Any]:
    """Train with Lightning, the callback made in front of the trainer and so of the group."""
    service = FakeService()
    callback = lightning.TamiyoCallback(service.client(), settings=WAITING)
    trainer = LightningTrainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback],
        logger=CSVLogger(folder), log_every_n_steps=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    module = Known()
    rows: Any = torch.arange(1.0, 13.0).reshape(12, 1)
    trainer.fit(module, DataLoader(rows, batch_size=1))
    pairs = zip(module.means[::2], module.means[1::2], strict=True)
    return {**told(service), "logged": [sum(pair) / 2 for pair in pairs]}


def train(folder: Path) -> dict[str, Any]:
    """Train with Transformers, the number of tokens different on the ranks."""
    service = FakeService()
    callback = huggingface.TamiyoCallback(service.client(), settings=WAITING)
    set_seed(1)
    rows = torch.randint(0, 17, (64, 16))
    texts = []
    for index, row in enumerate(rows):
        labels = row.clone()
        labels[: index * 5 % 13] = -100
        texts.append({"input_ids": row, "labels": labels})
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=17, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0, loss_type="ForCausalLM",
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="steps", logging_steps=1,
        gradient_accumulation_steps=2, dataloader_pin_memory=False, disable_tqdm=True,
        max_grad_norm=0.1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=texts, callbacks=[callback])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **told(service),
        "logged": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
    }


def told(service: FakeService) -> dict[str, Any]:
    """What the packets say."""
    return {
        "losses": [packet.training_loss for packet in service.packets],
        "gradient_norms": [packet.training_metrics["gradient_norm"] for packet in service.packets],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    result = {"lightning": fit(target), "transformers": train(target)}
    (target / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    # Frameworks hold the group; a process that ends in the usual way would abort for it.
    os._exit(0)
