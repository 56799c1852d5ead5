"""Saving and loading prompts and head."""

import sys

import pytest
import torch
from families import build, randomise
from safetensors.torch import load_file, save_file

import pcx
from pcx.checkpoints.fingerprint import backbone_fingerprint


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("kind", ["deep", "shallow", "prefix"])
def test_what_is_loaded_is_what_was_saved(backbone, x, tmp_path, kind):
    model = pcx.VPT(backbone, 3, kind=kind, dropout=0.1, dropout_groups=2, num_classes=5)
    model.trained_lr = 0.25
    pcx.save(model, tmp_path / "new" / "model.safetensors")
    loaded = pcx.load(tmp_path / "new" / "model.safetensors", backbone)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    for name in ("kind", "counts", "dropout", "dropout_groups", "path", "trained_lr", "read_only"):
        assert getattr(loaded, name) == getattr(model, name)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_ragged_and_headless(backbone, x, tmp_path):
    model = pcx.VPT(backbone, [0, 2], num_classes=0)
    pcx.save(model, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model(x))


@pytest.mark.parametrize("family", ["deit-distilled", "beit", "naflexvit"])
def test_families(family, tmp_path):
    from families import images

    backbone = build(family)
    model = pcx.VPT(backbone, 2)
    pcx.save(model, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(images(family)), model(images(family)))


def test_only_prompts_and_head_are_written(backbone, tmp_path):
    pcx.save(pcx.VPT(backbone, 3), tmp_path / "m")
    assert set(load_file(tmp_path / "m")) == {
        "prompts.0",
        "prompts.1",
        "backbone.head.weight",
        "backbone.head.bias",
    }
    assert (tmp_path / "m").stat().st_size < 4000


def test_another_backbone_is_refused(backbone, tmp_path):
    pcx.save(pcx.VPT(backbone, 3), tmp_path / "m")
    with torch.no_grad():
        backbone.head.weight.add_(1)  # its head is not the backbone
    pcx.load(tmp_path / "m", backbone)
    randomise(backbone, seed=1)
    with pytest.raises(
        ValueError, match=r"backbone: .* was trained on .* give the same pretrained"
    ):
        pcx.load(tmp_path / "m", backbone)
    with pytest.raises(ValueError, match="backbone: .* was trained on"):
        pcx.load(tmp_path / "m", build("vit"))


def test_the_fingerprint_is_of_the_backbone_alone(backbone):
    model = pcx.VPT(backbone, 3)
    assert backbone_fingerprint(model) == backbone_fingerprint(
        pcx.VPT(backbone, 1, kind="shallow", num_classes=9)
    )
    with torch.no_grad():
        backbone.blocks[1].mlp.fc2.bias[0] += 1e-6
    assert backbone_fingerprint(model) != backbone_fingerprint(pcx.VPT(build("vit"), 1))


def test_bad_files_are_named(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        pcx.load(tmp_path / "none", backbone)
    pcx.save(pcx.VPT(backbone, 3), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut is not a whole safetensors file"):
            pcx.load(tmp_path / "cut", backbone)
    save_file({"a": torch.ones(1)}, tmp_path / "bare", metadata={"pcx": "1", "config": "{}"})
    with pytest.raises(ValueError, match="bare has no whole configuration"):
        pcx.load(tmp_path / "bare", backbone)
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"foreign was not written by pcx\.save"):
        pcx.load(tmp_path / "foreign", backbone)


def test_a_head_of_several_modules(backbone, x, tmp_path):
    backbone.head = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Linear(8, 3)).double()
    model = pcx.VPT(backbone, 2, head_init="keep")
    with torch.no_grad():
        model.heads[0][0].weight.add_(1)
    pcx.save(model, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model(x))


def test_a_failed_write_keeps_the_old_file(backbone, tmp_path, monkeypatch):
    pcx.save(pcx.VPT(backbone, 3), tmp_path / "m")
    old = (tmp_path / "m").read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(sys.modules["pcx.checkpoints.saving"], "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        pcx.save(pcx.VPT(backbone, 2), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
