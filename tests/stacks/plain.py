"""A cell trained by a loop of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stacks.cells import HALF, LEARNING_RATE, STEPS, WAITING, Cell, Precision, Spread, Variant
from stacks.networks import PLACE, ROWS, batch_of, build_network, probe, rows
from stacks.observation import Observation, digest, make_service, norm_of
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tamiyo_svc.client.distributed import RankedClient, is_talker
from tamiyo_svc.client.run import TamiyoRun
from tamiyo_svc.client.seeds import SeedBank

_NARROW = {Precision.AUTOCAST: torch.bfloat16, Precision.SCALED: torch.float16}
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class _Stack:
    network: nn.Module
    model: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    run: TamiyoRun | None


def train(cell: Cell, folder: Path, seen: Observation, *, bare: bool) -> None:
    """Train the cell; `bare` without Tamiyo."""
    service = make_service(cell)

    def build() -> _Stack:
        return _build(cell, None if bare else service)

    stack = build()
    if cell.variant is Variant.RESUMED:
        _run_steps(cell, stack, seen, range(1, HALF + 1))
        seen.outputs.append(_outputs(stack.network))
        path = folder / "checkpoint.pt"
        _save(cell, stack, path)
        if stack.run is not None:
            stack.run.client.close()
        stack = build()
        _load(cell, stack, path)
        seen.outputs.append(_outputs(stack.network))
        _run_steps(cell, stack, seen, range(HALF + 1, STEPS + 1))
    else:
        _run_steps(cell, stack, seen, range(1, STEPS + 1))
    seen.learning_rate = stack.optimizer.param_groups[0]["lr"]
    if stack.run is not None and stack.run.bank is not None:
        stack.run.client.close()
        batch = rows(ROWS, 0)
        seen.note_effect(
            stack.run.bank,
            lambda: _loss(cell, stack.model, batch),
            lambda: _loss(cell, stack.network, batch),
        )
        seen.note_network(stack.network, stack.run.bank, PLACE)
        seen.note_packets(service)


def _build(cell: Cell, service: Any) -> _Stack:
    network = build_network(recomputed=cell.variant is Variant.RECOMPUTED)
    if cell.precision is Precision.WEIGHTS:
        network.to(torch.bfloat16)
    bank = None
    if service is not None:
        bank = SeedBank(network)
        bank.attach(PLACE)
    model: Any = network
    if cell.spread is Spread.DDP:
        model = DistributedDataParallel(network)
    elif cell.spread is Spread.FSDP2:
        mesh = init_device_mesh("cpu", (2,))
        policy = MixedPrecisionPolicy(param_dtype=_NARROW.get(cell.precision))
        for block in (*network.children(), network):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    if cell.variant is Variant.COMPILED:
        model = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler("cpu") if cell.precision is Precision.SCALED else None
    run = None
    if service is not None:
        client = RankedClient(service.client() if is_talker() else None)
        run = TamiyoRun(client, optimizer=optimizer, scaler=scaler, bank=bank, settings=WAITING)
    return _Stack(network, model, optimizer, scaler, run)


def _run_steps(cell: Cell, stack: _Stack, seen: Observation, steps: range) -> None:
    scaler, optimizer = stack.scaler, stack.optimizer
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    for step in steps:
        optimizer.zero_grad()
        losses = []
        for part in range(cell.parts):
            batch = batch_of(rank, step * cell.parts + part)
            with _synchronized(stack.model, last=part == cell.parts - 1):
                loss = _loss(cell, stack.model, batch)
                scaled = loss if scaler is None else scaler.scale(loss)
                (scaled / cell.parts).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = norm_of(stack.network.parameters())
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        mean = torch.stack(losses).mean()
        seen.trained.append((step, float(mean), norm))
        if stack.run is not None:
            ended = stack.run.end_step(
                step, mean, isolated_loss=_isolated(cell, stack.network, batch)
            )
            seen.note_end(step, ended)
    optimizer.zero_grad()


def _loss(cell: Cell, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    with _precision(cell):
        logits = model(batch[0].to(_input_format(cell)))
    return functional.cross_entropy(logits.float(), batch[1])


def _isolated(cell: Cell, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: _loss(cell, network, batch)


def _precision(cell: Cell) -> AbstractContextManager[Any]:
    narrow = _NARROW.get(cell.precision)
    # A sharded network has mixed precision of its own.
    if narrow is None or cell.spread is Spread.FSDP2:
        return nullcontext()
    return torch.autocast("cpu", narrow)


def _input_format(cell: Cell) -> torch.dtype:
    return torch.bfloat16 if cell.precision is Precision.WEIGHTS else torch.float32


def _synchronized(model: Any, *, last: bool) -> AbstractContextManager[Any]:
    """Exchange gradients with the last micro-batch only."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def _outputs(network: nn.Module) -> str:
    network.eval()
    with torch.no_grad():
        outputs = network(probe().to(next(network.parameters()).dtype))
    network.train()
    return digest([outputs])


def _save(cell: Cell, stack: _Stack, path: Path) -> None:
    if cell.spread is Spread.FSDP2:
        weights, moments = get_state_dict(stack.network, stack.optimizer, options=_WHOLE)
    else:
        weights, moments = stack.network.state_dict(), stack.optimizer.state_dict()
    saved = {
        "network": weights,
        "optimizer": moments,
        "scaler": None if stack.scaler is None else stack.scaler.state_dict(),
        "tamiyo": None if stack.run is None else stack.run.state_dict(),
    }
    if is_talker():
        torch.save(saved, path)
    if distributed.is_initialized():
        distributed.barrier()


def _load(cell: Cell, stack: _Stack, path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    if stack.run is not None:
        stack.run.load_state_dict(saved["tamiyo"])
    if cell.spread is Spread.FSDP2:
        set_state_dict(
            stack.network,
            stack.optimizer,
            model_state_dict=saved["network"],
            optim_state_dict=copy.deepcopy(saved["optimizer"]),
            options=_WHOLE,
        )
    else:
        stack.network.load_state_dict(saved["network"])
        stack.optimizer.load_state_dict(saved["optimizer"])
    if stack.scaler is not None:
        stack.scaler.load_state_dict(saved["scaler"])
