"""Learning rates changed by command, under every kind of scheduler."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from tamiyo_svc.client.rates import MAX_LEARNING_RATE, MIN_LEARNING_RATE, OptimizerRate

STEPS = 40
Make = Callable[[Any], Any]


def make_optimizer(rate: Any = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.9)


class Noam:
    """Writes what it computes from nothing but a count."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer
        self.count = 0
        self.step()

    def step(self) -> None:
        self.count += 1
        for group in self.inner.param_groups:
            write(group, 0.1 * min(self.count**-0.5, self.count / 8**1.5))


class Decay:
    """Writes what it computes from the rate before."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            write(group, float(group["lr"]) * 0.9 + 1e-3)


class Called:
    """Has no step but is called."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            write(group, self.rate_of(epoch))

    @staticmethod
    def rate_of(epoch: int) -> float:
        return 0.1 * 0.9**epoch


class WithOwnFloor(schedulers.LRScheduler):
    """A torch scheduler with a constant that only it knows is a rate."""

    def get_lr(self) -> list[float | torch.Tensor]:
        floor = 0.02
        return [floor + (float(base) - floor) * 0.9**self.last_epoch for base in self.base_lrs]


class PerUpdate:
    """Steps by epoch and by update, from values taken when it was made, as timm's do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.base_values = [float(group["lr"]) for group in optimizer.param_groups]
        self.updates = 0

    def step(self, epoch: int = 0) -> None:
        self.updates += 1
        self.step_update(self.updates)

    def step_update(self, updates: int) -> None:
        for group, value in zip(self.optimizer.param_groups, self.base_values, strict=True):
            write(group, value / (1 + updates))


def write(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def sequence(optimizer: Any) -> Any:
    warmup = schedulers.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = schedulers.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-3)
    restarts = schedulers.CosineAnnealingWarmRestarts(optimizer, 7, eta_min=2e-3)
    inner = schedulers.SequentialLR(optimizer, [warmup, cosine, restarts], [5, 8])
    return schedulers.ChainedScheduler([inner, schedulers.ExponentialLR(optimizer, 0.99)])


TORCH: dict[str, Make] = {
    "none": lambda o: None,
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.97**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.97),
    "StepLR": lambda o: schedulers.StepLR(o, 10),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [10, 20]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 10),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=10),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS + 5),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS // 2, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(
        o, 6, 2, eta_min=0.01
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 8, mode="triangular2"),
    "CyclicLR, by iteration": lambda o: schedulers.CyclicLR(
        o, 0.01, 0.1, 4, mode="exp_range", gamma=0.99
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, STEPS + 5, three_phase=True),
    "SequentialLR": sequence,
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=10), schedulers.ExponentialLR(o, 0.97)],
        optimizer=o,
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=3, min_lr=0.003),
    "SWALR": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=20),
    "warm-up from 0": lambda o: schedulers.LambdaLR(o, lambda step: max(step - 3, 0) / 20),
    "two at once": lambda o: [
        schedulers.ExponentialLR(o, 0.97),
        schedulers.ReduceLROnPlateau(o, patience=5),
    ],
}
OTHERS: dict[str, Make] = {
    "computed from a count": Noam,
    "computed from the rate before": Decay,
    "with its own floor": WithOwnFloor,
    "by epoch and by update": PerUpdate,
    "nested in torch's": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 6), WithOwnFloor(o)], [6]
    ),
    "beside torch's": lambda o: [schedulers.ExponentialLR(o, 0.97), Decay(o)],
}


def step_all(scheduler: Any) -> None:
    for one in scheduler if isinstance(scheduler, list) else [scheduler]:
        if isinstance(one, schedulers.ReduceLROnPlateau):
            one.step(1.0)
        elif one is not None:
            one.step()


def curve(make: Make, commands: dict[int, float], rate: Any = 0.1) -> list[float]:
    optimizer = make_optimizer(torch.tensor(rate, dtype=torch.float64) if rate is not None else 0.1)
    if rate is None:
        optimizer = make_optimizer()
    scheduler = make(optimizer)
    held = OptimizerRate(optimizer, scheduler)
    rates = []
    for step in range(STEPS):
        optimizer.step()
        step_all(scheduler)
        if step in commands:
            assert held.change_learning_rate(commands[step]) == ""
        assert not held.watch()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize("rate", [None, 0.1], ids=["number", "tensor"])
@pytest.mark.parametrize("name", TORCH | OTHERS)
def test_every_rate_is_the_commanded_multiple_to_the_end(name: str, rate: Any) -> None:
    make = (TORCH | OTHERS)[name]
    plain = curve(make, {}, rate)
    changed = curve(make, {2: -0.5, 12: 0.2}, rate)
    expected = [
        value * (1.0 if step < 2 else 0.5 if step < 12 else 0.6) for step, value in enumerate(plain)
    ]
    assert changed == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_every_group_is_scaled_and_keeps_its_proportion() -> None:
    optimizer = make_optimizer()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.0})
    rate = OptimizerRate(optimizer)
    rate.change_learning_rate(-0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.0]
    rate.change_learning_rate(1e6)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 1.0, 0.0])


@pytest.mark.parametrize("make", [TORCH["none"], TORCH["OneCycleLR"], Noam])
def test_a_tensor_stays_the_same_tensor_also_in_several_groups(make: Make) -> None:
    shared = torch.tensor(0.1)
    optimizer = make_optimizer(shared)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": shared})
    scheduler = make(optimizer)
    before = float(shared)
    assert OptimizerRate(optimizer, scheduler).change_learning_rate(-0.5) == ""
    assert float(shared) == pytest.approx(before / 2)
    optimizer.step()
    step_all(scheduler)
    assert all(group["lr"] is shared for group in optimizer.param_groups)


def test_a_scheduler_that_is_called_keeps_the_change_too() -> None:
    optimizer = make_optimizer()
    schedule = Called(optimizer)
    assert OptimizerRate(optimizer, schedule).change_learning_rate(-0.5) == ""
    schedule(3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * Called.rate_of(3))


def test_momentum_is_left_alone_when_it_is_cycled() -> None:
    momenta = []
    for delta in (0.0, -0.5):
        optimizer = make_optimizer()
        scheduler = schedulers.CyclicLR(optimizer, 0.01, 0.1, 4)
        OptimizerRate(optimizer, scheduler).change_learning_rate(delta)
        optimizer.step()
        scheduler.step()
        momenta.append(optimizer.param_groups[0]["momentum"])
    assert momenta[0] == momenta[1]


def test_what_is_logged_of_the_rates_is_the_changed_one() -> None:
    for make in (TORCH["LambdaLR"], WithOwnFloor):
        optimizer = make_optimizer()
        scheduler = make(optimizer)
        OptimizerRate(optimizer, scheduler).change_learning_rate(-0.5)
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("first", ["rate", "checkpoint"])
@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "ReduceLROnPlateau", "SWALR"])
def test_checkpoints_of_optimizer_and_scheduler_carry_the_change(name: str, first: str) -> None:
    check_resuming(TORCH[name], first)


@pytest.mark.parametrize("first", ["rate", "checkpoint"])
def test_so_do_they_where_the_scheduler_is_somebody_elses(first: str) -> None:
    check_resuming(WithOwnFloor, first)


def check_resuming(make: Make, first: str) -> None:
    plain = curve(make, {})
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    held = OptimizerRate(optimizer, scheduler)
    for step in range(STEPS):
        if step == 20:
            file = io.BytesIO()
            torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            optimizer = make_optimizer()
            scheduler = make(optimizer)
            if first == "rate":
                held = OptimizerRate(optimizer, scheduler)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
            if first == "checkpoint":
                held = OptimizerRate(optimizer, scheduler)
        optimizer.step()
        step_all(scheduler)
        if step == 3:
            assert held.change_learning_rate(-0.5) == ""
        expected = plain[step] * (1.0 if step < 3 else 0.5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-5), step


def test_going_back_to_an_older_checkpoint_goes_back_to_its_rates() -> None:
    for make in (TORCH["StepLR"], WithOwnFloor):
        optimizer = make_optimizer()
        scheduler = make(optimizer)
        rate = OptimizerRate(optimizer, scheduler)
        saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        assert rate.change_learning_rate(-0.5) == ""
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        optimizer.step()
        scheduler.step()
        other = make_optimizer()
        plain = make(other)
        other.step()
        plain.step()
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


def test_copies_and_pickles_are_of_the_scheduler_as_its_user_wrote_it() -> None:
    optimizer = make_optimizer()
    scheduler = Decay(optimizer)
    OptimizerRate(optimizer, scheduler).change_learning_rate(-0.5)
    assert isinstance(scheduler, Decay)
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(copied) is Decay
        assert copied.optimizer.param_groups[0]["lr"] == 0.05
    assert vars(scheduler).keys() == {"optimizer"}


def test_a_scheduler_nobody_named_is_found() -> None:
    optimizer = make_optimizer()
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 1.0)
    assert OptimizerRate(optimizer).change_learning_rate(-0.5) == ""
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_rate_that_somebody_else_sets_cannot_be_changed() -> None:
    optimizer = make_optimizer()
    rate = OptimizerRate(optimizer)
    optimizer.param_groups[0]["lr"] = 0.07
    assert not rate.watch()
    assert rate.change_learning_rate(-0.5) == "set_elsewhere"
    assert optimizer.param_groups[0]["lr"] == 0.07


def test_a_rate_that_a_checkpoint_sets_can_be_changed() -> None:
    optimizer = make_optimizer()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.07
    rate = OptimizerRate(optimizer)
    optimizer.load_state_dict(saved)
    assert not rate.watch()
    assert rate.change_learning_rate(-0.5) == ""
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.035)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_change_that_is_overwritten_is_noticed(as_tensor: bool) -> None:
    optimizer = make_optimizer(torch.tensor(0.1) if as_tensor else 0.1)
    rate = OptimizerRate(optimizer)
    assert rate.change_learning_rate(-0.5) == ""
    assert not rate.watch()
    write(optimizer.param_groups[0], 0.1)
    assert rate.watch()
    assert rate.change_learning_rate(-0.5) == "set_elsewhere"


def test_rates_stay_within_bounds_unless_the_user_put_them_beyond() -> None:
    for rate, delta, expected in (
        (0.9, 1.0, MAX_LEARNING_RATE),
        (1.5e-8, -0.9, MIN_LEARNING_RATE),
        (0.1, -7.0, MIN_LEARNING_RATE),
    ):
        optimizer = make_optimizer(rate)
        assert OptimizerRate(optimizer).change_learning_rate(delta) == ""
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize(("rate", "delta"), [(5.0, 0.1), (1.0, 0.1), (1e-8, -0.1), (0.0, 1.0)])
def test_a_rate_at_its_bound_is_not_said_to_have_changed(rate: float, delta: float) -> None:
    optimizer = make_optimizer(rate)
    assert OptimizerRate(optimizer).change_learning_rate(delta) == "at_bound"
    assert optimizer.param_groups[0]["lr"] == rate


def test_a_change_of_nothing_leaves_each_bit() -> None:
    optimizer = make_optimizer(1 / 3)
    assert OptimizerRate(optimizer).change_learning_rate(0.0) == ""
    assert optimizer.param_groups[0]["lr"] == 1 / 3


def test_without_an_optimizer_nothing_is_said_to_have_happened() -> None:
    rate = OptimizerRate()
    assert rate.change_learning_rate(0.5) == "no_optimizer"
    assert (rate.learning_rate, rate.family) == (0.0, "")


class Forgetful:
    """An optimizer that hands out copies of its groups."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [], "lr": 0.1}]


