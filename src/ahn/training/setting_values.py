"""Settings as files and options write them, in the types that they have."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from ahn.errors import ConfigError


def typed_value(name: str, value: Any, hint: Any) -> Any:
    """The value in the type that a setting has; numbers may come as text, for YAML reads 1e-3 as one.

    Args:
        name: The setting, for the message.
        value: As a YAML file or an option gives it.
        hint: The setting's type.

    Raises:
        ConfigError: The value is of another kind.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return typed_value(name, value, next(part for part in parts if part is not type(None)))
    if origin is typing.Literal or hint is str:
        if isinstance(value, str):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple) and (parts[-1] is ... or len(value) == len(parts)):
            return tuple(typed_value(name, _whole(each) if parts[0] is int else each, parts[0]) for each in value)
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return {
                str(key): typed_value(name, each, parts[1]) if parts[1] is float else each
                for key, each in value.items()
            }
    elif isinstance(value, bool) == (hint is bool) and (number := _number(value, hint)) is not None:
        return number
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a list")
    kind = "names with numbers" if origin is dict else kind
    raise ConfigError(f"{name} must be {kind}, not {value!r}")


def _whole(value: Any) -> Any:
    """A whole number that is joined to others in an option comes as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _number(value: Any, hint: type) -> Any:
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    if isinstance(value, int) or (hint is float and isinstance(value, float)):
        return hint(value)
    return None
