"""Wrapped modules: what a method does at the residual sum equals a line in the block's forward."""

import copy
import pickle

import pytest
import timm
import torch
from families import build, images
from torch import nn

import pcx
from pcx.backbones.residual import OnInput, OnOutput, Wrapper, plain_names, wrap
from pcx.backbones.spec import find_spec
from pcx.models.base import TunedModel


class Shift(nn.Module):
    """Adds to some channels of a tensor in place, as salient channel tuning does."""

    def __init__(self, dim):
        super().__init__()
        self.amount = nn.Parameter(torch.linspace(-1, 1, dim // 2, dtype=torch.float64))

    def forward(self, x):
        x[..., : len(self.amount)] += self.amount * x[..., : len(self.amount)].tanh()
        return x


def with_a_line(block, shift):
    """timm's ViT block with one line more."""

    def forward(x, **kwargs):
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs)))
        x = shift(x.clone())
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return forward


@pytest.mark.parametrize("family", ["vit", "deit3", "dinov2-reg", "siglip", "vit-qk-norm"])
def test_the_reader_sees_the_sum(family):
    backbone, x = build(family), images(family)
    spec = find_spec(backbone)
    shifts = nn.ModuleList(Shift(48) for _ in spec.blocks)
    wrapped, oracle = copy.deepcopy(backbone), copy.deepcopy(backbone)
    for block, shift in zip(spec.blocks, shifts, strict=True):
        wrap(wrapped, block, "reader", lambda inner, s=shift: OnInput(inner, s))
        module = oracle.get_submodule(block.name)
        module.forward = with_a_line(module, shift)
    found, expected = wrapped(x), oracle(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, backbone(x))
    by_wrapping = torch.autograd.grad(found.square().sum(), list(shifts.parameters()))
    by_line = torch.autograd.grad(expected.square().sum(), list(shifts.parameters()))
    for a, b in zip(by_wrapping, by_line, strict=True):
        assert torch.equal(a, b)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(other(x), found)


@pytest.mark.parametrize("part", ["reader", "mlp", "attention"])
def test_any_part_is_wrapped(part):
    backbone, x = build("vit"), images("vit")
    expected = backbone(x)
    spec = find_spec(backbone)
    for block in spec.blocks:
        wrapper = wrap(backbone, block, part, Wrapper if part == "" else identity)
        assert isinstance(wrapper, OnOutput)
    assert torch.equal(backbone(x), expected)
    assert all(isinstance(backbone.get_submodule(b.reader), nn.Module) for b in spec.blocks)


def identity(inner):
    return OnOutput(inner, nn.Identity())


def test_a_part_that_is_not_there_is_named():
    backbone = build("vit-xp")
    (block, *_) = find_spec(backbone).blocks
    with pytest.raises(ValueError, match=r"part: blocks\.0 has no 'reader' that is a module"):
        wrap(backbone, block, "reader", identity)


def test_names_leave_wrappers_out():
    backbone = build("vit")
    plain = set(backbone.state_dict())
    for block in find_spec(backbone).blocks:
        wrap(backbone, block, "mlp", identity)
    names = plain_names(backbone)
    assert set(names.values()) == plain
    assert names["blocks.0.mlp.inner.fc1.weight"] == "blocks.0.mlp.fc1.weight"
    prompted = plain_names(pcx.VPT(build("vit"), 2))
    assert prompted["backbone.blocks.1.block.norm1.weight"] == "backbone.blocks.1.norm1.weight"


class Shifted(TunedModel):
    """A method at the residual sum, as small as one can be."""

    method = "test-shifted"

    def __init__(self, backbone, *, num_classes=None, head_init="published"):
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        self.shifts = nn.ModuleList(Shift(block.dim) for block in self.spec.blocks)
        for block, shift in zip(self.spec.blocks, self.shifts, strict=True):
            wrap(self.backbone, block, "reader", lambda inner, s=shift: OnInput(inner, s))


def test_a_method_at_the_residual_sum_is_trained_saved_and_loaded(
    backbone, loader, dataset, tmp_path
):
    pcx.METHODS.add("test-shifted", Shifted)
    model, before = Shifted(backbone), {k: v.clone() for k, v in backbone.state_dict().items()}
    rows = pcx.fit(model, loader, epochs=4, lr=0.02, clip_grad=1.0, progress=False)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not torch.equal(model.shifts[0].amount, Shift(24).amount)
    pcx.save(model, tmp_path / "m")
    x = dataset.tensors[0]
    loaded = pcx.load(tmp_path / "m", backbone)
    assert torch.equal(loaded(x), model.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    pruning = pcx.zero_tprune(loaded, layers=(1,), keep=0.5, iters=2)
    assert loaded(x).shape == (10, 3)
    pruning.remove()
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1))
    assert Shifted(swin.double()).eval()(torch.zeros(1, 3, 56, 56).double()).shape == (1, 1000)
