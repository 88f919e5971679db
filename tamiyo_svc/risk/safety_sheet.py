"""How a safety sheet's enum values are spelled in annotations and attributes.

The spellings are those of the catalogue: hazard bands and provenances in capitals, handling
classes and resource profiles in small letters.
"""

from __future__ import annotations

from typing import Final

from tamiyo_svc.leyline import leyline_pb2 as leyline


def _names(enum: str, prefix: str) -> dict[int, str]:
    values = leyline.DESCRIPTOR.enum_types_by_name[enum].values
    return {value.number: value.name.removeprefix(prefix) for value in values}


UNKNOWN: Final = "UNKNOWN"
"""Stands for a value that is not in the contract."""

HAZARD_BANDS: Final = _names("HazardBand", "HAZARD_BAND_")
HANDLING_CLASSES: Final = {
    number: name.lower() for number, name in _names("HandlingClass", "HANDLING_CLASS_").items()
}
RESOURCE_PROFILES: Final = {
    number: name.lower() for number, name in _names("ResourceProfile", "RESOURCE_PROFILE_").items()
}
PROVENANCES: Final = _names("Provenance", "PROVENANCE_")
