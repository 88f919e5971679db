"""Policies as bytes: safetensors to write, safetensors or a `torch.save` state dict to read.

Reading trusts nothing: sizes are capped before anything is loaded, no code runs, and all that is
found wrong is a `PolicyRejectedError` whose reason is one of the documented ones.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import Policy, weights_digest
from tamiyo_svc.policy.network import (
    ARCHITECTURE,
    NetworkConfig,
    TamiyoNetwork,
    from_contract_name,
    to_contract_name,
)
from tamiyo_svc.taxonomy import PolicyRejection

MAX_BYTES: Final = 256 << 20
"""Largest payload that is read, also counted unpacked."""

_ZIP_MAGIC: Final = b"PK\x03\x04"
MAX_HEADER_BYTES: Final = 4 << 20
"""Longest safetensors header that is read."""

_MAX_WIDTH: Final = 4096
_JSON_KEYS: Final = frozenset({"config", "registries", "vocabularies", "untrained", "golden"})


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a payload holds: weights by this module's names, float32 and finite, and metadata."""

    weights: Mapping[str, Tensor]
    sizes: NetworkConfig
    metadata: Mapping[str, Any]

    def build(self, policy_id: str = "", version: str = "") -> Policy:
        """Make it a policy; names that are given beat its own."""
        # Without storage, which the weights bring along.
        with torch.device("meta"):
            network = TamiyoNetwork(self.sizes)
        network.load_state_dict(self.weights, assign=True)
        network.eval()
        return Policy(
            policy_id=policy_id or str(self.metadata.get("policy_id", "")),
            version=version or str(self.metadata.get("version", "")),
            digest=weights_digest(network),
            untrained=self.metadata.get("untrained") is True,
            weights=network,
        )


