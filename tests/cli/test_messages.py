"""Messages of pcx's functions in the words of the command line."""

import pytest
import typer

from pcx.cli import app
from pcx.cli.messages import as_typed

SAID = [
    ("train", "num_workers: -1, expected 0", "--workers: -1, expected 0"),
    ("train", "weight_decay: -1.0", "--weight-decay: -1.0"),
    ("train", "num_prompts[2]: 1", "--prompts[2]: 1"),
    ("condense", "path: no file x", "MODEL: no file x"),
    ("predict", "path: no file x", "--model: no file x"),
    ("predict", "images[3]: a list", "IMAGES[3]: a list"),
    ("export", "batch_size: 3", "batch_size: 3"),  # it has no such option
    (
        "train",
        "loss: nan in epoch 1: lower lr (now 1; try 0.1), or set clip_grad=1.0. The model",
        "loss: nan in epoch 1: lower --lr (now 1; try 0.1), or set --clip-grad 1.0. The model",
    ),
    ("train", "a; give overwrite=True, or amp='bf16'", "a; give --overwrite, or --amp bf16"),
    ("train", "lr: give lr or base_lr.", "--lr: give --lr or --base-lr."),
    # Names of files, words of prose, and what is written for the command line stay as they are.
    ("train", "seed_lr: no folder a/base_lr or base_lr.pt", None),
    ("train", "photos of a task have an epoch and a method", None),
    ("train", "--config: a.toml: its options are base_lr, lr=1", None),
]


def command(name):
    return typer.main.get_command(app).get_command(None, name)


@pytest.mark.parametrize(("name", "message", "expected"), SAID)
def test_arguments_are_options(name, message, expected):
    assert as_typed(message, command(name), {}) == (expected or message)


def test_which_of_two_options_is_meant_follows_from_what_was_given():
    train = command("train")
    assert as_typed("name: 'x'", train, {"photos": None, "task": "x"}) == "--task: 'x'"
    assert as_typed("name: no folder a/b", train, {"photos": "a/b"}) == "PHOTOS: no folder a/b"
    assert as_typed("split: no such folder", train, {"photos": "split"}) == "split: no such folder"
    both = {"cache": "here", "cache_tokens": True}
    assert as_typed("cache: 'tokens' needs", train, both) == "--cache-tokens: 'tokens' needs"
    assert as_typed("cache: here is a file", train, both) == "--cache: here is a file"
