"""Seed modules and the catalogue written about them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.trainer.blueprints import BLUEPRINTS, build_seed, graph_metadata, write_catalog

SAMPLE = Path(__file__).parents[2] / "data" / "urza_catalog.db"


def columns(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("PRAGMA table_info(blueprints)").fetchall()


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "urza.db"
    write_catalog(path)
    return path


def rows(path: Path) -> list[Any]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT * FROM blueprints").fetchall()


def test_the_table_is_that_of_an_urza_catalogue(catalog: Path) -> None:
    assert columns(catalog) == columns(SAMPLE)


def test_every_row_is_a_descriptor_with_extras(catalog: Path) -> None:
    found = rows(catalog)
    assert [row[0] for row in found] == list(BLUEPRINTS)
    for blueprint_id, name, tier, artifact_path, text in found:
        document = json.loads(text)
        extras = document.pop("_urza")
        descriptor = json_format.ParseDict(document, leyline.BlueprintDescriptor())
        assert descriptor.blueprint_id == blueprint_id
        assert descriptor.name == name
        assert leyline.BlueprintTier.Name(descriptor.tier) == tier
        assert artifact_path == f"artifacts/{blueprint_id}.pt"
        assert descriptor.risk == pytest.approx(BLUEPRINTS[blueprint_id].risk)
        assert descriptor.allowed_parameters["alpha"].max_value == 1.0
        assert extras["graph_metadata"] == graph_metadata(BLUEPRINTS[blueprint_id])


@pytest.mark.parametrize("blueprint_id", BLUEPRINTS)
def test_metadata_describes_the_module(blueprint_id: str) -> None:
    metadata = graph_metadata(BLUEPRINTS[blueprint_id])
    module = build_seed(blueprint_id, 24)
    count = sum(layer["parameter_count"] for layer in metadata["layers"])
    assert count == sum(parameter.numel() for parameter in module.parameters())
    assert [layer["depth"] for layer in metadata["layers"]] == list(range(len(metadata["layers"])))
    assert metadata["activations"]
    assert {layer["activation"] for layer in metadata["layers"] if "activation" in layer} == {
        activation["type"] for activation in metadata["activations"]
    }


def test_the_catalogue_is_replaced_as_a_whole(catalog: Path) -> None:
    before = rows(catalog)
    write_catalog(catalog)
    assert rows(catalog) == before
    assert [path.name for path in catalog.parent.iterdir()] == ["urza.db"]


@pytest.mark.parametrize("channels", [12, 24])
@pytest.mark.parametrize("blueprint_id", BLUEPRINTS)
def test_a_fresh_seed_keeps_the_shape_and_adds_nothing_yet(
    blueprint_id: str, channels: int
) -> None:
    features = torch.rand(2, channels, 4, 4)
    residual = build_seed(blueprint_id, channels)(features)
    assert torch.equal(residual, torch.zeros_like(features))


def test_an_unknown_blueprint_is_an_error() -> None:
    with pytest.raises(KeyError):
        build_seed("no-such-seed", 12)
