"""A seed as plain values and tensors, for a checkpoint that any loader reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from tamiyo_svc.client.seeds.blending import Schedule
from tamiyo_svc.client.seeds.lifecycle import Seed
from tamiyo_svc.client.seeds.slot import Slot, mixing_from

_CARRIED: Final = (
    "blueprint_id",
    "blend_steps",
    "steps_in_stage",
    "germinated_epoch",
    "gradient_norm",
    "loss_fast",
    "loss_slow",
    "impact",
)
_LEARNED: Final = ("had_gradient", "moved")


def save_seed(seed: Seed, slot: Slot) -> dict[str, Any]:
    """Everything about a seed."""
    module, optimizer = slot.seed, seed.optimizer
    return {
        **{name: getattr(seed, name) for name in (*_CARRIED, *_LEARNED)},
        "stage": int(seed.stage),
        "alpha": slot.alpha,
        "channels": slot.channels,
        "channel_dim": slot.channel_dim,
        "shape": list(slot.shape),
        "learning_rate": seed.learning_rate,
        "schedule": dataclasses.asdict(seed.schedule),
        "mixing": {**dataclasses.asdict(slot.mixing), "mode": str(slot.mixing.mode)},
        "module": None if module is None else module.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }


def restore_place(slot: Slot, saved: Mapping[str, Any]) -> None:
    """Tell a slot what has passed its place, unless it has seen that itself."""
    slot.channel_dim = saved["channel_dim"]
    if not slot.channels:
        slot.channels = saved["channels"]
        slot.shape = tuple(saved.get("shape") or ())


def restore_seed(
    seed: Seed, slot: Slot, saved: Mapping[str, Any], module: nn.Module | None
) -> None:
    """Give a seed back what `save_seed` gave, in `module` if it had one."""
    slot.clear()
    seed.optimizer = None
    if module is not None:
        seed.germinate(saved["blueprint_id"], module, saved["learning_rate"], 1)
        module.load_state_dict(saved["module"])
        seed.resume(saved["optimizer"])
    for name in _CARRIED:
        setattr(seed, name, saved[name])
    for name in _LEARNED:
        # Whoever wrote none of these let no seed pass that had not learned.
        setattr(seed, name, saved.get(name, True))
    seed.stage = saved["stage"]
    seed.schedule = Schedule(**saved["schedule"])
    slot.mixing = mixing_from(saved["mixing"])
    slot.alpha = saved["alpha"]
