"""How a setting is described: its variable, group, unit and what it takes, read off its field."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, Field, SecretStr
from pydantic.fields import FieldInfo

_MAX_SHOWN_CHARACTERS: Final = 80


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting as an operator meets it."""

    name: str
    """The environment variable."""
    field: str
    """The attribute of the settings object."""
    group: str
    default: str
    """The default as a reader sees it."""
    unit: str
    takes: str
    """What values are accepted, in words."""
    description: str
    is_secret: bool


def setting(
    group: str,
    name: str,
    default: Any,
    description: str,
    *,
    unit: str = "",
    takes: str = "",
    unset: str = "",
    **constraints: Any,
) -> Any:
    """A settings field read from the variable `name`.

    `default` may be a function, of the values validated before it or of nothing. `unset` says in
    words what the default means where its value does not; `takes` overrides the wording derived
    from type and bounds.
    """
    extra: dict[str, Any] = {"group": group, "unit": unit, "takes": takes, "unset": unset}
    source = {"default_factory" if callable(default) else "default": default}
    return Field(
        validation_alias=name,
        description=description,
        json_schema_extra=extra,
        **source,
        **constraints,
    )


def describe(model: type[BaseModel]) -> tuple[Variable, ...]:
    """Every setting of `model`, in the order of its definition."""
    return tuple(_describe(field, info) for field, info in model.model_fields.items())


def _describe(field: str, info: FieldInfo) -> Variable:
    extra = info.json_schema_extra
    if not isinstance(extra, Mapping) or not isinstance(info.validation_alias, str):
        raise TypeError(f"{field} was not made with setting()")
    kind = _kind(info.annotation)
    return Variable(
        name=info.validation_alias,
        field=field,
        group=str(extra["group"]),
        default=str(extra["unset"]) or _plain(info.default),
        unit=str(extra["unit"]),
        takes=str(extra["takes"]) or _takes(kind, info),
        description=info.description or "",
        is_secret=kind is SecretStr,
    )


def _kind(annotation: Any) -> Any:
    """The type of a field, without its `| None` and its validators."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _kind(next(kind for kind in get_args(annotation) if kind is not type(None)))
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    return annotation


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _takes(kind: Any, info: FieldInfo) -> str:
    if kind is bool:
        return "true or false"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if kind is Path:
        return "a path"
    noun = {int: "a whole number", float: "a number"}[kind]
    return f"{noun}{_limits(info)}"


def _limits(info: FieldInfo) -> str:
    words = {type(limit): limit for limit in info.metadata}
    match words.get(Ge), words.get(Gt), words.get(Le), words.get(Lt):
        case Ge(low), None, Le(high), None:
            return f" from {low} to {high}"
        case Ge(low), None, None, None:
            return f" of at least {low}"
        case None, Gt(low), None, None:
            return f" above {low}"
        case None, Gt(low), None, Lt(high):
            return f" above {low} and below {high}"
        case None, None, None, None:
            return ""
    raise TypeError(f"no words for the limits {info.metadata}")


def shown(value: object) -> str:
    """A value as an error message quotes it: short, without passwords."""
    text = redacted(str(value))
    if len(text) > _MAX_SHOWN_CHARACTERS:
        text = text[:_MAX_SHOWN_CHARACTERS] + "…"
    return repr(text)


def redacted(text: str) -> str:
    """A text with the passwords of any URL in it masked."""
    text = re.sub(r"//.*@", "//********@", text, flags=re.DOTALL)
    return re.sub(r"([?&]password=)[^&\s]*", r"\1********", text)
