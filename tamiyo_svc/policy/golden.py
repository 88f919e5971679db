"""Golden packets: what a policy must decide, recorded where it was made, replayed where it runs."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.errors import InferenceError, PolicyRejectedError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.evaluator import PolicyEvaluator, PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.taxonomy import PolicyRejection

MAX_GOLDEN: Final = 256
"""Most golden packets in one checkpoint."""

_TOLERANCE: Final = 1e-3


def record_golden(
    evaluator: PolicyEvaluator, requests: Sequence[PolicyRequest]
) -> list[dict[str, Any]]:
    """Requests with what the evaluator's policy decides, as JSON values.

    Raises:
        InferenceError: the policy fails on one of them.
        ValueError: more than `MAX_GOLDEN`.
    """
    if len(requests) > MAX_GOLDEN:
        raise ValueError(f"{len(requests)} golden packets, at most {MAX_GOLDEN} are kept")
    rows = []
    for request in requests:
        (proposal,) = evaluator.evaluate([request])
        if isinstance(proposal, InferenceError):
            raise proposal
        rows.append(
            {
                "packet": _encoded(request.packet.SerializeToString(deterministic=True)),
                "blueprints": [
                    {
                        "descriptor": _encoded(
                            blueprint.descriptor.SerializeToString(deterministic=True)
                        ),
                        "graph_metadata": blueprint.graph_metadata,
                    }
                    for blueprint in request.blueprints
                ],
                "expected": _decided(proposal),
            }
        )
    return rows


def read_golden(value: object) -> list[tuple[PolicyRequest, Mapping[str, Any]]]:
    """Requests and expectations from a checkpoint's metadata; none where it has none.

    Raises:
        PolicyRejectedError: `invalid_payload`: not what `record_golden` wrote.
    """
    if value is None:
        return []
    try:
        if not isinstance(value, list) or len(value) > MAX_GOLDEN:
            raise TypeError(f"not a list of at most {MAX_GOLDEN}")
        return [(_request(row), dict(row["expected"])) for row in value]
    except (KeyError, TypeError, ValueError, AttributeError, DecodeError, binascii.Error) as error:
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, f"golden packets: {type(error).__name__}: {error}"
        ) from error


def replay_golden(
    evaluator: PolicyEvaluator, golden: Sequence[tuple[PolicyRequest, Mapping[str, Any]]]
) -> None:
    """Decide every golden packet and compare.

    Raises:
        PolicyRejectedError: `probe_failed`: a decision is not the expected one.
    """
    for place, (request, expected) in enumerate(golden):
        (proposal,) = evaluator.evaluate([request])
        if isinstance(proposal, InferenceError):
            raise PolicyRejectedError(
                PolicyRejection.PROBE_FAILED, f"golden packet {place}: {proposal}"
            )
        for name, wanted, got in _differences(expected, _decided(proposal)):
            raise PolicyRejectedError(
                PolicyRejection.PROBE_FAILED,
                f"golden packet {place}: {name} is {got!r}, expected {wanted!r}",
            )


def sample_requests() -> list[PolicyRequest]:
    """Requests that reach every part of the network, for probes and where none were recorded."""
    stages = [
        leyline.SEED_STAGE_DORMANT,
        leyline.SEED_STAGE_TRAINING,
        leyline.SEED_STAGE_BLENDING,
        leyline.SEED_STAGE_FOSSILIZED,
    ]
    blueprints = tuple(
        Blueprint(
            leyline.BlueprintDescriptor(blueprint_id=f"sample-{place}", risk=0.2 * place, stage=3)
        )
        for place in range(2)
    )
    requests = []
    for count in range(1, len(stages) + 1):
        packet = leyline.SystemStatePacket(
            version=1,
            packet_id=f"sample-{count}",
            training_run_id="sample",
            current_epoch=count,
            global_step=10 * count,
            validation_loss=0.9 / count,
            training_loss=0.8 / count,
            seed_states=[
                leyline.SeedState(
                    seed_id=f"seed-{place}",
                    stage=stage,
                    layer_depth=place,
                    learning_rate=0.01,
                    gradient_norm=1.0,
                    risk_score=0.1 * place,
                )
                for place, stage in enumerate(stages[:count])
            ],
        )
        requests.append(PolicyRequest(packet, blueprints[: count % 3], {}))
    return requests


def _request(row: Mapping[str, Any]) -> PolicyRequest:
    blueprints = tuple(
        Blueprint(
            leyline.BlueprintDescriptor.FromString(_decoded(each["descriptor"])),
            graph_metadata=each.get("graph_metadata"),
        )
        for each in row["blueprints"]
    )
    packet = leyline.SystemStatePacket.FromString(_decoded(row["packet"]))
    return PolicyRequest(packet, blueprints, {})


def _decided(proposal: Proposal) -> dict[str, Any]:
    return {
        "action": proposal.action.name,
        "seed_id": proposal.seed_id,
        "blueprint_id": proposal.blueprint.blueprint_id if proposal.blueprint else "",
        "blending_method": proposal.blending_method,
        "risk_index": proposal.risk_index,
        "risk_score": proposal.risk_score,
        "value_estimate": proposal.value_estimate,
        "parameters": list(proposal.parameters),
    }


def _differences(
    expected: Mapping[str, Any], decided: Mapping[str, Any]
) -> Iterator[tuple[str, object, object]]:
    for name, wanted in expected.items():
        got = decided.get(name)
        if isinstance(got, (float, list)):
            if not _close(wanted, got):
                yield name, wanted, got
        elif got != wanted:
            yield name, wanted, got


def _close(wanted: object, got: float | list[float]) -> bool:
    if isinstance(got, list):
        return (
            isinstance(wanted, list)
            and len(wanted) == len(got)
            and all(_close(a, b) for a, b in zip(wanted, got, strict=True))
        )
    return isinstance(wanted, (int, float)) and math.isclose(
        wanted, got, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE
    )


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
