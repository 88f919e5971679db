"""What the loader makes of entries, good, hostile and broken."""

from __future__ import annotations

import io
import json
import resource
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.bus import SECRET
from support.policies import POLICY_ID, altered, checkpoint, trained, update

from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.policy_store import PolicyStore
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import SignedEnvelope, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.checkpoint import write_policy
from tamiyo_svc.policy.compiled import pack
from tamiyo_svc.policy.evaluator import PolicyEvaluator
from tamiyo_svc.policy.folding import fold_weights
from tamiyo_svc.policy.golden import record_golden, sample_requests
from tamiyo_svc.service.policy_loader import Finding, LoaderRequest, examine
from tamiyo_svc.taxonomy import WeightDtype

KEYRING = Keyring(SECRET.encode())
# The update is issued now; the entry arrives at the same time.
ENTRY_ID = "{}-0"


@pytest.fixture
def request_(tmp_path: Path) -> LoaderRequest:
    return LoaderRequest(
        redis_url="",
        stream="oona.policy",
        after="0",
        folder=str(tmp_path),
        vocabularies=Vocabularies().snapshot(),
        secrets=(SECRET,),
    )


def entry(envelope: SignedEnvelope, arrived_ms: int) -> Entry:
    return Entry("oona.policy", ENTRY_ID.format(arrived_ms), envelope.fields())


def found(
    request: LoaderRequest,
    payload: bytes,
    attributes: Mapping[str, str] | None = None,
    version: str = "v1",
) -> Finding:
    message = update(version, payload)
    arrived_ms = message.issued_at.ToMilliseconds()
    return examine(entry(seal(message, KEYRING, attributes), arrived_ms), request)


def state_dict(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def as_state_dict(payload: bytes) -> bytes:
    length = int.from_bytes(payload[:8], "little")
    metadata = json.loads(payload[8 : 8 + length])["__metadata__"]
    return state_dict(
        {
            **safetensors.torch.load(payload),
            "_metadata": {
                "architecture_version": metadata["architecture_version"],
                "registries": json.loads(metadata["registries"]),
            },
        }
    )


@pytest.mark.parametrize("convert", [bytes, as_state_dict])
def test_a_good_update_leaves_its_weights_in_a_file(
    request_: LoaderRequest, tmp_path: Path, convert: Any
) -> None:
    finding = found(request_, convert(checkpoint(1.0)), {"issued_by": "ann@desk"})

    assert finding.reason == ""
    assert (finding.policy_id, finding.version, finding.issued_by) == (POLICY_ID, "v1", "ann@desk")
    assert finding.digest == trained(1.0).digest
    assert (tmp_path / "policies" / finding.file).is_file()


def test_a_service_that_takes_packed_weights_gets_them(
    request_: LoaderRequest, tmp_path: Path
) -> None:
    try:
        library = load_compiled(tmp_path / "compiled")
    except CompiledFormUnavailableError as error:
        pytest.skip(str(error))
    finding = found(replace(request_, library=str(library.path)), checkpoint(1.0))
    assert finding.packed is not None
    packed = PolicyStore(tmp_path).take_packed(finding.packed)

    expected = pack(fold_weights(trained(1.0).network), library.panel, WeightDtype.FP32)

    assert packed.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(packed.arrays[name], array)
    assert found(request_, checkpoint(1.0)).packed is None


def test_a_library_that_cannot_be_loaded_costs_the_packed_weights_alone(
    request_: LoaderRequest, tmp_path: Path
) -> None:
    finding = found(replace(request_, library=str(tmp_path / "gone.so")), checkpoint(1.0))

    assert (finding.reason, finding.packed) == ("", None)
    assert finding.file


def test_the_update_is_named_by_the_digest_of_its_envelope(request_: LoaderRequest) -> None:
    sealed = seal(update("v2"), KEYRING)

    finding = examine(entry(sealed, 2**41), request_)

    assert finding.update == sha256(sealed.payload).hexdigest()


def test_golden_packets_are_replayed(request_: LoaderRequest) -> None:
    from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits

    evaluator = PolicyEvaluator(GraphBuilder(GraphLimits(), Vocabularies()), trained(1.0))
    golden = record_golden(evaluator, sample_requests())

    good = found(request_, write_policy(trained(1.0), Vocabularies(), "", golden))
    bad = found(request_, write_policy(trained(2.0), Vocabularies(), "", golden))

    assert (good.reason, good.golden) == ("", len(golden))
    assert bad.reason == "probe_failed"
    assert "golden packet 0" in bad.detail


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({b"payload": b"x"}, "missing_signature"),
        ({b"payload": b"x", b"signature": b"!"}, "invalid_signature"),
        ({b"payload": b"x", b"signature": KEYRING.sign(b"x").encode()}, "invalid_payload"),
    ],
)
def test_what_is_no_signed_envelope_is_refused(
    request_: LoaderRequest, fields: dict[bytes, bytes], reason: str
) -> None:
    assert examine(Entry("oona.policy", "1-0", fields), request_).reason == reason


def test_signatures_are_not_asked_for_where_none_are_required(request_: LoaderRequest) -> None:
    unsigned = seal(update("v1", checkpoint()), None)

    assert examine(entry(unsigned, 2**41), request_).reason == "missing_signature"
    relaxed = replace(request_, secrets=None, verify_updates=False)
    assert examine(entry(unsigned, 2**41), relaxed).reason == ""


