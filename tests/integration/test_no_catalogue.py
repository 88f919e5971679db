"""A service that nobody gave a catalogue: it decides on the blueprints that trainers name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from support.bus import SECRET, Bus, state_packet
from support.catalogs import copy_sample
from support.running import StartService
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.cli.capture import capture
from tamiyo_svc.cli.decision_diff import Agreement
from tamiyo_svc.cli.replay import replay_file
from tamiyo_svc.client import ClientSettings, Keyring, TamiyoClient
from tamiyo_svc.client.run import RunSettings, TamiyoRun
from tamiyo_svc.client.seeds import SeedBank
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.service.settings import Settings

pytestmark = pytest.mark.redis

SEED, OPTIMIZER = leyline.COMMAND_SEED, leyline.COMMAND_OPTIMIZER
DEFAULT_PATH = Path("var/urza/catalog.db")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing lies where a catalogue is looked for unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def remove(path: Path) -> None:
    path.unlink()


async def answer(bus: Bus, step: int, names: str = "", run_id: str = "run-1") -> Any:
    packet = state_packet(run_id, step)
    await bus.publish(packet, **({"blueprint_id": names} if names else {}))
    return await bus.command_for(packet)


async def events(bus: Bus) -> set[str]:
    packets = [*await bus.telemetry(), *await bus.telemetry("oona.emergency")]
    return {event.description for packet in packets for event in packet.events}


def train(url: str, settings: RunSettings, steps: int) -> str:
    """Train a small network with one place for a seed; the seed's last stage."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(64, 8), torch.randint(0, 4, (64,))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    bank = SeedBank(model)
    seed = bank.attach("1")

    def loss_of() -> Tensor:
        return functional.cross_entropy(model(inputs), labels)

    client = TamiyoClient(url, Keyring(SECRET.encode()), "loop", ClientSettings(max_wait_s=20.0))
    with TamiyoRun(client, optimizer=optimizer, bank=bank, settings=settings) as run:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            run.end_step(step, loss, isolated_loss=loss_of)
            if seed.stage_name == "FOSSILIZED":
                break
    return seed.stage_name


@pytest.mark.parametrize("enrich", [True, False])
async def test_a_seed_grows_to_the_end(
    bus: Bus, start_service: StartService, redis_url: str, enrich: bool
) -> None:
    await start_service(
        urza_database_url=None, risk_step_latency_high_ms=1e6, risk_hook_budget_ms=1e6
    )
    settings = RunSettings(wait_s=20.0, enrich=enrich)
    assert await asyncio.to_thread(train, redis_url, settings, 400) == "FOSSILIZED"
    assert "no_blueprint_candidates" not in await events(bus)


async def test_the_absence_of_a_catalogue_is_no_degradation(
    bus: Bus, start_service: StartService
) -> None:
    with capture_logs() as logs:
        running = await start_service(urza_database_url=None, metadata_refresh_s=0.05)
        command = await answer(bus, 1, "mine")
    assert [line["event"] for line in logs].count("catalog.absent") == 1
    assert command.command_type == SEED
    assert command.seed_operation.blueprint_id == "mine"
    assert command.annotations["blueprint_risk"] == "0.25"
    assert command.annotations["blueprint_tier"] == "BLUEPRINT_TIER_UNSPECIFIED"
    assert "catalog_degraded" not in await events(bus)
    assert running.value("tamiyo_catalog_degraded") == 0


async def test_without_a_name_there_is_nothing_to_choose_from(
    bus: Bus, start_service: StartService
) -> None:
    await start_service(urza_database_url=None)
    assert (await answer(bus, 1)).command_type == OPTIMIZER
    assert "no_blueprint_candidates" in await events(bus)


@pytest.mark.parametrize("name", ["x" * 129, "line\nbreak", "\x1b[31m", "\u202eright to left"])
async def test_a_name_that_is_none_is_left_out(
    bus: Bus, start_service: StartService, name: str
) -> None:
    await start_service(urza_database_url=None)
    command = await answer(bus, 1, f"{name},mine")
    assert command.seed_operation.blueprint_id == "mine"
    assert (await answer(bus, 2, name)).command_type == OPTIMIZER


