"""The table of commands, and what their help loads."""

import importlib
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from pcx.cli import COMMANDS, app

SHOW = """
import sys
from pcx.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
mine = sorted(name for name in sys.modules if name.startswith("pcx.cli."))
print("LOADED", *mine, *(name for name in ("torch", "timm", "optuna") if name in sys.modules))
"""
COMMON = ["pcx.cli.config_file", "pcx.cli.messages", "pcx.cli.options"]
OF_GRIDS = {"compare": {"pcx.cli.grid_options"}, "study": {"pcx.cli.grid_options"}}


def help_and_modules(*arguments):
    command = [sys.executable, "-c", SHOW, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, _, modules = done.stdout.partition("LOADED")
    return " ".join(said.split()), modules.split()


def test_help_lists_the_commands_and_imports_none():
    said, modules = help_and_modules("--help")
    for name, listed in COMMANDS.items():
        assert f"{name} {listed.help}" in said.replace("│", "").replace("  ", " ") or (
            listed.help in said
        )
    assert modules == COMMON


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_its_file_alone(name):
    said, modules = help_and_modules(name, "--help")
    own = COMMANDS[name].target.partition(":")[0]
    assert set(modules) - {own} <= {*COMMON, *OF_GRIDS.get(name, ())}
    assert own in modules
    assert ("--config" in said) == (name != "env")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_table_is_how_the_help_begins(name):
    module, _, function = COMMANDS[name].target.partition(":")
    text = getattr(importlib.import_module(module), function).__doc__
    assert text.startswith(COMMANDS[name].help.rstrip("."))


def test_a_command_that_is_not_there_names_the_nearest():
    found = CliRunner().invoke(app, ["trian"])
    assert found.exit_code == 2
    assert "No such command 'trian'. Did you mean 'train'?" in found.output


def test_options_and_defaults_of_train():
    command = typer.main.get_command(app).get_command(None, "train")
    context = command.make_context("train", ["--task", "digits", "--out", "a"])
    assert context.params["backbone"] == "pcx_scenes_vit"
    assert (context.params["prompts"], context.params["epochs"]) == ("20", 100)
    assert (context.params["lr"], context.params["weight_decay"]) == (None, 1e-3)
    assert (context.params["amp"], context.params["resume"]) == ("no", False)
