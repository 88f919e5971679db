"""Times as an operator types them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.cli.duration import parse_duration_ms, parse_start, shown_duration
from tamiyo_svc.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [("500ms", 500), ("90s", 90_000), ("5m", 300_000), ("2h", 7_200_000), ("1d", 86_400_000)],
)
def test_durations_have_a_unit(text: str, duration_ms: int) -> None:
    assert parse_duration_ms("--for", text) == duration_ms
    assert parse_start("--since", text, 100_000_000) == f"{100_000_000 - duration_ms}-0"


def test_fractions_are_taken() -> None:
    assert parse_duration_ms("--for", "1.5s") == 1500


@pytest.mark.parametrize("text", ["", "5", "s", "-5s", "5 s", "5w", "1e3s", "٥s ", "yesterday"])
def test_anything_else_is_refused_by_the_name_of_the_option(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--for: got"):
        parse_duration_ms("--for", text)
    with pytest.raises(ConfigurationError, match="--since: got"):
        parse_start("--since", text, 0)


@given(st.integers(10**12, 10**13), st.integers(0, 2**63))
def test_entry_ids_are_taken_as_they_are(milliseconds: int, sequence: int) -> None:
    entry_id = f"{milliseconds}-{sequence}"
    assert parse_start("--since", entry_id, 0) == entry_id
    assert parse_start("--since", str(milliseconds), 0) == str(milliseconds)


def test_what_lies_before_the_epoch_is_the_beginning() -> None:
    assert parse_start("--since", "1d", 1000) == "0-0"


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [
        (0, "0 ms"),
        (999, "999 ms"),
        (1500, "1.5 s"),
        (180_000, "3 min"),
        (7.2e6, "2 h"),
        (9e7, "1.04 d"),
    ],
)
def test_durations_are_shown_in_their_largest_unit(duration_ms: float, text: str) -> None:
    assert shown_duration(duration_ms) == text