async def test_names_beyond_the_limit_are_not_considered(
    bus: Bus, start_service: StartService
) -> None:
    await start_service(urza_database_url=None, blueprint_candidates=2)
    names = ("a", "a", "b", *(f"late-{number}" for number in range(1000)))
    command = await answer(bus, 1, ",".join(names))
    assert command.seed_operation.blueprint_id in ("a", "b")


async def test_a_safety_sheet_of_a_name_counts(bus: Bus, start_service: StartService) -> None:
    await start_service(urza_database_url=None)
    sheet = leyline.BSDS(
        blueprint_id="mine",
        risk_score=0.9,
        hazard_band=leyline.HAZARD_BAND_CRITICAL,
        handling_class=leyline.HANDLING_CLASS_RESTRICTED,
    )
    assert (await answer(bus, 1, "mine", "before")).command_type == SEED
    await bus.publish(leyline.BSDSIssued(bsds=sheet))
    step = 1

    async def paused() -> bool:
        nonlocal step
        step += 1
        command = await answer(bus, step, "mine", "after")
        return bool(command.annotations["risk_reason"] == "bp_quarantine")

    await bus.until(paused)
    assert (await answer(bus, 1, "other", "untouched")).command_type == SEED


async def test_a_catalogue_that_appears_lists_what_there_is_for_good(
    bus: Bus, start_service: StartService
) -> None:
    await start_service(urza_database_url=None, metadata_refresh_s=0.05)
    assert (await answer(bus, 1, "mine")).command_type == SEED
    DEFAULT_PATH.parent.mkdir(parents=True)
    copy_sample(DEFAULT_PATH)
    step = 1

    async def refused() -> bool:
        nonlocal step
        step += 1
        return bool((await answer(bus, step, "mine")).command_type == OPTIMIZER)

    await bus.until(refused)
    assert (await answer(bus, 1, "demo-safe", "run-2")).command_type == SEED
    remove(DEFAULT_PATH)

    async def degraded() -> bool:
        return "catalog_degraded" in await events(bus)

    await bus.until(degraded)
    assert (await answer(bus, step + 1, "mine")).command_type == OPTIMIZER


def damage_nothing(path: Path) -> None:
    """A file that is not there."""


def damage_by_junk(path: Path) -> None:
    path.write_bytes(b"no database at all, " * 400)


def damage_by_emptiness(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("damage", [damage_nothing, damage_by_junk, damage_by_emptiness])
async def test_a_catalogue_that_was_named_and_cannot_be_read_admits_no_other_name(
    bus: Bus, start_service: StartService, tmp_path: Path, damage: Any
) -> None:
    path = tmp_path / "named.db"
    damage(path)
    await start_service(urza_database_url=f"sqlite:///{path}", metadata_refresh_s=600)
    assert (await answer(bus, 1, "mine")).command_type == OPTIMIZER
    assert "no_blueprint_candidates" in await events(bus)
    assert "catalog_degraded" in await events(bus)


async def test_a_file_at_the_usual_place_that_cannot_be_read_admits_no_other_name(
    bus: Bus, start_service: StartService
) -> None:
    DEFAULT_PATH.parent.mkdir(parents=True)
    damage_by_junk(DEFAULT_PATH)
    await start_service(urza_database_url=None)
    assert (await answer(bus, 1, "mine")).command_type == OPTIMIZER
    assert "catalog_degraded" in await events(bus)


async def test_what_was_decided_on_names_is_decided_again_byte_for_byte(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    await start_service(urza_database_url=None)
    for step in range(1, 9):
        await answer(bus, step, f"mine,other-{step},line\nbreak")
    file = tmp_path / "window.jsonl"
    online = Settings(redis_url=redis_url, secret=SECRET)  # type: ignore[arg-type]
    await asyncio.to_thread(capture, online, file, duration=None, since="1h")
    offline = Settings(
        redis_url="redis://127.0.0.1:1/0",
        secret=SECRET,  # type: ignore[arg-type]
        policy="bootstrap",
        state_dir=tmp_path,
    )
    comparison = await asyncio.to_thread(replay_file, offline, file)
    assert comparison.count(Agreement.IDENTICAL) == comparison.compared == 8
