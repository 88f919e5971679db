from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.adapters.vocabulary_store import load_vocabularies, save_vocabularies
from tamiyo_svc.errors import ConfigurationError, StoredStateError
from tamiyo_svc.graph.vocabulary import Vocabularies


def learnt(*names: str) -> Vocabularies:
    vocabularies = Vocabularies()
    for name in names:
        vocabularies.layer_types.learn(name)
    return vocabularies


def test_without_a_file_they_are_fresh(tmp_path: Path) -> None:
    assert load_vocabularies(tmp_path / "none").size == Vocabularies().size


def test_what_was_saved_is_loaded_and_can_be_continued(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    save_vocabularies(folder, learnt("conv2d").to_json())
    vocabularies = load_vocabularies(folder)
    assert vocabularies.layer_types.index("conv2d") == 1
    before = vocabularies.digests()
    vocabularies.layer_types.learn("linear")
    save_vocabularies(folder, vocabularies.to_json())
    after = load_vocabularies(folder)
    assert after.layer_types.index("linear") == 2
    assert after.mismatches(before) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "vocabularies.json",
        "vocabularies.lock",
    ]


@pytest.mark.parametrize("names", [("linear", "conv2d"), ("linear",), ()])
def test_names_on_disk_are_never_renumbered_or_lost(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_vocabularies(tmp_path, learnt("conv2d", "pool").to_json())
    with pytest.raises(StoredStateError):
        save_vocabularies(tmp_path, learnt(*names).to_json())
    assert list(load_vocabularies(tmp_path).layer_types) == ["conv2d", "pool"]


def test_an_unreadable_file_stops_the_start_and_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "vocabularies.json"
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="TAMIYO_STATE_DIR"):
        load_vocabularies(tmp_path)
    with pytest.raises(StoredStateError):
        save_vocabularies(tmp_path, learnt().to_json())
    assert path.read_text() == "{"


@given(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=6), st.integers(0, 6))
def test_any_names_survive_and_an_earlier_state_stays_compatible(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    earlier = learnt(*names[:cut])
    save_vocabularies(folder, earlier.to_json())
    save_vocabularies(folder, learnt(*names).to_json())
    loaded = load_vocabularies(folder)
    assert list(loaded.layer_types) == names
    assert loaded.mismatches(earlier.digests()) == []
