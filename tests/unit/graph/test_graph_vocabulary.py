from __future__ import annotations

import hashlib
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.graph.vocabulary import Vocabularies, Vocabulary, id_bucket

_names = st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=12)


def test_indices_start_at_one_and_unknown_is_zero() -> None:
    vocabulary = Vocabulary(["conv2d", "linear"])

    assert [vocabulary.index(name) for name in ("conv2d", "linear", "attention")] == [1, 2, 0]


def test_the_digest_is_that_of_the_key_sorted_pairs_without_spaces() -> None:
    expected = hashlib.sha256(b'[["a",2],["b",1]]').hexdigest()

    assert Vocabulary(["b", "a"]).digest() == expected


@given(_names, _names)
def test_learning_more_keeps_every_earlier_index_and_digest_valid(
    first: list[str], more: list[str]
) -> None:
    vocabulary = Vocabulary(first)
    indices = {name: vocabulary.index(name) for name in first}
    digest = vocabulary.digest()

    for name in more:
        vocabulary.learn(name)

    assert {name: vocabulary.index(name) for name in first} == indices
    assert vocabulary.accepts(digest)
    assert vocabulary.accepts(vocabulary.digest())


def test_a_digest_of_other_names_or_another_order_is_refused() -> None:
    vocabulary = Vocabulary(["a", "b", "c"])

    assert not vocabulary.accepts(Vocabulary(["b", "a"]).digest())
    assert not vocabulary.accepts(Vocabulary(["a", "b", "c", "d"]).digest())


def test_a_vocabulary_never_grows_beyond_what_its_feature_can_tell_apart() -> None:
    vocabulary = Vocabulary(f"type-{index}" for index in range(1024))

    assert vocabulary.learn("one-more") == 0
    assert vocabulary.learn("type-3") == 4
    assert Vocabulary().learn("x" * 10_000) == 0


def test_founding_names_have_the_indices_trainers_use() -> None:
    vocabularies = Vocabularies()

    assert vocabularies.optimizer_families.index("sgd") == 1
    assert vocabularies.optimizer_families.index("adagrad") == 5
    assert vocabularies.blending_schedules.index("warmup_hold") == 3


@given(_names)
def test_a_snapshot_restores_every_digest(names: list[str]) -> None:
    vocabularies = Vocabularies()
    for name in names:
        vocabularies.layer_types.learn(name)
        vocabularies.optimizer_families.learn(name)

    restored = Vocabularies.from_json(vocabularies.to_json())

    assert restored.digests() == vocabularies.digests()


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"layer_types": "conv"}', '{"optimizer_families": ["adam"]}', '{"a": [1]}'],
)
def test_a_broken_snapshot_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Vocabularies.from_json(text)


def test_mismatches_name_the_vocabulary() -> None:
    vocabularies = Vocabularies()
    digests: dict[str, object] = dict(vocabularies.digests())
    assert vocabularies.mismatches(digests) == []

    digests |= {"layer_types": "00", "hazard_classes": 7, "colours": "00"}

    assert sorted(vocabularies.mismatches(digests)) == ["colours", "hazard_classes", "layer_types"]


def test_id_buckets_are_the_same_in_every_process() -> None:
    assert [id_bucket(name) for name in ("seed-0", "seed-1", "")] == [1, 687, 692]


def test_threads_that_learn_at_once_never_share_an_index() -> None:
    vocabulary = Vocabulary()
    names = [f"name-{number}" for number in range(600)]
    start = threading.Barrier(4)
    learnt: list[dict[str, int]] = []

    def learn(order: list[str]) -> None:
        start.wait()
        learnt.append({name: vocabulary.learn(name) for name in order})

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=learn, args=(names[shift:] + names[:shift],))
            for shift in (0, 150, 300, 450)
        ]
        for thread in threads:
            thread.start()
        snapshots = [list(vocabulary) for _ in range(200)]
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all(one == learnt[0] for one in learnt)
    assert sorted(learnt[0].values()) == list(range(1, 601))
    whole = list(vocabulary)
    assert all(whole[: len(snapshot)] == snapshot for snapshot in snapshots)
