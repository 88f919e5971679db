"""Alpha schedules and ways to mix, and what is made of junk."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client.seeds.blending import CONVEX, Mixing, Schedule, read_mixing, read_schedule
from tamiyo_svc.taxonomy import BLENDING_METHODS, BlendMode

fractions = st.floats(0.0, 1.0)
junk_numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("linear", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("cosine", [0.0, 0.1464466, 0.5, 0.8535534, 1.0]),
        ("warmup_hold", [0.0, 0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_alpha_follows_the_commanded_method(method: str, expected: list[float]) -> None:
    schedule = Schedule(method=method, total_steps=4)
    assert [schedule.alpha(step) for step in range(5)] == pytest.approx(expected)


def test_alpha_rises_only_within_its_window() -> None:
    schedule = Schedule(first_alpha=0.2, start=0.25, end=0.75, total_steps=8)
    assert [schedule.alpha(step) for step in (0, 2, 4, 6, 8)] == pytest.approx(
        [0.2, 0.2, 0.6, 1.0, 1.0]
    )


@given(
    st.dictionaries(
        st.sampled_from(
            ["alpha", "blending_method_index", "blending_schedule_start", "blending_schedule_end"]
        ),
        junk_numbers,
    ),
    st.integers(1, 50),
)
def test_any_commanded_schedule_rises_from_a_fraction_to_one(
    parameters: dict[str, float], total_steps: int
) -> None:
    schedule = read_schedule(parameters, total_steps)
    alphas = [schedule.alpha(step) for step in range(total_steps + 1)]
    assert alphas[0] >= 0.0
    assert alphas[-1] == 1.0
    assert all(later >= earlier for earlier, later in itertools.pairwise(alphas))
    assert schedule.method in BLENDING_METHODS


def test_a_window_without_width_becomes_the_whole_blend() -> None:
    schedule = read_schedule({"blending_schedule_start": 0.5, "blending_schedule_end": 0.5}, 10)
    assert (schedule.start, schedule.end) == (0.0, 1.0)


def test_the_method_index_selects_the_method() -> None:
    methods = [read_schedule({"blending_method_index": i}, 10).method for i in range(3)]
    assert tuple(methods) == BLENDING_METHODS


HOST = torch.tensor([[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]])
RESIDUAL = torch.tensor([[[[0.5]], [[-1.0]]], [[[30.0]], [[40.0]]]])


def test_convex_and_residual_meet_the_seed_at_alpha_one() -> None:
    for mode in (BlendMode.CONVEX, BlendMode.RESIDUAL):
        assert torch.allclose(Mixing(mode).mix(HOST, RESIDUAL, 1.0), HOST + RESIDUAL)
        assert torch.allclose(Mixing(mode).mix(HOST, RESIDUAL, 0.5), HOST + 0.5 * RESIDUAL)


def test_channel_weights_each_channel() -> None:
    mixed = Mixing(BlendMode.CHANNEL, alpha_vec=(0.0, 1.0)).mix(HOST, RESIDUAL, 0.5)
    assert torch.equal(mixed[:, 0], HOST[:, 0])
    assert torch.allclose(mixed[:, 1], (HOST + 0.5 * RESIDUAL)[:, 1])


def test_confidence_passes_small_changes_and_damps_large_ones() -> None:
    mixing = Mixing(BlendMode.CONFIDENCE, gate_k=1.0, gate_tau=1.0)
    mixed = mixing.mix(HOST, RESIDUAL, 1.0)
    assert torch.allclose(mixed[0], HOST[0] + RESIDUAL[0])
    # The second sample changes by ten times its size: exp(-(10 - 1)) of it is let through.
    assert torch.allclose(mixed[1], HOST[1] + math.exp(-9.0) * RESIDUAL[1])


def test_confidence_keeps_within_its_alpha_bounds() -> None:
    mixing = Mixing(BlendMode.CONFIDENCE, alpha_lo=0.25, alpha_hi=0.5)
    mixed = mixing.mix(HOST, RESIDUAL, 1.0)
    assert torch.allclose(mixed[0], HOST[0] + 0.5 * RESIDUAL[0])
    assert torch.allclose(mixed[1], HOST[1] + 0.25 * RESIDUAL[1])


CONFIDENCE = {
    "blend_mode": "CONFIDENCE",
    "gate_k": "2.0",
    "gate_tau": "0.5",
    "alpha_lo": "0.1",
    "alpha_hi": "0.9",
}
CHANNEL = {"blend_mode": "CHANNEL", "alpha_vec": "[0.5, 1]", "alpha_vec_len": "2"}


def test_reads_every_mode() -> None:
    assert read_mixing({}, 2) == CONVEX
    assert read_mixing({"blend_mode": "RESIDUAL"}, 2).mode is BlendMode.RESIDUAL
    assert read_mixing(CHANNEL, 2) == Mixing(BlendMode.CHANNEL, alpha_vec=(0.5, 1.0))
    assert read_mixing(CONFIDENCE, 2) == Mixing(BlendMode.CONFIDENCE, 2.0, 0.5, 0.1, 0.9)


@pytest.mark.parametrize(
    "annotations",
    [
        {"blend_mode": "SIDEWAYS"},
        {"blend_mode": "CHANNEL"},
        {**CHANNEL, "alpha_vec": "[0.5]"},
        {**CHANNEL, "alpha_vec": "[0.5, 2]"},
        {**CHANNEL, "alpha_vec": "[0.5, NaN]"},
        {**CHANNEL, "alpha_vec": "[0.5, null]"},
        {**CHANNEL, "alpha_vec": "7"},
        {**CHANNEL, "alpha_vec": "not json"},
        {**CHANNEL, "alpha_vec": "[" * 100_000},
        {**CHANNEL, "alpha_vec_len": "3"},
        {**CONFIDENCE, "gate_k": "-1"},
        {**CONFIDENCE, "gate_tau": "inf"},
        {**CONFIDENCE, "alpha_lo": "0.95"},
        {**CONFIDENCE, "alpha_hi": "1.5"},
        {key: value for key, value in CONFIDENCE.items() if key != "gate_k"},
    ],
)
def test_junk_falls_back_to_convex(annotations: dict[str, str]) -> None:
    assert read_mixing(annotations, 2) == CONVEX


@given(
    st.dictionaries(st.sampled_from([*CONFIDENCE, *CHANNEL]), st.text(max_size=20)),
    st.sampled_from([*BlendMode, "OTHER"]),
)
def test_reading_never_raises(annotations: dict[str, str], mode: str) -> None:
    assert isinstance(read_mixing({**annotations, "blend_mode": mode}, 2), Mixing)


@given(st.lists(fractions, min_size=2, max_size=2))
def test_channel_weights_survive_their_json(weights: list[float]) -> None:
    annotations = {"blend_mode": "CHANNEL", "alpha_vec": json.dumps(weights)}
    assert read_mixing(annotations, 2).alpha_vec == tuple(weights)
