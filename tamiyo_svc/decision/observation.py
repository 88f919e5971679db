"""What was seen of a run after one command, over a number of epochs or steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tamiyo_svc.decision.record import Decision
from tamiyo_svc.leyline import leyline_pb2 as leyline


@dataclass(frozen=True, slots=True)
class Observation:
    """One later step; None is a value that was not measured."""

    loss_delta: float | None
    hook_latency_ms: float | None
    critical: bool


@dataclass(frozen=True, slots=True)
class ObservedCommand:
    """The command that a window is about; `issued_at_ns` is wall-clock time.

    Ids are empty where the command has none.
    """

    command_id: str
    issued_at_ns: int
    reason: str = ""
    seed_id: str = ""
    blueprint_id: str = ""
    policy_version: str = ""


class Sums(NamedTuple):
    """What the steps of a window add up to.

    `losses` and `hooks` count the packets that had a loss delta or a hook latency. A tuple because
    each step makes one for every open window.
    """

    packets: int = 0
    losses: int = 0
    loss_delta_total: float = 0.0
    loss_delta_min: float = 0.0
    loss_delta_max: float = 0.0
    hooks: int = 0
    hook_latency_total_ms: float = 0.0
    critical: bool = False

    def observe(self, seen: Observation) -> Sums:
        """With one more step."""
        packets, losses, total, lowest, highest, hooks, hook_ms, critical = self
        delta, latency = seen.loss_delta, seen.hook_latency_ms
        if delta is not None:
            lowest = min(lowest, delta) if losses else delta
            highest = max(highest, delta) if losses else delta
            losses, total = losses + 1, total + delta
        if latency is not None:
            hooks, hook_ms = hooks + 1, hook_ms + latency
        critical = critical or seen.critical
        return Sums(packets + 1, losses, total, lowest, highest, hooks, hook_ms, critical)


class ObservationWindow(NamedTuple):
    """The steps after a command, until `epochs` epochs or `steps` steps are over.

    A limit of 0 is none. A closed window says in `observed_epochs` and `observed_steps` how long
    it was; it is `closed_early` where neither limit had been reached.
    """

    command: ObservedCommand
    start_epoch: int
    start_step: int
    epochs: int
    steps: int
    sums: Sums = Sums()
    observed_epochs: int = 0
    observed_steps: int = 0
    closed_early: bool = False

    @property
    def label(self) -> str:
        """Where the window starts and how long it is meant to be, as its report's id has it."""
        if self.epochs:
            return f"{self.start_epoch}+{self.epochs}"
        return f"{self.start_step}+{self.steps}steps"

    def observe(self, seen: Observation) -> ObservationWindow:
        """With one more step in it."""
        command, start_epoch, start_step, epochs, steps, sums, *_ = self
        return ObservationWindow(
            command, start_epoch, start_step, epochs, steps, sums.observe(seen)
        )

    def has_begun(self, epoch: int, step: int) -> bool:
        """Whether the window starts at or before that place in its run."""
        return self.start_epoch <= epoch and self.start_step <= step

    def is_over(self, epoch: int, step: int) -> bool:
        """Whether the run has reached the end of the window."""
        return (0 < self.epochs <= epoch - self.start_epoch) or (
            0 < self.steps <= self._steps_until(step)
        )

    def close(self, epoch: int, step: int, *, early: bool = False) -> ObservationWindow:
        """The window as it ends there."""
        return self._replace(
            observed_epochs=epoch - self.start_epoch,
            observed_steps=self._steps_until(step),
            closed_early=early,
        )

    def _steps_until(self, step: int) -> int:
        # A trainer that does not number its steps takes at least one from packet to packet.
        return max(step - self.start_step, self.sums.packets)


def changes_something(command: leyline.AdaptationCommand) -> bool:
    """Whether applying the command alters the run: a pause or a rate change of 0 does not."""
    if command.command_type == leyline.COMMAND_OPTIMIZER:
        return any(command.optimizer_adjustment.hyperparameters.values())
    return command.command_type in (leyline.COMMAND_SEED, leyline.COMMAND_CIRCUIT_BREAKER)


def open_window(
    decision: Decision, command: leyline.AdaptationCommand, epochs: int, steps: int
) -> ObservationWindow | None:
    """The window of a decision's command, None for a command that changes nothing.

    One epoch or none, and 0 steps, are no limit; without any limit there is no window either.
    """
    epochs = epochs if epochs > 1 else 0
    if (epochs == 0 and steps == 0) or not changes_something(command):
        return None
    return ObservationWindow(
        ObservedCommand(
            command_id=command.command_id,
            issued_at_ns=decision.now_ns,
            reason=decision.verdict.reason,
            seed_id=command.target_seed_id,
            blueprint_id=command.seed_operation.blueprint_id,
            policy_version=decision.runtime.policy.version,
        ),
        start_epoch=decision.packet.current_epoch,
        start_step=decision.packet.global_step,
        epochs=epochs,
        steps=steps,
    )
