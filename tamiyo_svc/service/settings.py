"""Every setting of the service, read once at start and passed down."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import PrivateAttr, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
)

from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline.partition import tags
from tamiyo_svc.leyline.signing import MIN_SECRET_BYTES, Keyring, secret_text
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.service.settings_table import SettingsTable
from tamiyo_svc.service.variables import Variable, describe, redacted, shown

_SQLITE_PREFIX: Final = "sqlite:///"


class Origin(StrEnum):
    """Where a value came from; the first four in order of precedence."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    ENV_FILE = ".env"
    DEFAULT = "default"
    FILE = "file"
    """A secret that was read from the file its `_FILE` variable names."""


class Settings(SettingsTable):
    """All settings, validated and frozen; made by `load_settings`.

    Constructing it directly reads nothing but its arguments and the defaults. Values of secrets
    are in neither its `repr` nor its errors.
    """

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the arguments; `load_settings` is what looks outside."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        """Refuse values that are fine alone and wrong together."""
        roles = ("normal", "emergency", "telemetry", "policy", "dead_letter")
        taken: dict[str, str] = {}
        for field in (f"{role}_stream" for role in roles):
            first = taken.setdefault(getattr(self, field), field)
            if first != field:
                raise self._clash(field, f"a name other than that of {_NAMES[first]}")
        for field in ("command_stream", "field_report_stream"):
            role = taken.get(getattr(self, field), "normal_stream")
            if role not in ("normal_stream", "telemetry_stream"):
                raise self._clash(field, f"a name other than that of {_NAMES[role]}")
        for low, high in _ORDERED:
            if getattr(self, low) > getattr(self, high):
                limit = f"at most {_NAMES[high]} ({shown(getattr(self, high))})"
                raise self._clash(low, limit)
        return self

    def _clash(self, field: str, takes: str) -> ValueError:
        return ValueError(f"{_NAMES[field]}: got {shown(getattr(self, field))}, takes {takes}")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return iter(self.public_values().items())

    def public_values(self) -> dict[str, bool | int | float | str | None]:
        """Variable -> value that may be shown to anybody: secrets only say whether they are set."""
        return {name: _public(getattr(self, field)) for field, name in _NAMES.items()}

    def provenance(self) -> dict[str, Origin]:
        """Variable -> where its value came from."""
        given = dict.fromkeys(self.model_fields_set, Origin.FLAG) | self._origins
        return {name: given.get(field, Origin.DEFAULT) for field, name in _NAMES.items()}

    def keyring(self) -> Keyring | None:
        """The signing keys; None when there is no secret and signatures are not required.

        Raises:
            ConfigurationError: no secret although signatures are required.
        """
        if self.secret is None:
            if self.require_signatures:
                raise ConfigurationError(
                    "ESPER_LEYLINE_SECRET: not set, takes at least 16 bytes "
                    "(or run unsigned with TAMIYO_REQUIRE_SIGNATURES=false)"
                )
            return None
        previous = self.secret_previous
        return Keyring(
            self.secret.get_secret_value().encode(),
            previous.get_secret_value().encode() if previous else None,
        )

    def secret_texts(self) -> tuple[str, ...]:
        """Every text that must never be shown: the secrets and the password of the Redis URL."""
        secrets = [
            value.get_secret_value() for value in (self.secret, self.secret_previous) if value
        ]
        parts = urlsplit(self.redis_url)
        passwords = [parts.password or "", *parse_qs(parts.query).get("password", [])]
        return (*secrets, *(text for word in passwords for text in {word, unquote(word)} if text))

    def thresholds(self) -> Thresholds:
        """The risk thresholds; each is the setting of its name."""
        names = (field.name for field in fields(Thresholds))
        return Thresholds(**{name: getattr(self, f"risk_{name}") for name in names})

    @property
    def tags(self) -> tuple[str, ...]:
        """What the names of streams end with in each partition."""
        return tags(self.partitions)

    def in_partitions(self, *streams: str) -> tuple[str, ...]:
        """The names of streams as they are on the bus, those of a partition together, each once."""
        return tuple(dict.fromkeys(stream + tag for tag in self.tags for stream in streams))

    @property
    def input_streams(self) -> tuple[str, ...]:
        """Every stream the service reads packets from, in the order in which it does."""
        return self.in_partitions(self.emergency_stream, self.normal_stream)

    @property
    def catalog_path(self) -> Path:
        """File of the blueprint catalogue, whether it exists or not."""
        return Path(self.urza_database_url.removeprefix(_SQLITE_PREFIX))

    @property
    def catalog_is_optional(self) -> bool:
        """Whether nobody named a catalogue, so that there need not be one."""
        return "urza_database_url" not in self.model_fields_set


VARIABLES: Final[tuple[Variable, ...]] = describe(Settings)
"""Every setting, in the order of its definition."""

_NAMES: Final = {variable.field: variable.name for variable in VARIABLES}
_BY_NAME: Final = {variable.name: variable for variable in VARIABLES}
_ORDERED: Final = (
    ("risk_loss_warning", "risk_max_loss_spike"),
    ("risk_coverage_crit", "risk_coverage_warn"),
    ("risk_policy_risk_elevated", "risk_policy_risk_critical"),
    ("risk_policy_risk_signal", "risk_policy_risk_elevated"),
    ("risk_blueprint_risk", "risk_blueprint_quarantine"),
    ("blueprint_candidates", "max_blueprints"),
    ("breaker_cooldown_s", "breaker_max_cooldown_s"),
)
"""Pairs of fields of which the first must not exceed the second."""


def load_settings(env_file: Path | None = Path(".env"), /, **flags: object) -> Settings:
    """Read the settings: `flags` before environment before `env_file` before defaults.

    A flag is named like the field or like its variable; None means it was not given. Empty
    environment variables count as not set. A missing `env_file` is no error.

    Raises:
        ConfigurationError: one line with the variable, what it got and what it takes.
    """
    layers = {
        Origin.FLAG: _named_flags(flags),
        Origin.ENVIRONMENT: dict(EnvSettingsSource(Settings)()),
        Origin.ENV_FILE: _read_env_file(env_file),
    }
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, layer in reversed(layers.items()):
        known = {name: value for name, value in layer.items() if name in _BY_NAME}
        values |= known
        origins |= {_BY_NAME[name].field: origin for name in known}
    for name in ("ESPER_LEYLINE_SECRET", "ESPER_LEYLINE_SECRET_PREVIOUS"):
        text = _secret_from_file(name, layers)
        if text is not None:
            values[name] = text
            origins[_BY_NAME[name].field] = Origin.FILE
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise ConfigurationError(_one_line(error)) from None
    settings._origins = origins
    return settings


def _named_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """The given flags by variable."""
    named = {}
    for flag, value in flags.items():
        name = _NAMES.get(flag, flag)
        if name not in _BY_NAME:
            close = difflib.get_close_matches(name, _BY_NAME, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ConfigurationError(f"{name}: no such setting{hint}")
        if value is not None:
            named[name] = value
    return named


def _read_env_file(path: Path | None) -> dict[str, Any]:
    try:
        return dict(DotEnvSettingsSource(Settings, env_file=path)())
    except (OSError, UnicodeDecodeError) as error:
        detail = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigurationError(f"{path}: cannot be read ({detail})") from None


def _secret_from_file(name: str, layers: Mapping[Origin, Mapping[str, object]]) -> str | None:
    """The text of the file that stands for the secret `name`, if a file is what decides it."""
    variable = f"{name}_FILE"
    for layer in layers.values():
        if name in layer and variable in layer:
            raise ConfigurationError(f"{variable}: {name} is set as well, set only one of them")
        if name in layer:
            return None
        if variable in layer:
            break
    else:
        return None
    path = Path(str(layer[variable]))
    try:
        data = path.read_bytes()
    except OSError as error:
        detail = error.strerror
        raise ConfigurationError(
            f"{variable}: got {str(path)!r} ({detail}), takes {_BY_NAME[variable].takes}"
        ) from None
    try:
        text = secret_text(data)
    except ValueError as error:
        raise ConfigurationError(
            f"{variable}: the secret in {str(path)!r}: {error}, takes {_BY_NAME[name].takes}"
        ) from None
    if len(text.encode()) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"{variable}: the secret in {str(path)!r} is too short, takes {_BY_NAME[name].takes}"
        )
    return text


def _one_line(error: ValidationError) -> str:
    """The first thing that is wrong, in the form `VARIABLE: got ..., takes ...`."""
    details = error.errors(include_url=False)
    # A default that depends on a refused value is listed as an error of its own.
    first = next(each for each in details if each["type"] != "default_factory_not_called")
    return _worded(first)


def _worded(detail: ErrorDetails) -> str:
    if not detail["loc"]:
        return str(detail["ctx"]["error"])
    key = str(detail["loc"][0])
    variable = _BY_NAME[_NAMES.get(key, key)]
    got = f"got {shown(detail['input'])}"
    if variable.is_secret:
        got = str(detail.get("ctx", {}).get("error", ""))
    got = f"{got}, " if got else ""
    return f"{variable.name}: {got}takes {variable.takes}"


def _public(value: object) -> bool | int | float | str | None:
    match value:
        case SecretStr():
            return "********"
        case None | bool() | int() | float():
            return value
        case _:
            return redacted(str(value))
