"""Each part in this process: spaced as a trainer calls it, and in a tight loop.

`python -m benchmarks.parts [--rounds N] [--json]`; the probe takes turns with what is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import workload
from benchmarks.decision import decision_parts
from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.cli.measure import (
    HEADINGS,
    Distribution,
    WeightProbe,
    interleaved_ms,
    machine,
)
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.compiled import CompiledNetwork
from tamiyo_svc.policy.cuda import CudaNetwork
from tamiyo_svc.policy.engines import Engine
from tamiyo_svc.policy.folded import fold
from tamiyo_svc.policy.folding import fold_weights
from tamiyo_svc.policy.network import TamiyoNetwork
from tamiyo_svc.taxonomy import WeightDtype

GAP_S: Final = 0.02
_COUNT: Final = 40
_GRAPHS: Final = 50

T = TypeVar("T")


def parts() -> dict[str, Callable[[], object]]:
    """What is measured, by name; each call does it once."""
    torch.set_num_threads(1)
    graphs = _endless(workload.graphs(_GRAPHS))
    packets = _endless(workload.packets(_GRAPHS))
    candidates, builder = workload.blueprints(), workload.builder()
    network = workload.network()
    forms = engines(network)
    keyring = Keyring(b"a secret for the benchmark")
    sealed = seal(workload.packets(1)[0], keyring, {}).fields()

    def reference() -> object:
        graph = next(graphs)
        with torch.inference_mode():
            return network(graph.x, graph.edge_index, graph.edge_attr)

    def forward(engine: Engine) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return engine.evaluate([next(graphs)])

        return run

    return {
        "probe: 28 MB streamed": WeightProbe(),
        "graph build": lambda: builder.build(next(packets), candidates, {}),
        "forward, network.py": reference,
        **{name: forward(engine) for name, engine in forms.items()},
        "codec: open a packet": lambda: parse_payload(open_envelope(sealed, keyring)),
        "codec: seal a packet": lambda: seal(next(packets), keyring, {}).fields(),
    }


def engines(network: TamiyoNetwork) -> dict[str, Engine]:
    """The forms this machine can run, by name."""
    folded = fold(network)
    with torch.inference_mode():
        folded.warm_up(64)
    forms: dict[str, Engine] = {"forward, eager folded": folded, **_compiled(network)}
    if torch.cuda.is_available():
        device = torch.device("cuda")
        for title, is_compiled in {"eager": False, "torch.compile": True}.items():
            engine = CudaNetwork(network, device, time.perf_counter, is_compiled=is_compiled)
            print(f"CUDA {title}: {engine.choices}")
            forms[f"forward, CUDA {title}"] = engine
    return forms


def _compiled(network: TamiyoNetwork) -> dict[str, Engine]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = load_compiled(Path(folder))
    except CompiledFormUnavailableError:
        return {}
    weights = fold_weights(network)
    return {
        f"forward, compiled {dtype}": CompiledNetwork(library, weights, dtype)
        for dtype in WeightDtype
    }


def batched(size: int) -> dict[str, float]:
    """Graphs a second of one forward over `size` graphs of different packets."""
    graphs = workload.graphs(size)
    network = workload.network()
    rates = {}
    for name, engine in engines(network).items():
        with torch.inference_mode():
            engine.evaluate(graphs)
            started, calls = time.perf_counter(), 0
            while time.perf_counter() - started < 1.0:
                engine.evaluate(graphs)
                calls += 1
        rates[name] = calls * size / (time.perf_counter() - started)
    return rates


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", action="store_true")
    chosen = arguments.parse_args()
    with decision_parts() as decisions:
        calls = parts() | decisions
        results: dict[str, dict[str, list[float]]] = {
            "spaced, one every 20 ms": interleaved_ms(calls, chosen.rounds, _COUNT, GAP_S),
            "tight loop": interleaved_ms(calls, chosen.rounds, _COUNT),
        }
    rates = batched(64)
    if chosen.json:
        figures = {
            title: {name: asdict(Distribution.of(times)) for name, times in result.items()}
            for title, result in results.items()
        }
        print(json.dumps({"machine": machine(), "ms": figures, "graphs_per_s_of_64": rates}))
        return
    console = Console(width=110)
    for title, result in results.items():
        console.print(_table(title, result))
    for name, rate in rates.items():
        console.print(f"{name}: batches of 64, {rate:.0f} graphs a second", highlight=False)
    console.print(str(machine()), highlight=False)


def _table(title: str, result: dict[str, list[float]]) -> Table:
    table = Table("", *HEADINGS, title=f"{title}; milliseconds", title_justify="left")
    for name, times in result.items():
        table.add_row(name, *Distribution.of(times).cells())
    return table


def _endless(values: Sequence[T]) -> itertools.cycle[T]:
    return itertools.cycle(values)


if __name__ == "__main__":
    main()
