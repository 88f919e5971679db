"""The partition of a run and the names in it, which every client in any language computes."""

from __future__ import annotations

from collections import Counter

import pytest

from tamiyo_svc.leyline.partition import (
    MAX_PARTITIONS,
    partition_of,
    reply_prefix,
    tag_in,
    tag_of_run,
    tags,
)

VECTORS = {
    "run-1": {1: 0, 2: 1, 3: 2, 4: 3, 16: 11, 63: 17, 64: 59},
    "run-2": {1: 0, 2: 0, 4: 2, 16: 2, 63: 3, 64: 50},
    "résumé": {2: 0, 4: 2, 16: 6, 63: 51, 64: 54},
    "a{b}c": {2: 0, 4: 2, 16: 2, 63: 14, 64: 2},
    "imagenet-resnet50-2026-01-01": {2: 1, 4: 3, 16: 3, 63: 55, 64: 51},
}


@pytest.mark.parametrize("run_id", VECTORS)
def test_a_run_is_always_in_the_same_partition(run_id: str) -> None:
    assert {count: partition_of(run_id, count) for count in VECTORS[run_id]} == VECTORS[run_id]


def test_runs_are_spread_evenly() -> None:
    counts = Counter(partition_of(f"run-{number}", 8) for number in range(8000))
    assert len(counts) == 8
    assert all(850 < count < 1150 for count in counts.values())


def test_one_partition_has_plain_names() -> None:
    assert tags(1) == ("",)
    assert tag_of_run("run-1", 1) == ""
    assert reply_prefix("") == "oona.commands."


def test_names_in_several_partitions_carry_the_hash_tag() -> None:
    assert tags(3) == (".{0}", ".{1}", ".{2}")
    assert tag_of_run("run-1", 4) == ".{3}"
    assert reply_prefix(".{3}") == "oona.commands.{3}."


@pytest.mark.parametrize("count", [0, -1, MAX_PARTITIONS + 1])
def test_other_numbers_of_partitions_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="takes 1 to 64"):
        tags(count)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("oona.normal", ""),
        ("oona.normal.{12}", ".{12}"),
        ("oona.commands.{2}.run-1", ".{2}"),
        ("oona.commands.{2}.a.{7}", ".{2}"),
        ("tamiyo:run.{2}:a{b}c", ".{2}"),
        ("oona.commands.a{b}c", ""),
        ("oona.commands.a.{1x}", ""),
    ],
)
def test_the_tag_is_read_back_from_names(name: str, tag: str) -> None:
    assert tag_in(name) == tag
