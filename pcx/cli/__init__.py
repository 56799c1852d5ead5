"""Visual Prompt Tuning of vision transformers, and Prompt Condensation, from the command line."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any, NamedTuple, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from pcx.cli.messages import Command
from pcx.cli.options import new_backbone, printable
from pcx.registry import Registry

__all__ = ["COMMANDS", "app", "main", "new_backbone"]


class Listed(NamedTuple):
    """A command whose file is not imported yet."""

    target: str  # "module:function"
    help: str  # its line in `pcx --help`


# A new command is one file in this folder and one line here.
COMMANDS = {
    "demo": Listed("pcx.cli.demo:demo", "VPT and Prompt Condensation on data in the package."),
    "train": Listed("pcx.cli.train:train", "Trains a method on a task."),
    "study": Listed("pcx.cli.study:study", "Runs a suite: the papers' findings by one command."),
    "report": Listed("pcx.cli.report:report", "Writes one HTML page of runs."),
    "compare": Listed("pcx.cli.compare:compare", "Compares methods on tasks, each at its best."),
    "predict": Listed("pcx.cli.predict:predict", "Names and probabilities of photos' classes."),
    "condense": Listed("pcx.cli.condense:condense", "Scores, selects and fine-tunes prompts."),
    "export": Listed(
        "pcx.cli.export:export", "Writes a saved model to a file that runs without pcx."
    ),
    "eval": Listed("pcx.cli.evaluate:evaluate", "Accuracy of a saved model on a split."),
    "prune": Listed(
        "pcx.cli.prune:prune", "Accuracy of a saved model, whole and with tokens pruned."
    ),
    "search": Listed("pcx.cli.search:search", "Searches settings of pcx prune at a budget."),
    "env": Listed("pcx.cli.env:env", "Prints versions, devices, and for each op the backend used."),
}
_FUNCTIONS = Registry("command", {name: listed.target for name, listed in COMMANDS.items()})


def _as_listed() -> dict[str, Any]:
    """All commands, without their options, so that no file is imported."""
    return {name: TyperCommand(name, help=listed.help) for name, listed in COMMANDS.items()}


class CommandTable(TyperGroup):
    """The group of `COMMANDS`, which imports only the command that is run."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        self.commands = _as_listed()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command with its options, or None if there is no such command."""
        if cmd_name not in self.commands:
            return None
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(cmd_name, cls=Command)(_FUNCTIONS[cmd_name])
        return typer.main.get_command(alone)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the list of commands without importing their files."""
        listing = TyperGroup(
            name=self.name, commands=_as_listed(), help=self.help, params=self.params
        )
        listing.format_help(ctx, formatter)


app = typer.Typer(
    cls=CommandTable, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)


@app.callback()
def _group() -> None:
    """Makes typer treat the application as a group, although no command is registered with it."""


# Exit codes, besides 0; a process that a signal ends has 128 and the signal's number.
FAILED, WRONG_INPUT, DIVERGED = 1, 2, 3
_OF_PATHS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
_Usage: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> None:
    """Runs the command line; an error ends in one line, not in a traceback.

    The exit code is 2 for wrong input, 3 where training diverged, 1 where the system failed, and 4
    where pcx predict has skipped files that are no images.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except _Usage as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            app(["--help"], standalone_mode=False)
            sys.exit(WRONG_INPUT)
        _stop(error.format_message(), WRONG_INPUT)
    except FloatingPointError as error:
        _stop(error, WRONG_INPUT if str(error).startswith(("loader:", "val_loader:")) else DIVERGED)
    except (ValueError, *_OF_PATHS) as error:
        _stop(error, WRONG_INPUT)
    except (OSError, ImportError, MemoryError) as error:
        _stop(error, FAILED)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        _stop(f"{error}; try a smaller --batch-size", FAILED)
    except KeyboardInterrupt:
        _stop("interrupted", 128 + signal.SIGINT)


def _stop(said: Any, code: int) -> NoReturn:
    """Ends the process with one line on the standard error."""
    line = printable(" ".join(str(said).split()))
    Console(stderr=True).print(f"pcx: {line}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)


def _end(number: int, frame: Any) -> NoReturn:
    """Ends the process on SIGTERM as an exception does, so that part files go away."""
    sys.exit(128 + number)
