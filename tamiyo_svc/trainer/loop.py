"""The training loop: train a batch, say how it went, do what is commanded or go on without."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import psutil
import torch
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from tamiyo_svc.client.counters import ClientCounters
from tamiyo_svc.client.seeds.executor import Execution
from tamiyo_svc.client.seeds.lifecycle import CULLED, DORMANT, FOSSILIZED, Seed
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.blueprints import BLUEPRINTS
from tamiyo_svc.trainer.data import Samples, load
from tamiyo_svc.trainer.executor import CommandExecutor
from tamiyo_svc.trainer.learner import Learner, StepResult, evaluate
from tamiyo_svc.trainer.metrics import Timings, TrainingMeters
from tamiyo_svc.trainer.network import CHANNELS, HostNetwork
from tamiyo_svc.trainer.packets import build_packet
from tamiyo_svc.trainer.records import RunSummary, SeedView, StepOutcome, StepRecord

_GIB: Final = 1 << 30
_FLUSH_S: Final = 1.0


class CommandSource(Protocol):
    """What the loop needs of a client; `TamiyoClient` is one."""

    run_id: str

    @property
    def counters(self) -> ClientCounters: ...

    def publish_packet(
        self, packet: leyline.SystemStatePacket, *, blueprint_ids: tuple[str, ...] = ()
    ) -> bool: ...

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None: ...

    def poll(self) -> VerifiedCommand | None: ...

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
    """Trains the digits classifier, one command a step.

    Deterministic for a given `random_seed` and sequence of commands. `clock` measures durations
    in seconds, `timestamp_ns` stamps packets with Unix time. The number of torch threads is the
    caller's to set; one is enough.
    """

    def __init__(
        self,
        client: CommandSource,
        settings: TrainerSettings | None = None,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        timestamp_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.settings = settings or TrainerSettings()
        self._client = client
        self.on_step = on_step
        self._clock = clock
        self._timestamp_ns = timestamp_ns
        self._generator = torch.Generator().manual_seed(self.settings.random_seed)
        self._digits = load(self._generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.random_seed)
            self.network = HostNetwork()
        self.seeds = [Seed(index, self.network.slot(index)) for index in range(len(CHANNELS))]
        self.learner = Learner(
            self.network, self.seeds, self.settings.learning_rate, self.settings.steps
        )
        self.executor = CommandExecutor(
            self.learner,
            self._digits.validation,
            self.settings.blend_steps,
            self.settings.random_seed,
        )
        self._meters = TrainingMeters()
        self._timings = Timings()
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
            while self._step < self.settings.steps:
                started_s = self._clock()
                batch = next(batches, None)
                if batch is None:
                    break
                self._timings.input_wait_ms = self._since_ms(started_s)
                record = self._train(batch, epoch)
                self._timings.step_latency_ms = self._since_ms(started_s)
                if self.on_step is not None:
                    self.on_step(record)
                yield record

    def _train(self, batch: Samples, epoch: int) -> StepRecord:
        self._step += 1
        result = self.learner.step(batch)
        self._violations += result.isolation_violations
        validation_loss, accuracy = evaluate(self.network, self._digits.validation)
        hook_s = self._clock()
        packet = self._packet(result, epoch, validation_loss, accuracy)
        published_s = self._clock()
        self._client.publish_packet(packet, blueprint_ids=self._wanted_blueprints())
        verified = self._client.wait(self._step, self.settings.command_budget_s)
        latency_ms = self._since_ms(published_s)
        command = verified.command if verified is not None else None
        execution = self._apply(command, epoch)
        self._timings.hook_latency_ms = self._since_ms(hook_s)
        return self._record(
            epoch, result.loss, validation_loss, accuracy, command, execution, latency_ms
        )

    def _apply(self, command: leyline.AdaptationCommand | None, epoch: int) -> Execution:
        started_s = self._clock()
        execution = Execution() if command is None else self.executor.apply(command, epoch)
        self._timings.apply_ms = self._since_ms(started_s)
        started_s = self._clock()
        for seed in self.seeds:
            seed.advance(blend=execution.advances_blend)
        self._timings.finalize_ms = self._since_ms(started_s)
        return execution

    def _packet(
        self, result: StepResult, epoch: int, validation_loss: float, accuracy: float
    ) -> leyline.SystemStatePacket:
        metrics = self._meters.observe(
            result,
            validation_loss,
            self._timings,
            batch_size=self.settings.batch_size,
            learning_rate=self.learner.learning_rate,
            epochs=self.epochs,
        )
        return build_packet(
            run_id=self._client.run_id,
            step=self._step,
            epoch=epoch,
            timestamp_ns=self._timestamp_ns(),
            training_loss=result.loss,
            validation_loss=validation_loss,
            validation_accuracy=accuracy,
            metrics=metrics,
            hardware=_hardware(metrics["cpu_util_percent"]),
            seeds=self.seeds,
        )

    def _wanted_blueprints(self) -> tuple[str, ...]:
        """Every blueprint, first the one that suits the first seed still on its way."""
        known = tuple(BLUEPRINTS)
        seed = next((s for s in self.seeds if s.stage not in (FOSSILIZED, CULLED)), None)
        if seed is None:
            return known
        first = seed.index % len(known) if seed.stage == DORMANT else known.index(seed.blueprint_id)
        return known[first:] + known[:first]

    def _record(
        self,
        epoch: int,
        loss: float,
        validation_loss: float,
        accuracy: float,
        command: leyline.AdaptationCommand | None,
        execution: Execution,
        latency_ms: float,
    ) -> StepRecord:
        rejection = ": ".join(part for part in (execution.refusal, execution.gate) if part)
        outcome = StepOutcome.REJECTED if rejection else StepOutcome.APPLIED
        record = StepRecord(
            step=self._step,
            epoch=epoch,
            loss=loss,
            validation_loss=validation_loss,
            accuracy=accuracy,
            learning_rate=self.learner.learning_rate,
            outcome=StepOutcome.MISSED if command is None else outcome,
            command_type="" if command is None else _type_name(command),
            operation="" if command is None else _operation_name(command),
            target_seed_id="" if command is None else command.target_seed_id,
            reason="" if command is None else command.annotations.get("risk_reason", ""),
            rejection=rejection,
            latency_ms=None if command is None else latency_ms,
            seeds=self._views(),
        )
        self._outcomes[record.outcome] += 1
        if rejection:
            self._rejections[rejection] += 1
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
            for seed in self.seeds
        )

    @property
    def _batches_per_epoch(self) -> int:
        return len(self._digits.training) // self.settings.batch_size

    def _since_ms(self, started_s: float) -> float:
        return 1e3 * (self._clock() - started_s)


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


def _hardware(utilization_percent: float) -> leyline.HardwareContext:
    memory = psutil.virtual_memory()
    return leyline.HardwareContext(
        device_type="cpu",
        device_id="cpu",
        total_memory_gb=memory.total / _GIB,
        available_memory_gb=memory.available / _GIB,
        utilization_percent=utilization_percent,
    )
