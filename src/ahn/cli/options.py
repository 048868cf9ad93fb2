"""Options of a command from settings classes: each setting is declared once, as a field made by `ahn.config.setting`.

Beside `help`, `least` and `choices` the command line reads these words of a field's metadata:

- `names`: spellings of the option, such as `"--chat/--no-chat"`; made from the field's name if left out.
- `argument`: whether it is an argument of the command, known by its place.
- `metavar`: what stands for its value in the help; the choices if left out.
- `unset`: what happens without the option, for the help; the default if left out.
- `joined`: whether its words are joined by commas in one option, instead of giving the option several times.
- `alias`: an older spelling, which still works and is not in the help.
- `option`: false where a setting is no option.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ahn.cli import checks

_Field = dataclasses.Field[Any]


def from_fields(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for every field of the settings classes that it takes.

    Args:
        command: A parameter annotated with a settings class is given an instance, whose values were checked. One
            annotated with `Annotated[dict[str, Any], Class]` is given the values that the user gave, unchecked. All
            others stay as they are.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    classes = {name: each for name, parameter in parameters.items() if (each := _settings_class(parameter.annotation))}
    signature: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        signature += _options(*classes[name]) if name in classes else [own]

    def run(**values: Any) -> None:
        for name, (settings, given_only) in classes.items():
            taken = {field.name: _take(field, values, given_only) for field in _fields(settings)}
            named = {key: value for key, value in taken.items() if value not in (None, ())}
            values[name] = named if given_only else settings(**taken)
        command(**values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {each.name: each.annotation for each in signature}
    run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    return run


def _settings_class(annotation: Any) -> tuple[type, bool] | None:
    """The settings class that an annotation asks for, and whether only of what was given."""
    only = get_origin(annotation) is Annotated
    settings = annotation.__metadata__[0] if only else annotation
    return (settings, only) if isinstance(settings, type) and dataclasses.is_dataclass(settings) else None


def _fields(settings: Any) -> list[_Field]:
    return [field for field in dataclasses.fields(settings) if field.metadata.get("option", bool(field.metadata))]


def _options(settings: type, given_only: bool) -> Iterator[inspect.Parameter]:
    """The options of a settings class, as parameters of a command, with their older spellings."""
    hints = typing.get_type_hints(settings)
    for field in _fields(settings):
        yield _parameter(field, hints[field.name], given_only)
        if alias := field.metadata.get("alias"):
            yield _keyword(alias, None, Annotated[str | None, typer.Option(f"--{alias}", hidden=True)])


def _parameter(field: _Field, hint: Any, given_only: bool) -> inspect.Parameter:
    """A field as a parameter of a command; nothing is given where only what was given is wanted."""
    facts, shown = field.metadata, _default(field)
    default = None if given_only or shown == () else shown
    silent = not given_only or isinstance(shown, bool) or shown in ("", ())
    unset = facts.get("unset", None if silent else shown)
    note = f"  [dim]\\[default: {unset}][/dim]" if unset is not None else ""
    words: dict[str, Any] = {
        "help": facts["help"] + note,
        "metavar": facts.get("metavar") or "|".join(facts["choices"]) or None,
    }
    info = typer.Argument(**words) if facts.get("argument") else typer.Option(_spelling(field, whole=True), **words)
    kind = _type(hint, facts.get("joined", False), default is None)
    return _keyword(field.name, default, Annotated[kind, info])


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(field: _Field) -> Any:
    """A field's default as it is written on the command line; that of a signature where it must be given."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return inspect.Parameter.empty
    return ",".join(map(str, default)) if field.metadata.get("joined") and default is not None else default


def _type(hint: Any, joined: bool, optional: bool) -> Any:
    """The type of an option, in the words of typer."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    inner = parts[0] if type(None) in get_args(hint) else hint
    if get_origin(inner) is tuple:
        inner = str if joined else list[get_args(inner)[0]]  # type: ignore[misc]
    elif get_origin(inner) is Literal:
        inner = str
    return inner | None if optional else inner


def _spelling(field: _Field, whole: bool = False) -> str:
    """How a field is written on the command line; an option of two sides by the first of them, unless whole."""
    if field.metadata.get("argument"):
        return str(field.metadata.get("metavar") or field.name.upper())
    names = str(field.metadata.get("names") or f"--{field.name.replace('_', '-')}")
    return names if whole else names.split("/")[0]


def _take(field: _Field, values: dict[str, Any], given_only: bool) -> Any:
    """A field's value, checked, taken out of the values that a command was called with."""
    value, older = values.pop(field.name), values.pop(field.metadata.get("alias", ""), None)
    value = value if older is None else older
    if isinstance(value, str) and field.metadata.get("joined"):
        return tuple(checks.words(value))
    if isinstance(value, list) or (value is None and field.default == ()):
        return tuple(value or ())
    if not given_only:
        checks.setting(_spelling(field), value, field.metadata)
    return value
