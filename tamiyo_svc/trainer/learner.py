"""One optimization step of the host; seeds are Tamiyo's part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.trainer.data import Samples

_WEIGHT_DECAY: Final = 1e-3
_MAX_GRADIENT_NORM: Final = 5.0
_FINAL_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one batch gave; the norm is that before clipping."""

    loss: float
    gradient_norm: float


class Learner:
    """The host's optimizer and its schedule.

    The rate follows half a cosine from `learning_rate` to a twentieth of it over `steps` steps.
    """

    def __init__(self, network: nn.Module, learning_rate: float, steps: int) -> None:
        self.network = network
        self._parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=learning_rate, weight_decay=_WEIGHT_DECAY
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _decay(step / max(steps, 1))
        )

    def step(self, batch: Samples) -> StepResult:
        """Train on one batch; gradients that are not finite change nothing."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()
        self.scheduler.step()
        return StepResult(loss.item(), norm)

    def loss(self, batch: Samples) -> Tensor:
        """The network's loss on a batch."""
        return functional.cross_entropy(self.network(batch.images), batch.labels)


def _decay(progress: float) -> float:
    decay = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    return _FINAL_SHARE + (1.0 - _FINAL_SHARE) * decay


@torch.no_grad()
def evaluate(network: nn.Module, samples: Samples) -> tuple[float, float]:
    """Loss and accuracy of the network as it is."""
    network.eval()
    logits = network(samples.images)
    loss = functional.cross_entropy(logits, samples.labels)
    correct = (logits.argmax(dim=1) == samples.labels).float().mean()
    return loss.item(), correct.item()