def test_other_messages_and_entries_without_a_payload_are_passed_over(
    request_: LoaderRequest,
) -> None:
    other = seal(leyline.SystemStatePacket(packet_id="p"), KEYRING)

    assert examine(entry(other, 1), request_).ignored
    assert examine(Entry("oona.policy", "1-0", {b"bootstrap": b"1"}), request_).ignored


@pytest.mark.parametrize(
    ("attributes", "payload"),
    [
        ({"policy_action": "explode"}, b"x"),
        ({"policy_action": "shadow"}, b""),
        ({}, b""),
    ],
)
def test_updates_that_ask_for_nothing_that_can_be_done_are_refused(
    request_: LoaderRequest, attributes: dict[str, str], payload: bytes
) -> None:
    assert found(request_, payload, attributes, version="").reason == "invalid_payload"


def test_an_entry_over_the_limit_is_refused_before_it_is_verified(request_: LoaderRequest) -> None:
    finding = found(replace(request_, max_bytes=1000), checkpoint())

    assert finding.reason == "payload_too_large"


class _Exploit:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


def test_pickled_code_does_not_run(request_: LoaderRequest, tmp_path: Path) -> None:
    mark = tmp_path / "code ran"
    weights = safetensors.torch.load(checkpoint())

    for hostile in (_Exploit(mark), {**weights, "_metadata": _Exploit(mark)}):
        assert found(request_, state_dict(hostile)).reason == "invalid_payload"
    import pickle

    assert found(request_, pickle.dumps(_Exploit(mark))).reason == "invalid_payload"
    assert not mark.exists()


def deflated_bomb(unpacked_mb: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data/0", "w") as member:
            for _ in range(unpacked_mb):
                member.write(bytes(1 << 20))
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return file.getvalue()


def test_a_zip_bomb_is_refused_without_being_unpacked(request_: LoaderRequest) -> None:
    bomb = deflated_bomb(200)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    finding = found(request_, bomb)

    assert finding.reason == "invalid_payload"
    assert "compressed" in finding.detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize("length", [5 << 20, 1 << 32, 2**63, 2**64 - 1])
def test_an_oversized_header_is_refused(request_: LoaderRequest, length: int) -> None:
    payload = struct.pack("<Q", length) + checkpoint()[8:]

    assert found(request_, payload).reason == "invalid_payload"


def test_deeply_nested_headers_are_refused(request_: LoaderRequest) -> None:
    header = b"[" * 100_000
    payload = struct.pack("<Q", len(header)) + header

    assert found(request_, payload).reason == "invalid_payload"


@pytest.mark.parametrize("convert", [bytes, as_state_dict])
def test_a_checkpoint_cut_anywhere_is_refused(request_: LoaderRequest, convert: Any) -> None:
    payload = convert(checkpoint())

    reasons = {found(request_, payload[:length]).reason for length in range(1, len(payload), 1024)}

    assert reasons == {"invalid_payload"}


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(1, dtype=torch.int64), "shape_mismatch"),
        (torch.zeros(1, dtype=torch.bool), "shape_mismatch"),
        (torch.zeros(1, 1), "shape_mismatch"),
        (torch.zeros(0), "shape_mismatch"),
        (torch.tensor([torch.nan]), "nonfinite_weights"),
        (torch.tensor([-torch.inf]), "nonfinite_weights"),
        (torch.tensor([1e300], dtype=torch.float64), "nonfinite_weights"),
        (torch.tensor([torch.nan], dtype=torch.bfloat16), "nonfinite_weights"),
        (torch.tensor([1.0], dtype=torch.float8_e4m3fn), ""),
        (torch.tensor([1.0], dtype=torch.float64), ""),
    ],
)
def test_weights_are_of_the_right_shape_and_finite_as_float32(
    request_: LoaderRequest, weight: torch.Tensor, reason: str
) -> None:
    payload = altered(checkpoint(), {"_value_head.bias": weight})

    assert found(request_, payload).reason == reason


def test_tensors_without_storage_and_views_that_claim_more_are_refused(
    request_: LoaderRequest,
) -> None:
    weights = safetensors.torch.load(checkpoint())
    metadata = {
        "architecture_version": "tamiyo_gnn_v1",
        "registries": Vocabularies().digests(),
    }
    meta = torch.zeros(1, device="meta")
    huge = torch.zeros(1).expand(1 << 40)

    for weight, reason in ((meta, "invalid_payload"), (huge, "shape_mismatch")):
        payload = state_dict({**weights, "_value_head.bias": weight, "_metadata": metadata})
        assert found(request_, payload).reason == reason


def test_a_state_folder_that_cannot_be_written_fails_the_swap(
    request_: LoaderRequest, tmp_path: Path
) -> None:
    (tmp_path / "policies").write_text("in the way")

    assert found(request_, checkpoint()).reason == "swap_failed"


def test_requests_survive_their_way_through_the_pipe(request_: LoaderRequest) -> None:
    request = replace(request_, issued_ns={"p": 3}, digests=("a",), first=True)

    again = LoaderRequest.from_json(request.to_json())

    assert again.to_json() == request.to_json()
    assert "\n" not in request.to_json()


def test_nothing_secret_is_found(request_: LoaderRequest) -> None:
    forged = seal(update("v1", checkpoint()), Keyring(b"another secret, a wrong one"))

    for finding in (examine(entry(forged, 1), request_), found(request_, checkpoint())):
        assert SECRET not in repr(finding)
