"""State packets of a run."""

from __future__ import annotations

import pytest

from tamiyo_svc.client.seeds.blending import CONVEX, Schedule
from tamiyo_svc.client.seeds.lifecycle import Seed
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.blueprints import BLUEPRINTS, build_seed
from tamiyo_svc.trainer.network import SeedSlot
from tamiyo_svc.trainer.packets import build_packet, seed_state

BLUEPRINT = "seed-depthwise-conv"


def make_seed() -> Seed:
    seed = Seed(1, SeedSlot(12))
    seed.germinate(BLUEPRINT, build_seed(BLUEPRINT, 12, 0), 2e-3, epoch=3)
    return seed


def test_a_dormant_seed_measures_nothing() -> None:
    state = seed_state(Seed(0, SeedSlot(12)), epoch=5)
    assert state.seed_id == "seed-0"
    assert state.stage == leyline.SEED_STAGE_DORMANT
    assert (state.learning_rate, state.gradient_norm, state.risk_score) == (0.0, 0.0, 0.0)
    assert (state.age_epochs, state.layer_depth) == (0, 1)
    assert state.metrics["blend_allowed"] == 0.0


def test_a_blending_seed_says_how_far_it_is() -> None:
    seed = make_seed()
    seed.start_blending(Schedule(total_steps=10), CONVEX)
    seed.advance(blend=True)
    seed.observe(1.0, 0.75)
    state = seed_state(seed, epoch=5)
    assert state.stage == leyline.SEED_STAGE_BLENDING
    assert state.learning_rate == pytest.approx(2e-3)
    assert state.gradient_norm == 0.75
    assert (state.age_epochs, state.layer_depth) == (3, 2)
    assert dict(state.metrics) == pytest.approx(
        {
            "alpha": 0.1,
            "alpha_steps": 1.0,
            "alpha_total_steps": 10.0,
            "alpha_temperature": 1.0,
            "blend_allowed": 1.0,
            "risk_tolerance": 0.5,
        }
    )


@pytest.mark.parametrize(
    ("impact", "added"), [(-1.0, 0.0), (0.2, 0.2), (5.0, None), (float("nan"), None)]
)
def test_risk_is_the_blueprints_plus_measured_harm(impact: float, added: float | None) -> None:
    seed = make_seed()
    seed.impact = impact
    expected = 1.0 if added is None else BLUEPRINTS[BLUEPRINT].risk + added
    assert seed_state(seed, epoch=3).risk_score == pytest.approx(expected)


def test_a_packet_identifies_its_step() -> None:
    packet = build_packet(
        run_id="r",
        step=4,
        epoch=2,
        timestamp_ns=123,
        training_loss=0.5,
        validation_loss=0.25,
        validation_accuracy=0.75,
        metrics={"loss": 0.5},
        hardware=leyline.HardwareContext(device_type="cpu"),
        seeds=[make_seed()],
    )
    assert (packet.packet_id, packet.training_run_id) == ("r-step-4", "r")
    assert (packet.global_step, packet.current_epoch, packet.timestamp_ns) == (4, 2, 123)
    assert (packet.training_loss, packet.validation_loss) == (0.5, 0.25)
    assert packet.validation_accuracy == 0.75
    assert [seed.seed_id for seed in packet.seed_states] == ["seed-1"]
