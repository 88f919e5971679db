"""Policy updates over a real Redis, applied by a real service in this process."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bus import SECRET, Bus, state_packet
from support.policies import POLICY_ID, altered, checkpoint, told, update
from support.running import Running, StartService

from tamiyo_svc.adapters.oona.policy_stream import open_stream, read_statuses
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.evaluator import weights_digest
from tamiyo_svc.taxonomy import PolicyRejection

pytestmark = pytest.mark.redis

STREAM = "oona.policy"
ANSWERS = (
    "policy_action",
    "policy_value_estimate",
    "policy_risk_score",
    "policy_param_delta",
    "blending_method",
)
# Its value depends on what it sees.
SEEING = {"heads__value__weight": 0.3}


async def decisions(bus: Bus, run_id: str, packets: int = 3) -> list[tuple[str, ...]]:
    """What a run that always looks the same is answered."""
    answers = []
    for step in range(1, packets + 1):
        packet = state_packet(run_id, step, loss=0.5 - 0.01 * step)
        await bus.publish(packet)
        command = await bus.command_for(packet)
        answers.append(tuple(command.annotations[name] for name in ANSWERS))
    return answers


def serving(running: Running) -> Mapping[str, str]:
    """Labels of the policy that the metrics say serves."""
    (labels,) = [
        sample.labels
        for family in running.metrics.registry.collect()
        if family.name == "tamiyo_policy_info"
        for sample in family.samples
    ]
    return labels


async def test_an_update_is_applied_and_decides_from_then_on(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()

    await bus.publish(update("v2", checkpoint()), STREAM, issued_by="ann@desk")
    applied = await told(bus, "policy_update_applied")
    packet = state_packet("run", 1)
    await bus.publish(packet)
    command = await bus.command_for(packet)

    assert applied["issued_by"] == "ann@desk"
    assert applied["digest"] == serving(running)["digest"]
    assert command.annotations["policy_version"] == "v2"
    assert float(command.annotations["policy_value_estimate"]) == 1.0
    assert running.value("tamiyo_policy_updates_total", outcome="applied") == 1


def claiming_more_than_it_holds() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x")
    payload = bytearray(file.getvalue())
    # The uncompressed size stands 24 bytes into each entry of the central directory.
    entry = payload.index(b"PK\x01\x02")
    payload[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2
    return bytes(payload)


BIAS = "_value_head.bias"
REFUSED_PAYLOADS = {
    PolicyRejection.VERSION_MISMATCH: altered(checkpoint(), architecture_version="tamiyo_gnn_v9"),
    PolicyRejection.INVALID_PAYLOAD: checkpoint()[:-1],
    PolicyRejection.PAYLOAD_TOO_LARGE: claiming_more_than_it_holds(),
    PolicyRejection.REGISTRY_MISMATCH: altered(checkpoint(), registries='{"layer_types": "0"}'),
    PolicyRejection.SHAPE_MISMATCH: altered(checkpoint(), {BIAS: torch.zeros(2)}),
    PolicyRejection.NONFINITE_WEIGHTS: altered(checkpoint(), {BIAS: torch.tensor([torch.nan])}),
    # Finite weights of which two make an infinite value.
    PolicyRejection.PROBE_FAILED: checkpoint(3e38, heads__value__weight=3e38),
}


def block(folder: Path) -> None:
    """Put a file where policies are to be kept."""
    shutil.rmtree(folder)
    folder.write_text("in the way")


async def publish_unacceptable(bus: Bus, reason: PolicyRejection, blocker: Path) -> str:
    """Publish an update that is to be refused for a reason; returns its entry id."""
    match reason:
        case PolicyRejection.MISSING_SIGNATURE:
            unsigned: Any = {b"payload": seal(update("bad", checkpoint(2.0)), None).payload}
            entry_id: Any = await bus.redis.xadd(STREAM, unsigned)
        case PolicyRejection.INVALID_SIGNATURE:
            forged = seal(update("bad", checkpoint(2.0)), Keyring(b"not the secret at all"))
            return await bus.add(forged, STREAM)
        case PolicyRejection.STALE_UPDATE:
            hour_ago = time.time() - 3600
            return await bus.publish(update("bad", checkpoint(2.0), issued_s=hour_ago), STREAM)
        case PolicyRejection.REPLAYED_UPDATE:
            last: Any = await bus.redis.xrevrange(STREAM, count=1)
            entry_id = await bus.redis.xadd(STREAM, last[0][1])
        case PolicyRejection.SWAP_FAILED:
            block(blocker)
            return await bus.publish(update("bad", checkpoint(2.0)), STREAM)
        case _:
            return await bus.publish(update("bad", REFUSED_PAYLOADS[reason]), STREAM)
    return str(entry_id.decode())


@pytest.mark.timeout(300)
async def test_a_refused_update_changes_nothing_and_the_next_one_applies(
    bus: Bus, start_service: StartService, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    running = await start_service()
    blocker = tmp_path / "policies"
    await bus.publish(update("v0", checkpoint(0.5, **SEEING)), STREAM)
    await told(bus, "policy_update_applied")
    for turn, reason in enumerate(PolicyRejection, start=1):
        with subtests.test(reason=reason.value):
            before, labels = await decisions(bus, f"{reason}-before"), serving(running)

            entry_id = await publish_unacceptable(bus, reason, blocker)
            rejected = await told(bus, "policy_update_rejected", turn)

            assert (rejected["entry_id"], rejected["reason"]) == (entry_id, reason)
            assert serving(running) == labels
            assert (
                weights_digest(running.service._updates._serving.policy.network)
                == (labels["digest"])
            )
            assert await decisions(bus, f"{reason}-after") == before
            if reason is PolicyRejection.SWAP_FAILED:
                blocker.unlink()
            await bus.publish(update(f"v{turn}", checkpoint(0.5 + turn, **SEEING)), STREAM)
            applied = await told(bus, "policy_update_applied", turn + 1)
            assert applied["version"] == serving(running)["version"] == f"v{turn}"


async def test_updates_from_the_future_are_refused(bus: Bus, start_service: StartService) -> None:
    await start_service()

    await bus.publish(update("v9", checkpoint(), issued_s=time.time() + 60), STREAM)

    assert (await told(bus, "policy_update_rejected"))["reason"] == "stale_update"


async def test_too_old_updates_are_refused_where_freshness_is_asked_for(
    bus: Bus, start_service: StartService
) -> None:
    await start_service(update_freshness_s=30.0)

    await bus.publish(update("v1", checkpoint(), issued_s=time.time() - 60), STREAM)

    assert (await told(bus, "policy_update_rejected"))["reason"] == "stale_update"


async def test_without_verification_order_and_label_are_not_looked_at_and_weights_are(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service(verify_updates=False, update_freshness_s=30.0)
    other = altered(checkpoint(1.0), architecture_version="something else")

    await bus.publish(update("v2", other, issued_s=time.time() - 60), STREAM)
    await told(bus, "policy_update_applied")
    await bus.publish(update("v1", checkpoint(2.0), issued_s=time.time() - 120), STREAM)
    await told(bus, "policy_update_applied", 2)
    unsafe = {
        "invalid_payload": b"\x80\x04N.",
        "shape_mismatch": REFUSED_PAYLOADS[PolicyRejection.SHAPE_MISMATCH],
        "nonfinite_weights": REFUSED_PAYLOADS[PolicyRejection.NONFINITE_WEIGHTS],
    }
    for count, (reason, payload) in enumerate(unsafe.items(), start=1):
        await bus.publish(update("v3", payload), STREAM)
        assert (await told(bus, "policy_update_rejected", count))["reason"] == reason
    forged = seal(update("v4", checkpoint(4.0)), Keyring(b"not the secret at all"))
    await bus.add(forged, STREAM)
    assert (await told(bus, "policy_update_rejected", 4))["reason"] == "invalid_signature"

    assert serving(running)["version"] == "v1"


async def test_an_update_without_payload_renames_the_version(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    await bus.publish(update("v1", checkpoint()), STREAM)
    digest = (await told(bus, "policy_update_applied"))["digest"]

    await bus.publish(update("v1-final"), STREAM)
    await told(bus, "policy_update_applied", 2)

    assert serving(running) == {"policy_id": POLICY_ID, "version": "v1-final", "digest": digest}


async def test_a_policy_that_fails_on_probation_is_rolled_back_and_trainers_got_safe_commands(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service(breaker_cooldown_s=0.2)
    await bus.publish(update("good", checkpoint(1.0)), STREAM)
    good = await told(bus, "policy_update_applied")
    # Finite on the probe graphs, which have no such gradient, and infinite on this run.
    bad = checkpoint(2.0, encoders__global__0__weight=1e37)
    await bus.publish(update("bad", bad), STREAM)
    await told(bus, "policy_update_applied", 2)

    commands = []
    for run in range(6):
        # The first of each run: later ones are measured against it.
        packet = state_packet(f"run-{run}", 1)
        packet.training_metrics["gradient_norm"] = 1e6
        await bus.publish(packet)
        commands.append(await bus.command_for(packet))
    rolled_back = await told(bus, "policy_rolled_back", stream="oona.emergency")

    assert (rolled_back["reason"], rolled_back["from_version"]) == ("probation", "bad")
    assert rolled_back["version"] == "good"
    assert serving(running)["digest"] == good["digest"]
    by_bad = [each for each in commands if each.annotations["policy_version"] == "bad"]
    assert len(by_bad) >= 3
    assert {each.command_type for each in by_bad} == {leyline.COMMAND_PAUSE}
    assert running.value("tamiyo_policy_updates_total", outcome="rolled_back") == 1


async def test_a_restart_comes_up_with_the_last_known_good_policy(
    bus: Bus, start_service: StartService
) -> None:
    first = await start_service(policy=None)
    assert serving(first)["policy_id"] == "untrained"
    await bus.publish(update("v1", checkpoint(1.0, **SEEING)), STREAM)
    await told(bus, "policy_update_applied")
    labels = serving(first)
    first.stop.set()
    await first.task
    await bus.redis.delete(STREAM)

    second = await start_service(policy=None)

    assert serving(second) == labels


async def test_a_late_joiner_takes_the_newest_valid_policy_from_the_stream(
    bus: Bus, start_service: StartService, tmp_path: Path
) -> None:
    await bus.publish(update("v1", checkpoint(1.0)), STREAM)
    await bus.publish(update("v2", checkpoint(2.0)), STREAM)
    await bus.publish(update("v3", checkpoint(3.0)[:-1]), STREAM)

    running = await start_service(policy=None, state_dir=tmp_path / "new")

    # It is ready only once it has caught up.
    assert serving(running)["version"] == "v2"


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
async def test_a_damaged_store_falls_back_to_the_stream(
    bus: Bus, start_service: StartService, tmp_path: Path, damage: str
) -> None:
    first = await start_service(policy=None)
    await bus.publish(update("v1", checkpoint(1.0)), STREAM)
    await told(bus, "policy_update_applied")
    first.stop.set()
    await first.task
    (file,) = (tmp_path / "policies").glob("*.safetensors")
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "emptied":
            file.write_bytes(b"")
        case _:
            file.unlink()

    second = await start_service(policy=None)

    assert serving(second)["version"] == "v1"


async def test_a_policy_that_was_named_is_left_only_by_later_updates(
    bus: Bus, start_service: StartService
) -> None:
    await bus.publish(update("old", checkpoint(1.0)), STREAM)

    running = await start_service(policy="bootstrap")
    assert serving(running)["version"] == "bootstrap-1"
    await bus.publish(update("new", checkpoint(2.0)), STREAM)
    await told(bus, "policy_update_applied")

    assert serving(running)["version"] == "new"


@pytest.mark.parametrize("probation", [0, 200])
async def test_a_rollback_is_an_update_that_serves_the_previous_policy_again(
    bus: Bus, start_service: StartService, probation: int
) -> None:
    running = await start_service(policy_probation_decisions=probation)
    for version, value in (("v1", 1.0), ("v2", 2.0)):
        await bus.publish(update(version, checkpoint(value)), STREAM)
    await told(bus, "policy_update_applied", 2)

    await bus.publish(update(""), STREAM, policy_action="rollback", issued_by="ann@desk")
    rolled_back = await told(bus, "policy_rolled_back", stream="oona.emergency")
    await bus.publish(update(""), STREAM, policy_action="rollback")
    again = await told(bus, "policy_update_rejected")

    assert (rolled_back["reason"], rolled_back["issued_by"]) == ("operator", "ann@desk")
    assert serving(running)["version"] == "v1"
    assert again["detail"] == "nothing to go back to"


async def test_a_shadow_reports_agreement_without_acting_until_it_is_promoted(
    bus: Bus, start_service: StartService, redis_url: str
) -> None:
    running = await start_service()
    await bus.publish(update("v2", checkpoint(2.0)), STREAM, policy_action="shadow")
    await told(bus, "policy_shadow_started")

    before: list[tuple[str, ...]] = []
    updates = running.service._updates

    async def compared() -> bool:
        # Some are skipped: the comparison before stands back for every packet.
        before.extend(await decisions(bus, f"run-{len(before)}", packets=1))
        shadow = updates.status().shadow
        return shadow is not None and int(shadow["compared"]) >= 5

    await bus.until(compared)
    shadow = updates.status().shadow
    assert shadow is not None
    assert float(shadow["agreement"]) == 1.0
    assert float(shadow["candidate_p50_ms"]) > 0
    assert {answer[1] for answer in before} == {"0.0"}
    await bus.publish(update(""), STREAM, policy_action="promote")
    await told(bus, "policy_update_applied")

    assert serving(running)["version"] == "v2"
    with open_stream(redis_url) as redis:
        assert [status.replica for status in await asyncio.to_thread(read_statuses, redis)]


async def test_a_shadow_goes_on_after_a_restart_and_can_be_promoted(
    bus: Bus, start_service: StartService
) -> None:
    first = await start_service(policy=None)
    await bus.publish(update("v2", checkpoint(2.0)), STREAM, policy_action="shadow")
    await told(bus, "policy_shadow_started")
    first.stop.set()
    await first.task

    second = await start_service(policy=None)
    shadow = second.service._updates.status().shadow
    await bus.publish(update(""), STREAM, policy_action="promote")
    await told(bus, "policy_update_applied")

    assert shadow is not None
    assert shadow["version"] == "v2"
    assert serving(second)["version"] == "v2"
    assert second.service._updates.status().shadow is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_the_loader_yields_to_the_service_and_keeps_no_weights(
    bus: Bus, start_service: StartService
) -> None:
    running = await start_service()
    loader = await running.service._updates._loader.process_id()
    assert loader is not None
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, loader) == min(19, mine + 5)

    await bus.publish(update("v1", checkpoint(1.0)), STREAM)
    await told(bus, "policy_update_applied")

    assert await running.service._updates._loader.process_id() == loader
    maps = await asyncio.to_thread(Path(f"/proc/{loader}/maps").read_text)
    assert "libtorch" not in maps


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_process_that_loaded_what_the_stream_held_at_the_start_is_replaced(
    bus: Bus, start_service: StartService
) -> None:
    await bus.publish(update("v1", checkpoint(1.0)), STREAM)

    running = await start_service(policy=None)

    loader = await running.service._updates._loader.process_id()
    maps = await asyncio.to_thread(Path(f"/proc/{loader}/maps").read_text)
    assert serving(running)["version"] == "v1"
    assert "libtorch" not in maps


async def test_keys_rotate_with_overlap(bus: Bus, start_service: StartService) -> None:
    running = await start_service(
        secret="a newer secret for the tests", secret_previous="a secret for the tests"
    )

    await bus.publish(update("v1", checkpoint(1.0)), STREAM)
    newer = seal(update("v2", checkpoint(2.0)), Keyring(b"a newer secret for the tests"))
    await bus.add(newer, STREAM)
    applied = running.metrics

    async def both() -> bool:
        value = applied.registry.get_sample_value(
            "tamiyo_policy_updates_total", {"outcome": "applied"}
        )
        return value == 2

    await bus.until(both, timeout_s=60)
    assert serving(running)["version"] == "v2"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_secrets_are_not_in_the_process_list(bus: Bus, start_service: StartService) -> None:
    running = await start_service()
    pid = await running.service._updates._loader.process_id()

    listed = await asyncio.to_thread(Path(f"/proc/{pid}/cmdline").read_bytes)

    assert b"policy_loader" in listed
    assert SECRET.encode() not in listed
