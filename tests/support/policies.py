"""Small policies as updates, and what a replica says about them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import safetensors.torch
import torch
from support.bus import Bus
from torch import Tensor

from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.checkpoint import write_policy
from tamiyo_svc.policy.evaluator import Policy, build_policy, weights_digest
from tamiyo_svc.policy.network import NetworkConfig

SMALL = NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4, attention_heads=2)
POLICY_ID = "digits"


def trained(value: float = 1.0, **weights: float) -> Policy:
    """A small policy that estimates `value`; `weights` set whole parameters, `__` for a dot."""
    policy = build_policy("bootstrap", SMALL)
    with torch.no_grad():
        policy.network.get_parameter("heads.value.bias")[0] = value
        for name, number in weights.items():
            policy.network.get_parameter(name.replace("__", ".")).fill_(number)
    return replace(
        policy,
        policy_id=POLICY_ID,
        digest=weights_digest(policy.network),
        untrained=False,
    )


@cache
def checkpoint(value: float = 1.0, **weights: float) -> bytes:
    """The checkpoint of such a policy."""
    return write_policy(trained(value, **weights), Vocabularies(), "2026-01-01T00:00:00Z")


def altered(payload: bytes, weights: Mapping[str, Tensor] | None = None, **metadata: str) -> bytes:
    """A checkpoint with other weights, by their contract names, or other metadata."""
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])["__metadata__"]
    tensors = safetensors.torch.load(payload) | dict(weights or {})
    return safetensors.torch.save(tensors, header | metadata)


def update(
    version: str,
    payload: bytes = b"",
    *,
    policy_id: str = POLICY_ID,
    issued_s: float | None = None,
) -> leyline.PolicyUpdate:
    """An update issued now unless told otherwise."""
    message = leyline.PolicyUpdate(
        version=1, policy_id=policy_id, tamiyo_policy_version=version, payload=payload
    )
    message.issued_at.FromNanoseconds(int((issued_s or time.time()) * 1e9))
    return message


async def told(bus: Bus, event: str, count: int = 1, stream: str = "oona.telemetry") -> Any:
    """The attributes of the `count`th event of this name, once it is told."""

    async def find() -> list[dict[str, str]]:
        found = [
            dict(fired.attributes)
            for packet in await bus.telemetry(stream)
            for fired in packet.events
            if fired.description == event
        ]
        return found[count - 1 :][:1]

    return (await bus.until(find, timeout_s=60))[0]
