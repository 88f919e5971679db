"""The Transformers callback: what it says is what the Trainer logs; endings, resuming, copies."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.client.run import RunSettings, StepEnd
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import FakeService, grow, make_optimizer_command
from tamiyo_svc.leyline import leyline_pb2 as leyline

transformers = pytest.importorskip("transformers")

# What the frameworks themselves warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

WAITING = RunSettings(wait_s=10.0)
STEPS = 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_language_model() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=17, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0, loss_type="ForCausalLM", resid_pdrop=0.0, embd_pdrop=0.0,
        )
    )  # fmt: skip


def make_texts(count: int = 64) -> list[dict[str, Tensor]]:
    """Rows of which a varying part counts, so that batches hold varying numbers of tokens."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 17, (count, 16), generator=generator)
    texts = []
    for index, row in enumerate(rows):
        labels = row.clone()
        labels[: index * 5 % 13] = -100
        texts.append({"input_ids": row, "labels": labels})
    return texts


@dataclass
class Output(transformers.modeling_outputs.ModelOutput):  # type: ignore[misc,name-defined]
    loss: Tensor | None = None
    logits: Tensor | None = None


class Regression(nn.Module):
    """A model that knows nothing of numbers of items."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Output:
        outputs = self.inner(inputs)
        loss = None if labels is None else (50.0 * outputs - labels).square().mean()
        return Output(loss=loss, logits=outputs)


def make_numbers(count: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "inputs": torch.randn(4, generator=generator),
            "labels": torch.randn(1, generator=generator),
        }
        for _ in range(count)
    ]


def make_callback(service: FakeService, **options: Any) -> Any:
    from tamiyo_svc.client.huggingface import TamiyoCallback

    return TamiyoCallback(service.client(), **{"settings": WAITING, **options})


def make_trainer(
    folder: Path,
    callback: Any,
    model: Any = None,
    data: Any = None,
    *,
    kind: Any = None,
    others: Any = (),
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    transformers.set_seed(0)
    model = make_language_model() if model is None else model
    if data is None:
        data = make_numbers() if isinstance(model, Regression) else make_texts()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "steps",
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    return (kind or transformers.Trainer)(
        model, arguments, train_dataset=data, callbacks=[*others, callback],
        **(trainer_options or {}),
    )  # fmt: skip


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


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


def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    total = functional.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


class OwnLoss(transformers.Trainer):  # type: ignore[misc,name-defined]
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(inputs["inputs"])
        loss = (outputs.logits - inputs["labels"]).abs().mean()
        return (loss, outputs) if return_outputs else loss


SETUPS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (make_language_model, {}),
    "tokens-counted": (make_language_model, {"gradient_accumulation_steps": 3}),
    "means": (Regression, {"gradient_accumulation_steps": 3}),
    "last-window-short": (
        Regression,
        {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2},
    ),
    "not-clipped": (Regression, {"max_grad_norm": 0.0}),
    "label-smoothing": (make_language_model, {"label_smoothing_factor": 0.1}),
    "loss-function": (
        make_language_model,
        {"gradient_accumulation_steps": 2, "trainer_options": {"compute_loss_func": compute_loss}},
    ),
    "own-loss": (Regression, {"kind": OwnLoss, "gradient_accumulation_steps": 2}),
    "autocast": (make_language_model, {"bf16": True}),
}


@pytest.mark.parametrize(("make_model", "options"), SETUPS.values(), ids=list(SETUPS))
def test_loss_and_gradient_norm_are_those_that_the_trainer_logs(
    make_model: Callable[[], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    service = FakeService()
    trainer = make_trainer(tmp_path, make_callback(service), make_model(), **options)
    trainer.train()
    assert len(service.packets) == trainer.state.global_step >= STEPS
    assert losses(service) == pytest.approx(logged(trainer, "loss"), rel=1e-3)
    assert metric(service, "gradient_norm") == pytest.approx(logged(trainer, "grad_norm"), rel=1e-3)
    epochs = [packet.current_epoch for packet in service.packets]
    # The last step of an epoch belongs to it.
    assert epochs == [
        max(1, -int(-entry // 1)) for entry in logged(trainer, "epoch")[: len(epochs)]
    ]
    assert set(metric(service, "epochs_total")) == {float(trainer.state.num_train_epochs)}


def test_samples_are_counted_over_a_whole_step(tmp_path: Path) -> None:
    service = FakeService()
    callback = make_callback(service)
    counted = count_samples(callback)
    make_trainer(
        tmp_path, callback, Regression(), make_numbers(14), gradient_accumulation_steps=3,
        max_steps=-1, num_train_epochs=1,
    ).train()  # fmt: skip
    assert counted == [12, 2]


class Greedy(Regression):
    """Out of memory in its fourth pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Output:
        self.passes += 1
        if self.passes == 4:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(inputs, labels)


