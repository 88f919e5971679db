"""Seeds for any network: places by name, life stages, blending, and removal without a trace.

Imports torch.
"""

from tamiyo_svc.client.seeds.bank import SeedBank
from tamiyo_svc.client.seeds.blending import Mixing, Schedule
from tamiyo_svc.client.seeds.blueprints import BLUEPRINTS, residual_conv, residual_mlp
from tamiyo_svc.client.seeds.executor import CommandExecutor, Execution, Refusal
from tamiyo_svc.client.seeds.lifecycle import Seed

__all__ = [
    "BLUEPRINTS",
    "CommandExecutor",
    "Execution",
    "Mixing",
    "Refusal",
    "Schedule",
    "Seed",
    "SeedBank",
    "residual_conv",
    "residual_mlp",
]
