"""One rank of a data-parallel run: `python -m support.parallel_trainer <rank> <store> <url> ...`.

Prints one JSON line: the commands applied as (step, command id), and the digest of all weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial

import torch

# Before there is a group, which it would hold for good.
import torch.distributed.nn
from support.patience import PATIENT
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tamiyo_svc.client import TamiyoClient
from tamiyo_svc.client.distributed import RankedClient
from tamiyo_svc.client.run import RunSettings, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank, residual_mlp
from tamiyo_svc.client.testing import KEYRING


class Breaking(nn.Module):
    """A seed that fails after a number of passes."""

    def __init__(self, channels: int, passes: int) -> None:
        super().__init__()
        self.inner = residual_mlp(channels)
        self.passes = passes

    def forward(self, features: Tensor) -> Tensor:
        """The residual, as long as it lasts."""
        self.passes -= 1
        if self.passes == 0:
            raise RuntimeError("broken")
        residual: Tensor = self.inner(features)
        return residual


def main(rank: int, store: str, url: str, steps: int, cut_at: int, breaks_at: int) -> None:
    """Train in a group of two, and take it down when nothing holds it any more."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    train(rank, url, steps, cut_at, breaks_at if rank == 1 else 0)
    distributed.barrier()
    distributed.destroy_process_group()


def train(rank: int, url: str, steps: int, cut_at: int, breaks_at: int) -> None:
    """Train; before step `cut_at` rank 0's connections are cut, and the seed fails in its pass
    `breaks_at`; 0 is never.
    """
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    bank = SeedBank(network, {"seed-residual-mlp": partial(Breaking, passes=breaks_at)})
    bank.attach("1")
    own = TamiyoClient(url, KEYRING, "parallel", PATIENT)
    client = RankedClient(own if rank == 0 else None)
    generator = torch.Generator().manual_seed(rank)
    applied: list[tuple[int, str]] = []
    with TamiyoRun(
        client, optimizer=optimizer, bank=bank, settings=RunSettings(wait_s=10.0)
    ) as run:
        for step in range(1, steps + 1):
            inputs = torch.randn(32, 6, generator=generator)
            labels = torch.randint(0, 3, (32,), generator=generator)

            def isolated_loss(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                return functional.cross_entropy(network(inputs), labels)

            if step == cut_at and rank == 0:
                cut(own)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            ended = run.end_step(step, loss, isolated_loss=isolated_loss)
            if ended.verified is not None:
                applied.append((step, ended.verified.command.command_id))
    seeds = [p for seed in bank.seeds for p in seed.parameters]
    weights = torch.cat([p.detach().flatten() for p in (*network.parameters(), *seeds)])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    print(json.dumps([applied, digest, bank.seeds[0].stage_name]), flush=True)


def cut(client: TamiyoClient) -> None:
    """Point the client at nothing, as when its bus goes away for good."""
    client.close()
    client._make_link = None
    client._redis_url = "unix:///nonexistent/redis.sock"
    client._link = client._new_link()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
