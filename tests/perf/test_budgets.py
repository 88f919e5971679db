"""Time budgets, measured; run with `RUN_PERF_TESTS=1 pytest -m perf` on a quiet machine."""

from __future__ import annotations

import os

import pytest

from benchmarks import parts
from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.cli.measure import Distribution, timed_ms

pytestmark = [
    pytest.mark.perf,
    pytest.mark.skipif(os.environ.get("RUN_PERF_TESTS") != "1", reason="RUN_PERF_TESTS is not 1"),
]

_COUNT = 150


def spaced(name: str) -> Distribution:
    call = parts.parts()[name]
    timed_ms(call, _COUNT // 5)
    return Distribution.of(timed_ms(call, _COUNT, parts.GAP_S))


def test_graph_build_stays_within_two_milliseconds() -> None:
    assert spaced("graph build").p95 <= 2.0


def test_eager_inference_stays_within_forty_five_milliseconds() -> None:
    assert spaced("forward, eager folded").p95 < 45.0


def test_compiled_inference_stays_within_the_step_budget(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    try:
        load_compiled(tmp_path_factory.mktemp("compiled"))
    except CompiledFormUnavailableError as error:
        pytest.skip(str(error))

    assert spaced("forward, compiled fp16").p99 <= 4.2


def test_batches_reach_a_thousand_graphs_a_second() -> None:
    assert max(parts.batched(64).values()) >= 1000
