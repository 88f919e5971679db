"""What a packet says about a seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.seeds.blending import CONVEX, Schedule
from tamiyo_svc.client.seeds.lifecycle import Seed
from tamiyo_svc.leyline import leyline_pb2 as leyline

BLUEPRINT = "seed-residual-mlp"


def make_bank(*, grown: bool) -> tuple[SeedBank, Seed]:
    model = nn.Sequential(nn.Linear(4, 4))
    bank = SeedBank(model, risks={BLUEPRINT: 0.15})
    seed = bank.attach("0", "seed-a")
    model(torch.ones(1, 4))
    if grown:
        seed.germinate(BLUEPRINT, bank.build(seed, BLUEPRINT), learning_rate=2e-3, epoch=3)
    return bank, seed


def test_a_dormant_seed_measures_nothing() -> None:
    bank, _ = make_bank(grown=False)
    (state,) = bank.states(epoch=5)
    assert state.seed_id == "seed-a"
    assert state.stage == leyline.SEED_STAGE_DORMANT
    assert (state.learning_rate, state.gradient_norm, state.risk_score) == (0.0, 0.0, 0.0)
    assert (state.age_epochs, state.layer_depth) == (0, 1)
    assert state.metrics["blend_allowed"] == 0.0


def test_a_blending_seed_says_how_far_it_is() -> None:
    bank, seed = make_bank(grown=True)
    seed.start_blending(Schedule(total_steps=10), CONVEX)
    seed.advance(blend=True)
    seed.observe(1.0, 0.75)
    (state,) = bank.states(epoch=5)
    assert state.stage == leyline.SEED_STAGE_BLENDING
    assert state.learning_rate == pytest.approx(2e-3)
    assert state.gradient_norm == 0.75
    assert state.age_epochs == 3
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
    ("impact", "risk"), [(-1.0, 0.15), (0.2, 0.35), (5.0, 1.0), (float("nan"), 1.0)]
)
def test_risk_is_the_blueprints_plus_measured_harm(impact: float, risk: float) -> None:
    bank, seed = make_bank(grown=True)
    seed.impact = impact
    assert bank.states(epoch=3)[0].risk_score == pytest.approx(risk)


def test_a_seed_follows_the_hosts_learning_rate() -> None:
    bank, seed = make_bank(grown=True)
    bank.follow(5e-4)
    assert seed.learning_rate == 5e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_loss_leaves_a_seeds_averages_alone(bad: float) -> None:
    _, seed = make_bank(grown=True)
    seed.observe(bad, 1.0)
    for loss in (2.0, bad, 2.0):
        seed.observe(loss, 1.0)
    assert (seed.loss_fast, seed.loss_slow) == (2.0, 2.0)
    seed.observe(4.0, 1.0)
    assert seed.loss_fast > seed.loss_slow > 2.0
