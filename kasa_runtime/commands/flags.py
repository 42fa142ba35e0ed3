"""Command-line flags derived from configuration dataclasses, so that no default is written twice.

A field `grpc_port: int` becomes `--grpc-port`; its help is the field's metadata "help". A field
that holds another dataclass contributes that one's fields; one with metadata `flag=False`, none.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import click

from kasa_runtime.commands.help import OPTIONS, Option

Config = TypeVar("Config")
Command = TypeVar("Command", bound=Callable[..., Any])

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Leaf:
    """A setting in a tree of configurations. `path`: the fields that lead to it, with its own."""

    path: tuple[str, ...]
    field: Field[Any]
    hint: Any

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def leaves(config_type: type, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """All settings of a configuration, in the order of its fields; their names must differ."""
    hints = typing.get_type_hints(config_type)
    for field in _fields(config_type):
        hint = hints[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from leaves(hint, (*path, field.name))
        else:
            yield Leaf((*path, field.name), field, without_none(hint))


def options(
    *config_types: type, section: str | None = None, **changed: Settings
) -> Callable[[Command], Command]:
    """Decorator: a flag for every field of the configurations, whose names must differ.

    `section` is their heading in help; by default the TOML table in which a setting is. `changed`
    has settings of `click.option` for the flags of some fields, by field name.
    """
    found = [leaf for config_type in config_types for leaf in leaves(config_type)]
    names = [leaf.name for leaf in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    assert not repeated, f"fields of one name in two configurations: {repeated}"

    def decorate(command: Command) -> Command:
        for leaf in reversed(found):
            heading = section or _table(leaf)
            command = _option(leaf, heading, changed.get(leaf.name, {}))(command)
        return command

    return decorate


def build(config_type: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration that `values` (field name to value of its flag) describe."""
    hints = typing.get_type_hints(config_type)
    arguments: dict[str, Any] = {}
    for field in _fields(config_type):
        if is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return config_type(**arguments)


def _fields(config_type: type) -> Iterator[Field[Any]]:
    assert is_dataclass(config_type), config_type
    return (f for f in fields(config_type) if f.init and f.metadata.get("flag", True))


def _table(leaf: Leaf) -> str:
    return f"[{'.'.join(leaf.path[:-1])}]" if leaf.path[1:] else OPTIONS


def _option(leaf: Leaf, section: str, changed: Settings) -> Callable[[Any], Any]:
    field, hint, flag = leaf.field, leaf.hint, leaf.flag
    default = _default(field)
    settings: dict[str, Any] = {
        "cls": Option,
        "section": section,
        "help": field.metadata.get("help"),
        "show_default": default is not None and default != (),
    }
    if default is MISSING:
        settings |= {"required": True, "show_default": False}
    else:
        settings["default"] = default
    if hint is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif typing.get_origin(hint) is tuple:
        settings |= {"multiple": True, "type": _param_type(typing.get_args(hint)[0])}
    else:
        settings["type"] = _param_type(hint)
    return click.option(flag, field.name, **{**settings, **changed})


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def without_none(hint: Any) -> Any:
    """`X` of the type `X | None`, and any other as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _param_type(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        return click.Choice(list(typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return click.Choice(hint)
    if hint is Path:
        return click.Path(path_type=Path)
    assert hint in (str, int, float), f"no flag can be derived from the type {hint}"
    return hint
