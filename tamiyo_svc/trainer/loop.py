"""The training loop: train a batch, say how it went, do what is commanded or go on without."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final, Protocol

import torch
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from tamiyo_svc.client.counters import ClientCounters
from tamiyo_svc.client.run import RunSettings, StepClient, StepEnd, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.seeds.lifecycle import CULLED, DORMANT, FOSSILIZED
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import AckOutcome
from tamiyo_svc.trainer.blueprints import BLUEPRINTS, build_seed
from tamiyo_svc.trainer.data import Samples, load
from tamiyo_svc.trainer.learner import Learner, evaluate
from tamiyo_svc.trainer.network import PLACES, HostNetwork
from tamiyo_svc.trainer.records import RunSummary, SeedView, StepOutcome, StepRecord

_FLUSH_S: Final = 1.0
_OUTCOMES: Final = {
    None: StepOutcome.MISSED,
    AckOutcome.APPLIED: StepOutcome.APPLIED,
    AckOutcome.REJECTED: StepOutcome.REJECTED,
}


class CommandSource(StepClient, Protocol):
    """What the loop needs of a client; `TamiyoClient` is one."""

    run_id: str

    @property
    def counters(self) -> ClientCounters: ...

    def flush(self, timeout_s: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """How to train; everything random follows from `random_seed`."""

    steps: int = 320
    batch_size: int = 64
    learning_rate: float = 3e-3
    command_budget_s: float = 0.025
    blend_steps: int = 20
    random_seed: int = 7


class Trainer:
    """Trains the digits classifier, one command a step; the client stays open.

    Deterministic for a given `random_seed` and sequence of commands. `clock` measures durations
    in seconds. The number of torch threads is the caller's to set; one is enough.
    """

    def __init__(
        self,
        client: CommandSource,
        settings: TrainerSettings | None = None,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings = settings or TrainerSettings()
        self._client = client
        self.on_step = on_step
        self._clock = clock
        self._generator = torch.Generator().manual_seed(self.settings.random_seed)
        self._digits = load(self._generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.random_seed)
            self.network = HostNetwork()
        self.learner = Learner(self.network, self.settings.learning_rate, self.settings.steps)
        self.bank = SeedBank(
            self.network,
            {name: partial(build_seed, name) for name in BLUEPRINTS},
            random_seed=self.settings.random_seed,
            evaluate=lambda: evaluate(self.network, self._digits.validation)[0],
            risks={name: blueprint.risk for name, blueprint in BLUEPRINTS.items()},
        )
        for place in PLACES:
            self.bank.attach(place)
        self.tamiyo = TamiyoRun(
            client,
            optimizer=self.learner.optimizer,
            scheduler=self.learner.scheduler,
            bank=self.bank,
            settings=RunSettings(
                wait_s=self.settings.command_budget_s, blend_steps=self.settings.blend_steps
            ),
            clock=clock,
        )
        self._outcomes: Counter[StepOutcome] = Counter()
        self._rejections: Counter[str] = Counter()
        self._violations = 0
        self._step = 0

    @property
    def epochs(self) -> int:
        """Epochs the whole run takes, the last perhaps in part."""
        return -(-self.settings.steps // self._batches_per_epoch)

    def run(self) -> RunSummary:
        """Train to the end and report."""
        started_s = self._clock()
        for _ in self.steps():
            pass
        # What left or arrived after the last wait would otherwise go uncounted.
        self._client.flush(_FLUSH_S)
        self._client.poll()
        return self._summary(self._clock() - started_s)

    def steps(self) -> Iterator[StepRecord]:
        """Train step by step; each record is also handed to `on_step`."""
        for epoch in range(1, self.epochs + 1):
            batches = self._digits.training.batches(self.settings.batch_size, self._generator)
            left = self.settings.steps - self._step
            for batch in self.tamiyo.batches(islice(batches, left)):
                record = self._train(batch, epoch)
                if self.on_step is not None:
                    self.on_step(record)
                yield record

    def _train(self, batch: Samples, epoch: int) -> StepRecord:
        self._step += 1
        result = self.learner.step(batch)
        validation_loss, accuracy = evaluate(self.network, self._digits.validation)
        ended = self.tamiyo.end_step(
            self._step,
            result.loss,
            epoch=epoch,
            epochs_total=self.epochs,
            validation_loss=validation_loss,
            validation_accuracy=accuracy,
            gradient_norm=result.gradient_norm,
            batch_size=self.settings.batch_size,
            isolated_loss=lambda: self.learner.loss(batch),
            blueprint_ids=self._wanted_blueprints(),
        )
        self._violations += self.bank.isolation_violations
        return self._record(epoch, result.loss, validation_loss, accuracy, ended)

    def _wanted_blueprints(self) -> tuple[str, ...]:
        """Every blueprint, first the one that suits the first seed still on its way."""
        known = tuple(BLUEPRINTS)
        seed = next((s for s in self.bank.seeds if s.stage not in (FOSSILIZED, CULLED)), None)
        if seed is None:
            return known
        first = seed.index % len(known) if seed.stage == DORMANT else known.index(seed.blueprint_id)
        return known[first:] + known[:first]

    def _record(
        self, epoch: int, loss: float, validation_loss: float, accuracy: float, ended: StepEnd
    ) -> StepRecord:
        command = None if ended.verified is None else ended.verified.command
        record = StepRecord(
            step=self._step,
            epoch=epoch,
            loss=loss,
            validation_loss=validation_loss,
            accuracy=accuracy,
            learning_rate=self.tamiyo.rate.learning_rate,
            outcome=_OUTCOMES[ended.outcome],
            command_type="" if command is None else _type_name(command),
            operation="" if command is None else _operation_name(command),
            target_seed_id="" if command is None else command.target_seed_id,
            reason="" if command is None else command.annotations.get("risk_reason", ""),
            rejection=ended.reason,
            latency_ms=ended.latency_ms,
            seeds=self._views(),
        )
        self._outcomes[record.outcome] += 1
        if ended.reason:
            self._rejections[ended.reason] += 1
        return record

    def _summary(self, duration_s: float) -> RunSummary:
        counters = self._client.counters
        return RunSummary(
            run_id=self._client.run_id,
            steps=self._step,
            accuracy=evaluate(self.network, self._digits.test)[1],
            duration_s=duration_s,
            published=counters.published,
            received=counters.received,
            late=counters.late,
            missed=counters.missed,
            unverifiable=counters.rejected.total(),
            applied=self._outcomes[StepOutcome.APPLIED],
            rejected=self._outcomes[StepOutcome.REJECTED],
            isolation_violations=self._violations,
            rejections=dict(self._rejections),
            seeds=self._views(),
        )

    def _views(self) -> tuple[SeedView, ...]:
        return tuple(
            SeedView(
                seed.seed_id,
                seed.stage_name,
                seed.slot.alpha,
                seed.blueprint_id,
            )
            for seed in self.bank.seeds
        )

    @property
    def _batches_per_epoch(self) -> int:
        return len(self._digits.training) // self.settings.batch_size


def _type_name(command: leyline.AdaptationCommand) -> str:
    return _spell(leyline.CommandType, command.command_type, "COMMAND_")


def _operation_name(command: leyline.AdaptationCommand) -> str:
    if not command.HasField("seed_operation"):
        return ""
    return _spell(leyline.SeedOperation, command.seed_operation.operation, "SEED_OP_")


def _spell(enum: EnumTypeWrapper, number: int, prefix: str) -> str:
    if number not in enum.values():
        return str(number)
    return enum.Name(number).removeprefix(prefix).lower()
