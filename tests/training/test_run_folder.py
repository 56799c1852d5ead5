"""What a run leaves in its folder."""

import csv
import getpass
import json
import socket
import sys
from pathlib import Path

import pytest
import torch

import pcx
from pcx.training.run import Run
from pcx.training.run_folder import RunFolder, without_place, writable_folder

QUIET = {"progress": False}
FILES = {"last.pt", "config.json", "environment.json", "history.csv"}


def new_model(backbone):
    torch.manual_seed(0)
    return pcx.VPT(backbone, 3, head_init="keep")


def read_json(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def rows(folder):
    with open(folder / "history.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


class Interrupted(Exception):
    pass


def interrupted(monkeypatch, method, after, *arguments, **options):
    """Runs fit until a method of the run was called so often."""
    original, calls = getattr(*method), []

    def stop(self, *given):
        original(self, *given)
        calls.append(1)
        if len(calls) == after:
            raise Interrupted

    monkeypatch.setattr(*method, stop)
    with pytest.raises(Interrupted):
        pcx.fit(*arguments, **options)
    monkeypatch.undo()


def test_the_history_is_the_one_that_fit_returns(backbone, loader, tmp_path):
    history = pcx.fit(
        new_model(backbone),
        loader,
        epochs=3,
        lr=0.1,
        val_loader=loader,
        checkpoint_dir=tmp_path / "a" / "b",
        **QUIET,
    )
    assert rows(tmp_path / "a" / "b") == history
    assert (tmp_path / "a" / "b" / "history.csv").read_text().startswith(",".join(history[0]))
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == FILES


def test_the_configuration_says_what_was_trained_on_what(backbone, loader, tmp_path):
    model = new_model(backbone)
    pcx.fit(model, loader, epochs=1, lr=0.1, seed=7, checkpoint_dir=tmp_path, **QUIET)
    config = read_json(tmp_path, "config")
    assert config["recipe"]["lr"] == 0.1
    assert config["recipe"]["seed"] == 7
    assert (config["model"], config["backbone"]) == (
        "VPT",
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    )
    assert config["trained"]["prompts.0"] == "3x24"
    assert set(config["trained"]) == set(model.trainable())
    assert config["trained_parameters"] == sum(p.numel() for p in model.trainable().values())
    assert config["training_data"] == {"samples": 10, "batch_size": 4}
    assert config["validation_data"] is None


def test_the_first_files_are_there_before_the_first_epoch(backbone, loader, tmp_path, monkeypatch):
    def look(self):
        assert {p.name for p in tmp_path.iterdir()} == {"config.json", "environment.json"}
        raise Interrupted

    monkeypatch.setattr(Run, "epoch", look)
    with pytest.raises(Interrupted):
        pcx.fit(new_model(backbone), loader, epochs=1, lr=0.1, checkpoint_dir=tmp_path, **QUIET)


def test_the_environment_names_no_person_machine_or_folder(backbone, loader, tmp_path, monkeypatch):
    home = str(Path.home())
    arguments = ["/opt/x/bin/pcx", "train", "--root", home, f"--out={tmp_path}/cars.safetensors"]
    monkeypatch.setattr(sys, "argv", arguments)
    pcx.fit(new_model(backbone), loader, epochs=1, lr=0.1, checkpoint_dir=tmp_path, **QUIET)
    found = read_json(tmp_path, "environment")
    assert found["command"] == ["pcx", "train", "--root", "<path>", "--out=cars.safetensors"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["pcx"] == pcx.__version__
    assert found["device"] == "cpu"
    text = " ".join(p.read_text() for p in tmp_path.glob("*.json"))
    assert str(tmp_path) not in text
    assert socket.gethostname() not in found["platform"]
    assert f"/{getpass.getuser()}" not in text


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("runs/a/b.csv", "runs/a/b.csv"),
        ("../a", "../a"),
        ("/home/jo doe/x.toml", "x.toml"),
        ("~jo/x", "<path>"),
        ("--storage=sqlite:////home/jo/s.db", "--storage=sqlite:s.db"),
        (r"C:\Users\jo\x.toml", "x.toml"),
        ("0.1", "0.1"),
        ("sprites:ori", "sprites:ori"),
    ],
)
def test_absolute_paths_become_names(argument, expected):
    assert without_place(argument) == expected


@pytest.mark.parametrize("method", [(Run, "save"), (RunFolder, "add_epoch")])
def test_resuming_doubles_no_line_and_loses_none(backbone, loader, tmp_path, monkeypatch, method):
    """Whether the run was stopped before an epoch's line was written or after."""
    options = {"epochs": 4, "lr": 0.1, **QUIET}
    whole = new_model(backbone)
    expected = pcx.fit(whole, loader, **options)
    options |= {"checkpoint_dir": tmp_path}
    interrupted(monkeypatch, method, 2, new_model(backbone), loader, **options)
    started = read_json(tmp_path, "environment")["started"]
    resumed = new_model(backbone)
    history = pcx.fit(resumed, loader, resume=True, **options)
    assert rows(tmp_path) == history
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in expected]
    assert all(torch.equal(v, resumed.trainable()[k]) for k, v in whole.trainable().items())
    environment = read_json(tmp_path, "environment")
    assert environment["started"] == started
    assert len(environment["resumed"]) == 1


