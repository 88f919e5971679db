"""Tamiyo's part of a step: what it applies, reports, measures and survives."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tamiyo_svc.client import AckOutcome
from tamiyo_svc.client.distributed import RankedClient
from tamiyo_svc.client.run import RunSettings, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import (
    LONG_S,
    FakeService,
    grow,
    make_optimizer_command,
    make_pause,
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


def test_gradients_that_cannot_be_measured_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
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


def last_metrics(service: FakeService, run: TamiyoRun) -> Mapping[str, float]:
    assert run.client.flush(LONG_S)  # type: ignore[attr-defined]
    return service.packets[-1].training_metrics


@pytest.mark.parametrize(
    ("target", "notes"),
    [
        (None, "rejected: learning_rate: no_optimizer"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), "at_bound"),
        (torch.optim.Rprop([torch.nn.Parameter(torch.ones(1))]), "rate_is_only_initial"),
    ],
)
def test_a_rate_that_cannot_be_changed_is_reported_with_the_reason(
    target: torch.optim.Optimizer | None, notes: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = FakeService(lambda _: [make_optimizer_command(0.5)])
    with TamiyoRun(service.client(), optimizer=target, settings=WAITING) as run:
        for step in (1, 2):
            assert run.end_step(step, 1.0).outcome is AckOutcome.REJECTED
        assert run.client.flush(LONG_S)  # type: ignore[attr-defined]
    assert service.reports[0].notes.endswith(notes)
    assert caplog.text.count("command refused") == 1


def test_a_command_for_the_optimizer_before_is_for_another() -> None:
    service = FakeService(lambda _: [make_optimizer_command(-0.5, "sgd")])
    with TamiyoRun(service.client(), optimizer=optimizer(), settings=WAITING) as run:
        assert run.end_step(1, 1.0).outcome is AckOutcome.APPLIED
        run.use_optimizer(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]))
        assert run.end_step(2, 1.0).reason == "unknown_optimizer"


@pytest.mark.parametrize("names", [{"weight_decay": 0.5}, {"lr_delta": -0.5, "momentum": 0.1}, {}])
def test_what_it_cannot_adjust_is_not_said_to_be_done(names: dict[str, float]) -> None:
    command = make_optimizer_command(0.0)
    command.optimizer_adjustment.hyperparameters.clear()
    command.optimizer_adjustment.hyperparameters.update(names)
    target = optimizer()
    with TamiyoRun(
        FakeService(lambda _: [command]).client(), optimizer=target, settings=WAITING
    ) as run:
        assert run.end_step(1, 1.0).reason.startswith("unsupported")
    assert target.param_groups[0]["lr"] == 1.0


def test_a_rate_set_by_hand_after_a_command_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService(lambda _: [make_optimizer_command(-0.5)])
    target = optimizer()
    with TamiyoRun(service.client(), optimizer=target, settings=WAITING) as run:
        for step in (1, 2, 3):
            run.end_step(step, 1.0)
            target.param_groups[0]["lr"] = 1.0
    assert caplog.text.count("a commanded learning rate was overwritten") == 1
    assert "give what sets the rate as `scheduler`" in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_bad_loss_is_sent_as_it_is_and_the_run_goes_on(bad: Any) -> None:
    service = FakeService()
    with TamiyoRun(service.client(), settings=WAITING) as run:
        for step in range(1, 4):
            run.end_step(step, bad if step == 2 else 1.0, gradient_norm=1.0)
        metrics = last_metrics(service, run)
    assert not math.isfinite(service.packets[1].training_loss)
    assert not math.isfinite(service.packets[1].training_metrics["loss"])
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["nonfinite_total"] == 1.0


def test_a_number_too_large_for_a_packet_is_large_and_not_infinite() -> None:
    service = FakeService()
    with TamiyoRun(service.client(), settings=WAITING) as run:
        run.end_step(1, 1e300, metrics={"mine": -1e300, "endless": math.inf})
        metrics = last_metrics(service, run)
    assert (metrics["loss"], metrics["mine"]) == pytest.approx((3.4e38, -3.4e38))
    assert metrics["endless"] == math.inf


@pytest.mark.parametrize("loss", [torch.ones(2), "a word", object()])
def test_a_loss_that_is_no_number_ends_nothing(loss: Any, caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()
    with TamiyoRun(service.client(), settings=WAITING) as run:
        assert run.end_step(1, loss).verified is None
        assert run.end_step(2, 1.0).verified is not None
    assert "reading the loss failed" in caplog.text


def test_a_loss_that_still_has_its_graph_is_read() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    service = FakeService()
    with TamiyoRun(service.client(), settings=WAITING) as run:
        run.end_step(1, (weight * 0.25).sum(), gradient_norm=(weight * 2.0).sum())
        assert last_metrics(service, run)["gradient_norm"] == 2.0
    assert service.packets[0].training_loss == 0.25


class Batches:
    """Four batches of five, each a mapping as tokenizers make them."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(4):
            yield {"ids": ["a"], "inputs": torch.zeros(5, 2), "labels": torch.zeros(5)}


