"""The Lightning callback: values of the step, endings, checkpoints, copies, what people see."""

from __future__ import annotations

import copy
import csv
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tamiyo_svc.client.run import RunSettings, StepEnd
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import FakeService, grow, make_optimizer_command
from tamiyo_svc.leyline import leyline_pb2 as leyline

lightning = pytest.importorskip("lightning.pytorch")

# What the frameworks themselves warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

WAITING = RunSettings(wait_s=10.0)
ROWS = torch.arange(1.0, 13.0).reshape(12, 1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Known(lightning.LightningModule):  # type: ignore[misc,name-defined]
    """The loss of a batch is the mean of its rows plus `weight`, whose gradient is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        self.norms: list[float] = []
        nn.init.zeros_(self.net.weight)

    def loss(self, batch: Tensor) -> Any:
        return self.net(torch.ones_like(batch)).mean() + batch.mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = lightning.utilities.grad_norm(self, 2)
        self.norms.append(float(norms.get("grad_2.0_norm_total", 0.0)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def load(rows: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows, **options)


def make_callback(service: FakeService, **options: Any) -> Any:
    from tamiyo_svc.client.lightning import TamiyoCallback

    return TamiyoCallback(service.client(), **{"settings": WAITING, **options})


def fit(
    callback: Any,
    module: Any = None,
    *,
    rows: Tensor = ROWS,
    batch_size: int = 1,
    validation: Any = None,
    checkpoint: Any = None,
    **options: Any,
) -> Any:
    trainer = lightning.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
            "callbacks": [callback, *options.get("callbacks", ())],
        }
    )
    loader = load(rows, batch_size=batch_size)
    trainer.fit(Known() if module is None else module, loader, validation, ckpt_path=checkpoint)
    return trainer


def count_samples(callback: Any) -> list[int]:
    """The sizes of the steps to come."""
    counted: list[int] = []
    end_step = callback.run.end_step

    def count(*args: Any, **options: Any) -> StepEnd:
        counted.append(options["batch_size"])
        ended: StepEnd = end_step(*args, **options)
        return ended

    callback.run.end_step = count
    return counted


def losses(service: FakeService) -> list[float]:
    return [packet.training_loss for packet in service.packets]


def metric(service: FakeService, name: str) -> list[float]:
    return [packet.training_metrics[name] for packet in service.packets]


def test_a_steps_loss_is_the_mean_of_its_micro_batches_in_the_last_window_too() -> None:
    service = FakeService()
    fit(make_callback(service), accumulate_grad_batches=5)
    assert losses(service) == [3.0, 8.0, 11.5]


def test_a_change_of_accumulation_between_epochs_is_followed() -> None:
    service = FakeService()
    scheduler = lightning.callbacks.GradientAccumulationScheduler({0: 4, 1: 6})
    fit(make_callback(service), max_epochs=2, callbacks=[scheduler])
    assert losses(service) == [2.5, 6.5, 10.5, 3.5, 9.5]
    assert [packet.current_epoch for packet in service.packets] == [1, 1, 1, 2, 2]
    assert metric(service, "epochs_total") == [2.0] * 5


def test_a_dictionary_and_a_skipped_micro_batch_are_understood() -> None:
    class Skips(Known):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx in (1, 4, 5) else {"loss": self.loss(batch), "seen": batch}

    service = FakeService()
    fit(make_callback(service), Skips(), accumulate_grad_batches=2)
    assert losses(service) == [1.0, 3.5, 7.5, 9.5, 11.5]
    assert [packet.global_step for packet in service.packets] == [1, 2, 4, 5, 6]


def scaling() -> Any:
    """Half precision with a loss scale of 1024, on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)


