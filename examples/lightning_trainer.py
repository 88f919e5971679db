"""PyTorch Lightning on handwritten digits: the callback does Tamiyo's part."""

from __future__ import annotations

import argparse

import torch
from connection import connect
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tamiyo_svc.client.lightning import TamiyoCallback
from tamiyo_svc.client.run import RunSettings
from tamiyo_svc.client.seeds import SeedBank

Batch = list[Tensor]


class Classifier(LightningModule):
    """A small perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy of a batch of images and labels."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on everything but the seeds, which bring their own."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int) -> None:
    """Train for so many steps and say what was commanded."""
    seed_everything(7, verbose=False)
    digits = load_digits()
    data = TensorDataset(
        torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    )
    model = Classifier()
    bank = SeedBank(model)
    seed = bank.attach("net.1")
    client = connect("lightning-1", "seed-residual-mlp")
    callback = TamiyoCallback(
        client,
        bank=bank,
        settings=RunSettings(wait_s=0.05),
        isolated_loss=lambda module, batch: module.loss(batch),
    )
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    counters = client.counters
    print(f"{counters.received} of {counters.published} packets answered in time")
    print(f"seed stage {seed.stage_name}, alpha {seed.slot.alpha:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    main(parser.parse_args().steps)
