from __future__ import annotations

import json
import mmap
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.networks import random_network
from support.policies import POLICY_ID, checkpoint, trained

from tamiyo_svc.adapters.policy_store import KeptPolicy, Manifest, PolicyStore
from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.compiled import pack
from tamiyo_svc.policy.evaluator import weights_digest
from tamiyo_svc.policy.folding import fold_weights
from tamiyo_svc.policy.network import NetworkConfig
from tamiyo_svc.policy.update import TakenUpdates
from tamiyo_svc.taxonomy import WeightDtype

FP32 = WeightDtype.FP32
_SMALL = NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4, attention_heads=2)


def _kept(store: PolicyStore, value: float = 1.0) -> KeptPolicy:
    digest = trained(value).digest
    return KeptPolicy(POLICY_ID, f"v{value:g}", digest, store.write(digest, checkpoint(value)))


def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    manifest = Manifest("5-1", _kept(store), None, TakenUpdates({"p": 7}, ("d",)), _kept(store, 2))
    store.save(manifest)

    again = PolicyStore(tmp_path)

    assert again.load() == manifest
    assert manifest.current is not None
    policy = again.open(manifest.current, Vocabularies())
    assert (policy.policy_id, policy.version) == (POLICY_ID, "v1")
    assert policy.digest == trained(1.0).digest
    assert not policy.untrained


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert PolicyStore(tmp_path / "new").load() == Manifest()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_manifest_that_cannot_be_read_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    store = PolicyStore(tmp_path)
    store.save(Manifest("5-1"))
    (store.folder / "manifest.json").write_text(text)

    assert store.load() == Manifest()