class ByHand(Known):
    """Optimizes by hand, every second batch, and returns what `returned` makes of the loss."""

    def __init__(self, returned: Callable[[Tensor], Any] = lambda loss: None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.returned = returned

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(10.0 * loss / 2.0)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
        return self.returned(loss)


@pytest.mark.parametrize(
    ("returned", "scale"),
    [(lambda loss: None, 10.0), (lambda loss: loss, 1.0), (lambda loss: {"loss": loss}, 1.0)],
    ids=["nothing", "tensor", "dictionary"],
)
def test_a_module_that_optimizes_by_hand_is_seen(
    returned: Callable[[Tensor], Any], scale: float
) -> None:
    service = FakeService()
    fit(make_callback(service), ByHand(returned), rows=ROWS[:4])
    assert losses(service) == [1.5 * scale, 3.5 * scale]
    # As it was before the module clipped it to 1.
    assert metric(service, "gradient_norm") == pytest.approx([10.0, 10.0])


def test_a_module_that_optimizes_by_hand_is_seen_unscaled() -> None:
    service = FakeService()
    fit(make_callback(service), ByHand(), rows=ROWS[:4], plugins=[scaling()])
    assert losses(service) == pytest.approx([15.0, 35.0], rel=1e-2)
    assert metric(service, "gradient_norm") == pytest.approx([10.0, 10.0], rel=1e-2)


def test_the_gradient_norm_is_that_of_all_optimizers_that_stepped() -> None:
    class Two(Known):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(1, 1, bias=False)
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            first, second = self.optimizers()
            for optimizer, net, factor in ((first, self.net, 3.0), (second, self.other, 4.0)):
                if optimizer is second and batch_idx:
                    continue
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(factor * net(torch.ones_like(batch)).mean())
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), lr=0.0) for net in (self.net, self.other)]

    service = FakeService(lambda _: [make_optimizer_command(-0.1)])
    fit(make_callback(service), Two(), rows=ROWS[:2])
    assert metric(service, "gradient_norm") == pytest.approx([5.0, 3.0])
    # Lightning counts the steps of every optimizer.
    assert [packet.global_step for packet in service.packets] == [2, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.5, "scaled": True},
    ],
    ids=str,
)
def test_the_gradient_norm_is_that_of_lightning_before_clipping(options: dict[str, Any]) -> None:
    service = FakeService()
    if options.pop("scaled", False):
        options["plugins"] = [scaling()]
    module = Known()
    fit(make_callback(service), module, rows=100.0 * ROWS, **options)
    assert metric(service, "gradient_norm") == pytest.approx(module.norms, rel=1e-2)


def test_samples_are_counted_over_a_whole_step_and_its_short_last_batch() -> None:
    class Dictionary(Known):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch["nested"][1])

    def collate(rows: list[Tensor]) -> Any:
        return {"names": ["a", "b"], "nested": (torch.tensor(0.0), torch.stack(rows))}

    service = FakeService()
    callback = make_callback(service)
    counted = count_samples(callback)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
        callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Dictionary(), load(ROWS, batch_size=5, collate_fn=collate))
    assert counted == [10, 2]


class Validated(Known):
    """Validation losses 100, 101, …; the accuracy is a half."""

    def __init__(self) -> None:
        super().__init__()
        self.validations = 100

    def on_validation_epoch_start(self) -> None:
        self.validations += not self.trainer.sanity_checking

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", float(self.validations + 10 * dataloader_idx))
        self.log("val_acc", 0.5)


def test_a_validation_counts_once_for_the_step_after_it_and_a_sanity_check_never() -> None:
    service = FakeService()
    fit(
        make_callback(service), Validated(), rows=ROWS[:6], validation=load(ROWS[:1]),
        val_check_interval=2, num_sanity_val_steps=1,
    )  # fmt: skip
    assert [packet.validation_loss for packet in service.packets] == [0, 0, 101, 0, 102, 0]
    assert [packet.validation_accuracy for packet in service.packets] == [0, 0, 0.5, 0, 0.5, 0]


def test_several_validation_sets_count_with_their_mean() -> None:
    service = FakeService()
    sets = [load(ROWS[:1]), load(ROWS[:1])]
    fit(make_callback(service), Validated(), rows=ROWS[:2], validation=sets, max_epochs=2)
    assert [packet.validation_loss for packet in service.packets] == [0, 0, 106, 0]


