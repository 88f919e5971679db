"""Data-parallel training: `torchrun --standalone --nproc-per-node 2 examples/data_parallel.py`."""

from __future__ import annotations

import argparse
import hashlib

import torch

# Before there is a group: its functions hold the group they find for good, as a default argument,
# and a group that is held keeps its threads when it is destroyed, which may then abort the process
# as it ends. DistributedDataParallel imports it too, but only when there is a group.
import torch.distributed.nn
from connection import connect
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tamiyo_svc.client.distributed import RankedClient, is_talker
from tamiyo_svc.client.run import RunSettings, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank


def digest(model: nn.Module, bank: SeedBank) -> str:
    """A short name for all weights, seeds included."""
    seeds = [parameter for seed in bank.seeds for parameter in seed.parameters]
    weights = torch.cat([p.detach().flatten() for p in (*model.parameters(), *seeds)])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]


def train(steps: int) -> None:
    """Train for so many steps; every rank ends with the same weights."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(7)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)[rank::ranks] / 16.0
    labels = torch.tensor(digits.target)[rank::ranks]

    network = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    bank = SeedBank(network, random_seed=7)
    bank.attach("1")
    client = RankedClient(connect("parallel-1", "seed-residual-mlp") if is_talker() else None)
    generator = torch.Generator().manual_seed(rank)
    settings = RunSettings(wait_s=0.05)
    with TamiyoRun(client, optimizer=optimizer, bank=bank, settings=settings) as run:
        for step in range(1, steps + 1):
            picked = torch.randint(0, len(labels), (32,), generator=generator)
            batch, wanted = images[picked], labels[picked]

            def isolated_loss(batch: Tensor = batch, wanted: Tensor = wanted) -> Tensor:
                return functional.cross_entropy(network(batch), wanted)

            optimizer.zero_grad()
            loss = functional.cross_entropy(model(batch), wanted)
            loss.backward()
            optimizer.step()
            run.end_step(step, loss, batch_size=32, isolated_loss=isolated_loss)
    print(f"rank {rank}: seed stage {bank.seeds[0].stage_name}, weights {digest(network, bank)}")


def main(steps: int) -> None:
    """Set the group up, train, and take it down when nothing holds it any more."""
    distributed.init_process_group("gloo")
    train(steps)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    main(parser.parse_args().steps)
