"""One rank of two that do not do alike: `python -m support.uneven_ranks <rank> <store> <trouble>`.

Prints one JSON line: digest of all weights, seed stage, digest of outputs, reasons of refusals.
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import timedelta

import torch

# Before there is a group, which it would hold for good.
import torch.distributed.nn
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tamiyo_svc.client.distributed import RankedClient
from tamiyo_svc.client.run import RunSettings, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank, residual_mlp
from tamiyo_svc.client.testing import FakeService, grow

STEPS = 60
LIMIT_S = 40.0


def digest(tensors: list[Tensor]) -> str:
    """A short name for values."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:12]


def train(rank: int, client: RankedClient, trouble: str) -> None:
    """Train, with the trouble on rank 1."""
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    held_out = torch.randn(64, 6, generator=generator), torch.arange(64) % 3
    passes = 0

    def build(channels: int) -> nn.Module:
        if rank == 1 and trouble == "build":
            raise torch.OutOfMemoryError("no memory left")
        if trouble == "statistics":
            return nn.Sequential(nn.BatchNorm1d(channels), residual_mlp(channels))
        return residual_mlp(channels)

    def evaluate() -> float:
        if rank == 1 and trouble == "evaluate":
            raise RuntimeError("a broken shard")
        return float(functional.cross_entropy(network(held_out[0]), held_out[1]))

    asks = trouble in ("evaluate", "worth")
    bank = SeedBank(network, {"seed-residual-mlp": build}, evaluate=evaluate if asks else None)
    seed = bank.attach("2")
    reasons: list[str] = []
    with TamiyoRun(
        client, optimizer=optimizer, bank=bank, settings=RunSettings(wait_s=20.0)
    ) as run:
        for step in range(1, STEPS + 1):
            inputs = torch.randn(32, 6, generator=generator)
            labels = torch.randint(0, 3, (32,), generator=generator)

            def isolated_loss(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                nonlocal passes
                passes += 1
                if rank == 1 and trouble == "isolated pass" and passes % 3 == 0:
                    raise torch.OutOfMemoryError("no memory left")
                return functional.cross_entropy(network(inputs), labels)

            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if rank == 1 and trouble == "absence" and step == STEPS // 2:
                continue
            ended = run.end_step(step, loss, isolated_loss=isolated_loss)
            if ended.reason:
                reasons.append(ended.reason)
    weights = digest([*network.parameters(), *seed.parameters])
    model.eval()
    with torch.no_grad():
        outputs = digest([model(torch.ones(4, 6))])
    print(json.dumps([weights, seed.stage_name, outputs, sorted(set(reasons))]), flush=True)


def main(rank: int, store: str, trouble: str) -> None:
    """Make the client before there is a group, as callbacks do, then train in a group of two."""
    torch.set_num_threads(1)
    client = RankedClient(FakeService(grow("seed-residual-mlp")).client())
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=LIMIT_S),
    )
    train(rank, client, trouble)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
