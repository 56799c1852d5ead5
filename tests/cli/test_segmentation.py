"""Tasks of pixels at the command line: training, evaluation, condensing and comparing."""

import pytest
from typer.testing import CliRunner

from pcx.cli import app
from pcx.tasks import masks

SMALL = ["--task", "masks", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(masks, "SPLITS", {"train": (1, 16), "val": (2, 8), "test": (3, 8)})


@pytest.fixture
def say(tmp_path, monkeypatch):
    """Runs the command in a folder of its own, and gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    return run


def test_train_eval_and_condense(say):
    said = say("train", *SMALL, "--prompts", "4", "--epochs", "2", "--patience", "1")
    assert "wrote masks.safetensors" in said
    assert "the weights are those of epoch" in said
    assert "masks test: mIoU" in said
    assert "% on 8 images, loss" in said
    evaluated = say("eval", "masks.safetensors", *SMALL)
    assert evaluated in said
    condense = ["--keep", "0.5", "--epochs", "1", "--lr", "0.01"]
    said = say("condense", "masks.safetensors", *SMALL, *condense)
    assert "scored 24 prompts on 16 samples" in said
    assert "masks test: mIoU" in said
    said = say("train", *SMALL, "--method", "linear", "--epochs", "1", "--out", "l.safetensors")
    assert "masks test: mIoU" in said


def test_methods_are_compared_by_their_miou(say, tmp_path):
    grid = ["--grid-lr", "0.003", "--grid-weight-decay", "0", "--grid-clip-grad", "1"]
    said = say(
        "compare", *SMALL, "--methods", "linear,vpt", "--epochs", "1", "--seeds", "1", *grid,
        "--grid-opt", "adamw",
    )  # fmt: skip
    assert "Of masks the accuracy is the mean intersection over union." in said
    report = (tmp_path / "runs" / "compare" / "compare.md").read_text()
    assert "| linear |" in report


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--top5"], "--top5: it is for one class per image, and masks is of segmentation"),
        (["--class-weights", "balanced"], "--class-weights: it is for one class per image"),
        (["--method", "mlp", "--lr", "1"], "its heads are"),
    ],
)
def test_what_pixels_have_not_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["train", *SMALL, *option], catch_exceptions=False)


def test_evaluation_refuses_it_too(say):
    say("train", *SMALL, "--method", "linear", "--epochs", "1")
    with pytest.raises(ValueError, match="--top5: it is for one class per image"):
        CliRunner().invoke(
            app, ["eval", "masks.safetensors", *SMALL, "--top5"], catch_exceptions=False
        )
