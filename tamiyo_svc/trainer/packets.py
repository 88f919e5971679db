"""The state packet of one training step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.blueprints import BLUEPRINTS
from tamiyo_svc.trainer.seeds import BLENDING, DORMANT, PROBATIONARY, SHADOWING, TRAINING, Seed

_RISK_TOLERANCE: Final = 0.5
_ALPHA_TEMPERATURE: Final = 1.0
_MAY_BLEND: Final = frozenset({TRAINING, BLENDING, SHADOWING, PROBATIONARY})


def build_packet(
    *,
    run_id: str,
    step: int,
    epoch: int,
    timestamp_ns: int,
    training_loss: float,
    validation_loss: float,
    validation_accuracy: float,
    metrics: Mapping[str, float],
    hardware: leyline.HardwareContext,
    seeds: Sequence[Seed],
) -> leyline.SystemStatePacket:
    """The packet after `step` (from 1) in `epoch` (from 1)."""
    return leyline.SystemStatePacket(
        version=1,
        packet_id=f"{run_id}-step-{step}",
        training_run_id=run_id,
        experiment_name="digits",
        source_subsystem="tolaria",
        current_epoch=epoch,
        global_step=step,
        timestamp_ns=timestamp_ns,
        training_loss=training_loss,
        validation_loss=validation_loss,
        validation_accuracy=validation_accuracy,
        hardware_context=hardware,
        training_metrics=metrics,
        seed_states=[seed_state(seed, epoch) for seed in seeds],
    )


def seed_state(seed: Seed, epoch: int) -> leyline.SeedState:
    """What the packet says about one seed; a dormant one has nothing to measure yet."""
    return leyline.SeedState(
        seed_id=seed.seed_id,
        stage=seed.stage,
        gradient_norm=seed.gradient_norm,
        learning_rate=seed.learning_rate,
        layer_depth=seed.index + 1,
        age_epochs=seed.age_epochs(epoch),
        risk_score=_risk(seed),
        metrics={
            "alpha": seed.slot.alpha,
            "alpha_steps": float(seed.blend_steps),
            "alpha_total_steps": float(seed.schedule.total_steps),
            "alpha_temperature": _ALPHA_TEMPERATURE,
            "blend_allowed": float(seed.stage in _MAY_BLEND),
            "risk_tolerance": _RISK_TOLERANCE,
        },
    )


def _risk(seed: Seed) -> float:
    if seed.stage == DORMANT or seed.blueprint_id not in BLUEPRINTS:
        return 0.0
    harm = max(seed.impact, 0.0) if math.isfinite(seed.impact) else 1.0
    return min(BLUEPRINTS[seed.blueprint_id].risk + harm, 1.0)
