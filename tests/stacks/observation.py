"""What one rank has seen of one training: the packets' values and the training's own."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from stacks.cells import LR_DELTA, Cell
from torch import Tensor, nn

from tamiyo_svc.client.run import StepEnd
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import FakeService, grow, make_optimizer_command
from tamiyo_svc.leyline import leyline_pb2 as leyline

_RATE_CHANGES_AT = 10


@dataclass
class Observation:
    """Of one rank; `packets` only where it has the client. By step: loss and gradient norm."""

    packets: list[tuple[int, float, float | None]] = field(default_factory=list)
    trained: list[tuple[int, float, float | None]] = field(default_factory=list)
    stage: str = ""
    moved: bool = False
    seed_format: str = ""
    place_format: str = ""
    host_weights: str = ""
    seed_weights: str = ""
    learning_rate: float = 0.0
    effect: list[float] = field(default_factory=list)
    """One batch's loss: as trained, by the bare network, by that without its seed."""
    outputs: list[str] = field(default_factory=list)
    """Digests of the network's outputs where it stopped and where it went on."""
    violations: float = 0.0
    joined_gradient: float = 0.0
    """Norm of the seed's gradient in the end, from the host's own backward pass."""
    reasons: dict[str, int] = field(default_factory=dict)
    complaints: list[tuple[str, str]] = field(default_factory=list)
    raised: str = ""

    def note_end(self, step: int, ended: StepEnd) -> None:
        """Keep why a command was refused."""
        if ended.reason:
            self.reasons[ended.reason] = self.reasons.get(ended.reason, 0) + 1

    def note_packets(self, service: FakeService) -> None:
        """Keep what the packets say."""
        for packet in service.packets:
            metrics = packet.training_metrics
            norm = metrics.get("gradient_norm")
            self.packets.append((packet.global_step, packet.training_loss, norm))
            self.violations += metrics["kasmina.isolation.violations"]

    def note_effect(
        self, bank: SeedBank, trained: Callable[[], Tensor], bare: Callable[[], Tensor]
    ) -> None:
        """Keep what the seed does to a loss, with and without what is around the network."""
        (seed,) = bank.seeds
        self.effect = [float(trained().detach()), float(bare().detach())]
        slot: Any = seed.slot
        slot.silent = True
        self.effect.append(float(bare().detach()))
        slot.silent = False

    def note_network(self, network: nn.Module, bank: SeedBank, place: str) -> None:
        """Keep how the network and its seed ended."""
        (seed,) = bank.seeds
        self.stage, self.moved = seed.stage_name, seed.moved
        formats = {str(parameter.dtype) for parameter in seed.parameters}
        self.seed_format = ", ".join(sorted(formats))
        around = network.get_submodule(place).parameters()
        self.place_format = ", ".join(sorted({str(p.dtype) for p in around}))
        self.joined_gradient = seed.gradient_norm
        self.host_weights = digest(network.parameters())
        self.seed_weights = digest(seed.parameters)


def make_service(cell: Cell) -> FakeService:
    """One that grows the first seed and changes the learning rate once."""
    growing = grow("seed-residual-mlp")

    def answer(packet: leyline.SystemStatePacket) -> Iterable[leyline.AdaptationCommand]:
        if packet.global_step == _RATE_CHANGES_AT:
            return [make_optimizer_command(LR_DELTA)]
        return growing(packet)

    return FakeService(answer)


def digest(tensors: Iterable[Tensor]) -> str:
    """A short name for all values; every rank must call it where they are sharded."""
    whole = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)
    values = torch.cat([tensor.detach().double().flatten() for tensor in whole] or [torch.ones(0)])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def norm_of(parameters: Iterable[nn.Parameter]) -> float | None:
    """The norm of all gradients together, None where it is not finite."""
    total = 0.0
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            total += float(whole.double().square().sum())
    return math.sqrt(total) if math.isfinite(total) else None


@contextmanager
def overheard(observation: Observation) -> Iterator[None]:
    """Keep what Tamiyo logs as a warning or worse."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            observation.complaints.append((record.levelname, record.getMessage()))

    logger, listener = logging.getLogger("tamiyo.client"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
