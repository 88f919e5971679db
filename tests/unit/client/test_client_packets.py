"""Packets and reports from plain values, and the run that puts them together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client import AckOutcome, ClientMode, ClientSettings, State
from tamiyo_svc.client.capture import read_capture
from tamiyo_svc.client.client import from_environment
from tamiyo_svc.client.packets import build_packet, build_report, freeze
from tamiyo_svc.client.run import RunSettings, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import (
    LONG_S,
    FakeService,
    make_optimizer_command,
    make_packet,
    make_seed_command,
    never_answer,
    tamiyo_client,  # noqa: F401  a fixture
    tamiyo_service,  # noqa: F401  a fixture
)
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.signing import Keyring

WAITING = RunSettings(wait_s=LONG_S)
junk = st.one_of(
    st.none(), st.floats(), st.integers(), st.text(max_size=5), st.booleans(), st.just([1])
)


def build(state: State) -> leyline.SystemStatePacket:
    return build_packet(
        freeze(state), run_id="r", packet_id="p", step=3, timestamp_ns=5, experiment="e"
    )


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), junk))
def test_metrics_that_are_no_numbers_are_left_out(metrics: dict[str, Any]) -> None:
    packet = build(State(metrics=metrics))
    assert set(packet.training_metrics) <= set(metrics)
    for name, value in metrics.items():
        if isinstance(value, float) and math.isfinite(value) and abs(value) < 1e38:
            assert packet.training_metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-37)


def test_what_is_none_is_left_out() -> None:
    packet = build(State())
    assert not packet.HasField("hardware_context")
    assert (packet.training_loss, packet.global_step, packet.experiment_name) == (0.0, 3, "e")


def test_a_state_that_cannot_be_built_costs_its_packet_and_nothing_else() -> None:
    with FakeService().client() as client:
        assert client.publish(State(training_loss="high"), 1) == ""  # type: ignore[arg-type]
        assert client.wait(1, LONG_S) is None
        assert client.publish(State(training_loss=1.0), 2) != ""
        assert client.wait(2, LONG_S) is not None
    assert client.counters.unpublished == 1


def test_what_only_shows_when_the_packet_is_built_costs_it_too_and_nobody_waits() -> None:
    with FakeService().client() as client:
        state = State(metrics={1: 2.0})  # type: ignore[dict-item]
        assert client.publish(state, 1) != ""
        assert client.wait(1, LONG_S) is None
        assert client.counters.unpublished == 1
        client.publish(State(training_loss=1.0), 2)
        assert client.wait(2, LONG_S) is not None


def test_what_the_caller_changes_after_publishing_changes_nothing_of_the_packet() -> None:
    seed = leyline.SeedState(seed_id="seed-0", metrics={"alpha": 0.5})
    mapping: dict[str, Any] = {"seed_id": "seed-1", "metrics": {"alpha": 0.5}}
    metrics: dict[str, Any] = {"loss": 1.0, "accuracy": torch.tensor(0.5)}
    loss = torch.tensor(2.0)
    hardware = leyline.HardwareContext(device_type="cpu")
    frozen = freeze(
        State(loss, metrics=metrics, seeds=[seed, mapping], hardware=hardware)  # type: ignore[arg-type]
    )
    for kept in (seed.metrics, mapping["metrics"], metrics):
        kept.clear()
    loss.add_(1.0)
    hardware.device_type = "cuda"
    packet = build_packet(frozen, run_id="r", packet_id="p", step=1, timestamp_ns=1)
    assert packet.training_loss == 2.0
    assert dict(packet.training_metrics) == {"loss": 1.0, "accuracy": 0.5}
    assert [dict(seed.metrics) for seed in packet.seed_states] == [{"alpha": 0.5}] * 2
    assert packet.hardware_context.device_type == "cpu"


def test_whatever_a_state_holds_publishing_does_not_raise() -> None:
    states: list[Any] = [
        State(torch.ones(2)),  # type: ignore[arg-type]
        State(10**400),
        State(metrics=None),  # type: ignore[arg-type]
        State(seeds=[{"no_such_field": 1}]),
        State(hardware=3),  # type: ignore[arg-type]
        None,
    ]
    with FakeService().client() as client:
        assert [client.publish(state, step) for step, state in enumerate(states)] == [""] * 6
        spread: dict[str, Any] = {"spread": torch.ones(2)}
        assert client.publish(State(metrics=spread), 7) != ""
        assert client.flush(LONG_S)
    assert (client.counters.unpublished, client.counters.published) == (6, 1)


@pytest.mark.parametrize(
    ("outcome", "reason", "notes", "reported"),
    [
        (AckOutcome.APPLIED, "", "applied", leyline.FIELD_REPORT_OUTCOME_SUCCESS),
        (AckOutcome.REJECTED, "gate", "rejected: gate", leyline.FIELD_REPORT_OUTCOME_ABORTED),
    ],
)
def test_reports_say_what_became_of_a_command(
    outcome: AckOutcome, reason: str, notes: str, reported: int
) -> None:
    command = leyline.AdaptationCommand(command_id="c", target_seed_id="seed-0")
    report = build_report(command, outcome, reason, run_id="r", issued_ns=7)
    assert (report.report_id, report.notes, report.outcome) == ("fr-ack-c", notes, reported)
    assert (report.command_id, report.training_run_id, report.seed_id) == ("c", "r", "seed-0")


def test_the_environment_names_mode_and_secret() -> None:
    off = from_environment("r", {"TAMIYO_CLIENT_MODE": "disabled"})
    assert off.mode is ClientMode.DISABLED
    with pytest.raises(ConfigurationError, match="ESPER_LEYLINE_SECRET"):
        from_environment("r", {})
    with pytest.raises(ConfigurationError, match="online, observe, offline, disabled"):
        from_environment("r", {"TAMIYO_CLIENT_MODE": "sometimes"})


def test_the_environment_names_the_streams_and_a_file_with_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("leyline").write_text("the current secret\n")
    variables = {
        "ESPER_LEYLINE_SECRET_FILE": "leyline",
        "OONA_NORMAL_STREAM": "oona.normal.pod-1",
        "TAMIYO_CLIENT_MODE": "offline",
    }
    with from_environment("r", variables) as client:
        client.publish(State(training_loss=0.7), 1)
    (entry,) = read_capture(client.settings.spool)
    assert entry.stream == client.settings.report_stream == "oona.normal.pod-1"
    assert Keyring(b"the current secret").verify(entry.payload, entry.signature)
    with pytest.raises(ConfigurationError, match="ESPER_LEYLINE_SECRET_FILE"):
        from_environment("r", {"ESPER_LEYLINE_SECRET_FILE": str(tmp_path / "gone")})


def test_the_environment_says_how_many_partitions_there_are() -> None:
    known = {"ESPER_LEYLINE_SECRET": "a secret for the tests"}
    assert from_environment("run-1", known).reply_stream == "oona.commands.run-1"
    several = from_environment("run-1", {**known, "OONA_PARTITIONS": "4"})
    assert several.reply_stream == "oona.commands.{3}.run-1"
    for wrong in ("0", "65", "four", "-1", "²"):
        with pytest.raises(ConfigurationError, match="OONA_PARTITIONS"):
            from_environment("run-1", {**known, "OONA_PARTITIONS": wrong})


def test_the_fixtures_answer_without_redis(
    tamiyo_service: FakeService,  # noqa: F811
    tamiyo_client: Any,  # noqa: F811
) -> None:
    tamiyo_client.publish_packet(make_packet(4))
    assert tamiyo_client.wait(4, LONG_S).step_index == 4
    assert [packet.global_step for packet in tamiyo_service.packets] == [4]


def test_a_bus_that_is_away_in_the_fake_is_away_for_the_client() -> None:
    service = FakeService()
    service.reachable = False
    with service.client(settings=ClientSettings(close_timeout_s=0.0)) as client:
        client.publish_packet(make_packet(1))
        assert client.wait(1, 0.01) is None
    assert client.counters.published == 0


def test_the_fakes_commands_are_verified_like_any_other() -> None:
    with FakeService().client(keyring=Keyring(b"not the secret of the fake")) as client:
        client.publish_packet(make_packet(1))
        assert client.wait(1, 0.05) is None


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
