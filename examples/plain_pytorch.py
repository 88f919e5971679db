"""An ordinary PyTorch loop on handwritten digits, with one place for a seed."""

from __future__ import annotations

import argparse

import torch
from connection import connect
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.client.run import RunSettings, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank


def main(steps: int) -> None:
    """Train for so many steps and say what was commanded."""
    torch.manual_seed(7)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(digits.target)
    held_out, held_out_labels = images[1500:], labels[1500:]

    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def evaluate() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(model(held_out), held_out_labels))

    bank = SeedBank(model, evaluate=evaluate)
    seed = bank.attach("1")
    client = connect("plain-1", "seed-residual-mlp")
    settings = RunSettings(wait_s=0.05)
    with TamiyoRun(client, optimizer=optimizer, bank=bank, settings=settings) as run:
        for step in range(1, steps + 1):
            picked = torch.randint(0, 1500, (64,))
            batch, wanted = images[picked], labels[picked]

            def loss_of(batch: Tensor = batch, wanted: Tensor = wanted) -> Tensor:
                return functional.cross_entropy(model(batch), wanted)

            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            ended = run.end_step(
                step, loss, validation_loss=evaluate(), batch_size=64, isolated_loss=loss_of
            )
            if ended.verified is not None and not ended.reason and step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}, seed stage {seed.stage_name}")
    counters = client.counters
    print(f"{counters.received} of {counters.published} packets answered in time")
    print(f"loss {evaluate():.3f}, seed stage {seed.stage_name}, alpha {seed.slot.alpha:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    main(parser.parse_args().steps)
