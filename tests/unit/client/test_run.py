"""Tamiyo's part of a step: what it applies, reports, measures and survives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tamiyo_svc.client import AckOutcome
from tamiyo_svc.client.run import RunSettings, TamiyoRun, total_norm
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import (
    LONG_S,
    FakeService,
    make_optimizer_command,
    make_seed_command,
    never_answer,
)
from tamiyo_svc.leyline import leyline_pb2 as leyline

WAITING = RunSettings(wait_s=LONG_S)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)


def test_without_waiting_the_command_of_the_step_before_is_applied() -> None:
    service = FakeService(lambda _: [make_optimizer_command(-0.5)])
    target = optimizer()
    with TamiyoRun(service.client(), optimizer=target, settings=RunSettings(wait_s=0.0)) as run:
        assert run.end_step(1, 1.0).verified is None
        client: Any = run.client
        while client._exchange._command is None:
            pass
        ended = run.end_step(2, 1.0)
    assert ended.verified is not None
    assert ended.verified.step_index == 1
    assert target.param_groups[0]["lr"] == 0.5


def test_a_refused_command_is_reported_with_its_reason() -> None:
    service = FakeService(lambda _: [make_seed_command("seed-9", leyline.SEED_OP_CULL)])
    with TamiyoRun(service.client(), settings=WAITING) as run:
        ended = run.end_step(1, 1.0)
        assert (ended.outcome, ended.reason) == (AckOutcome.REJECTED, "unknown_seed")
        assert run.client.flush(LONG_S)  # type: ignore[attr-defined]
    assert service.reports[0].notes == "rejected: unknown_seed"


def test_an_error_while_applying_ends_as_a_rejection() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def broken(channels: int) -> torch.nn.Module:
        raise RuntimeError("no memory")

    bank = SeedBank(model, {"broken": broken})
    bank.attach("0")
    model(torch.ones(1, 2))
    command = make_seed_command("seed-0", leyline.SEED_OP_GERMINATE, "broken")
    service = FakeService(lambda _: [command])
    with TamiyoRun(service.client(), bank=bank, settings=WAITING) as run:
        ended = run.end_step(1, 1.0)
        service.script = never_answer
    assert (ended.outcome, ended.reason) == (AckOutcome.REJECTED, "failed: no memory")
    assert bank.seeds[0].stage_name == "DORMANT"


def test_an_error_at_every_step_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    bank = SeedBank(model)
    bank.attach("0")
    service = FakeService(
        lambda _: [make_seed_command("seed-0", leyline.SEED_OP_GERMINATE, "seed-residual-mlp")]
    )
    with TamiyoRun(service.client(), bank=bank, settings=WAITING) as run:
        reasons = [run.end_step(step, 1.0).reason for step in (1, 2, 3)]
    assert all("no tensor" in reason and "has passed behind 0 yet" in reason for reason in reasons)
    assert caplog.text.count("applying command failed") == 1


def test_gradients_of_every_kind_are_measured_or_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    embedding = torch.nn.Embedding(9, 4, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    assert total_norm(embedding.parameters()) == pytest.approx((4 * (2.0**2 + 1.0**2)) ** 0.5)
    odd: Any = "no parameter"
    with TamiyoRun(FakeService().client(), settings=WAITING) as run:
        assert run.gradient_norm([odd]) is None
    assert "measuring gradients failed" in caplog.text


def test_a_runs_state_brings_back_client_breaker_and_seeds() -> None:
    with TamiyoRun(FakeService().client(), settings=WAITING) as run:
        run.executor.breaker = leyline.CIRCUIT_STATE_OPEN
        run.end_step(1, 1.0)
        saved = run.state_dict()
    with TamiyoRun(FakeService().client(), settings=WAITING) as resumed:
        resumed.load_state_dict(saved)
        assert resumed.executor.breaker == leyline.CIRCUIT_STATE_OPEN
        assert resumed.client.state_dict()["accepted_s"] == saved["client"]["accepted_s"]
    assert len(saved["client"]["accepted_s"]) == 1
