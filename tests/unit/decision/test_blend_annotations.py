from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.blend import BlendOptions, blend_annotations, channel_count
from tamiyo_svc.leyline import leyline_pb2 as leyline

NAN = float("nan")


def blueprint(metadata: Any) -> Blueprint:
    return Blueprint(leyline.BlueprintDescriptor(blueprint_id="b"), graph_metadata=metadata)


def channels(count: object) -> Blueprint:
    return blueprint({"layers": [{"output_channels": 999}, {"output_channels": count}]})


def annotate(
    mode: str, source: Blueprint | None = None, alpha: float = 0.25, **options: Any
) -> dict[str, str]:
    return blend_annotations(
        BlendOptions(enabled=True, default_mode=mode, **options), alpha, source
    )


def test_switched_off_there_is_no_key() -> None:
    assert blend_annotations(BlendOptions(default_mode="CHANNEL"), 0.25, channels(4)) == {}


@pytest.mark.parametrize("mode", ["CONVEX", "RESIDUAL"])
def test_a_chosen_mode_is_an_override(mode: str) -> None:
    assert annotate(mode) == {"blend_mode": mode, "blend_mode_source": "override"}


@pytest.mark.parametrize("mode", ["", "SOFTMAX"])
def test_an_unknown_mode_is_convex(mode: str) -> None:
    assert annotate(mode) == {"blend_mode": "CONVEX", "blend_mode_source": "heuristic"}


def test_confidence_has_pass_through_gates_by_default() -> None:
    assert annotate("CONFIDENCE") == {
        "blend_mode": "CONFIDENCE",
        "blend_mode_source": "override",
        "gate_k": "1.0",
        "gate_tau": "1.0",
        "alpha_lo": "0.0",
        "alpha_hi": "1.0",
    }


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [
        (0.2, 0.8, ("0.2", "0.8")),
        (0.8, 0.2, ("0.2", "0.8")),
        (-1.0, 2.0, ("0.0", "1.0")),
        (NAN, NAN, ("0.0", "1.0")),
    ],
)
def test_alpha_limits_are_clamped_and_ordered(
    lo: float, hi: float, expected: tuple[str, str]
) -> None:
    found = annotate("CONFIDENCE", alpha_lo=lo, alpha_hi=hi)
    assert (found["alpha_lo"], found["alpha_hi"]) == expected


def test_gates_follow_the_options() -> None:
    found = annotate("CONFIDENCE", gate_k=2.0, gate_tau=0.5)
    assert (found["gate_k"], found["gate_tau"]) == ("2.0", "0.5")


def test_channel_alphas_follow_the_deepest_layer() -> None:
    found = annotate("CHANNEL", channels(4))
    assert json.loads(found["alpha_vec"]) == [0.25] * 4
    assert found["alpha_vec_len"] == "4"


@pytest.mark.parametrize(
    "source",
    [
        None,
        blueprint(None),
        blueprint({}),
        blueprint({"layers": []}),
        blueprint({"layers": "many"}),
        blueprint({"layers": [7]}),
        blueprint([]),
        channels(None),
        channels("8"),
        channels(True),
        channels(0),
        channels(-4),
        channels(4.0),
        channels(65),
    ],
)
def test_without_a_usable_channel_count_there_is_no_vector(source: Blueprint | None) -> None:
    assert annotate("CHANNEL", source) == {
        "blend_mode": "CHANNEL",
        "blend_mode_source": "override",
    }


def test_a_vector_above_one_kib_is_left_out() -> None:
    kept = annotate("CHANNEL", channels(113), 0.123456, alpha_vec_max=500)
    dropped = annotate("CHANNEL", channels(114), 0.123456, alpha_vec_max=500)
    assert len(kept["alpha_vec"]) <= 1024
    assert dropped.keys() == {"blend_mode", "blend_mode_source"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["layers", "output_channels"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@given(JSON)
def test_no_metadata_is_an_error(metadata: Any) -> None:
    count = channel_count(metadata)
    assert count is None or count > 0
