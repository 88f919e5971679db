from __future__ import annotations

import pytest

from tamiyo_svc.graph.coverage import EMPTY_COVERAGE, FAMILIES, Tally


def test_keys_count_equally_and_families_by_what_was_observed() -> None:
    coverage = Tally(
        {"layer.depth": (3, 4), "layer.type": (0, 1), "edges.layer_connects": (0, 1)}
    ).coverage()

    assert coverage.by_key == {"layer.depth": 0.75, "layer.type": 0.0, "edges.layer_connects": 0.0}
    assert coverage.mean == pytest.approx(0.25)
    assert coverage.by_family["node.layer"] == pytest.approx(3 / 5)


def test_every_family_is_reported_even_when_nothing_was_observed() -> None:
    coverage = Tally({"seed.age": (0, 0)}).coverage()

    assert set(coverage.by_family) == set(FAMILIES)
    assert coverage.by_key == {"seed.age": 0.0}
    assert coverage.by_family["edges.layer_connects"] == 0.0


def test_nothing_looked_at_is_no_coverage() -> None:
    assert EMPTY_COVERAGE.mean == 0.0
    assert Tally({}).coverage().mean == 0.0