def test_the_same_callback_fits_again(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService(lambda _: [make_optimizer_command(0.0)])
    ended: list[StepEnd] = []
    callback = make_callback(service, on_step=lambda step, end: ended.append(end))
    for _ in range(2):
        fit(callback, rows=ROWS[:9], accumulate_grad_batches=3)
    assert [packet.global_step for packet in service.packets] == [1, 2, 3] * 2
    assert losses(service) == [2.0, 5.0, 8.0] * 2
    assert metric(service, "loss_ewma")[::3] == [2.0] * 2
    # The time between two fits is no step's.
    timed = ["step_latency_ms" in packet.training_metrics for packet in service.packets]
    assert timed == [False, False, True] * 2
    assert all(end.verified is not None for end in ended)
    assert not [record for record in caplog.records if record.name.startswith("tamiyo")]


def test_a_fit_that_broke_off_leaves_nothing_to_the_next() -> None:
    class Breaks(Known):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("CUDA out of memory.")
            return self.loss(batch)

    service = FakeService()
    callback = make_callback(service)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(callback, Breaks(), accumulate_grad_batches=2)
    fit(callback, rows=ROWS[4:], accumulate_grad_batches=2)
    assert losses(service) == [1.5, 5.5, 7.5, 9.5, 11.5]


def test_no_error_of_tamiyos_part_ends_training(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"no {name}")

    from tamiyo_svc.client.lightning import TamiyoCallback

    callback = TamiyoCallback(Broken(), settings=WAITING)
    trainer = fit(callback, enable_checkpointing=False)
    assert trainer.global_step == 12
    assert callback.state_dict() == {}
    callback.load_state_dict({})
    told = [record.getMessage() for record in caplog.records]
    assert sum("on_train_batch_end" in text for text in told) == 1


def test_an_error_of_on_step_is_logged_and_an_interruption_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = FakeService()

    def on_step(step: int, end: StepEnd) -> None:
        raise ValueError("the user's own")

    assert fit(make_callback(service, on_step=on_step)).global_step == 12
    assert caplog.text.count("the user's own") >= 1

    def interrupt(step: int, end: StepEnd) -> None:
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_callback(service, on_step=interrupt))


def growing(service: FakeService, **options: Any) -> tuple[Any, Any]:
    """A module with a seed that grows, and its callback."""
    module = Grown()
    bank = SeedBank(module)
    bank.attach("net")
    isolated = lambda module, batch: module.loss(batch)  # noqa: E731
    return module, make_callback(service, bank=bank, isolated_loss=isolated, **options)


class Grown(Known):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def loss(self, batch: Tensor) -> Any:
        return self.net(batch.expand(-1, 4)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_a_checkpoint_with_seeds_is_read_with_weights_only(tmp_path: Path) -> None:
    service = FakeService(grow("seed-residual-mlp"))
    module, callback = growing(service)
    trainer = fit(callback, module)
    stage = callback.run.bank.seeds[0].stage
    assert stage > leyline.SEED_STAGE_GERMINATED
    saved = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(saved)
    checkpoint = torch.load(saved, weights_only=True)
    (state,) = (value for key, value in checkpoint["callbacks"].items() if "Tamiyo" in key)
    module, again = growing(service)
    again.load_state_dict(copy.deepcopy(state))
    assert again.run.bank.seeds[0].stage == stage


def test_a_resumed_fit_goes_on_with_steps_and_seeds(tmp_path: Path) -> None:
    service = FakeService(grow("seed-residual-mlp"))
    module, callback = growing(service)
    saved = tmp_path / "saved.ckpt"
    fit(callback, module, max_steps=4).save_checkpoint(saved)
    stage = callback.run.bank.seeds[0].stage
    module, callback = growing(service)
    fit(callback, module, checkpoint=saved, max_epochs=2, max_steps=6)
    assert [packet.global_step for packet in service.packets] == [1, 2, 3, 4, 5, 6]
    assert service.packets[4].seed_states[0].stage == stage


def test_loggers_and_the_progress_bar_show_commands_and_seeds(tmp_path: Path) -> None:
    shown: dict[str, Any] = {}

    class Bar(lightning.callbacks.ProgressBar):  # type: ignore[misc,name-defined]
        def disable(self) -> None:
            return

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            shown.clear()
            shown.update(self.get_metrics(trainer, pl_module))

    service = FakeService(grow("seed-residual-mlp"))
    module, callback = growing(service)
    logger = lightning.loggers.CSVLogger(tmp_path)
    fit(
        callback, module, logger=logger, log_every_n_steps=1, rows=ROWS[:6], max_epochs=2,
        callbacks=[Bar()], enable_progress_bar=True,
    )  # fmt: skip
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["tamiyo/command"]) == leyline.COMMAND_SEED
    assert float(rows[0]["tamiyo/operation"]) == leyline.SEED_OP_GERMINATE
    assert float(rows[0]["tamiyo/seed-0/stage"]) == leyline.SEED_STAGE_GERMINATED
    assert float(rows[-1]["tamiyo/applied"]) + float(rows[-1]["tamiyo/refused"]) == 12.0
    assert float(rows[-1]["tamiyo/seed-0/alpha"]) == callback.run.bank.seeds[0].slot.alpha
    assert shown["seed-0"] == callback.run.bank.seeds[0].stage


