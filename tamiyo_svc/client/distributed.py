"""Data-parallel training: one rank talks, all ranks act alike at the same step."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Final

from torch import distributed as dist

from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.packets import State
from tamiyo_svc.client.seeds.ranks import WORLD, RanksApartError
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import AckOutcome

_LOG: Final = logging.getLogger("tamiyo.client")
_TALKER: Final = 0


def is_talker() -> bool:
    """Whether this process is the one that needs a client: rank 0, or the only one.

    Before the process group exists the launcher's variable RANK tells, where there is one.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == _TALKER
    return os.environ.get("RANK", "0") == "0"


class RankedClient:
    """The client of a whole group of ranks; without `torch.distributed` it is the client itself.

    Which rank talks is decided by the first packet or wait, so that this may be made before the
    process group is. Pass the client on rank 0; those of other ranks are closed unused. Each rank
    calls `wait` or `poll` at the same steps; rank 0 verifies, and the command goes to all as bytes,
    which the others trust as they trust its gradients. That costs one small broadcast a step, two
    when there is a command.
    """

    def __init__(self, client: TamiyoClient | None) -> None:
        self._client = client
        self._decided = False

    @property
    def client(self) -> TamiyoClient | None:
        """The client of rank 0, None elsewhere; until the first packet the one that was given."""
        return self._client

    def publish(self, state: State, step: int, *, blueprint_ids: Sequence[str] = ()) -> str:
        """Queue the packet of a step on rank 0; empty elsewhere."""
        client = self._talker()
        return "" if client is None else client.publish(state, step, blueprint_ids=blueprint_ids)

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None:
        """The command for this step, the same on every rank."""
        client = self._talker()
        return self._share(client.wait(step, timeout_s) if client else None)

    def poll(self) -> VerifiedCommand | None:
        """The command that is there, the same on every rank."""
        client = self._talker()
        return self._share(client.poll() if client else None)

    def ack(self, verified: VerifiedCommand, outcome: AckOutcome, reason: str = "") -> None:
        """Report what became of a command, from rank 0."""
        if self._client is not None:
            self._client.ack(verified, outcome, reason)

    def state_dict(self) -> dict[str, Any]:
        """That of rank 0's client, empty elsewhere."""
        return {} if self._client is None else self._client.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand it to rank 0's client."""
        if self._client is not None and state:
            self._client.load_state_dict(state)

    def close(self) -> None:
        """Close rank 0's client."""
        if self._client is not None:
            self._client.close()

    def _talker(self) -> TamiyoClient | None:
        if not self._decided:
            self._decided = True
            if WORLD.rank != _TALKER and self._client is not None:
                self._client.close()
                self._client = None
            elif WORLD.rank == _TALKER and self._client is None:
                _LOG.error("rank 0 has no client: no packets are sent and no commands come")
        return self._client

    def _share(self, verified: VerifiedCommand | None) -> VerifiedCommand | None:
        if not WORLD.shared:
            return verified
        try:
            data = WORLD.bytes_of_first(
                b"" if verified is None else verified.command.SerializeToString()
            )
        except RanksApartError:
            return None
        if verified is not None or not data:
            return verified
        command = leyline.AdaptationCommand.FromString(data)
        annotations = command.annotations
        return VerifiedCommand(command, annotations["packet_id"], int(annotations["step_index"]))
