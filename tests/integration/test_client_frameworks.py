"""Lightning and the Transformers Trainer on real data, over a real Redis, commanded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from support.faulty_bus import Fault, FaultyBus
from support.patience import PATIENT
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tamiyo_svc.client import AckOutcome, TamiyoClient
from tamiyo_svc.client.run import RunSettings, StepEnd
from tamiyo_svc.client.testing import KEYRING, FakeService, make_optimizer_command
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import CommandRejection

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
    return TamiyoClient(bus.url, KEYRING, run_id, PATIENT)


def lightning_fit(
    client: TamiyoClient,
    folder: Path,
    *,
    steps: int = STEPS,
    skipped: Collection[int] = (),
    checkpoint: Path | None = None,
    **options: Any,
) -> tuple[Any, list[StepEnd]]:
    lightning = pytest.importorskip("lightning.pytorch")
    from tamiyo_svc.client.lightning import TamiyoCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            if batch_idx in skipped:
                return None
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
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64), ckpt_path=checkpoint)
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


def test_a_run_resumed_by_lightning_goes_on_and_refuses_the_commands_it_had(
    tmp_path: Path,
) -> None:
    service = FakeService(lambda _: [make_optimizer_command(-0.1)])
    saved = tmp_path / "saved.ckpt"
    trainer, ended = lightning_fit(service.client(), tmp_path)
    trainer.save_checkpoint(saved)
    assert ended[0].verified is not None
    had = ended[0].verified.command.command_id
    first = STEPS + 1

    def replay(packet: leyline.SystemStatePacket) -> Iterator[leyline.AdaptationCommand]:
        if packet.global_step == first:
            yield leyline.AdaptationCommand(command_id=had)
        yield make_optimizer_command(-0.1)

    service.script = replay
    client = service.client()
    _, ended = lightning_fit(client, tmp_path, steps=STEPS + 3, checkpoint=saved)
    assert [end.outcome for end in ended] == [AckOutcome.APPLIED] * 3
    assert [packet.global_step for packet in service.packets[STEPS:]] == [13, 14, 15]
    assert client.counters.rejected == {CommandRejection.REPLAYED: 1}


def test_lightning_steps_that_were_skipped_are_left_out(tmp_path: Path) -> None:
    service = FakeService()
    _, ended = lightning_fit(service.client(), tmp_path, skipped={3, 4}, enable_checkpointing=False)
    assert [end.verified is None for end in ended] == [step in (4, 5) for step in range(1, 13)]
    assert [packet.global_step for packet in service.packets] == [1, 2, 3, *range(6, 13)]


def transformers_train(
    client: TamiyoClient, folder: Path, **options: Any
) -> tuple[Any, list[StepEnd]]:
    """Train a tiny language model; its callback and how its steps ended."""
    transformers = pytest.importorskip("transformers")
    from tamiyo_svc.client.huggingface import TamiyoCallback

    transformers.set_seed(1)
    digits = torch.tensor(load_digits().data, dtype=torch.long)[:200]
    data = [{"input_ids": row, "labels": row} for row in digits]
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=17, n_positions=64, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        )
    )  # fmt: skip
    ended: list[StepEnd] = []
    callback = TamiyoCallback(client, settings=WAITING, on_step=lambda step, end: ended.append(end))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 8, **options},
    )
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert not model._forward_hooks
    return callback, ended


def test_the_transformers_trainer_applies_commands(bus: FaultyBus, tmp_path: Path) -> None:
    client = make_client(bus, "transformers")
    callback, ended = transformers_train(client, tmp_path, gradient_accumulation_steps=2)
    assert [end.outcome for end in ended] == [AckOutcome.APPLIED] * STEPS
    assert [end.verified.step_index for end in ended if end.verified] == [*range(1, STEPS + 1)]
    assert callback.run.rate.learning_rate == pytest.approx(1e-2 * 0.9**STEPS)


def test_a_transformers_steps_loss_is_the_same_in_one_batch_and_in_several(tmp_path: Path) -> None:
    losses = []
    for size, times in ((16, 1), (4, 4)):
        service = FakeService()
        transformers_train(
            service.client(),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
        )
        losses.append([packet.training_loss for packet in service.packets])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