def test_a_logger_that_writes_seldom_is_given_the_counts_so_far(tmp_path: Path) -> None:
    logger = lightning.loggers.CSVLogger(tmp_path)
    service = FakeService(lambda _: [make_optimizer_command(0.0)])
    fit(make_callback(service), logger=logger, log_every_n_steps=5)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["tamiyo/applied"]) for row in rows] == [5.0, 10.0]


def test_a_callback_is_copied_deep_and_by_pickle(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()
    callback = make_callback(service, validation_metric="other")
    fit(callback, rows=ROWS[:2])
    twin = copy.deepcopy(callback)
    fit(twin, rows=ROWS[:2])
    assert losses(service) == [1.0, 2.0, 1.0, 2.0]
    caplog.clear()
    # What it is made of here is not there in another process.
    callback = make_callback(service, on_step=lambda step, end: None, validation_metric="other")
    sent = pickle.loads(pickle.dumps(callback))
    assert "without its on_step" in caplog.text
    assert fit(sent, rows=ROWS[:2]).global_step == 2
    assert sent._validation_metric == "other"


def test_seeds_of_another_network_are_told(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()
    _, callback = growing(service)
    with caplog.at_level(logging.WARNING):
        fit(callback, Grown(), rows=ROWS[:2])
    assert "another one" in caplog.text


def test_seeds_train_in_isolation_in_the_precision_of_the_step() -> None:
    seen: list[torch.dtype] = []

    def isolated(module: Any, batch: Tensor) -> Any:
        output = module.net(batch.expand(-1, 4))
        seen.append(output.dtype)
        return output.square().mean()

    service = FakeService(grow("seed-residual-mlp"))
    module = Grown()
    bank = SeedBank(module)
    bank.attach("net")
    fit(
        make_callback(service, bank=bank, isolated_loss=isolated), module,
        rows=ROWS[:6], precision="bf16-mixed",
    )  # fmt: skip
    assert set(seen) == {torch.bfloat16}


def test_a_trainer_of_the_other_package_takes_the_callback() -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return 0.0 * self.net(batch).sum() + batch.mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    service = FakeService()
    trainer = other.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=3,
        callbacks=[make_callback(service)],
    )  # fmt: skip
    trainer.fit(Module(), load(ROWS[:6]))
    assert losses(service) == [2.0, 5.0]


def test_the_norm_of_gradients_in_shards_is_over_all_of_them() -> None:
    callback = make_callback(FakeService())
    net = nn.Linear(1, 1, bias=False)
    net(torch.tensor([[3.0]])).backward()
    strategy = SimpleNamespace(
        sharding_strategy=SimpleNamespace(name="FULL_SHARD"),
        root_device=torch.device("cpu"),
        # What the other rank holds has norm 4.
        reduce=lambda squared, reduce_op: squared + 16.0,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = SimpleNamespace(strategy=strategy)
    assert callback._measure_gradients(trainer, optimizer) == pytest.approx(5.0)
