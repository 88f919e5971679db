"""Policies as bytes: safetensors to write, safetensors or a `torch.save` state dict to read.

Reading trusts nothing: sizes are capped before anything is loaded, no code runs, and all that is
found wrong is a `PolicyRejectedError` whose reason is one of the documented ones.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import Policy, weights_digest
from tamiyo_svc.policy.folded import fold
from tamiyo_svc.policy.network import (
    ARCHITECTURE,
    NetworkConfig,
    TamiyoNetwork,
    from_contract_name,
    to_contract_name,
)

MAX_BYTES: Final = 256 << 20
"""Largest payload that is read, also counted unpacked."""

_ZIP_MAGIC: Final = b"PK\x03\x04"
_MAX_HEADER_BYTES: Final = 4 << 20


def write_policy(policy: Policy, vocabularies: Vocabularies, created_at: str) -> bytes:
    """A policy as safetensors; `created_at` is an ISO 8601 time."""
    weights = {
        to_contract_name(name): weight.detach().float().contiguous().cpu()
        for name, weight in policy.network.state_dict().items()
    }
    metadata = {
        "architecture_version": ARCHITECTURE,
        "config": json.dumps(asdict(policy.network.config)),
        "registries": json.dumps(vocabularies.digests()),
        "vocabularies": json.dumps(vocabularies.snapshot()),
        "created_at": created_at,
        "policy_id": policy.policy_id,
        "version": policy.version,
        "untrained": json.dumps(policy.untrained),
    }
    return safetensors.torch.save(weights, metadata)


def read_policy(
    payload: bytes,
    vocabularies: Vocabularies,
    *,
    policy_id: str = "",
    version: str = "",
    max_bytes: int = MAX_BYTES,
) -> Policy:
    """Read and fold a checkpoint; `policy_id` and `version`, when given, beat its own.

    Raises:
        PolicyRejectedError: `payload_too_large`, `invalid_payload`, `version_mismatch`,
            `registry_mismatch`, `shape_mismatch` or `nonfinite_weights`.
    """
    if len(payload) > max_bytes:
        raise PolicyRejectedError(
            "payload_too_large", f"{len(payload)} bytes, at most {max_bytes} are read"
        )
    if payload[: len(_ZIP_MAGIC)] == _ZIP_MAGIC:
        weights, metadata = _read_state_dict(payload, max_bytes)
    else:
        weights, metadata = _read_safetensors(payload)
    architecture = metadata.get("architecture_version")
    if architecture != ARCHITECTURE:
        raise PolicyRejectedError(
            "version_mismatch", f"architecture {architecture!r}, {ARCHITECTURE!r} is served"
        )
    _check_registries(metadata.get("registries"), vocabularies)
    network = _load(weights, metadata.get("config"))
    return Policy(
        policy_id=policy_id or str(metadata.get("policy_id", "")),
        version=version or str(metadata.get("version", "")),
        digest=weights_digest(network),
        untrained=metadata.get("untrained") is True,
        network=network,
        folded=fold(network),
    )


def _read_safetensors(payload: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        (length,) = struct.unpack_from("<Q", payload)
        if length > min(_MAX_HEADER_BYTES, len(payload) - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(payload[8 : 8 + length])
        texts = header.get("__metadata__", {})
        metadata = {
            key: json.loads(text) if key in ("config", "registries", "untrained") else text
            for key, text in texts.items()
        }
        return safetensors.torch.load(payload), metadata
    except PolicyRejectedError:
        raise
    except Exception as error:
        raise _invalid(error) from error


def _read_state_dict(payload: bytes, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            members = archive.infolist()
    except Exception as error:
        raise _invalid(error) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise PolicyRejectedError("invalid_payload", "compressed members are not read")
    # Members may overlap in a forged archive, so the sum can exceed the payload.
    if (total := sum(member.file_size for member in members)) > max_bytes:
        raise PolicyRejectedError(
            "payload_too_large", f"{total} bytes unpacked, at most {max_bytes} are read"
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _invalid(error) from error
    if not isinstance(state, dict):
        raise PolicyRejectedError("invalid_payload", f"a {type(state).__name__}, not a state dict")
    # As an entry, or as the attribute `nn.Module.state_dict` gives its result.
    metadata = state.pop("_metadata", None) or getattr(state, "_metadata", None)
    if not all(
        isinstance(name, str) and type(weight) is Tensor and weight.layout is torch.strided
        for name, weight in state.items()
    ):
        raise PolicyRejectedError("invalid_payload", "a state dict maps names to dense tensors")
    return dict(state), dict(metadata) if isinstance(metadata, Mapping) else {}


def _check_registries(digests: object, vocabularies: Vocabularies) -> None:
    if not isinstance(digests, Mapping):
        raise PolicyRejectedError("registry_mismatch", "no vocabulary digests")
    if mismatches := vocabularies.mismatches(digests):
        raise PolicyRejectedError("registry_mismatch", ", ".join(map(str, mismatches)))


def _load(weights: Mapping[str, Tensor], config: object) -> TamiyoNetwork:
    try:
        sizes = NetworkConfig(**config) if isinstance(config, dict) else _inferred(weights)
        # Without storage: what the sizes claim is compared before it is believed.
        with torch.device("meta"):
            network = TamiyoNetwork(sizes)
        renamed = {from_contract_name(name): weight for name, weight in weights.items()}
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise PolicyRejectedError("shape_mismatch", f"{type(error).__name__}: {error}") from error
    expected = network.state_dict()
    if different := sorted(expected.keys() ^ renamed.keys()):
        raise PolicyRejectedError("shape_mismatch", f"missing or unknown weight {different[0]}")
    for name, weight in renamed.items():
        if weight.shape != expected[name].shape or not weight.is_floating_point():
            raise PolicyRejectedError(
                "shape_mismatch",
                f"{name} is {weight.dtype} {tuple(weight.shape)},"
                f" expected {tuple(expected[name].shape)}",
            )
        if not bool(torch.isfinite(weight).all()):
            raise PolicyRejectedError("nonfinite_weights", name)
    network.load_state_dict(
        {name: weight.float().contiguous().clone() for name, weight in renamed.items()},
        assign=True,
    )
    return network.eval()


def _inferred(weights: Mapping[str, Tensor]) -> NetworkConfig:
    """Sizes as the shapes imply them, for checkpoints that do not state theirs."""
    attention = weights["_gat_layers.0.convs.<global___influences___seed>.att_src"]
    edge = weights["_gat_layers.0.convs.<global___influences___seed>.lin_edge.weight"]
    return NetworkConfig(
        sage_hidden_dim=weights["_node_encoders.global.0.weight"].shape[0],
        gat_hidden_dim=attention.shape[2],
        attention_heads=attention.shape[1],
        policy_classes=weights["_policy_head.bias"].shape[0],
        blending_classes=weights["_blending_head.bias"].shape[0],
        schedule_output_dim=weights["_schedule_head.2.bias"].shape[0],
        edge_feature_dim=edge.shape[1],
        risk_classes=weights["_risk_head.bias"].shape[0],
        param_vector_dim=weights["_param_head.2.bias"].shape[0],
    )


def _invalid(error: Exception) -> PolicyRejectedError:
    return PolicyRejectedError("invalid_payload", f"{type(error).__name__}: {error}")
