"""The graph and packet that everything is measured with: 4 seeds and the sample graph metadata."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.cli.bench import state_packet
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.network import TamiyoNetwork

CATALOG: Final = Path(__file__).parents[1] / "tests" / "data" / "urza_catalog.db"
BLUEPRINT: Final = "demo-safe"
SEEDS: Final = 4

_RANDOM_SEED: Final = 11


def blueprints() -> Sequence[Blueprint]:
    """The candidates every packet names."""
    catalog = UrzaCatalog(f"sqlite:///{CATALOG}", 5.0, lambda event, attributes: None)
    asyncio.run(catalog.refresh())
    return catalog.snapshot.candidates([BLUEPRINT], "", "", 8)


def packets(count: int, seeds: int = SEEDS) -> list[leyline.SystemStatePacket]:
    """Consecutive packets of one run."""
    return [state_packet("bench", step, seeds) for step in range(1, count + 1)]


def builder() -> GraphBuilder:
    """A builder with the default limits."""
    return GraphBuilder(GraphLimits(), Vocabularies())


def graphs(count: int) -> list[Graph]:
    """The graphs of consecutive packets."""
    build, candidates = builder(), blueprints()
    return [build.build(packet, candidates, {}) for packet in packets(count)]


def network() -> TamiyoNetwork:
    """The full-size network with random weights: nothing in it is constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        return TamiyoNetwork().eval()
