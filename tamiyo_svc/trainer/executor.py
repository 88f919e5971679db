"""Applies commands to this trainer's learner and its seeds."""

from __future__ import annotations

from torch import nn

from tamiyo_svc.client.seeds import executor
from tamiyo_svc.client.seeds.lifecycle import Seed
from tamiyo_svc.trainer.blueprints import BLUEPRINTS, build_seed
from tamiyo_svc.trainer.data import Samples
from tamiyo_svc.trainer.learner import OPTIMIZER_FAMILY, Learner, measure_impact


class CommandExecutor(executor.CommandExecutor):
    """The executor of the digits trainer; impact is measured on the validation set."""

    def __init__(
        self, learner: Learner, validation: Samples, blend_steps: int, random_seed: int
    ) -> None:
        def build(seed: Seed, blueprint_id: str) -> nn.Module:
            return build_seed(blueprint_id, seed.slot.channels, random_seed + seed.index)

        super().__init__(
            learner.seeds,
            learner,
            blueprint_ids=BLUEPRINTS,
            build=build,
            impact=lambda seed: measure_impact(learner.network, seed, validation),
            optimizer_ids=(OPTIMIZER_FAMILY,),
            blend_steps=blend_steps,
        )
