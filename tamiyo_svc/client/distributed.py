"""Data-parallel training: one rank talks, all ranks act alike at the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.packets import State
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import AckOutcome

_TALKER = 0


def is_talker() -> bool:
    """Whether this process is the one that needs a client: rank 0, or the only one."""
    return not _running() or dist.get_rank() == _TALKER


class RankedClient:
    """The client of a whole group of ranks; without `torch.distributed` it is the client itself.

    Rank 0 passes its client, the others None. Each rank calls `wait` or `poll` at the same steps;
    rank 0 verifies, and the command goes to all as bytes, which the others trust as they trust
    its gradients. The exchange is on the CPU, over a gloo group of its own where the default one
    is not gloo, and costs one small broadcast a step, two when there is a command. Create it on
    all ranks at the same point.
    """

    def __init__(self, client: TamiyoClient | None) -> None:
        if client is None and is_talker():
            raise ValueError("rank 0 needs a client")
        self._client = client if is_talker() else None
        self._shared = _running() and dist.get_world_size() > 1
        self._group: Any = None
        if self._shared and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    @property
    def client(self) -> TamiyoClient | None:
        """The client of rank 0, None elsewhere."""
        return self._client

    def publish(self, state: State, step: int, *, blueprint_ids: Sequence[str] = ()) -> str:
        """Queue the packet of a step on rank 0; empty elsewhere."""
        if self._client is None:
            return ""
        return self._client.publish(state, step, blueprint_ids=blueprint_ids)

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None:
        """The command for this step, the same on every rank."""
        return self._share(self._client.wait(step, timeout_s) if self._client else None)

    def poll(self) -> VerifiedCommand | None:
        """The command that is there, the same on every rank."""
        return self._share(self._client.poll() if self._client else None)

    def ack(self, verified: VerifiedCommand, outcome: AckOutcome, reason: str = "") -> None:
        """Report what became of a command, from rank 0."""
        if self._client is not None:
            self._client.ack(verified, outcome, reason)

    def state_dict(self) -> dict[str, Any]:
        """That of rank 0's client, empty elsewhere."""
        return {} if self._client is None else self._client.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand it to rank 0's client."""
        if self._client is not None:
            self._client.load_state_dict(state)

    def close(self) -> None:
        """Close rank 0's client."""
        if self._client is not None:
            self._client.close()

    def _share(self, verified: VerifiedCommand | None) -> VerifiedCommand | None:
        if not self._shared:
            return verified
        data = b"" if verified is None else verified.command.SerializeToString()
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, _TALKER, group=self._group)
        if not int(size):
            return None
        content = _to_tensor(data) if data else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, _TALKER, group=self._group)
        if verified is not None:
            return verified
        command = leyline.AdaptationCommand.FromString(bytes(content.tolist()))
        annotations = command.annotations
        return VerifiedCommand(command, annotations["packet_id"], int(annotations["step_index"]))


def _to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
