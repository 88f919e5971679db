"""Whatever is wrong with Tamiyo or Redis, training ends with the weights it has without them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.faulty_bus import Fault, FaultyBus
from support.patience import PATIENT
from torch import nn
from torch.nn import functional

from tamiyo_svc.client import AckOutcome, ClientMode, ClientSettings, TamiyoClient
from tamiyo_svc.client.run import RunSettings, StepEnd, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.client.testing import KEYRING

pytestmark = pytest.mark.redis

STEPS = 30
WAYS = {
    "waiting": (ClientMode.ONLINE, 0.005),
    "polling": (ClientMode.ONLINE, 0.0),
    "observe": (ClientMode.OBSERVE, 0.005),
    "offline": (ClientMode.OFFLINE, 0.005),
    "disabled": (ClientMode.DISABLED, 0.005),
}
FAULTS = [fault for fault in Fault if fault not in (Fault.NONE, Fault.GROWS, Fault.SLOWS_DOWN)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAULTS)
def faulty_bus(request: pytest.FixtureRequest) -> Iterator[tuple[Fault, FaultyBus]]:
    with FaultyBus(request.param) as bus:
        yield request.param, bus


EndStep = Callable[[int, torch.Tensor], object]


def train(attach: Callable[[nn.Module, torch.optim.Optimizer], EndStep]) -> str:
    """Train a network with dropout and running statistics; the digest of all it learned."""
    # Sums depend on it, and a service in the same process changes it.
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    end_step = attach(model, optimizer)
    for step in range(1, STEPS + 1):
        inputs, labels = torch.randn(32, 6), torch.randint(0, 3, (32,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        end_step(step, loss)
    state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(state).hexdigest()


@pytest.fixture(scope="module")
def undisturbed() -> str:
    """The digest without Tamiyo."""
    return train(lambda model, optimizer: lambda step, loss: None)


def test_the_digest_notices_a_change(undisturbed: str) -> None:
    def disturb(model: nn.Module, optimizer: torch.optim.Optimizer) -> EndStep:
        return lambda step, loss: torch.rand(1) if step == STEPS // 2 else None

    assert train(disturb) != undisturbed
    assert train(lambda model, optimizer: lambda step, loss: None) == undisturbed


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_a_run_without_tamiyo(
    faulty_bus: tuple[Fault, FaultyBus], way: str, undisturbed: str, tmp_path: Path
) -> None:
    fault, bus = faulty_bus
    mode, wait_s = WAYS[way]
    ended: list[StepEnd] = []
    settings = ClientSettings(mode=mode, spool=tmp_path / "spool.jsonl", close_timeout_s=0.1)
    run_id = f"{fault}-{way}"
    with TamiyoClient(bus.url, KEYRING, run_id, settings) as client:

        def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> EndStep:
            bank = SeedBank(model)
            bank.attach("0")
            run = TamiyoRun(
                client, optimizer=optimizer, bank=bank, settings=RunSettings(wait_s=wait_s)
            )

            def end_step(step: int, loss: torch.Tensor) -> None:
                if step == STEPS // 2:
                    bus.tell("strike")
                ended.append(run.end_step(step, loss))

            return end_step

        digest = train(attach)
        bus.tell("heal") if fault is Fault.DIES else None
    assert digest == undisturbed
    assert len(ended) == STEPS
    if fault is not Fault.DIES and fault is not Fault.SLOW:
        assert all(end.verified is None for end in ended)
    assert all(end.outcome in (None, AckOutcome.APPLIED) for end in ended)
    assert client.counters.faults == 0


def test_a_command_that_is_applied_does_change_the_weights(undisturbed: str) -> None:
    with (
        FaultyBus(Fault.SLOWS_DOWN) as bus,
        TamiyoClient(bus.url, KEYRING, "slows-down", PATIENT) as client,
    ):
        ended: list[StepEnd] = []

        def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> EndStep:
            run = TamiyoRun(client, optimizer=optimizer, settings=RunSettings(wait_s=10.0))

            def end_step(step: int, loss: torch.Tensor) -> None:
                ended.append(run.end_step(step, loss))

            return end_step

        assert train(attach) != undisturbed
    assert all(end.outcome is AckOutcome.APPLIED for end in ended)
    assert client.counters.received == STEPS
