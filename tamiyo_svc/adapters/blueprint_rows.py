"""One catalogue row to a blueprint; what does not fit is left out and counted, never fatal."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.message import Message

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.leyline import leyline_pb2 as leyline

MAX_ROW_BYTES: Final = 1 << 20
"""Longer metadata is not parsed."""

SKIPPED_PARTS: Final = ("row", "bsds", "graph_metadata", "guard_spec", "tags")
"""What can be left out: a whole row, or a part of one."""

_ENUM_FIELDS: Final = {
    "hazard_band": "HAZARD_BAND",
    "handling_class": "HANDLING_CLASS",
    "resource_profile": "RESOURCE_PROFILE",
    "provenance": "PROVENANCE",
}
# Whatever json and json_format raise for input that is merely hostile.
_UNREADABLE: Final = (
    ArithmeticError,
    AttributeError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
)


def parse_blueprint(blueprint_id: str, text: str, skipped: Counter[str]) -> Blueprint:
    """Parse one `metadata_json`; parts that do not fit are counted in `skipped`.

    Raises:
        ValueError: not even the descriptor can be read.
    """
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("metadata_json is not an object")
        extras = data.pop("_urza", None)
        # A lone surrogate in a map's key makes protobuf raise SystemError; no text holds one.
        json.dumps(data, ensure_ascii=False).encode()
        descriptor: Message = json_format.ParseDict(
            data, leyline.BlueprintDescriptor(), ignore_unknown_fields=True
        )
    except (json_format.ParseError, *_UNREADABLE) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    assert isinstance(descriptor, leyline.BlueprintDescriptor)
    if not math.isfinite(descriptor.risk):
        raise ValueError("risk is not finite")
    descriptor.blueprint_id = blueprint_id
    if not isinstance(extras, dict):
        extras = {}
    tags = [str(tag) for tag in _typed(extras, "tags", list, skipped) or () if _is_text(tag)]
    return Blueprint(
        descriptor=descriptor,
        bsds=_sheet(descriptor, extras.get("bsds"), skipped),
        graph_metadata=_typed(extras, "graph_metadata", dict, skipped),
        guard_spec=_typed(extras, "guard_spec", list, skipped),
        tags=tuple(tags),
    )


def _is_text(tag: object) -> bool:
    return isinstance(tag, str | int | float)


def _typed(extras: Mapping[str, Any], name: str, kind: type, skipped: Counter[str]) -> Any:
    value = extras.get(name)
    if value is None or isinstance(value, kind):
        return value
    skipped[name] += 1
    return None


def _sheet(
    descriptor: leyline.BlueprintDescriptor, value: Any, skipped: Counter[str]
) -> leyline.BSDS | None:
    """The safety sheet in a row's extras.

    A field that cannot be read is left out by itself: a sheet that calls a blueprint critical
    must not be lost because its provenance is misspelt.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        skipped["bsds"] += 1
        return None
    sheet = leyline.BSDS(version=1, blueprint_id=descriptor.blueprint_id)
    sheet.risk_score = descriptor.risk
    odd = False
    try:
        risk = float(value["risk_score"])
        if not math.isfinite(risk):
            raise ValueError("risk_score is not finite")
        sheet.risk_score = min(1.0, max(0.0, risk))
    except _UNREADABLE:
        odd = True
    for field, prefix in _ENUM_FIELDS.items():
        if value.get(field) is None:
            continue
        name = str(value[field]).upper()
        try:
            number = _ENUMS[prefix].Value(name if name.startswith(prefix) else f"{prefix}_{name}")
        except ValueError:
            odd = True
        else:
            setattr(sheet, field, number)
    if isinstance(value.get("recommendation"), str):
        sheet.recommendation = value["recommendation"].encode(errors="replace").decode()
    if value.get("issued_at"):
        try:
            sheet.issued_at.FromJsonString(str(value["issued_at"]))
        except _UNREADABLE:
            sheet.ClearField("issued_at")
            odd = True
    skipped["bsds"] += odd
    return sheet


_ENUMS: Final[Mapping[str, Any]] = {
    "HAZARD_BAND": leyline.HazardBand,
    "HANDLING_CLASS": leyline.HandlingClass,
    "RESOURCE_PROFILE": leyline.ResourceProfile,
    "PROVENANCE": leyline.Provenance,
}
