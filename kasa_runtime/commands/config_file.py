"""`kasa serve --config FILE`: TOML whose tables are a tree of configuration dataclasses.

A file's values become the defaults of the flags, so that environment and flags win over them.
"""

from __future__ import annotations

import json
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from kasa_runtime.commands.flags import Leaf, leaves
from kasa_runtime.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])

ENVIRONMENT_PREFIX = "KASA_"
OTHER_VARIABLES = (
    *("KASA_CONFIG", "KASA_HOME", "KASA_PRINT_CONFIG", "KASA_ADDRESS", "KASA_TOKEN", "KASA_TLS"),
    *("KASA_ROOT_CERTIFICATES", "KASA_CERTIFICATE", "KASA_PRIVATE_KEY"),
)
NEAR = 0.8
KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a string",
}


def config_option(config_type: type) -> Callable[[Command], Command]:
    """Decorator of a click command: `--config FILE` with the settings of `config_type`."""

    def remember(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
        if path is not None and not context.resilient_parsing:
            context.default_map = read(path, config_type)

    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="TOML file with these settings; environment and flags win over it",
    )


def read(path: Path, config_type: type) -> dict[str, Any]:
    """The file's settings by the names of their fields. Raises ConfigError for a key that is no
    setting and for a value of another type."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    known = {leaf.path: leaf for leaf in leaves(config_type)}
    settings = {}
    for key, value in _entries(document, known):
        if key not in known:
            raise ConfigError(f"{path}: unknown key {'.'.join(key)}{_near(key, known)}")
        settings[key[-1]] = _checked(value, known[key].hint, f"{path}: {'.'.join(key)}")
    return settings


def check_environment(config_type: type, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError for a variable that looks like a setting's, written wrong. Others that
    begin alike are let be: orchestrators make some up for a service called kasa."""
    settings = [leaf.name.upper() for leaf in leaves(config_type)]
    known = {*OTHER_VARIABLES, *(ENVIRONMENT_PREFIX + name for name in settings)}
    for variable in environment:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            name = variable.removeprefix(ENVIRONMENT_PREFIX)
            if near := get_close_matches(name, settings, n=1, cutoff=NEAR):
                wanted = ENVIRONMENT_PREFIX + near[0]
                raise ConfigError(f"{variable} is no setting; did you mean {wanted}?")


def show(config: object, context: click.Context) -> str:
    """The configuration as TOML, with where each value came from, as `context` knows it."""
    lines = []
    for table, group in groupby(_flat_first(type(config)), key=lambda leaf: leaf.path[:-1]):
        lines += ["", f"[{'.'.join(table)}]"]
        lines += [_line(leaf, config, context) for leaf in group]
    return "\n".join(lines[1:])


def _entries(
    table: Mapping[str, Any], known: Iterable[tuple[str, ...]], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    tables = {key[:length] for key in known for length in range(len(key))}
    for name, value in table.items():
        key = (*path, name)
        if key in tables and isinstance(value, dict):
            yield from _entries(value, known, key)
        else:
            yield key, value


def _near(key: tuple[str, ...], known: Iterable[tuple[str, ...]]) -> str:
    """ "; did you mean ..." if a key, or a table, is called nearly so."""
    names = {path[-1]: path for path in known}
    names |= {path[-2]: path[:-1] for path in names.values() if len(path) > 1}
    near = get_close_matches(key[-1], names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join('.'.join(names[name]) for name in near)}?" if near else ""


def _checked(value: Any, hint: Any, what: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{what} must be an array, got {value!r}")
        return [_checked(item, typing.get_args(hint)[0], what) for item in value]
    if origin is typing.Literal:
        if value not in (allowed := typing.get_args(hint)):
            raise ConfigError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")
        return value
    found = type(value)
    accepted = {Path: (str,), float: (float, int)}.get(hint, (hint,))
    if found not in accepted:
        raise ConfigError(f"{what} must be {KINDS[hint]}, got {value!r}")
    return value


def _flat_first(config_type: type) -> list[Leaf]:
    """A table's own settings before the tables within it, as TOML wants them."""
    found = list(leaves(config_type))
    tables = list(dict.fromkeys(leaf.path[:-1] for leaf in found))
    return sorted(found, key=lambda leaf: tables.index(leaf.path[:-1]))


def _line(leaf: Leaf, config: object, context: click.Context) -> str:
    value = config
    for name in leaf.path:
        assert is_dataclass(value)
        value = getattr(value, name)
    if value is None:
        return f"# {leaf.name} is not set"
    return f"{leaf.name} = {_toml(value)}  # {_source(leaf, context)}"


def _source(leaf: Leaf, context: click.Context) -> str:
    match context.get_parameter_source(leaf.name):
        case ParameterSource.COMMANDLINE:
            return leaf.flag
        case ParameterSource.ENVIRONMENT:
            return ENVIRONMENT_PREFIX + leaf.name.upper()
        case ParameterSource.DEFAULT_MAP:
            return "file"
    return "default"


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else repr(value)