def test_a_wrapped_loader_says_how_long_it_was_waited_for_and_how_large_batches_are() -> None:
    service = FakeService()
    with TamiyoRun(service.client(), settings=WAITING) as run:
        for step, batch in enumerate(run.batches(Batches()), 1):
            run.end_step(step, float(batch["inputs"].sum()))
        metrics = last_metrics(service, run)
    assert len(service.packets) == 4
    assert metrics["input_wait_ms"] >= 0.0
    assert metrics["samples_per_s"] == pytest.approx(5e3 / metrics["step_latency_ms"], rel=1e-3)


def test_what_the_policy_looks_at_is_in_the_packet() -> None:
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    target = torch.optim.SGD(weights, lr=0.1)
    service = FakeService()
    with TamiyoRun(service.client(), optimizer=target, settings=WAITING) as run:
        for step in range(1, 10):
            for weight in weights:
                weight.grad = torch.ones(4)
            run.end_step(step, 1.0, epoch=2, epochs_total=8, validation_accuracy=0.5)
        metrics = last_metrics(service, run)
    packet = service.packets[-1]
    assert (packet.validation_accuracy, metrics["epochs_total"]) == (0.5, 8.0)
    assert metrics["grad_conflict_rate"] == 0.0
    assert metrics["gradient_norm"] == pytest.approx(8**0.5)
    assert packet.hardware_context.total_memory_gb > 0.0


def test_the_norm_given_by_the_user_goes_before_the_one_measured() -> None:
    target = optimizer()
    target.param_groups[0]["params"][0].grad = torch.ones(1)
    service = FakeService()
    with TamiyoRun(service.client(), optimizer=target, settings=WAITING) as run:
        run.end_step(1, 1.0, gradient_norm=7.0)
        assert last_metrics(service, run)["gradient_norm"] == 7.0
        target.zero_grad(set_to_none=False)
        run.end_step(2, 1.0)
        assert "gradient_norm" not in last_metrics(service, run)


def test_scaled_gradients_are_reported_unscaled_and_an_overflow_says_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    target = torch.optim.SGD([weight], lr=0.0)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    service = FakeService()
    seen = []
    with TamiyoRun(service.client(), settings=WAITING) as run:
        run.use_optimizer(target, scaler=scaler)
        for step, factor in enumerate((3.0, 3.0, math.inf, 3.0), 1):
            target.zero_grad()
            scaler.scale((weight * factor).sum()).backward()
            before = run.gradient_norm([weight])
            scaler.step(target)
            scaler.update()
            run.end_step(step, 1.0, gradient_norm=before if step == 1 else None)
            metrics = last_metrics(service, run)
            seen.append((metrics["loss_scale"], metrics.get("gradient_norm")))
    assert seen == [(1024.0, 3.0), (2048.0, 3.0), (4096.0, None), (2048.0, 3.0)]


