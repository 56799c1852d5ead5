"""The option --config, which reads a command's options from a TOML file."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer


def use_config(ctx: typer.Context, file: Path | None) -> Path | None:
    """Makes the values in a file the defaults of the command; the command line overrides them.

    Keys are names of options, with - or _. They stand at the top level or in a table named after
    the command. The table overrides the top level.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not TOML, or a key or value does not fit the command.
    """
    if file is None or ctx.resilient_parsing:
        return file
    command = str(ctx.command.name)
    options = {str(option.name): option for option in ctx.command.params if option.name != "config"}
    values = {}
    for key, value in _values(file, command).items():
        name = key.replace("-", "_")
        if name not in options:
            raise ValueError(_unknown(file, command, key, options))
        values[name] = _checked(ctx, options[name], value, f"--config: {file}: {key}")
    ctx.default_map = values
    return file


def _values(file: Path, command: str) -> dict[str, Any]:
    """The values of the top level, overridden by those of the command's own table."""
    from pcx.cli import COMMANDS

    content = read_toml(file)
    top = {
        key: value
        for key, value in content.items()
        if not (key in COMMANDS and isinstance(value, Mapping))
    }
    table = content.get(command, {})
    values: dict[str, Any] = {}
    for source in (top, table if isinstance(table, Mapping) else {}):
        _refuse_doubled(file, source)
        names = {key.replace("-", "_") for key in source}
        values = {k: v for k, v in values.items() if k.replace("-", "_") not in names}
        values.update(source)
    return values


def _refuse_doubled(file: Path, source: Mapping[str, Any]) -> None:
    for key in source:
        if "-" in key and key.replace("-", "_") in source:
            raise ValueError(
                f"--config: {file} has {key!r} and {key.replace('-', '_')!r}, which are one "
                "option; remove one of them"
            )


def read_toml(file: Path) -> dict[str, Any]:
    """Reads a TOML file; errors name the file and the line."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not file.is_file():
        raise FileNotFoundError(f"--config: no file {file}; give the path of a TOML file")
    content = file.read_bytes()
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"--config: {file}, line {line}: it is not UTF-8; save it as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        last = f"at line {max(1, len(content.splitlines()))}, the end"
        reason = str(error).replace("at end of document", last)
        raise ValueError(f"--config: {file} is not TOML: {reason}") from None


def _unknown(file: Path, command: str, key: str, options: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), options, n=2)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"--config: {file}: pcx {command} has no option {key!r}.{hint} Its options are "
        f"{', '.join(options)}; those of another command stand in that command's table"
    )


def _checked(ctx: typer.Context, option: Any, value: Any, where: str) -> Any:
    """The value as text of the command line, after a trial conversion; flags stay booleans.

    For an option that may be given several times it is a list of such.
    """
    flag = getattr(option, "is_flag", False)
    if isinstance(value, Mapping):
        raise ValueError(f"{where}: got a table, expected a value")
    if flag != isinstance(value, bool):
        raise ValueError(
            f"{where}: got {value!r}, expected {'true or false' if flag else 'a number or text'}"
        )
    if flag:
        return value
    several = getattr(option, "multiple", False)
    # Converted from text, so that 2.5 for a whole number is an error and not 2.
    parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    text = parts if several else ",".join(parts)
    try:
        option.process_value(ctx, text)
    except typer.BadParameter as error:
        raise ValueError(f"{where}: got {value!r}: {error.message}") from None
    return text