def test_a_smaller_batch_size_begins_anew(tmp_path: Path) -> None:
    service = FakeService()
    model = Greedy()
    trainer = make_trainer(
        tmp_path, make_callback(service), model, per_device_train_batch_size=8,
        auto_find_batch_size=True, gradient_accumulation_steps=2, max_steps=3,
    )  # fmt: skip
    trainer.train()
    # Of the first attempt one step was whole.
    assert [packet.global_step for packet in service.packets] == [1, 1, 2, 3]
    assert losses(service)[1:] == pytest.approx(logged(trainer, "loss"), rel=1e-3)
    assert metric(service, "loss_ewma")[1] == losses(service)[1]
    assert len({packet.packet_id for packet in service.packets}) == 4
    assert not model._forward_hooks
    assert "training_step" not in vars(trainer)


class Interrupts(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """Raises an error once, where it is told to."""

    def __init__(self, where: str) -> None:
        self.left = 1
        setattr(self, where, self.interrupt)

    def interrupt(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.left:
            self.left -= 1
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_training_that_was_broken_off_leaves_nothing_to_the_next(
    where: str, tmp_path: Path
) -> None:
    service = FakeService(lambda _: [make_optimizer_command(0.0)])
    ended: list[StepEnd] = []
    callback = make_callback(service, on_step=lambda step, end: ended.append(end))
    model = Regression()
    trainer = make_trainer(
        tmp_path, callback, model, others=[Interrupts(where)], gradient_accumulation_steps=2
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    before = len(service.packets)
    logs = len(logged(trainer, "loss"))
    trainer.train()
    assert losses(service)[before:] == pytest.approx(logged(trainer, "loss")[-STEPS:], rel=1e-3)
    assert logs <= STEPS
    assert [packet.global_step for packet in service.packets[before:]] == [*range(1, STEPS + 1)]
    assert all(end.verified is not None for end in ended)
    assert not {"training_step", "compute_loss", "log"} & vars(trainer).keys()
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_an_evaluation_counts_once_for_the_step_after_it(tmp_path: Path) -> None:
    service = FakeService()
    trainer = make_trainer(
        tmp_path, make_callback(service), Regression(), eval_strategy="steps", eval_steps=2,
        trainer_options={"eval_dataset": make_numbers(8)},
    )  # fmt: skip
    trainer.train()
    seen = [packet.validation_loss for packet in service.packets]
    first, second, *_ = logged(trainer, "eval_loss")
    assert seen == pytest.approx([0, 0, first, 0, second])
    trainer.evaluate()
    trainer.train()
    assert service.packets[STEPS].validation_loss == 0.0


def test_several_evaluation_sets_count_with_their_mean(tmp_path: Path) -> None:
    service = FakeService()
    sets = {"easy": make_numbers(4), "hard": make_numbers(8)[4:]}
    trainer = make_trainer(
        tmp_path, make_callback(service), Regression(), eval_strategy="steps", eval_steps=4,
        trainer_options={
            "eval_dataset": sets,
            "compute_metrics": lambda _: {"accuracy": 0.25},
        },
    )  # fmt: skip
    trainer.train()
    (easy, *_), (hard, *_) = logged(trainer, "eval_easy_loss"), logged(trainer, "eval_hard_loss")
    assert service.packets[-1].validation_loss == pytest.approx((easy + hard) / 2)
    assert service.packets[-1].validation_accuracy == 0.25


def test_no_error_of_tamiyos_part_ends_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"no {name}")

    from tamiyo_svc.client.huggingface import TamiyoCallback

    callback = TamiyoCallback(Broken(), settings=WAITING)
    trainer = make_trainer(tmp_path, callback, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.global_step == STEPS
    told = [record.getMessage() for record in caplog.records]
    assert sum("on_step_end" in text for text in told) == 1
    assert sum("on_save" in text for text in told) == 1


def test_an_error_of_on_step_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def on_step(step: int, end: StepEnd) -> None:
        raise ValueError("the user's own")

    service = FakeService()
    make_trainer(tmp_path, make_callback(service, on_step=on_step)).train()
    assert len(service.packets) == STEPS
    assert "the user's own" in caplog.text


def growing(service: FakeService, **options: Any) -> tuple[Any, Any]:
    """A model with a seed that grows, and its callback."""
    model = make_language_model()
    bank = SeedBank(model)
    bank.attach("transformer.h.0")
    return model, make_callback(service, bank=bank, **options)


@pytest.mark.parametrize("named", [True, False], ids=["by-folder", "newest"])
def test_resumed_training_takes_up_seeds_and_refuses_the_commands_it_had(
    named: bool, tmp_path: Path
) -> None:
    service = FakeService(grow("seed-residual-mlp"))
    model, callback = growing(service)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    make_trainer(tmp_path, callback, model, **options).train()
    stage = callback.run.bank.seeds[0].stage
    assert stage > leyline.SEED_STAGE_GERMINATED
    had = callback.run.client.state_dict()["accepted_s"]
    model, callback = growing(service)
    trainer = make_trainer(tmp_path, callback, model, **{**options, "max_steps": 5})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if named else True)
    assert [packet.global_step for packet in service.packets] == [1, 2, 3, 4, 5]
    assert service.packets[3].seed_states[0].stage == stage
    assert set(had) < set(callback.run.client.state_dict()["accepted_s"])
    assert losses(service)[3:] == pytest.approx(logged(trainer, "loss")[3:], rel=1e-3)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")])
def test_a_checkpoint_without_a_state_to_be_read_is_told(
    damage: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = FakeService()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, make_callback(service), max_steps=3, **options).train()
    damage(tmp_path / "checkpoint-3" / "tamiyo.pt")
    trainer = make_trainer(tmp_path, make_callback(service), max_steps=5, **options)
    trainer.train(resume_from_checkpoint=True)
    assert [packet.global_step for packet in service.packets] == [1, 2, 3, 4, 5]
    assert caplog.text.count("tamiyo.pt is not restored") == 1


def test_what_the_trainer_logs_and_its_progress_bar_show_commands_and_seeds(
    tmp_path: Path,
) -> None:
    reported: list[dict[str, Any]] = []

    class Reporter(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            reported.append(dict(logs))

    class Bar(transformers.ProgressCallback):  # type: ignore[misc,name-defined]
        postfix = ""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            Bar.postfix = self.training_bar.postfix
            super().on_train_end(*args, **kwargs)

    service = FakeService(grow("seed-residual-mlp"))
    model, callback = growing(service)
    trainer = make_trainer(tmp_path, callback, model, others=[Reporter()])
    trainer.add_callback(Bar())
    trainer.train()
    steps = [logs for logs in reported if "loss" in logs]
    assert steps[0]["tamiyo/command"] == leyline.COMMAND_SEED
    assert steps[0]["tamiyo/operation"] == leyline.SEED_OP_GERMINATE
    assert steps[0]["tamiyo/seed-0/stage"] == leyline.SEED_STAGE_GERMINATED
    assert logged(trainer, "tamiyo/applied")[0] == 1.0
    assert all(isinstance(value, float) for key, value in steps[0].items() if "tamiyo" in key)
    assert f"seed-0={callback.run.bank.seeds[0].stage_name.lower()}" in Bar.postfix


def test_a_callback_is_copied_deep_and_by_pickle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = FakeService()
    callback = make_callback(service)
    trainer = make_trainer(tmp_path, callback, max_steps=2)
    trainer.train()
    make_trainer(tmp_path, copy.deepcopy(callback), max_steps=2).train()
    assert len(service.packets) == 4
    caplog.clear()
    sent = pickle.loads(pickle.dumps(make_callback(service, on_step=lambda step, end: None)))
    assert "without its on_step" in caplog.text
    again = make_trainer(tmp_path, sent, max_steps=2)
    again.train()
    assert again.state.global_step == 2


def test_seeds_of_another_network_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, callback = growing(FakeService())
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, callback, max_steps=1).train()
    assert "another one" in caplog.text


def test_seeds_train_on_the_loss_that_the_trainer_computes(tmp_path: Path) -> None:
    seen: list[float] = []

    def count(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = compute_loss(outputs, labels, num_items_in_batch)
        seen.append(float(loss.detach()))
        return loss

    service = FakeService(grow("seed-residual-mlp"))
    model, callback = growing(service)
    trainer = make_trainer(
        tmp_path, callback, model, trainer_options={"compute_loss_func": count}, max_steps=4
    )
    trainer.train()
    # The seed is in training when the last step ends.
    assert len(seen) == 4 + 1
    assert losses(service) == pytest.approx(logged(trainer, "loss"), rel=1e-3)


def test_a_step_whose_loss_is_no_number_is_sent_and_harms_no_other(tmp_path: Path) -> None:
    class Bad(Regression):
        passes = 0

        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Output:
            self.passes += 1
            output = super().forward(inputs, labels)
            assert output.loss is not None
            bad = output.loss + torch.nan if self.passes == 2 else output.loss
            return Output(loss=bad, logits=output.logits)

    service = FakeService()
    trainer = make_trainer(tmp_path, make_callback(service), Bad(), learning_rate=0.0)
    trainer.train()
    seen = losses(service)
    assert seen[1] != seen[1]
    assert seen[2:] == pytest.approx(logged(trainer, "loss")[2:], rel=1e-3)


def test_another_training_with_the_same_client_is_not_taken_for_the_first(tmp_path: Path) -> None:
    from tamiyo_svc.client.huggingface import TamiyoCallback

    service = FakeService()
    client = service.client()
    options: dict[str, Any] = {
        "others": [Interrupts("on_step_end")],
        "gradient_accumulation_steps": 2,
    }
    first = TamiyoCallback(client, settings=WAITING)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, first, Regression(), **options).train()
    make_trainer(tmp_path, TamiyoCallback(client, settings=WAITING), Regression()).train()
    ids = [packet.packet_id for packet in service.packets]
    assert len(set(ids)) == len(ids) > STEPS


def test_called_by_something_else_than_a_trainer_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = FakeService()
    callback = make_callback(service)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[])
    state = transformers.TrainerState(global_step=1)
    control = transformers.TrainerControl()
    for hook in (callback.on_train_begin, callback.on_step_end, callback.on_train_end):
        hook(arguments, state, control, model=Regression())
    assert service.packets == []
    assert caplog.text.count("is not found") == 1
