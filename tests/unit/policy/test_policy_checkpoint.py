from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.checkpoint import read_policy, write_policy
from tamiyo_svc.policy.evaluator import build_policy
from tamiyo_svc.policy.network import ARCHITECTURE, NetworkConfig, to_contract_name

_SMALL = NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4, attention_heads=2)
_POLICY = build_policy("untrained", _SMALL)
_VOCABULARIES = Vocabularies()
_PAYLOAD = write_policy(_POLICY, _VOCABULARIES, "2026-01-01T00:00:00Z")
_CONTRACT = Path(__file__).parents[2] / "data" / "gnn_small.safetensors"


def _weights() -> dict[str, Tensor]:
    return {
        to_contract_name(name): weight.clone()
        for name, weight in _POLICY.network.state_dict().items()
    }


def _metadata(**changes: str) -> dict[str, str]:
    return {
        "architecture_version": ARCHITECTURE,
        "registries": json.dumps(_VOCABULARIES.digests()),
        **changes,
    }


def _safetensors(weights: dict[str, Tensor], **changes: str) -> bytes:
    return safetensors.torch.save(weights, _metadata(**changes))


def _state_dict(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _saved(**metadata: Any) -> dict[str, Any]:
    return {
        **_weights(),
        "_metadata": {
            "architecture_version": ARCHITECTURE,
            "registries": _VOCABULARIES.digests(),
            **metadata,
        },
    }


def _reason(payload: bytes, **options: Any) -> str:
    with pytest.raises(PolicyRejectedError) as caught:
        read_policy(payload, _VOCABULARIES, **options)
    return caught.value.reason


def test_what_was_written_is_read_back() -> None:
    policy = read_policy(_PAYLOAD, _VOCABULARIES)

    assert policy.digest == _POLICY.digest
    assert policy.network.config == _SMALL
    assert (policy.policy_id, policy.version) == ("untrained", "untrained-1")
    assert policy.untrained
    assert not policy.network.training


def test_the_metadata_says_where_the_policy_comes_from() -> None:
    length = int.from_bytes(_PAYLOAD[:8], "little")
    metadata = json.loads(_PAYLOAD[8 : 8 + length])["__metadata__"]

    assert metadata["architecture_version"] == ARCHITECTURE
    assert metadata["created_at"] == "2026-01-01T00:00:00Z"
    assert json.loads(metadata["registries"]) == _VOCABULARIES.digests()
    assert json.loads(metadata["vocabularies"]) == _VOCABULARIES.snapshot()


def test_the_caller_may_rename_a_policy() -> None:
    policy = read_policy(_PAYLOAD, _VOCABULARIES, policy_id="other", version="7")

    assert (policy.policy_id, policy.version) == ("other", "7")


def test_weights_of_existing_checkpoints_load_under_their_names() -> None:
    weights = {
        name.removeprefix("weights/"): weight
        for name, weight in safetensors.torch.load_file(_CONTRACT).items()
        if name.startswith("weights/")
    }

    policy = read_policy(_safetensors(weights), _VOCABULARIES)

    assert policy.network.config.sage_hidden_dim == 16
    assert policy.network.config.attention_heads == 2
    assert torch.equal(policy.network.state_dict()["heads.value.bias"], weights["_value_head.bias"])


@pytest.mark.parametrize("as_attribute", [False, True])
def test_a_state_dict_is_read_without_running_code(as_attribute: bool) -> None:
    state: Any = OrderedDict(_saved())
    if as_attribute:
        state._metadata = state.pop("_metadata")

    assert read_policy(_state_dict(state), _VOCABULARIES).digest == _POLICY.digest


def test_a_checkpoint_from_before_a_name_was_learnt_still_fits() -> None:
    later = Vocabularies()
    later.layer_types.learn("conv2d")

    assert read_policy(_PAYLOAD, later).digest == _POLICY.digest


def test_a_checkpoint_of_another_vocabulary_is_refused() -> None:
    other = Vocabularies()
    other.layer_types.learn("conv2d")
    payload = write_policy(_POLICY, other, "")

    assert _reason(payload) == "registry_mismatch"
    assert _reason(_safetensors(_weights(), registries="null")) == "registry_mismatch"
    assert _reason(_state_dict(_saved(registries=None))) == "registry_mismatch"


@pytest.mark.parametrize(
    "payload",
    [
        _safetensors(_weights(), architecture_version="tamiyo_gnn_v2"),
        safetensors.torch.save(_weights()),
        _state_dict(_saved(architecture_version="tamiyo_gnn_v0")),
        _state_dict(_weights()),
    ],
)
def test_another_architecture_is_refused(payload: bytes) -> None:
    assert _reason(payload) == "version_mismatch"


def _changed(name: str, weight: Tensor | None) -> dict[str, Tensor]:
    weights = _weights()
    if weight is None:
        del weights[name]
    else:
        weights[name] = weight
    return weights


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("_value_head.bias", None),
        ("_node_encoders.global.0.weight", None),
        ("_value_head.bias", torch.zeros(2)),
        ("_value_head.bias", torch.zeros(1, dtype=torch.int64)),
        ("_extra.weight", torch.zeros(1)),
        ("_value_head.extra", torch.zeros(1)),
        ("_policy_head.bias", torch.zeros(3)),
    ],
)
def test_missing_unknown_and_misshapen_weights_are_refused(
    name: str, weight: Tensor | None
) -> None:
    assert _reason(_safetensors(_changed(name, weight))) == "shape_mismatch"
    assert _reason(_state_dict({**_saved(), name: torch.zeros(3)})) == "shape_mismatch"


