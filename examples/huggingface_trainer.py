"""The Transformers Trainer on a tiny language model, built here and taught the Zen of Python."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import tempfile

import torch
from connection import connect
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from tamiyo_svc.client.huggingface import TamiyoCallback
from tamiyo_svc.client.run import RunSettings
from tamiyo_svc.client.seeds import SeedBank

LENGTH = 32


def zen() -> list[dict[str, torch.Tensor]]:
    """The poem in pieces of 32 characters, one token a character."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13")
    tokens = torch.tensor([min(ord(character), 127) for character in text])
    pieces = [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH, 8)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(steps: int) -> None:
    """Train for so many steps and say what was commanded."""
    set_seed(7)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    bank = SeedBank(model)
    seed = bank.attach("transformer.h.0")
    client = connect("huggingface-1", "seed-residual-mlp")
    callback = TamiyoCallback(client, bank=bank, settings=RunSettings(wait_s=0.05))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=zen(), callbacks=[callback]).train()
    counters = client.counters
    print(f"{counters.received} of {counters.published} packets answered in time")
    print(f"seed stage {seed.stage_name}, alpha {seed.slot.alpha:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    main(parser.parse_args().steps)
