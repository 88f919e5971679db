"""Runs the policy scenarios at a given length: `python tests/chaos/policy_campaign.py kills 50`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    from chaos.policy_scenarios import kill_during_updates, mutate_checkpoints

    scenarios = {"kills": kill_during_updates, "mutations": mutate_checkpoints}
    name, times = sys.argv[1], int(sys.argv[2])
    started = time.monotonic()
    figures = scenarios[name](times)
    print(json.dumps({**figures, "duration_s": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
