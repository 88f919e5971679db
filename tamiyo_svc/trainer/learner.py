"""One optimization step: the host with the seeds that joined it, and the others in isolation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.client.seeds.gates import Impact
from tamiyo_svc.client.seeds.lifecycle import JOINED, TRAINING, Seed
from tamiyo_svc.trainer.data import Samples
from tamiyo_svc.trainer.network import HostNetwork

OPTIMIZER_FAMILY: Final = "adamw"
_WEIGHT_DECAY: Final = 1e-3
_MAX_GRADIENT_NORM: Final = 5.0
_MEAN_GRADIENT_WEIGHT: Final = 0.1
_AGAINST: Final = -0.5
"""Cosine of 120 degrees: noise alone rarely turns a gradient that far."""
MIN_LEARNING_RATE: Final = 1e-5
MAX_LEARNING_RATE: Final = 1e-1
_FINAL_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one batch gave.

    `conflict_rate` is the share of host tensors whose gradient turned more than 120 degrees from
    its running mean; a violation is a parameter that an isolated seed's loss reached.
    """

    loss: float
    gradient_norm: float
    conflict_rate: float
    isolation_violations: int


class Learner:
    """Owns the host's optimizer and the learning rate; each seed brings its own optimizer.

    The rate follows half a cosine from `learning_rate` to a twentieth of it over `steps` steps,
    times a factor that commands change.
    """

    def __init__(
        self, network: HostNetwork, seeds: list[Seed], learning_rate: float, steps: int
    ) -> None:
        self.network = network
        self.seeds = seeds
        self.optimizer = torch.optim.AdamW(
            network.host_parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY
        )
        self._first_rate = learning_rate
        self._steps = max(steps, 1)
        self._step = 0
        self._factor = 1.0
        self._mean_gradients: list[Tensor] = []

    @property
    def learning_rate(self) -> float:
        """The learning rate now, of the host and of every seed."""
        progress = min(self._step / self._steps, 1.0)
        decay = 0.5 + 0.5 * math.cos(math.pi * progress)
        rate = self._factor * self._first_rate * (_FINAL_SHARE + (1.0 - _FINAL_SHARE) * decay)
        return min(max(rate, MIN_LEARNING_RATE), MAX_LEARNING_RATE)

    def change_learning_rate(self, delta: float) -> None:
        """Multiply the learning rate by 1 + `delta`, within its bounds."""
        before = self.learning_rate
        after = min(max(before * (1.0 + delta), MIN_LEARNING_RATE), MAX_LEARNING_RATE)
        self._factor *= after / before

    def step(self, batch: Samples) -> StepResult:
        """Train on one batch; gradients that are not finite change nothing."""
        self._set_rates()
        self._step += 1
        self.network.train()
        self.network.zero_grad(set_to_none=True)
        violations = 0
        for seed in self.seeds:
            if seed.stage == TRAINING:
                violations += self._train_isolated(seed, batch)
        loss = functional.cross_entropy(self.network(batch.images), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        host = self.network.host_parameters()
        norm = float(nn.utils.clip_grad_norm_(host, _MAX_GRADIENT_NORM))
        conflict_rate = 0.0
        if math.isfinite(norm):
            conflict_rate = self._conflict_rate([p.grad for p in host if p.grad is not None])
            self.optimizer.step()
        for seed in self.seeds:
            if seed.stage in JOINED:
                _step_seed(seed, loss.item())
        return StepResult(loss.item(), norm, conflict_rate, violations)

    def _set_rates(self) -> None:
        rate = self.learning_rate
        for optimizer in (self.optimizer, *(seed.optimizer for seed in self.seeds)):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate

    def _train_isolated(self, seed: Seed, batch: Samples) -> int:
        loss = functional.cross_entropy(self.network.trial(batch.images, seed.index), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        own = set(seed.parameters)
        reached = [p for p in self.network.parameters() if p.grad is not None and p not in own]
        _step_seed(seed, loss.item())
        self.network.zero_grad(set_to_none=True)
        return len(reached)

    def _conflict_rate(self, gradients: list[Tensor]) -> float:
        if not self._mean_gradients:
            self._mean_gradients = [gradient.clone() for gradient in gradients]
            return 0.0
        pairs = list(zip(gradients, self._mean_gradients, strict=True))
        against = sum(
            bool((new * mean).sum() < _AGAINST * new.norm() * mean.norm()) for new, mean in pairs
        )
        for new, mean in pairs:
            mean.lerp_(new, _MEAN_GRADIENT_WEIGHT)
        return against / len(pairs)


def _step_seed(seed: Seed, loss: float) -> None:
    norm = float(nn.utils.clip_grad_norm_(seed.parameters, _MAX_GRADIENT_NORM))
    seed.observe(loss, norm)
    if math.isfinite(norm):
        seed.learn()


@torch.no_grad()
def evaluate(network: HostNetwork, samples: Samples) -> tuple[float, float]:
    """Loss and accuracy of the network as it is."""
    network.eval()
    return _score(network(samples.images), samples)


@torch.no_grad()
def measure_impact(network: HostNetwork, seed: Seed, samples: Samples) -> Impact:
    """What the seed in full is worth; the same samples give the same loss each time."""
    network.eval()
    joined = seed.stage in JOINED
    present = network(samples.images) if joined else network.trial(samples.images, seed.index)
    absent = network(samples.images, without=seed.index)
    loss = _score(absent, samples)[0]
    return Impact(_score(present, samples)[0] - loss, 0.0, loss)


def _score(logits: Tensor, samples: Samples) -> tuple[float, float]:
    loss = functional.cross_entropy(logits, samples.labels)
    correct = (logits.argmax(dim=1) == samples.labels).float().mean()
    return loss.item(), correct.item()
