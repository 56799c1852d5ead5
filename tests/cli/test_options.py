"""What commands make of the options that they share."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import pcx
from pcx import backbones
from pcx.backbones.inputs import data_config
from pcx.cli import app, options
from pcx.ops import library
from pcx.ops.dispatch import report
from pcx.tasks import load_task

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of made-up weights of a small timm model."""
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(TINY).state_dict(), file)
    return file


def test_the_embedded_backbone_has_its_name():
    assert options.EMBEDDED == backbones.NAME


@pytest.mark.parametrize(
    "name", [backbones.NAME, TINY, "eva02_tiny_patch14_336", "deit3_small_patch16_384"]
)
def test_images_are_described_without_weights(name):
    new = backbones.scenes_vit if name == backbones.NAME else timm.create_model
    expected = data_config(new(0) if name == backbones.NAME else new(name, num_classes=0))
    assert options.backbone_data_config(name) == expected


def test_a_saved_model_is_loaded_on_the_backbone_that_its_file_names(tmp_path, weights):
    model = pcx.VPT(options.new_backbone(TINY, 3, weights), 2)
    pcx.save(model, tmp_path / "m")
    found = options.loaded_model(tmp_path / "m", None, weights)
    assert all(torch.equal(v, found.trainable()[k]) for k, v in model.trainable().items())
    pcx.save(pcx.VPT(backbones.scenes_vit(3), 2), tmp_path / "e")
    assert options.loaded_model(tmp_path / "e", None, None).counts == (2,) * 6
    with pytest.raises(ValueError, match="trained on pcx_scenes_vit"):
        options.loaded_model(tmp_path / "e", TINY, weights)
    with pytest.raises(FileNotFoundError, match="path: no file"):
        options.loaded_model(tmp_path / "none", None, None)
    (tmp_path / "bad").write_bytes(b"bad")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        options.loaded_model(tmp_path / "bad", None, None)


def test_train_is_what_the_functions_give_for_the_seed(tmp_path, monkeypatch):
    """Bitwise, and with weights of the backbone read once."""
    reads = []
    read = backbones.load
    monkeypatch.setattr(backbones, "load", lambda data: reads.append(1) or read(data))
    monkeypatch.setattr(options, "say_accuracy", lambda *arguments, **more: None)
    out = tmp_path / "a.safetensors"
    arguments = ["--task", "digits", "--out", str(out), "--prompts", "2", "--epochs", "1"]
    arguments += ["--lr", "0.1", "--seed", "3", "--clip-grad", "1", "--split", "trainval"]
    found = CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)
    assert found.exit_code == 0
    assert len(reads) == 1

    data = load_task("digits", data_config(backbones.scenes_vit()))
    torch.manual_seed(3)
    model = pcx.VPT(backbones.scenes_vit(10), 2)
    loader = data.loader("trainval", 64)
    pcx.fit(model, loader, epochs=1, lr=0.1, seed=3, clip_grad=1, progress=False)
    saved = pcx.load(out, backbones.scenes_vit())
    assert all(torch.equal(v, saved.trainable()[k]) for k, v in model.trainable().items())
    assert {p.name for p in tmp_path.iterdir()} == {out.name, f"{out.name}.ckpt"}


def test_env_says_what_runs_and_why_not_the_rest(monkeypatch):
    said = CliRunner().invoke(app, ["env"], catch_exceptions=False).output
    assert f"torch {torch.__version__}" in said
    assert f"pcx {pcx.__version__}" in said
    assert "device cpu" in said
    monkeypatch.setattr(library, "EXTENSION", frozenset())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = {(line.op, line.backend): line.reason for line in report()}
    assert rows["weighted_pagerank", "triton"] == "no CUDA device"
    assert "without its compiled extension" in rows["weighted_pagerank", "cpu"]
    assert all(rows[op, "reference"] is None for op, _ in rows)
    lines = CliRunner().invoke(app, ["env"], catch_exceptions=False).output.splitlines()
    used = [line for line in lines if "used" in line]
    assert len(used) == len({op for op, _ in rows})
    assert all("reference" in line for line in used)


def test_train_takes_any_method_that_is_built_from_a_backbone(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "say_accuracy", lambda *arguments, **more: None)
    out = tmp_path / "a.safetensors"
    arguments = ["train", "--task", "digits", "--out", str(out), "--epochs", "1", "--lr", "0.1"]
    arguments += ["--overwrite"]
    for method in ("linear", "full"):
        found = CliRunner().invoke(app, [*arguments, "--method", method], catch_exceptions=False)
        assert found.exit_code == 0
        loaded = pcx.load(out)
        assert loaded.method == method
        assert loaded.record.task == "digits"
    help_text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert all(method in help_text for method in pcx.METHODS)
    for wrong, message in (
        (["--method", "liner"], "Did you mean 'linear'"),
        (["--method", "linear", "--prompts", "3"], "--prompts: --method linear has no such"),
        (["--method", "peft"], "--method: peft: peft_type: None, expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, [*arguments, *wrong], catch_exceptions=False)