def test_a_line_after_the_last_checkpoint_goes_away(backbone, loader, tmp_path):
    options = {"epochs": 2, "lr": 0.1, "checkpoint_dir": tmp_path, **QUIET}
    pcx.fit(new_model(backbone), loader, **options)
    with open(tmp_path / "history.csv", "a") as file:
        file.write("3,half a li")
    history = pcx.fit(new_model(backbone), loader, resume=True, **options)
    assert rows(tmp_path) == history
    assert len(history) == 2


def test_a_folder_of_before_has_a_checkpoint_alone_and_resumes(
    backbone, loader, tmp_path, monkeypatch
):
    options = {"epochs": 4, "lr": 0.1, **QUIET}
    whole = new_model(backbone)
    pcx.fit(whole, loader, **options)
    options |= {"checkpoint_dir": tmp_path}
    interrupted(monkeypatch, (Run, "save"), 2, new_model(backbone), loader, **options)
    for file in tmp_path.iterdir():
        if file.name != "last.pt":
            file.unlink()
    resumed = new_model(backbone)
    history = pcx.fit(resumed, loader, resume=True, **options)
    assert all(torch.equal(v, resumed.trainable()[k]) for k, v in whole.trainable().items())
    assert rows(tmp_path) == history
    assert {p.name for p in tmp_path.iterdir()} == FILES


def test_a_new_run_forgets_the_one_before(backbone, loader, tmp_path):
    options = {"lr": 0.1, "checkpoint_dir": tmp_path, **QUIET}
    pcx.fit(new_model(backbone), loader, epochs=3, **options)
    with pytest.raises(ValueError, match=r"checkpoint_dir: .*last\.pt holds 3 finished epochs"):
        pcx.fit(new_model(backbone), loader, epochs=1, **options)
    assert len(rows(tmp_path)) == 3
    history = pcx.fit(new_model(backbone), loader, epochs=1, overwrite=True, **options)
    assert rows(tmp_path) == history
    assert "resumed" not in read_json(tmp_path, "environment")
    assert read_json(tmp_path, "config")["recipe"]["epochs"] == 1


def test_measures_that_a_resumed_run_adds_are_columns(backbone, loader, tmp_path, monkeypatch):
    options = {"epochs": 3, "lr": 0.1, "checkpoint_dir": tmp_path, **QUIET}
    interrupted(monkeypatch, (Run, "save"), 1, new_model(backbone), loader, **options)
    history = pcx.fit(new_model(backbone), loader, resume=True, val_loader=loader, **options)
    assert rows(tmp_path) == history
    assert ["val_loss" in row for row in history] == [False, True, True]


def test_a_folder_that_cannot_be_written_is_an_error_before_training(
    backbone, tmp_path, monkeypatch
):
    class Unread(list):
        def __iter__(self):
            raise AssertionError("the loader was read")

    options = {"epochs": 1, "lr": 0.1, **QUIET}
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="checkpoint_dir: .*file is a file, expected a folder"):
        pcx.fit(new_model(backbone), Unread([1]), checkpoint_dir=file, **options)
    with pytest.raises(ValueError, match=r"checkpoint_dir: .*sub cannot be written to \(Not a dir"):
        pcx.fit(new_model(backbone), Unread([1]), checkpoint_dir=file / "sub", **options)

    def refuse(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\)"):
        pcx.fit(new_model(backbone), Unread([1]), checkpoint_dir=tmp_path / "new", **options)


def test_proving_that_a_folder_can_be_written_touches_no_file_of_the_user(tmp_path):
    for name in ("probe", "probe.part"):
        (tmp_path / name).write_text("mine")
    writable_folder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probe", "probe.part"]
    assert (tmp_path / "probe").read_text() == "mine"
