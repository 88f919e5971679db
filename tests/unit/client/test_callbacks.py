from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tamiyo_svc.client import AckOutcome, State
from tamiyo_svc.client.callbacks import RunCallback, find_metric, guarded, read_together, scalar
from tamiyo_svc.client.run import RunSettings, StepEnd
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import FakeService

WAITING = RunSettings(wait_s=10.0)


def make_callback(service: FakeService, **options: Any) -> RunCallback:
    return RunCallback(
        service.client(), **{"bank": None, "settings": WAITING, "on_step": None, **options}
    )


def test_values_are_read_together_and_what_is_missing_stays_so() -> None:
    assert read_together([torch.tensor(2.0), None, 3.0]) == [2.0, None, 3.0]


def test_the_mean_is_over_the_ranks_that_have_a_value() -> None:
    def other_rank_has_4_for_all(both: torch.Tensor) -> torch.Tensor:
        return (both + torch.tensor([4.0, 4.0, 1.0, 1.0])) / 2

    assert read_together([torch.tensor(2.0), None], other_rank_has_4_for_all) == [3.0, 4.0]


def test_a_value_that_is_not_finite_is_read_as_it_is() -> None:
    loss, norm = read_together([torch.tensor(math.nan), torch.tensor(math.inf)])
    assert loss is not None
    assert math.isnan(loss)
    assert norm == math.inf


@pytest.mark.parametrize(
    "value",
    [3, 3.0, torch.tensor([2.0, 4.0], dtype=torch.bfloat16), torch.tensor(3.0, requires_grad=True)],
    ids=str,
)
def test_a_loss_is_a_number_in_full_precision(value: Any) -> None:
    number = scalar(value)
    assert number is not None
    assert (number.dtype, float(number), number.requires_grad) == (torch.float32, 3.0, False)


def test_a_metric_of_its_name_goes_before_the_mean_of_several_sets() -> None:
    metrics = {"eval_a_loss": 1.0, "eval_b_loss": torch.tensor(2.0), "eval_a_runtime": 9.0}
    pattern = "eval_.+_loss"
    assert find_metric(metrics, "eval_loss", pattern) == 1.5
    assert find_metric({**metrics, "eval_loss": 5.0}, "eval_loss", pattern) == 5.0
    assert find_metric({}, "eval_loss", pattern) is None


def test_each_kind_of_error_is_logged_once_and_an_interruption_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(RunCallback):
        @guarded
        def fail(self, error: type[BaseException]) -> int:
            raise error("bad")

    callback = Failing(FakeService().client(), bank=None, settings=None, on_step=None)
    for _ in range(3):
        assert callback.fail(ValueError) is None
        assert callback.fail(KeyError) is None
    assert len(caplog.records) == 2
    with pytest.raises(KeyboardInterrupt):
        callback.fail(KeyboardInterrupt)
    with pytest.raises(SystemExit):
        callback.fail(SystemExit)


def test_a_deep_copy_with_its_network_has_its_seeds_in_the_copied_network() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    bank = SeedBank(model)
    bank.attach("0")
    callback, copied = copy.deepcopy((make_callback(FakeService(), bank=bank), model))
    assert callback.run.bank is not None
    assert callback.run.bank.model is copied
    assert copied is not model


def say_nothing(step: int, ended: StepEnd) -> None:
    """An `on_step` of a module's top level."""


def test_what_can_be_pickled_is_in_the_copy(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    callback = make_callback(FakeService(), bank=SeedBank(model), on_step=say_nothing)
    copied: RunCallback = pickle.loads(pickle.dumps(callback))
    assert copied.run.bank is not None
    assert copied.run.settings == WAITING
    assert copied._on_step is say_nothing
    assert "on_step" not in caplog.text


@pytest.mark.parametrize("epochs", [-1, None, 1 << 62])
def test_an_endless_number_of_epochs_is_unknown(epochs: int | None) -> None:
    service = FakeService()
    callback = make_callback(service)
    callback._end_step(1, 1.0, epochs_total=epochs)
    callback._close()
    assert "epochs_total" not in service.packets[0].training_metrics


def test_names_of_reasons_are_few_and_plain() -> None:
    callback = make_callback(FakeService())
    client = callback.run.client
    client.publish(State(training_loss=1.0), step=1)
    verified = client.wait(1, WAITING.wait_s)
    client.close()
    for reason in ("failed: 0x7f01", "failed: 0x7f02", "gate: min_steps"):
        callback._count(StepEnd(verified, AckOutcome.REJECTED, reason))
    names = [name for name in callback._log_values() if "reason" in name]
    assert names == ["tamiyo/reason/failed", "tamiyo/reason/gate_min_steps"]
