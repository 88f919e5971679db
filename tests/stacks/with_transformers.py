"""A cell trained by the Trainer of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stacks.cells import HALF, LEARNING_RATE, STEPS, WAITING, Cell, Precision, Spread, Variant
from stacks.observation import Observation, digest, make_service
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from tamiyo_svc.client.distributed import RankedClient, is_talker
from tamiyo_svc.client.huggingface import TamiyoCallback
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import FakeService

_PLACE = "transformer.h.0"
_WORDS = 17
_LENGTH = 12


class Probe(TrainerCallback):  # type: ignore[misc]
    """Looks at outputs where training begins again, and ends the first half."""

    def __init__(self, seen: Observation, stop_at: int) -> None:
        self.seen = seen
        self.stop_at = stop_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare outputs if this is not the beginning."""
        if state.global_step:
            self.look(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where it is to be gone on from."""
        if state.global_step == self.stop_at:
            control.should_save = control.should_training_stop = True

    def look(self, model: nn.Module) -> None:
        """Note the outputs."""
        model.eval()
        with torch.no_grad():
            outputs = model(input_ids=_texts()[0]["input_ids"][None]).logits
        model.train()
        self.seen.outputs.append(digest([outputs]))


def train(cell: Cell, folder: Path, seen: Observation, *, bare: bool) -> None:
    """Train the cell; `bare` without Tamiyo."""
    service = make_service(cell)
    checkpoint = None
    if cell.variant is Variant.RESUMED:
        trainer, _, look = _train(cell, folder, seen, None if bare else service, stop_at=HALF)
        look.look(trainer.model)
        checkpoint = str(folder / f"checkpoint-{HALF}")
    trainer, bank, _ = _train(cell, folder, seen, None if bare else service, checkpoint=checkpoint)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            seen.trained.append((entry["step"], entry["loss"], entry.get("grad_norm")))
    seen.learning_rate = trainer.optimizer.param_groups[0]["lr"]
    if bank is not None:
        _note_effect(trainer, seen, bank)
        seen.note_network(bank.model, bank, _PLACE)
        seen.note_packets(service)


def _train(
    cell: Cell,
    folder: Path,
    seen: Observation,
    service: FakeService | None,
    *,
    stop_at: int = 0,
    checkpoint: str | None = None,
) -> tuple[Trainer, SeedBank | None, Probe]:
    arguments = _arguments(cell, folder)
    set_seed(0)
    config = GPT2Config(
        vocab_size=_WORDS, n_positions=_LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, loss_type="ForCausalLM", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if cell.precision is Precision.WEIGHTS:
        model.to(torch.bfloat16)
    callbacks: list[TrainerCallback] = []
    bank = None
    if service is not None:
        bank = SeedBank(model)
        bank.attach(_PLACE)
        client = RankedClient(service.client() if is_talker() else None)
        callbacks.append(TamiyoCallback(client, bank=bank, settings=WAITING, on_step=seen.note_end))
    look = Probe(seen, stop_at)
    trainer = Trainer(model, arguments, train_dataset=_texts(), callbacks=[*callbacks, look])
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, bank, look


def _note_effect(trainer: Trainer, seen: Observation, bank: SeedBank) -> None:
    rows = torch.stack([text["input_ids"] for text in _texts()[:8]])

    def loss(model: nn.Module) -> Tensor:
        with trainer.compute_loss_context_manager():
            value: Tensor = trainer.compute_loss(model, {"input_ids": rows, "labels": rows})
        return value

    seen.note_effect(bank, lambda: loss(trainer.model_wrapped), lambda: loss(bank.model))


def _arguments(cell: Cell, folder: Path) -> TrainingArguments:
    options: dict[str, Any] = {
        "bf16": cell.precision is Precision.AUTOCAST,
        "fp16": cell.precision is Precision.SCALED,
        "gradient_accumulation_steps": cell.parts,
        "gradient_checkpointing": cell.variant is Variant.RECOMPUTED,
    }
    if cell.variant is Variant.COMPILED:
        options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    if cell.spread is Spread.FSDP2:
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def _texts() -> list[dict[str, Tensor]]:
    """Rows that count upwards from every number, round and round."""
    rows = [(torch.arange(_LENGTH) + start) % _WORDS for start in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]
