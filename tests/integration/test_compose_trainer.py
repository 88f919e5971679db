"""The compose stack's trainer and `tamiyo top` beside a real service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.served_process import SECRET, serve

from tamiyo_svc.adapters.embedded import EmbeddedRedis

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]

TRAINER = Path(__file__).parents[2] / "deploy" / "compose" / "trainer.py"


def test_the_trainer_trains_a_run_and_top_shows_it(tmp_path: Path) -> None:
    secret, catalog, picture = (tmp_path / name for name in ("leyline", "catalog.db", "top.svg"))
    secret.write_text(SECRET)
    with EmbeddedRedis() as redis, serve(redis.url, tmp_path) as service:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "REDIS_URL": redis.url,
            "ESPER_LEYLINE_SECRET_FILE": str(secret),
        }
        trained = subprocess.run(
            [sys.executable, str(TRAINER), "--catalog", str(catalog), "--runs", "1"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert trained.returncode == 0, trained.stderr
        found = re.search(r"^(compose-\d+-1): .* (\d+) of (\d+) packets answered", trained.stdout)
        assert found
        run_id, answered, published = found[1], int(found[2]), int(found[3])
        assert 0 < answered <= published
        assert catalog.exists()
        shown = subprocess.run(
            [sys.executable, "-m", "tamiyo_svc.cli.main", "top", "--svg", str(picture)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        assert run_id in shown.stdout
        assert "oona.normal" in shown.stdout
        assert service.get("/livez")[0] == 200
    svg = picture.read_text()
    assert run_id in svg
    assert "@font-face" not in svg