def test_a_joined_seed_learns_from_unscaled_gradients() -> None:
    learned = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        bank = SeedBank(model)
        seed = bank.attach("0")
        inputs = torch.ones(4, 2)
        model(inputs)
        target = torch.optim.SGD(model.parameters(), lr=0.0)
        seed.germinate(
            "seed-residual-mlp", bank.build(seed, "seed-residual-mlp"), learning_rate=0.1, epoch=1
        )
        seed.optimizer = torch.optim.SGD(seed.parameters, lr=0.1)
        seed.enter(leyline.SEED_STAGE_SHADOWING)
        seed.slot.alpha = 1.0
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=scale)
        with TamiyoRun(
            FakeService(never_answer).client(), bank=bank, settings=RunSettings(wait_s=0.0)
        ) as run:
            run._scale = type(run._scale)(scaler)
            scaler.scale(model(inputs).square().mean()).backward()
            scaler.step(target)
            scaler.update()
            run.end_step(1, 1.0)
        learned.append(torch.cat([p.detach().flatten() for p in seed.parameters]))
    torch.testing.assert_close(learned[0], learned[1])


def answer_with(
    command: leyline.AdaptationCommand, _: leyline.SystemStatePacket
) -> list[leyline.AdaptationCommand]:
    return [command]


def test_a_pause_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    pause = make_pause()
    pause.annotations["risk_reason"] = "loss_spike"
    service = FakeService(lambda _: [pause])
    with (
        TamiyoRun(service.client(), optimizer=optimizer(), settings=WAITING) as run,
        caplog.at_level(logging.WARNING),
    ):
        for step in range(1, 13):
            command = make_optimizer_command(0.0) if step in (5, 9) else pause
            service.script = partial(answer_with, command)
            run.end_step(step, 1.0)
    assert caplog.text.count("paused from step 1: loss_spike") == 1
    assert caplog.text.count("paused from step") == 1
    assert caplog.text.count("no longer paused, after 4 steps") == 1


def test_an_answer_that_was_waited_for_has_a_latency() -> None:
    service = FakeService()
    with TamiyoRun(service.client(), settings=WAITING) as run:
        ended = run.end_step(1, 1.0)
        assert ended.latency_ms is not None
        assert ended.latency_ms >= 0.0
        service.script = never_answer
        run.settings = RunSettings(wait_s=0.0)
        assert run.end_step(2, 1.0).latency_ms is None


def test_whatever_breaks_in_its_part_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    broken: Any = SimpleNamespace(param_groups=[])
    service = FakeService()
    with TamiyoRun(service.client(), settings=WAITING) as run:
        run.use_optimizer(broken)
        for step in (1, 2):
            assert run.end_step(step, 1.0).verified is not None
        assert last_metrics(service, run)["loss"] == 1.0
    assert caplog.text.count("measuring failed") == 1


@pytest.mark.parametrize("duplicate", [lambda run: pickle.loads(pickle.dumps(run)), copy.deepcopy])
def test_a_run_and_a_ranked_client_can_be_copied_and_go_on(
    duplicate: Callable[[Any], Any],
) -> None:
    client = FakeService().client()
    for owner in (client, RankedClient(client)):
        with duplicate(TamiyoRun(owner, optimizer=optimizer(), settings=WAITING)) as run:
            assert run.end_step(1, 0.5).verified is not None


def test_a_slow_evaluation_is_not_asked_for_at_every_command() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    inputs, labels = torch.randn(16, 4), torch.arange(16) % 2
    asked: list[bool] = []

    def evaluate() -> float:
        """The seed seems to do harm, each time another."""
        left_out = bool(getattr(seed.slot, "silent", False))
        asked.append(left_out)
        return 1.0 if left_out else 5.0 + len(asked)

    bank = SeedBank(model, evaluate=evaluate)
    seed = bank.attach("1")
    model(inputs)
    service = FakeService(grow("seed-residual-mlp"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TamiyoRun(service.client(), optimizer=optimizer, bank=bank, settings=WAITING) as run:
        for step in range(1, 61):
            run.end_step(
                step,
                1.0,
                isolated_loss=lambda: torch.nn.functional.cross_entropy(model(inputs), labels),
            )
    assert seed.stage_name == "TRAINING"
    measurements = 1 + (60 - 24) // 10
    assert 0 < len(asked) <= 9 * measurements