class WithoutRate:
    """An optimizer that works its rate out by itself."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": [], "lr": None}]


class DummyOptimizer(torch.optim.SGD):
    """What stands for optimizers that step in the backward pass."""


class Overridden:
    """A scheduler whose step is its instance's own."""

    def __init__(self) -> None:
        self.step = lambda: None


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "reason"),
    [
        (Forgetful(), None, "read_only"),
        (WithoutRate(), None, "no_learning_rate"),
        (DummyOptimizer([nn.Parameter(torch.zeros(1))], lr=0.1), None, "no_learning_rate"),
        (make_optimizer(math.inf), None, "not_finite"),
        (torch.optim.Rprop([nn.Parameter(torch.zeros(1))]), None, "rate_is_only_initial"),
        (make_optimizer(), TORCH["StepLR"](make_optimizer()), "scheduler_of_another_optimizer"),
        (make_optimizer(), Overridden(), "scheduler_cannot_be_held"),
        (make_optimizer(), print, "scheduler_cannot_be_held"),
    ],
)
def test_what_cannot_be_changed_says_why(optimizer: Any, scheduler: Any, reason: str) -> None:
    before = [group["lr"] for group in optimizer.param_groups]
    assert OptimizerRate(optimizer, scheduler).change_learning_rate(-0.5) == reason
    assert [group["lr"] for group in optimizer.param_groups] == before


def test_another_optimizer_takes_the_place_of_the_first() -> None:
    first, second = make_optimizer(), make_optimizer()
    rate = OptimizerRate(first)
    rate.use(second)
    assert rate.change_learning_rate(-0.5) == ""
    assert (first.param_groups[0]["lr"], second.param_groups[0]["lr"]) == (0.1, 0.05)


def test_what_accelerate_wraps_is_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    weight = nn.Parameter(torch.zeros(1))
    plain = torch.optim.SGD([weight], lr=0.1)
    optimizer = accelerator.prepare_optimizer(plain)
    inner = schedulers.LambdaLR(plain, lambda step: 1.0)
    scheduler = accelerator.prepare_scheduler(inner)
    assert OptimizerRate(optimizer, scheduler).change_learning_rate(-0.5) == ""
    weight.grad = torch.zeros(1)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.05]
    assert plain.param_groups[0]["lr"] == 0.05
    assert type(inner) is schedulers.LambdaLR