def test_the_policy_before_is_kept_and_a_new_name_is_no_new_policy(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    first, second = _kept(store, 1.0), _kept(store, 2.0)

    manifest = Manifest(current=first).with_current(second)
    renamed = manifest.with_current(replace(second, version="final"))

    assert (manifest.current, manifest.previous) == (second, first)
    assert (renamed.current, renamed.previous) == (replace(second, version="final"), first)


def test_a_policy_that_was_packed_elsewhere_is_opened_when_its_network_is_needed(
    tmp_path: Path,
) -> None:
    store = PolicyStore(tmp_path)
    kept = _kept(store)

    policy = store.open_when_needed(kept, Vocabularies(), untrained=False)
    store.give_back(policy)
    hidden = (store.folder / kept.file).rename(tmp_path / "hidden")
    with pytest.raises(PolicyRejectedError, match="invalid_payload"):
        _ = policy.network
    hidden.rename(store.folder / kept.file)

    assert weights_digest(policy.network) == policy.digest == kept.digest
    assert policy.network is policy.network
    store.give_back(policy)
    assert weights_digest(policy.network) == kept.digest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_take_no_memory_once_given_back_and_can_still_be_read(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    kept = _kept(store)
    policy = store.open(kept, Vocabularies())

    def resident_kb() -> int:
        maps = Path("/proc/self/smaps").read_text()
        file = re.escape(str(store.folder / kept.file))
        (size,) = re.findall(rf"{file}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
        return int(size)

    assert resident_kb() > 0
    store.give_back(policy)
    assert resident_kb() == 0
    assert weights_digest(policy.network) == kept.digest


def test_a_checkpoint_of_many_parts_is_written_whole(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    data = os.urandom((5 << 19) + 1)

    name = store.write("digest", data)

    assert (store.folder / name).read_bytes() == data


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file goes at once")
def test_what_a_file_held_goes_while_somebody_still_has_it_open(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    store.write("digest", os.urandom(1_000_000))
    path = store.folder / "digest.safetensors"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        store.sweep(Manifest())

        assert not path.exists()
        assert os.fstat(file.fileno()).st_blocks == 0
        # Where it is mapped, nobody crashes.
        assert mapped[:] == bytes(1_000_000)


def test_a_file_that_may_not_be_written_is_swept_as_well(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    store.write("digest", b"weights")
    path = store.folder / "digest.safetensors"
    path.chmod(0o400)

    store.sweep(Manifest())

    assert not path.exists()


def test_files_that_nothing_names_are_swept(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    kept = [_kept(store, value) for value in (1.0, 2.0, 3.0, 4.0)]
    manifest = Manifest(current=kept[0], previous=kept[1], shadow=kept[2])
    store.save(manifest)
    (store.folder / "half.tmp").write_bytes(b"")

    store.sweep(manifest)

    names = {path.name for path in store.folder.iterdir()}
    assert names == {"manifest.json", kept[0].file, kept[1].file, kept[2].file}


def test_a_checkpoint_named_by_its_path_is_not_swept_from_the_folder(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    kept = _kept(store)
    named = replace(kept, file=str((store.folder / kept.file).resolve()))

    store.sweep(Manifest(current=named))

    assert store.open(named, Vocabularies()).digest == kept.digest


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_what_a_file_held_stays_where_it_has_another_name(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"weights")
    store = PolicyStore(tmp_path)
    store.folder.mkdir()
    link(store.folder / "linked.safetensors", elsewhere)

    store.sweep(Manifest())

    assert list(store.folder.iterdir()) == []
    assert elsewhere.read_bytes() == b"weights"


def test_a_file_stays_for_as_long_as_its_network_does(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    kept = _kept(store)
    policy = store.open(kept, Vocabularies())

    store.sweep(Manifest())

    assert weights_digest(policy.network) == kept.digest
    del policy
    store.sweep(Manifest())
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "swapped", "removed", "header"])
def test_a_damaged_file_is_not_opened(tmp_path: Path, damage: str) -> None:
    store = PolicyStore(tmp_path)
    kept = _kept(store)
    path = store.folder / kept.file
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "swapped":
            path.write_bytes(checkpoint(2.0))
        case "header":
            path.write_bytes(b"\xff" * 64)
        case _:
            path.unlink()

    with pytest.raises(PolicyRejectedError, match="invalid_payload"):
        store.open(kept, Vocabularies())


def test_built_in_policies_need_no_file(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)

    policy = store.open(KeptPolicy("bootstrap", "renamed", ""), Vocabularies())

    assert (policy.policy_id, policy.version, policy.untrained) == ("bootstrap", "renamed", True)
    with pytest.raises(PolicyRejectedError):
        store.open(KeptPolicy("elsewhere", "1", ""), Vocabularies())


def test_a_crash_while_saving_leaves_the_manifest_as_it_was(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    store.save(Manifest("1-0"))
    # What a crash leaves behind: the new text, not yet under the name that counts.
    (store.folder / "manifest.json.99.tmp").write_text(json.dumps({"format": 1})[:5])

    assert store.load() == Manifest("1-0")


@pytest.mark.parametrize("dtype", WeightDtype)
def test_packed_weights_come_back_as_they_were_and_once(tmp_path: Path, dtype: WeightDtype) -> None:
    store = PolicyStore(tmp_path)
    packed = pack(fold_weights(random_network(NetworkConfig(), 3)), 16, dtype)

    file = store.write_packed("digest", packed)
    again = store.take_packed(file)

    assert (again.config, again.columns) == (packed.config, packed.columns)
    assert again.arrays.keys() == packed.arrays.keys()
    for name, array in packed.arrays.items():
        assert again.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(again.arrays[name], array)
    with pytest.raises(FileNotFoundError):
        store.take_packed(file)


@pytest.mark.parametrize("place", [0, 9, 100, -1])
def test_packed_weights_that_were_changed_are_not_taken(tmp_path: Path, place: int) -> None:
    store = PolicyStore(tmp_path)
    file = store.write_packed("digest", pack(fold_weights(random_network(_SMALL, 3)), 16, FP32))
    path = store.folder / file.name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)

    with pytest.raises(ValueError, match=file.name):
        store.take_packed(file)
    assert not path.exists()


def test_packed_weights_that_end_early_are_not_taken(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    file = store.write_packed("digest", pack(fold_weights(random_network(_SMALL, 3)), 16, FP32))
    path = store.folder / file.name
    for size in (path.stat().st_size - 1, 20, 4, 0):
        path.write_bytes(path.read_bytes()[:size] if path.exists() else bytes(size))
        with pytest.raises(ValueError, match=file.name):
            store.take_packed(file)


def test_packed_weights_that_nobody_took_are_swept_away(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    store.write_packed("digest", pack(fold_weights(random_network(_SMALL, 3)), 16, FP32))

    store.sweep(Manifest())

    assert list(store.folder.iterdir()) == []
