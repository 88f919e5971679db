"""The state packet of one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tamiyo_svc.client.seeds.lifecycle import Seed, describe_seed
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.blueprints import BLUEPRINTS


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
    """What the packet says about one seed, its blueprint's risk included."""
    blueprint = BLUEPRINTS.get(seed.blueprint_id)
    return describe_seed(seed, epoch, blueprint.risk if blueprint else 0.0)
