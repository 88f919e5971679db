"""Recorded and replayed commands compared."""

from __future__ import annotations

import json
from typing import Any

from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.cli.decision_diff import Agreement, Comparison, compare, comparison_text
from tamiyo_svc.cli.replay_page import render_page
from tamiyo_svc.decision.record import PolicyIdentity
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.outcomes import Received
from tamiyo_svc.service.recording import Recording
from tamiyo_svc.service.replay import Redecided, Replay
from tamiyo_svc.taxonomy import Outcome


def seed_command(**annotations: str) -> leyline.AdaptationCommand:
    command = leyline.AdaptationCommand(
        command_id="c",
        command_type=leyline.COMMAND_SEED,
        target_seed_id="seed-1",
        annotations={"risk_reason": "policy", "policy_action": "seed", **annotations},
    )
    command.issued_at.seconds = 1
    command.seed_operation.operation = leyline.SEED_OP_GERMINATE
    command.seed_operation.blueprint_id = "b"
    command.seed_operation.parameters["alpha"] = 0.25
    return command


def pause_command(**annotations: str) -> leyline.AdaptationCommand:
    told = {"risk_reason": "loss_spike", "policy_action": "seed", **annotations}
    command = leyline.AdaptationCommand(
        command_id="c", command_type=leyline.COMMAND_PAUSE, annotations=told
    )
    command.issued_at.seconds = 1
    return command


def compared(
    recorded: leyline.AdaptationCommand | None, replayed: leyline.AdaptationCommand
) -> Comparison:
    packet = leyline.SystemStatePacket(training_run_id="r", packet_id="p", global_step=7)
    received = Received(Entry("oona.normal", "1700000000000-0", {}), packet, {}, b"d", 0.0)
    replay = Replay(PolicyIdentity("id", "v2"), [Redecided(received, replayed, recorded)])
    commands = {} if recorded is None else {"c": recorded}
    return compare(Recording(commands=commands), replay)


def agreement(recorded: Any, replayed: Any) -> Agreement:
    return compared(recorded, replayed).rows[0].agreement


def test_the_same_bytes_are_identical_whoever_signed_them() -> None:
    signed = seed_command()
    Keyring(b"a secret for the tests").sign_command(signed)
    comparison = compared(signed, seed_command())
    assert comparison.rows[0].agreement is Agreement.IDENTICAL
    assert comparison.rows[0].changes == {}


def test_other_numbers_and_annotations_are_the_same_decision() -> None:
    other = seed_command(policy_version="v2")
    other.seed_operation.parameters["alpha"] = 0.5
    comparison = compared(seed_command(policy_version="v1"), other)
    assert comparison.rows[0].agreement is Agreement.SAME_DECISION
    assert comparison.rows[0].changes == {
        "annotations.policy_version": ("v1", "v2"),
        "seed_operation.parameters.alpha": ("0.25", "0.5"),
    }
    assert comparison.agrees
    assert comparison.recorded_policies == {"v1": 1}


def test_another_seed_blueprint_or_operation_is_another_decision() -> None:
    for change in ("seed", "blueprint", "operation"):
        other = seed_command()
        if change == "seed":
            other.target_seed_id = "seed-2"
        elif change == "blueprint":
            other.seed_operation.blueprint_id = "other"
        else:
            other.seed_operation.operation = leyline.SEED_OP_CULL
        assert agreement(seed_command(), other) is Agreement.DIFFERENT


def test_a_learning_rate_is_an_order_and_no_detail() -> None:
    def command(delta: float) -> leyline.AdaptationCommand:
        made = leyline.AdaptationCommand(command_type=leyline.COMMAND_OPTIMIZER)
        made.optimizer_adjustment.hyperparameters["lr_delta"] = delta
        return made

    assert agreement(command(0.1), command(0.1)) is Agreement.IDENTICAL
    assert agreement(command(0.1), command(0.2)) is Agreement.DIFFERENT


def test_different_decisions_say_what_became_of_what() -> None:
    comparison = compared(seed_command(), pause_command())
    assert not comparison.agrees
    assert comparison.transitions() == [
        ("seed germinate seed-1 b (policy)", "pause (loss_spike)", 1)
    ]
    text = comparison_text(comparison, 5)
    assert "1 compared: 0 identical, 0 same decision, 1 different" in text
    assert "r step 7 p: seed germinate seed-1 b (policy) -> pause (loss_spike)" in text


def test_a_missed_deadline_is_no_disagreement() -> None:
    missed = pause_command(risk_reason="timeout_inference", policy_action="timeout")
    comparison = compared(missed, seed_command())
    assert comparison.rows[0].agreement is Agreement.UNANSWERED
    assert comparison.agrees
    # Having no proposal now where there was one is something else.
    assert agreement(seed_command(), pause_command(policy_action="none")) is Agreement.DIFFERENT


def test_without_a_recorded_command_there_is_nothing_to_compare() -> None:
    comparison = compared(None, seed_command())
    assert (comparison.compared, comparison.count(Agreement.NOT_RECORDED)) == (0, 1)


def test_commands_without_their_packet_and_packets_not_decided_are_counted() -> None:
    replay = Replay(PolicyIdentity("id", "v"))
    replay.others[Outcome.SUPERSEDED] = 3
    replay.before = 2
    comparison = compare(Recording(commands={"x": seed_command()}), replay)
    assert comparison.unmatched == 1
    assert comparison.others == {"superseded": 3, "before the recording": 2}
    assert "superseded 3, before the recording 2" in comparison_text(comparison, 5)


def test_long_lists_are_cut_and_say_so() -> None:
    one = compared(seed_command(), pause_command())
    many = Comparison("p", {"v": 1}, one.rows * 30, {}, {}, 0, "d")
    text = comparison_text(many, 5)
    assert text.count("r step 7") == 5
    assert "and 25 more" in text


def test_page_and_json_hold_every_difference() -> None:
    comparison = compared(seed_command(selected_seed="<b>"), pause_command())
    page = render_page(comparison, "window.jsonl")
    assert "0 of 1 decisions agree" in page
    assert "seed_operation.blueprint_id" in page
    assert "<b></code>" not in page
    document = json.loads(json.dumps(comparison.document()))
    assert document["agreement"]["different"] == 1
    assert document["decisions"][0]["changes"]["target_seed_id"] == ["seed-1", ""]
