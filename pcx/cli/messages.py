"""Messages of errors in the words of the command line: an option where Python has an argument."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from typer.core import TyperArgument, TyperCommand

# Arguments in Python whose options have another name.
OPTION_OF = {
    "checkpoint_dir": "out",
    "clip_grad": "grid_clip_grad",
    "lr": "grid_lr",
    "name": "task",
    "names": "track",
    "num_prompts": "prompts",
    "num_workers": "workers",
    "opt": "grid_opt",
    "path": "model",
    "weight_decay": "grid_weight_decay",
}
# A name in the midst of a sentence is an argument where it is no word.
_NO_WORDS = ("lr",)
QUOTES = "'\""
_VALUE = r"'[^']*'|\"[^\"]*\"|[\w+-]+(?:\.\w+)*"


class Command(TyperCommand):
    """A command whose errors name arguments as they are typed."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; a message that it raises is changed by `as_typed`."""
        try:
            return super().invoke(ctx)
        except (ValueError, FloatingPointError, OSError) as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (as_typed(error.args[0], self, ctx.params),)
            raise


def as_typed(message: str, command: TyperCommand, given: Mapping[str, Any]) -> str:
    """A message in which arguments of pcx's functions are the options of a command.

    "num_workers: -1, expected ..." becomes "--workers: -1, expected ...", and "set clip_grad=1.0"
    becomes "set --clip-grad 1.0". A message that begins with an option is written for the command
    line already.

    Args:
        message: of an error.
        command: that was run.
        given: its arguments and options by name.
    """
    if message.startswith("--"):
        return message
    typed = {str(option.name): _typed(option) for option in command.params}
    flags = {str(o.name) for o in command.params if getattr(o, "is_flag", False)}
    typed |= {name: typed[option] for name, option in OPTION_OF.items() if option in typed}
    if given.get("photos") is not None:
        typed["name"] = typed["photos"]

    def head(found: re.Match) -> str:
        name, index, rest = found.groups()
        if name in map(str, given.values()):  # a folder or file of that name
            return found[0]
        if name == "cache" and given.get("cache_tokens"):
            own = given.get("cache") is not None and rest.startswith(str(given["cache"]))
            name = name if own else "cache_tokens"
        return f"{typed.get(name, name)}{index or ''}: {rest}"

    def assigned(found: re.Match) -> str:
        name, value = found.groups()
        return typed[name] if name in flags else f"{typed[name]} {value.strip(QUOTES)}"

    options = [name for name, how in typed.items() if how.startswith("--")]
    plain = [name for name in options if "_" in name or name in _NO_WORDS]
    message = re.sub(r"(?s)\A(\w+)(\[\d+\])?: (.*)", head, message)
    before = r"(?<![\w./\\'\"=-])"
    message = re.sub(rf"{before}({_any(options)})=({_VALUE})", assigned, message)
    after = r"(?![\w/\\=(:-]|\.\w)"
    return re.sub(rf"{before}({_any(plain)}){after}", lambda found: typed[found[1]], message)


def _typed(option: Any) -> str:
    """An option's longest name, or an argument's in capitals as the help has it."""
    if isinstance(option, TyperArgument):
        return str(option.name).upper()
    return max(option.opts, key=len)


def _any(names: list[str]) -> str:
    """A regular expression for one of the names, none where there is no name."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"
