"""Packets and reports from plain values, and the run that puts them together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client import AckOutcome, ClientMode, ClientSettings, State
from tamiyo_svc.client.capture import read_capture
from tamiyo_svc.client.client import from_environment
from tamiyo_svc.client.packets import build_packet, build_report, freeze
from tamiyo_svc.client.pytest_plugin import (
    tamiyo_client,  # noqa: F401  a fixture
    tamiyo_service,  # noqa: F401  a fixture
)
from tamiyo_svc.client.run import RunSettings
from tamiyo_svc.client.testing import (
    LONG_S,
    FakeService,
    make_packet,
    never_answer,
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


def test_whatever_goes_with_a_state_publishing_does_not_raise() -> None:
    state, odd = State(training_loss=1.0), cast("Any", 1.5)
    with FakeService().client() as client:
        assert client.publish(state, odd) == ""
        assert client.publish(state, 1, blueprint_ids=odd) == ""
        assert client.publish(state, 1, blueprint_ids=[odd]) != ""
        assert client.publish(state, 1, traceparent=odd) != ""
        assert client.flush(LONG_S)
        for step in (True, torch.tensor(2), np.int64(3)):
            client.publish(state, cast("Any", step))
            assert client.wait(int(step), LONG_S) is not None
    assert (client.counters.unpublished, client.counters.published) == (4, 3)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
def test_a_timeout_that_is_no_time_does_not_wait(timeout_s: float) -> None:
    with FakeService(never_answer).client() as client:
        client.publish(State(training_loss=1.0), 1)
        assert client.wait(1, timeout_s) is None
    assert client.counters.missed == 1


def test_settings_take_the_names_of_modes_and_paths(tmp_path: Path) -> None:
    named: dict[str, Any] = {"mode": "disabled", "spool": str(tmp_path / "spool.jsonl")}
    settings = ClientSettings(**named)
    assert settings.mode is ClientMode.DISABLED
    assert settings.spool == tmp_path / "spool.jsonl"


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "sometimes"},
        {"max_entries": 0},
        {"max_queue_bytes": 0},
        {"max_wait_s": math.nan},
        {"close_timeout_s": -1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ClientSettings(**wrong)


def test_a_secret_that_is_not_in_a_keyring_is_refused() -> None:
    secret: Any = b"a secret"
    with pytest.raises(TypeError, match="Keyring"):
        FakeService().client(keyring=secret)


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
    named: Any = str(outcome)
    assert build_report(command, named, reason, run_id="r", issued_ns=7) == report


def test_the_environment_names_mode_and_secret() -> None:
    off = from_environment("r", {"TAMIYO_CLIENT_MODE": "disabled"})
    assert off.mode is ClientMode.DISABLED
    with pytest.raises(ConfigurationError, match="ESPER_LEYLINE_SECRET"):
        from_environment("r", {})
    with pytest.raises(ConfigurationError, match="online, observe, offline, disabled"):
        from_environment("r", {"TAMIYO_CLIENT_MODE": "sometimes"})
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        from_environment("r", {"ESPER_LEYLINE_SECRET": "a secret", "REDIS_URL": "localhost"})


def test_an_empty_variable_is_as_good_as_none() -> None:
    names = (
        "TAMIYO_CLIENT_MODE", "REDIS_URL", "OONA_NORMAL_STREAM", "OONA_FIELD_REPORT_STREAM",
        "OONA_PARTITIONS", "ESPER_LEYLINE_SECRET_PREVIOUS",
    )  # fmt: skip
    secret = {"ESPER_LEYLINE_SECRET": "a secret"}
    assert from_environment("r", {**secret, **dict.fromkeys(names, "")}).settings == (
        from_environment("r", secret).settings
    )


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
