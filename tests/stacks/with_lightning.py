"""A cell trained by Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from stacks.cells import HALF, LEARNING_RATE, STEPS, WAITING, Cell, Precision, Spread, Variant
from stacks.networks import PLACE, ROWS, build_network, probe, rows
from stacks.observation import Observation, digest, make_service, norm_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tamiyo_svc.client.distributed import RankedClient, is_talker
from tamiyo_svc.client.lightning import TamiyoCallback
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import FakeService

_PRECISIONS = {
    Precision.FP32: "32-true",
    Precision.AUTOCAST: "bf16-mixed",
    Precision.WEIGHTS: "bf16-true",
    Precision.SCALED: "16-mixed",
}
_DATA = 512


class Classifier(LightningModule):  # type: ignore[misc]
    """The network of the matrix, sharded where the strategy has a mesh."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.net = build_network(recomputed=variant is Variant.RECOMPUTED)
        self.variant = variant

    def configure_model(self) -> None:
        """Shard the network, and compile it here, as Lightning takes no sharded one compiled."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for block in (*self.net.children(), self.net):
            fully_shard(block, mesh=mesh)
        if self.variant is Variant.COMPILED:
            self.net.compile(backend="aot_eager")

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Cross entropy of a batch."""
        return functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        """One for everything but the seeds, which bring their own."""
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)


class Probe(Callback):  # type: ignore[misc]
    """Looks at losses and gradients, and at outputs where training begins again."""

    def __init__(self, seen: Observation, bank: SeedBank | None) -> None:
        self.seen = seen
        self.bank = bank
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare outputs if this is not the beginning."""
        if trainer.global_step:
            self.look(pl_module.net)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what the seed does."""
        if self.bank is not None:
            plugin = trainer.precision_plugin
            batch = plugin.convert_input([*rows(ROWS, 0)])
            with plugin.train_step_context():
                self.seen.note_effect(
                    self.bank,
                    lambda: pl_module.training_step(batch, 0),
                    lambda: pl_module.loss(batch),
                )

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss of a micro-batch, which is divided by their number, over all ranks."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss.detach() / (1.0 if scaler is None else scaler.get_scale())
        self._losses.append(trainer.strategy.reduce(loss, reduce_op="mean"))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Measure the gradients, and end the step."""
        loss, self._losses = float(torch.stack(self._losses).sum()), []
        norm = norm_of(pl_module.parameters())
        self.seen.trained.append((trainer.global_step + 1, loss, norm))

    def look(self, network: nn.Module) -> None:
        """Note the outputs."""
        network.eval()
        with torch.no_grad():
            outputs = network(probe().to(next(network.parameters()).dtype))
        network.train()
        self.seen.outputs.append(digest([outputs]))


def train(cell: Cell, folder: Path, seen: Observation, *, bare: bool) -> None:
    """Train the cell; `bare` without Tamiyo."""
    service = make_service(cell)
    resumed = cell.variant is Variant.RESUMED
    path = folder / "stopped.ckpt"
    if resumed:
        trainer, module, _, look = _fit(cell, folder, seen, None if bare else service, HALF)
        look.look(module.net)
        trainer.save_checkpoint(path)
    trainer, module, bank, _ = _fit(
        cell, folder, seen, None if bare else service, STEPS, path if resumed else None
    )
    seen.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
    if bank is not None:
        seen.note_network(module.net, bank, PLACE)
        seen.note_packets(service)


def _fit(
    cell: Cell,
    folder: Path,
    seen: Observation,
    service: FakeService | None,
    steps: int,
    checkpoint: Path | None = None,
) -> tuple[Trainer, Classifier, SeedBank | None, Probe]:
    module = Classifier(cell.variant)
    callbacks: list[Callback] = []
    bank = None
    if service is not None:
        bank = SeedBank(module.net)
        bank.attach(PLACE)
        callbacks.append(
            TamiyoCallback(
                RankedClient(service.client() if is_talker() else None),
                bank=bank,
                settings=WAITING,
                isolated_loss=lambda module, batch: module.loss(batch),
                on_step=seen.note_end,
            )
        )
    look = Probe(seen, bank)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=cell.ranks,
        strategy=_strategy(cell),
        precision=_PRECISIONS[cell.precision],
        accumulate_grad_batches=cell.parts,
        callbacks=[*callbacks, look],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trained: Any = module
    if cell.variant is Variant.COMPILED and cell.spread is not Spread.FSDP2:
        trained = torch.compile(module, backend="aot_eager")
    data = DataLoader(TensorDataset(*rows(_DATA, 0)), batch_size=ROWS)
    trainer.fit(trained, data, ckpt_path=checkpoint)
    return trainer, module, bank, look


def _strategy(cell: Cell) -> Any:
    if cell.spread is Spread.SINGLE:
        return "auto"
    return "ddp" if cell.spread is Spread.DDP else ModelParallelStrategy()
