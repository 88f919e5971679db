"""What a blend mode adds to a seed command, and how a trainer reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.bus import Bus, state_packet
from support.running import StartService

from tamiyo_svc.client.seeds.blending import CONVEX, read_mixing
from tamiyo_svc.taxonomy import BlendMode

pytestmark = pytest.mark.redis

CHANNELS = 32
"""Output channels of the deepest layer of `demo-safe`."""
MODE = {"blend_mode", "blend_mode_source"}
GATE = {"gate_k", "gate_tau", "alpha_lo", "alpha_hi"}
VECTOR = {"alpha_vec", "alpha_vec_len"}


async def annotate(
    bus: Bus, start_service: StartService, blueprint: str = "demo-safe", **options: Any
) -> dict[str, str]:
    """Annotations of the seed command of a service with these options."""
    running = await start_service(**options)
    packet = state_packet("run-1", 1)
    await bus.publish(packet, blueprint_id=blueprint)
    command = await bus.command_for(packet)
    assert command.target_seed_id == "seed-0"
    running.stop.set()
    await running.task
    return dict(command.annotations)


def added(found: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in found.items() if key in MODE | GATE | VECTOR}


async def test_switched_off_no_key_is_new(bus: Bus, start_service: StartService) -> None:
    found = await annotate(bus, start_service, blend_mode_default="CHANNEL")
    assert added(found) == {}


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("CONVEX", MODE),
        ("RESIDUAL", MODE),
        ("CONFIDENCE", MODE | GATE),
        ("CHANNEL", MODE | VECTOR),
    ],
)
async def test_each_mode_adds_its_keys_and_the_trainer_reads_it(
    bus: Bus, start_service: StartService, redis_url: str, mode: str, keys: set[str]
) -> None:
    before = await annotate(bus, start_service)
    await bus.redis.flushall()
    found = await annotate(bus, start_service, enable_blend_mode_ann=True, blend_mode_default=mode)
    assert found.keys() - before.keys() == keys
    assert (found["blend_mode"], found["blend_mode_source"]) == (mode, "override")
    mixing = read_mixing(found, CHANNELS)
    assert mixing.mode is BlendMode(mode)
    if mode == "CHANNEL":
        assert json.loads(found["alpha_vec"]) == [0.1] * CHANNELS
        assert mixing.alpha_vec == (0.1,) * CHANNELS
    if mode == "CONFIDENCE":
        assert (mixing.gate_k, mixing.gate_tau) == (1.0, 1.0)
        assert (mixing.alpha_lo, mixing.alpha_hi) == (0.0, 1.0)


async def test_an_unknown_mode_is_convex(bus: Bus, start_service: StartService) -> None:
    found = await annotate(
        bus, start_service, enable_blend_mode_ann=True, blend_mode_default="SOFTMAX"
    )
    assert found["blend_mode"] == "CONVEX"
    assert read_mixing(found, CHANNELS) == CONVEX


async def test_an_unknown_channel_count_leaves_the_vector_out(
    bus: Bus, start_service: StartService
) -> None:
    found = await annotate(
        bus,
        start_service,
        "demo-guard-spec",
        enable_blend_mode_ann=True,
        blend_mode_default="CHANNEL",
    )
    assert added(found) == {"blend_mode": "CHANNEL", "blend_mode_source": "override"}
    assert read_mixing(found, CHANNELS) == CONVEX


@pytest.mark.parametrize(
    "junk",
    [
        {"blend_mode": "MYSTERY"},
        {"blend_mode": "CHANNEL", "alpha_vec": "[1,", "alpha_vec_len": "2"},
        {"blend_mode": "CHANNEL", "alpha_vec": "[0.5]", "alpha_vec_len": "many"},
        {"blend_mode": "CONFIDENCE", "gate_k": "x"},
        {"blend_mode": ""},
    ],
    ids=str,
)
def test_junk_is_read_as_convex(junk: dict[str, str]) -> None:
    assert read_mixing(junk, 2) == CONVEX
