"""Test a trainer without Redis: a service in the same process.

Packets and commands are sealed, signed and verified as on a real bus; only the bus is missing.
`pytest_plugins = ["tamiyo_svc.client.testing"]` in a conftest brings the fixtures
`tamiyo_service` and `tamiyo_client` of `tamiyo_svc.client.pytest_plugin`.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from tamiyo_svc.client.aio import AsyncTamiyoClient
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.core import ClientCore, ClientSettings
from tamiyo_svc.client.drafts import Outgoing
from tamiyo_svc.client.transport import Entry
from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import (
    EnvelopeRejectedError,
    open_envelope,
    parse_payload,
    seal,
)
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import NEXT_SEED_OPERATIONS

pytest_plugins = ("tamiyo_svc.client.pytest_plugin",)
"""What pytest loads with this module; nothing else needs pytest."""

KEYRING: Final = Keyring(b"a secret for tests alone")
LONG_S: Final = 10.0
"""A wait that ends when the answer is there, on however slow a machine."""

_Client = TypeVar("_Client", bound=ClientCore)
Script = Callable[[leyline.SystemStatePacket], Iterable[leyline.AdaptationCommand]]


def make_packet(
    step: int = 1, run_id: str = "run-1", seeds: Sequence[leyline.SeedState] = (), loss: float = 1.0
) -> leyline.SystemStatePacket:
    """A small state packet."""
    return leyline.SystemStatePacket(
        version=1,
        packet_id=f"{run_id}-{step}",
        training_run_id=run_id,
        global_step=step,
        current_epoch=1,
        training_loss=loss,
        validation_loss=loss,
        timestamp_ns=time.time_ns(),
        seed_states=seeds,
    )


def make_pause() -> leyline.AdaptationCommand:
    """A command that changes nothing."""
    return leyline.AdaptationCommand(command_type=leyline.COMMAND_PAUSE)


def make_optimizer_command(lr_delta: float, optimizer_id: str = "") -> leyline.AdaptationCommand:
    """A command that multiplies the learning rate by 1 + `lr_delta`."""
    return leyline.AdaptationCommand(
        command_type=leyline.COMMAND_OPTIMIZER,
        optimizer_adjustment=leyline.CommandOptimizerAdjustment(
            optimizer_id=optimizer_id, hyperparameters={"lr_delta": lr_delta}
        ),
    )


def make_seed_command(
    seed_id: str,
    operation: leyline.SeedOperation,
    blueprint_id: str = "",
    *,
    parameters: dict[str, float] | None = None,
    annotations: dict[str, str] | None = None,
) -> leyline.AdaptationCommand:
    """A command to one seed."""
    return leyline.AdaptationCommand(
        command_type=leyline.COMMAND_SEED,
        target_seed_id=seed_id,
        seed_operation=leyline.CommandSeedOperation(
            operation=operation, blueprint_id=blueprint_id, parameters=parameters
        ),
        annotations=annotations,
    )


def always_pause(_: leyline.SystemStatePacket) -> Iterable[leyline.AdaptationCommand]:
    """A script: every packet is answered with a pause."""
    yield make_pause()


def never_answer(_: leyline.SystemStatePacket) -> Iterable[leyline.AdaptationCommand]:
    """A script: silence."""
    return ()


@dataclass(frozen=True, slots=True)
class grow:  # noqa: N801 - a script like the functions above, that other processes can have too
    """A script: the first seed that is still on its way gets its next operation, else pause."""

    blueprint_id: str

    def __call__(self, packet: leyline.SystemStatePacket) -> Iterable[leyline.AdaptationCommand]:
        for seed in packet.seed_states:
            operation = NEXT_SEED_OPERATIONS.get(seed.stage)
            if operation is not None:
                yield make_seed_command(seed.seed_id, operation, self.blueprint_id)
                return
        yield make_pause()


class FakeService:
    """Answers packets as a script says, signed as Tamiyo would.

    Whatever a command lacks of what ties it to its packet is filled in. Set `reachable` to False
    for a bus that is away, and `clock_offset_s` for a service whose clock is that many seconds
    ahead. `packets` and `reports` hold what arrived, in order, `refused` the reasons of what the
    service would have moved to its dead-letter stream, as with a client of another secret. A copy
    is a service of its own, also in another process if the script can be pickled.
    """

    def __init__(self, script: Script = always_pause, keyring: Keyring = KEYRING) -> None:
        self.script = script
        self.reachable = True
        self.clock_offset_s = 0.0
        self.packets: list[leyline.SystemStatePacket] = []
        self.reports: list[leyline.FieldReport] = []
        self.refused: list[str] = []
        self._keyring = keyring
        # A resumed run refuses the commands it had before, from whatever service.
        self._name = f"command-{os.urandom(4).hex()}"
        self._signed = 0

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        # As with a service elsewhere, copies of its clients talk to the one there is.
        return self

    def client(
        self,
        run_id: str = "run-1",
        settings: ClientSettings | None = None,
        keyring: Keyring | None = None,
    ) -> TamiyoClient:
        """A client of this service; waits up to `LONG_S` unless the settings say otherwise."""
        return self._make_client(TamiyoClient, run_id, settings, keyring)

    def async_client(
        self,
        run_id: str = "run-1",
        settings: ClientSettings | None = None,
        keyring: Keyring | None = None,
    ) -> AsyncTamiyoClient:
        """The same for asyncio."""
        return self._make_client(AsyncTamiyoClient, run_id, settings, keyring)

    def _make_client(
        self,
        kind: type[_Client],
        run_id: str,
        settings: ClientSettings | None,
        keyring: Keyring | None,
    ) -> _Client:
        return kind(
            "redis://nowhere:1/0",
            keyring or self._keyring,
            run_id,
            settings or ClientSettings(max_wait_s=LONG_S),
            make_link=partial(_FakeLink, self),
        )

    def receive(self, outgoing: Outgoing) -> list[Entry]:
        """Take one entry and return the answers to it."""
        try:
            message = parse_payload(open_envelope(outgoing.envelope.fields(), self._keyring))
        except EnvelopeRejectedError as error:
            self.refused.append(error.reason)
            return []
        if isinstance(message, leyline.FieldReport):
            self.reports.append(message)
            return []
        if not isinstance(message, leyline.SystemStatePacket):
            return []
        self.packets.append(message)
        return [self.sign(command, message) for command in self.script(message)]

    def sign(
        self, command: leyline.AdaptationCommand, packet: leyline.SystemStatePacket
    ) -> dict[bytes, bytes]:
        """Complete, sign and seal a command for a packet."""
        self._signed += 1
        answer = leyline.AdaptationCommand(
            version=1, command_id=f"{self._name}-{self._signed}", issued_by="tamiyo"
        )
        answer.issued_at.FromNanoseconds(time.time_ns() + int(self.clock_offset_s * 1e9))
        answer.annotations.update(
            training_run_id=packet.training_run_id,
            packet_id=packet.packet_id,
            step_index=str(packet.global_step),
        )
        answer.MergeFrom(command)
        self._keyring.sign_command(answer)
        return seal(answer, self._keyring).fields()


class _FakeLink:
    def __init__(self, service: FakeService) -> None:
        self.cursor = ""
        self.receives = True
        self._service = service
        self._arrived: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()

    def connect(self) -> None:
        self._check()

    def send(self, batch: Sequence[Outgoing]) -> None:
        self._check()
        for outgoing in batch:
            for entry in self._service.receive(outgoing):
                self._arrived.put(entry)

    def disconnect(self) -> None:
        return

    def listen(self) -> None:
        self._check()

    def receive(self) -> list[Entry]:
        entry = self._arrived.get()
        self._check()
        return [] if entry is None else [entry]

    def stop_listening(self) -> None:
        return

    def interrupt(self) -> None:
        self._arrived.put(None)

    def readers(self, stream: str) -> str:
        if self._service.refused:
            return (
                f"the packets on {stream} are refused ({self._service.refused[-1]}): is the secret "
                "(ESPER_LEYLINE_SECRET) the service's?"
            )
        return f"the packets on {stream} are read and not answered"

    def _check(self) -> None:
        if not self._service.reachable:
            raise BusError("the fake bus is away")


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """The fixtures, for a conftest that imports them from here."""
        if name not in ("tamiyo_service", "tamiyo_client"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("tamiyo_svc.client.pytest_plugin"), name)
