"""Visual Prompt Tuning of vision transformers, and Prompt Condensation, from the command line."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from pcx.cli.options import new_backbone
from pcx.registry import Registry

__all__ = ["COMMANDS", "app", "main", "new_backbone"]


class Listed(NamedTuple):
    """A command before its file is imported: where its function is, and its line of help."""

    target: str
    help: str


# A new command is one file in this folder and one line here.
COMMANDS = {
    "demo": Listed("pcx.cli.demo:demo", "VPT and Prompt Condensation on data in the package."),
    "train": Listed("pcx.cli.train:train", "Trains a method on a task."),
    "condense": Listed("pcx.cli.condense:condense", "Scores, selects and fine-tunes prompts."),
    "eval": Listed("pcx.cli.evaluate:evaluate", "Accuracy of a saved model on a split."),
    "prune": Listed(
        "pcx.cli.prune:prune", "Accuracy of a saved model whole and with tokens pruned."
    ),
    "search": Listed("pcx.cli.search:search", "Searches settings of pcx prune at a budget."),
    "env": Listed("pcx.cli.env:env", "Versions, devices, and which backend runs each operation."),
}
_FUNCTIONS = Registry("command", {name: listed.target for name, listed in COMMANDS.items()})


def _as_listed() -> dict[str, Any]:
    """The commands without their options."""
    return {name: TyperCommand(name, help=listed.help) for name, listed in COMMANDS.items()}


class CommandTable(TyperGroup):
    """The group of `COMMANDS`: it lists them as they are, and imports the one that is run."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        self.commands = _as_listed()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command with its options, None where there is no such command."""
        if cmd_name not in self.commands:
            return None
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(cmd_name)(_FUNCTIONS[cmd_name])
        return typer.main.get_command(alone)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of a group of the commands as listed, of which no file is imported."""
        listing = TyperGroup(
            name=self.name, commands=_as_listed(), help=self.help, params=self.params
        )
        listing.format_help(ctx, formatter)


app = typer.Typer(
    cls=CommandTable, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)


@app.callback()
def _group() -> None:
    """Makes a group of the application, although no command is registered with typer."""


def main() -> None:
    """Runs the command line; a wrong argument or file ends in one line, not in a traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(f"pcx: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
