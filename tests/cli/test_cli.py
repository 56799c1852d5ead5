"""The command line, as a person runs it."""

import importlib.util
import json
import subprocess
import sys

import pytest

from pcx.experiments import demo as demo_module


def pcx_command(*arguments, cwd, code=0):
    command = [sys.executable, "-c", "from pcx.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def test_train_condense_and_eval(tmp_path):
    train = [
        "--prompts",
        "4,4,4,4,4,4",
        "--epochs",
        "2",
        "--lr",
        "0.3",
        "--clip-grad",
        "1",
        "--head-init",
    ]
    said = pcx_command(
        "train", "--task", "digits", "--out", "vpt.safetensors", *train, "keep", cwd=tmp_path
    )
    assert "training 3,274 of" in said  # 6 x 4 x 96 prompts, 10 x 96 + 10 head
    assert "digits test:" in said
    condense = ["--keep", "0.5", "--epochs", "1", "--out", "small.safetensors"]
    said = pcx_command("condense", "vpt.safetensors", "--task", "digits", *condense, cwd=tmp_path)
    assert "scored 24 prompts on 200 samples" in said
    said = pcx_command("eval", "small.safetensors", "--task", "digits", cwd=tmp_path)
    assert "on 1397 images" in said
    prune = ["--layers", "1,3", "--keep", "0.9,0.5", "--out", "kept.png"]
    said = pcx_command("prune", "small.safetensors", "--task", "digits", *prune, cwd=tmp_path)
    whole, pruned = said.split("pruned:")
    assert "wrote kept.png" in whole
    accuracy = [part.split("digits test: ")[1].split()[0] for part in (whole, pruned)]
    assert accuracy[0] != accuracy[1]
    budget = ["--budget", "0.7", "--trials", "3", "--images", "50", "--seed", "1"]
    said = pcx_command("search", "small.safetensors", "--task", "digits", *budget, cwd=tmp_path)
    assert "best of 3 settings at 0.700 of" in said
    options, searched = said.split("pcx prune ")[1].split(" digits test: ", 1)
    again = ["small.safetensors", "--task", "digits", *options.split()]
    said = pcx_command("prune", *again, cwd=tmp_path)
    assert said.endswith(searched)
    assert {p.name for p in tmp_path.iterdir()} == {
        "vpt.safetensors",
        "vpt.safetensors.ckpt",
        "small.safetensors",
        "small.safetensors.ckpt",
        "kept.png",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "none.safetensors", "--task", "digits"], "pcx: MODEL: no file none.safetensors"),
        (["train", "--task", "letters", "--out", "a", "--lr", "1"], "pcx: --task: 'letters'"),
        (
            ["train", "--task", "digits", "--out", "a", "--method", "full"],
            "pcx: --lr: give --lr or --base-lr",
        ),
        (
            ["train", "--task", "digits", "--out", "a", "--lr", "1", "--backbone", "vit_huge_x"],
            "pcx: --backbone: timm knows no 'vit_huge_x'",
        ),
        (
            ["train", "--task", "digits", "--out", "a", "--lr", "1", "--prompts", "4,x"],
            "pcx: --prompts: '4,x', expected numbers",
        ),
        (
            ["train", "--task", "digits", "--out", "a", "--backbone", "vit_tiny_patch16_224"]
            + ["--weights", "none.pt"],
            "pcx: --weights: no file none.pt",
        ),
        (
            ["condense", "m", "--task", "digits", "--out", "a", "--keep", "auto"]
            + ["--split", "trainval"],
            "pcx: --split: 'trainval' holds the images of val",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    said = pcx_command(*arguments, cwd=tmp_path, code=2)
    assert said.startswith(message)
    assert "Traceback" not in said


def test_demo_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    """The demo's path with everything cut short; the figures of the real one are in the README."""
    for name, value in {"EPOCHS": 1, "TUNE_EPOCHS": 1, "SEARCH_EPOCHS": 1, "PROMPTS": 10}.items():
        monkeypatch.setattr(demo_module, name, value)
    for name in ("RATES", "LINEAR_RATES"):
        monkeypatch.setattr(demo_module, name, (0.3,))
    demo_module.demo(tmp_path, tasks=("digits",))
    task = json.loads((tmp_path / "result.json").read_text())["tasks"]["digits"]
    methods = {"linear", "vpt", "condensed_no_finetune", "condensed", "vpt_small"}
    assert set(task["accuracy"]) == set(task["standard_error"]) == methods
    assert all(0 < a < 100 for a in task["accuracy"].values())
    assert task["prompts"]["before"] == [10] * 6
    assert sum(task["prompts"]["after"]) == 18
    assert set(task["latency_ms"]) == {
        "folded",
        "concat",
        "folded_condensed",
        "concat_condensed",
    }
    assert all(ms > 0 for ms in task["latency_ms"].values())
    assert set(task["learning_rate"]) == {"linear", "vpt", "condensed", "vpt_small"}
    figures = {p.name for p in (tmp_path / "digits").iterdir()}
    names = ("kept_per_layer", "scores", "accuracy_by_keep")
    assert figures == {f"{name}.{suffix}" for name in names for suffix in ("png", "csv")}
    points = (tmp_path / "digits" / "accuracy_by_keep.csv").read_text().splitlines()[1:]
    assert len(points) == 1 + 3 + 1 + 2  # fine-tuned, not, trained with so many; two levels
    assert len({line.rsplit(",", 1)[1] for line in points}) > 2  # each its own standard error
    assert "VPT-Deep with 30%" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("missing", "package"), [("matplotlib",) * 2, ("sklearn", "scikit-learn")])
def test_demo_says_at_its_start_what_is_missing(tmp_path, monkeypatch, missing, package):
    def runs(*given):
        raise AssertionError("it has begun")

    found = importlib.util.find_spec
    monkeypatch.setattr(
        "pcx.extras.find_spec", lambda name: None if name == missing else found(name)
    )
    monkeypatch.setattr(demo_module, "_run_task", runs)
    with pytest.raises(ImportError, match=rf"pcx demo needs {package}.*pcx\[study\]"):
        demo_module.demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
