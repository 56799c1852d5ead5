"""--config: options from a TOML file."""

import re
import subprocess
import sys

import pytest
import typer

from pcx.cli import app


@pytest.fixture
def options(tmp_path):
    """Parses a command line of `pcx train`, with a file of the text given."""

    def parse(text, *arguments, command="train"):
        file = tmp_path / "run.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        found = typer.main.get_command(app).get_command(None, command)
        return found.make_context(command, [*arguments, "--config", str(file)]).params

    return parse


NEEDED = 'task = "digits"\nout = "a.safetensors"\n'


def test_values_of_all_kinds_come_from_the_file(options):
    found = options(
        NEEDED + "epochs = 3\nlr = 1\nbatch-size = 8\nweight_decay = 0.5\nresume = true\n"
        "prompts = [8, 8, 4]\n"
    )
    assert (found["task"], found["out"].name) == ("digits", "a.safetensors")
    assert (found["epochs"], found["lr"], found["batch_size"]) == (3, 1.0, 8)
    assert isinstance(found["lr"], float)
    assert (found["weight_decay"], found["resume"]) == (0.5, True)
    assert found["prompts"] == "8,8,4"
    assert not found["track"]
    assert options(NEEDED + 'track = ["wandb", "aim"]\n')["track"] == ["wandb", "aim"]
    assert options(NEEDED + 'track = "wandb"\n')["track"] == ["wandb"]
    assert found["seed"] == 0  # the default of what the file leaves out


def test_the_command_line_wins_over_the_file(options):
    text = NEEDED + "epochs = 3\nseed = 4\nresume = true\n"
    found = options(text, "--epochs", "100", "--no-resume")
    assert (found["epochs"], found["seed"], found["resume"]) == (100, 4, False)


def test_a_table_wins_over_the_top_level_and_others_do_not_count(options):
    text = NEEDED + "batch_size = 3\nseed = 4\n[train]\nbatch-size = 5\n[condense]\nseed = 6\n"
    found = options(text)
    assert (found["batch_size"], found["seed"]) == (5, 4)
    found = options(text + 'model = "m"\nkeep = 0.5\n', command="condense")
    assert (found["seed"], found["batch_size"]) == (6, 3)
    assert (found["model"].name, found["keep"]) == ("m", "0.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", r"run\.toml: pcx train has no option 'epoch'\. Did you mean 'epochs'"),
        ("[train]\nweight-decy = 3", r"no option 'weight-decy'\. Did you mean 'weight_decay'"),
        ("[trian]\nlr = 3", r"pcx train has no option 'trian'"),
        ("config = 'b'", r"no option 'config'"),
        ("epochs = 2.5", r"run\.toml: epochs: .*2\.5"),
        ("epochs = true", r"run\.toml: epochs: got True, expected a number or text"),
        ("resume = 'yes'", r"run\.toml: resume: got 'yes', expected true or false"),
        ("lr = {a = 1}", r"run\.toml: lr: got a table"),
        ("batch-size = 1\nbatch_size = 2", r"'batch-size' and 'batch_size', which are one"),
        ("seed = 1\nlr = = 2", r"run\.toml is not TOML: .*line 2"),
        ("seed = 1\nlr = [2,\n", r"run\.toml is not TOML: .*line 2, the end"),
        (b"seed = 1\n# \xff\n", r"run\.toml, line 2: it is not UTF-8"),
    ],
)
def test_wrong_files_are_errors_that_name_the_place(options, text, message):
    with pytest.raises(ValueError, match=message):
        options(text, "--task", "digits", "--out", "a")


def test_the_command_ends_in_one_line(tmp_path):
    code = "from pcx.cli import main; main()"
    for text, message in [(None, "no file run.toml"), ("lrr = 1", "no option 'lrr'")]:
        if text:
            (tmp_path / "run.toml").write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", code, "train", "--config", "run.toml"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2
        assert re.fullmatch(rf"pcx: --config: .*{message}.*\n", done.stderr)