def write_policy(
    policy: Policy,
    vocabularies: Vocabularies,
    created_at: str,
    golden: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """A policy as safetensors.

    `created_at` is an ISO 8601 time, `golden` what `record_golden` gave.
    """
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
    if golden:
        metadata["golden"] = json.dumps(list(golden))
    return safetensors.torch.save(weights, metadata)


def read_policy(
    payload: bytes,
    vocabularies: Vocabularies,
    *,
    policy_id: str = "",
    version: str = "",
    max_bytes: int = MAX_BYTES,
    check_architecture: bool = True,
) -> Policy:
    """Read and fold a checkpoint; `policy_id` and `version`, when given, beat its own.

    Raises:
        PolicyRejectedError: as for `read_checkpoint`.
    """
    checkpoint = read_checkpoint(
        payload, vocabularies, max_bytes=max_bytes, check_architecture=check_architecture
    )
    return checkpoint.build(policy_id, version)


def read_checkpoint(
    payload: bytes,
    vocabularies: Vocabularies,
    *,
    max_bytes: int = MAX_BYTES,
    check_architecture: bool = True,
) -> Checkpoint:
    """Read a payload and check everything about it that can be checked without running it.

    Without `check_architecture` the label may differ; names and shapes may not.

    Raises:
        PolicyRejectedError: `payload_too_large`, `invalid_payload`, `version_mismatch`,
            `registry_mismatch`, `shape_mismatch` or `nonfinite_weights`.
    """
    if len(payload) > max_bytes:
        raise PolicyRejectedError(
            PolicyRejection.PAYLOAD_TOO_LARGE, f"{len(payload)} bytes, at most {max_bytes} are read"
        )
    if payload[: len(_ZIP_MAGIC)] == _ZIP_MAGIC:
        weights, metadata = _read_state_dict(payload, max_bytes)
    else:
        weights, metadata = _read_safetensors(payload)
    return check_checkpoint(weights, metadata, vocabularies, check_architecture=check_architecture)


def check_checkpoint(
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    vocabularies: Vocabularies,
    *,
    check_architecture: bool = True,
    copy: bool = True,
) -> Checkpoint:
    """Check weights under their contract names, and the metadata that came with them.

    Without `copy` float32 weights go on sharing the memory they lie in.

    Raises:
        PolicyRejectedError: as for `read_checkpoint`.
    """
    architecture = metadata.get("architecture_version")
    if check_architecture and architecture != ARCHITECTURE:
        raise PolicyRejectedError(
            PolicyRejection.VERSION_MISMATCH,
            f"architecture {architecture!r}, {ARCHITECTURE!r} is served",
        )
    _check_registries(metadata.get("registries"), vocabularies)
    sizes, checked = _check_weights(weights, metadata.get("config"), copy)
    return Checkpoint(checked, sizes, metadata)


def read_header(prefix: bytes, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensor table of a safetensors file of `size` bytes from its beginning.

    `prefix` needs the header alone, `header_bytes` says how long that is.

    Raises:
        PolicyRejectedError: `invalid_payload`.
    """
    try:
        length = header_bytes(prefix, size)
        header = json.loads(prefix[8:length])
        return _metadata(header.pop("__metadata__", {})), header
    except PolicyRejectedError:
        raise
    except Exception as error:
        raise _invalid(error) from error


def header_bytes(prefix: bytes, size: int) -> int:
    """Bytes of a safetensors file up to the end of its header, from its first eight.

    Raises:
        PolicyRejectedError: `invalid_payload`: too short, or a header over the limit.
    """
    if len(prefix) < 8:
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, f"{size} bytes are no checkpoint"
        )
    (length,) = struct.unpack_from("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, f"a header of {length} bytes in {size}"
        )
    return int(length) + 8


def _metadata(texts: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a safetensors header with its JSON values read."""
    return {key: json.loads(text) if key in _JSON_KEYS else text for key, text in texts.items()}


def _read_safetensors(payload: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata, _ = read_header(payload, len(payload))
    try:
        return safetensors.torch.load(payload), metadata
    except Exception as error:
        raise _invalid(error) from error


def _read_state_dict(payload: bytes, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            members = archive.infolist()
    except Exception as error:
        raise _invalid(error) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, "compressed members are not read"
        )
    # Members may overlap in a forged archive, so the sum can exceed the payload.
    if (total := sum(member.file_size for member in members)) > max_bytes:
        raise PolicyRejectedError(
            PolicyRejection.PAYLOAD_TOO_LARGE,
            f"{total} bytes unpacked, at most {max_bytes} are read",
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _invalid(error) from error
    if not isinstance(state, dict):
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, f"a {type(state).__name__}, not a state dict"
        )
    # As an entry, or as the attribute `nn.Module.state_dict` gives its result.
    metadata = state.pop("_metadata", None) or getattr(state, "_metadata", None)
    if not all(
        isinstance(name, str)
        and type(weight) is Tensor
        and weight.layout is torch.strided
        and weight.device.type == "cpu"
        for name, weight in state.items()
    ):
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, "a state dict maps names to dense tensors"
        )
    return dict(state), dict(metadata) if isinstance(metadata, Mapping) else {}


def _check_registries(digests: object, vocabularies: Vocabularies) -> None:
    if not isinstance(digests, Mapping):
        raise PolicyRejectedError(PolicyRejection.REGISTRY_MISMATCH, "no vocabulary digests")
    if mismatches := vocabularies.mismatches(digests):
        raise PolicyRejectedError(
            PolicyRejection.REGISTRY_MISMATCH, ", ".join(map(str, mismatches))
        )


def _check_weights(
    weights: Mapping[str, Tensor], config: object, copy: bool
) -> tuple[NetworkConfig, dict[str, Tensor]]:
    try:
        sizes = NetworkConfig(**config) if isinstance(config, dict) else _inferred(weights)
        expected = _shapes(sizes)
        renamed = {from_contract_name(name): weight for name, weight in weights.items()}
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise PolicyRejectedError(
            PolicyRejection.SHAPE_MISMATCH, f"{type(error).__name__}: {error}"
        ) from error
    if different := sorted(expected.keys() ^ renamed.keys()):
        raise PolicyRejectedError(
            PolicyRejection.SHAPE_MISMATCH, f"missing or unknown weight {different[0]}"
        )
    return sizes, {
        name: _checked(name, weight, expected[name], copy) for name, weight in renamed.items()
    }


def _checked(name: str, weight: Tensor, shape: torch.Size, copy: bool) -> Tensor:
    """A weight as float32, with `copy` of its own storage."""
    if weight.shape != shape or not weight.is_floating_point():
        raise PolicyRejectedError(
            PolicyRejection.SHAPE_MISMATCH,
            f"{name} is {weight.dtype} {tuple(weight.shape)}, expected {tuple(shape)}",
        )
    try:
        number = weight.detach().to(torch.float32, copy=copy).contiguous()
    except (RuntimeError, NotImplementedError) as error:
        # Narrow formats that cannot be converted.
        raise PolicyRejectedError(
            PolicyRejection.SHAPE_MISMATCH, f"{name} is {weight.dtype}"
        ) from error
    # After the conversion: a finite double may be no finite float.
    if not bool(torch.isfinite(number).all()):
        raise PolicyRejectedError(PolicyRejection.NONFINITE_WEIGHTS, name)
    return number


@lru_cache(maxsize=8)
def _shapes(sizes: NetworkConfig) -> Mapping[str, torch.Size]:
    """Shape of every weight; what sizes claim is compared before it is believed."""
    if max(asdict(sizes).values()) > _MAX_WIDTH:
        raise ValueError(f"no size may exceed {_MAX_WIDTH}")
    with torch.device("meta"):
        network = TamiyoNetwork(sizes)
    return {name: weight.shape for name, weight in network.state_dict().items()}


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
    return PolicyRejectedError(PolicyRejection.INVALID_PAYLOAD, f"{type(error).__name__}: {error}")
