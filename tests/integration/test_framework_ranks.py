"""Lightning and Transformers on two gloo processes: packets are of all ranks together."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote, and the file of Lightning's logger with the first."""
    pytest.importorskip("lightning.pytorch")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "support.framework_ranks", str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "TORCHELASTIC_RUN_ID": "test",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            printed, _ = process.communicate(timeout=200)
            assert process.returncode == 0, printed
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    (file,) = folder.rglob("metrics.csv")
    with file.open() as opened:
        results[0]["csv"] = list(csv.DictReader(opened))
    return results


def test_lightnings_loss_and_gradient_norm_are_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["lightning"] for rank in ranks)
    assert first == second
    assert first["losses"] == pytest.approx(first["logged"])
    # The loss is linear in the batch's rows, and the weight is 0.
    assert first["gradient_norms"] == pytest.approx(first["logged"])


def test_lightnings_logger_shows_what_rank_0_was_told(ranks: list[dict[str, Any]]) -> None:
    rows = [row for row in ranks[0]["csv"] if row.get("tamiyo/applied")]
    assert float(rows[-1]["tamiyo/applied"]) == 3.0


def test_transformers_loss_and_gradient_norm_are_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["transformers"] for rank in ranks)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(first["logged"], rel=1e-3)
    assert first["gradient_norms"] == pytest.approx(first["norms"], rel=1e-3)
