"""Weights of a backbone from a user's file: read as data alone, and none left at random."""

import argparse
import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from pcx.backbones.building import build_backbone

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5).state_dict()


def built(file, **more):
    return build_backbone(NAME, weights=file, num_classes=3, **more)


FORMS = {
    "a.safetensors": save_file,
    "a.pth": torch.save,
    "nested.pth": lambda state, file: torch.save({"model": state, "epoch": 3}, file),
    "settings.pth": lambda state, file: torch.save(
        {"model": state, "args": argparse.Namespace(lr=1)}, file
    ),
    "wrapped.pth": lambda state, file: torch.save(
        {"state_dict": {f"module.{name}": t for name, t in state.items()}}, file
    ),
    "old.pth": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_fills_the_backbone(state, tmp_path, name):
    FORMS[name](state, tmp_path / name)
    found = built(tmp_path / name)
    for key, tensor in found.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(tensor, state[key])
    assert found.num_classes == 3
    assert "state_dict" not in found.pretrained_cfg


def test_positions_are_resampled_as_timm_does(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    found = built(tmp_path / "a.safetensors", img_size=112)
    assert found.pos_embed.shape[1] == 1 + 7 * 7
    assert torch.equal(found.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])


def without(state, start):
    return {name: tensor for name, tensor in state.items() if not name.startswith(start)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"a": torch.ones(2)}, "has no values for cls_token, pos_embed"),
        (lambda s: {f"vit.{n}": t for n, t in s.items()}, r"has no values for .*it has vit\."),
        (lambda s: without(s, "blocks.11."), r"has no values for blocks\.11\.norm1\.weight"),
        (lambda s: without(s, "norm."), r"has no values for norm\.weight, norm\.bias of"),
        (
            lambda s: s | {n.replace("blocks.0.", "blocks.12."): t.clone() for n, t in s.items()},
            r"has more than vit_tiny_patch16_224 takes: blocks\.12\.",
        ),
        (lambda s: s | {"cls_token": torch.ones(1, 1, 7)}, "does not fit vit_tiny_patch16_224"),
        (lambda s: {"epoch": torch.tensor(3)}, "has no values for"),
    ],
)
def test_what_does_not_fill_it_is_named(state, tmp_path, change, message):
    save_file(change(state), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"^weights: .*a\.safetensors {message}"):
        built(tmp_path / "a.safetensors")


class RunsCode:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (self.place,))


def test_no_code_is_run(state, tmp_path):
    torch.save({"state_dict": state, "args": RunsCode(str(tmp_path / "ran"))}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is not what torch\.save writes of tensors alone"):
        built(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_foreign_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(ValueError, match=f"^weights: .*{name}"):
        built(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"weights: no file .*{name}"):
        built(tmp_path / name)
