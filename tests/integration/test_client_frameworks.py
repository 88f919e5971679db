"""Lightning and the Transformers Trainer on real data, over a real Redis, commanded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from support.faulty_bus import Fault, FaultyBus
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tamiyo_svc.client import AckOutcome, ClientSettings, TamiyoClient
from tamiyo_svc.client.run import RunSettings, StepEnd
from tamiyo_svc.client.testing import KEYRING

# What the frameworks themselves warn of is theirs.
pytestmark = [pytest.mark.redis, pytest.mark.filterwarnings("ignore")]

LONG_S = 10.0
STEPS = 12
WAITING = RunSettings(wait_s=LONG_S)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bus() -> Iterator[FaultyBus]:
    """A service that lowers the learning rate by a tenth with every command."""
    with FaultyBus(Fault.SLOWS_DOWN) as bus:
        yield bus


def make_client(bus: FaultyBus, run_id: str) -> TamiyoClient:
    return TamiyoClient(bus.url, KEYRING, run_id, ClientSettings(max_wait_s=LONG_S))


def lightning_fit(client: TamiyoClient, folder: Path, **options: Any) -> tuple[Any, list[StepEnd]]:
    lightning = pytest.importorskip("lightning.pytorch")
    from tamiyo_svc.client.lightning import TamiyoCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    digits = load_digits()
    data = TensorDataset(
        torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    )
    torch.manual_seed(1)
    ended: list[StepEnd] = []
    callback = TamiyoCallback(client, settings=WAITING, on_step=lambda step, end: ended.append(end))
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64))
    return trainer, ended


def test_lightning_applies_commands_through_its_scheduler(bus: FaultyBus, tmp_path: Path) -> None:
    client = make_client(bus, "lightning")
    trainer, ended = lightning_fit(client, tmp_path, enable_checkpointing=False)
    assert [end.outcome for end in ended] == [AckOutcome.APPLIED] * STEPS
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**STEPS)
    assert (client.counters.received, client.counters.missed) == (STEPS, 0)


def test_lightning_counts_optimizer_steps_when_gradients_accumulate(
    bus: FaultyBus, tmp_path: Path
) -> None:
    client = make_client(bus, "lightning-accumulating")
    _, ended = lightning_fit(
        client, tmp_path, enable_checkpointing=False, accumulate_grad_batches=2
    )
    assert [end.verified.step_index for end in ended if end.verified] == [*range(1, STEPS + 1)]


def test_lightning_checkpoints_carry_the_clients_state(bus: FaultyBus, tmp_path: Path) -> None:
    client = make_client(bus, "lightning-saving")
    trainer, _ = lightning_fit(client, tmp_path)
    saved = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(saved)
    checkpoint = torch.load(saved, weights_only=False)
    ((_, state),) = (
        item for item in checkpoint["callbacks"].items() if "TamiyoCallback" in item[0]
    )
    assert len(state["client"]["accepted_s"]) == STEPS


def test_the_transformers_trainer_applies_commands(bus: FaultyBus, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tamiyo_svc.client.huggingface import TamiyoCallback

    transformers.set_seed(1)
    digits = torch.tensor(load_digits().data, dtype=torch.long)[:200]
    data = [{"input_ids": row, "labels": row} for row in digits]
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=17, n_positions=64, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    client = make_client(bus, "transformers")
    ended: list[StepEnd] = []
    callback = TamiyoCallback(client, settings=WAITING, on_step=lambda step, end: ended.append(end))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert [end.outcome for end in ended] == [AckOutcome.APPLIED] * STEPS
    assert [end.verified.step_index for end in ended if end.verified] == [*range(1, STEPS + 1)]
    assert callback.run.rate.learning_rate == pytest.approx(1e-2 * 0.9**STEPS)
    assert not model._forward_hooks
