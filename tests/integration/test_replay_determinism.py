"""The same packets from the same start give the same bytes, run by run and in any company."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.replay import make_packets, replay

TESTS = Path(__file__).parents[1]
PACKETS = 10_000


@pytest.mark.timeout(600)
@pytest.mark.parametrize("runs", [1, 100])
async def test_ten_thousand_packets_replay_to_the_same_bytes(runs: int) -> None:
    packets = make_packets(PACKETS, runs)
    first = await replay(packets)
    again = await replay(packets)
    assert first.whole.hexdigest() == again.whole.hexdigest()
    assert len(first.runs) == runs
    assert {run: digest.hexdigest() for run, digest in first.runs.items()} == {
        run: digest.hexdigest() for run, digest in again.runs.items()
    }
    # Not by saying the same thing ten thousand times.
    assert first.reasons.keys() >= {"policy", "bp_quarantine", "no_seed_candidates"}
    assert first.events.keys() >= {
        "conservative_entered",
        "field_report_synthesised",
        "loss_spike",
        "metadata_skipped",
    }
    (indicated,) = first.indicators
    assert indicated >= {
        "timeout_budget_ms",
        "metadata_timeout_budget_ms",
        "reason",
        "priority",
        "step_index",
        "policy_version",
        "policy_compile",
    }


async def test_a_run_decides_alone_as_it_does_among_others() -> None:
    packets = make_packets(400, 20)
    among = await replay(packets)
    alone = await replay([pair for pair in packets if pair[0].training_run_id == "run-7"])
    assert alone.runs["run-7"].hexdigest() == among.runs["run-7"].hexdigest()


async def test_another_packet_gives_other_bytes() -> None:
    packets = make_packets(50, 1)
    before = await replay(packets)
    packets[10][0].validation_loss += 0.001
    assert (await replay(packets)).whole.hexdigest() != before.whole.hexdigest()


def test_another_process_gives_the_same_bytes() -> None:
    here = asyncio.run(replay(make_packets(200, 5))).whole.hexdigest()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "support.replay", "200", "5"],
            cwd=TESTS,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == here


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