@pytest.mark.parametrize(
    "config", ['{"sage_hidden_dim": 9}', '{"sage_hidden_dim": 1e9}', '{"x": 1}', "{}"]
)
def test_sizes_that_are_not_those_of_the_weights_are_refused(config: str) -> None:
    assert _reason(_safetensors(_weights(), config=config)) == "shape_mismatch"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    payload = _safetensors(_changed("_value_head.bias", torch.tensor([value])))

    assert _reason(payload) == "nonfinite_weights"


def test_an_oversized_payload_is_refused_before_it_is_read() -> None:
    assert _reason(_PAYLOAD, max_bytes=len(_PAYLOAD) - 1) == "payload_too_large"
    assert _reason(b"x" * 100, max_bytes=99) == "payload_too_large"


def _rezipped(payload: bytes, **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload)) as old, zipfile.ZipFile(file, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def test_compressed_members_are_refused_before_they_are_unpacked() -> None:
    payload = _rezipped(_state_dict(_saved()), compression=zipfile.ZIP_DEFLATED)

    assert _reason(payload) == "invalid_payload"


def test_members_that_claim_more_than_the_limit_are_refused() -> None:
    payload = bytearray(_state_dict(_saved()))
    # The uncompressed size stands 24 bytes into each entry of the central directory.
    entry = payload.index(b"PK\x01\x02")
    payload[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2

    assert _reason(bytes(payload)) == "payload_too_large"


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        b"PK\x03\x04",
        _PAYLOAD[:-1],
        _state_dict(_Exploit()),
        _state_dict([1, 2]),
        _state_dict({**_saved(), "_value_head.bias": 3}),
        _state_dict({**_saved(), 5: torch.zeros(1)}),
    ],
)
def test_what_is_no_checkpoint_is_refused(payload: bytes) -> None:
    assert _reason(payload) == "invalid_payload"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=8))
def test_damage_is_refused_or_harmless(offset: int, noise: bytes) -> None:
    damaged = _PAYLOAD[:offset] + noise + _PAYLOAD[offset + len(noise) :]

    with contextlib.suppress(PolicyRejectedError):
        read = read_policy(damaged, _VOCABULARIES)
        assert all(torch.isfinite(weight).all() for weight in read.network.parameters())
