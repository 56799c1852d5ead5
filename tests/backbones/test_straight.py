"""Blocks as straight lines of calls, and patch embeddings as products, are what they stand for."""

import copy
import pickle

import pytest
import timm
import torch
from families import FAMILIES, build, images
from torch import nn

import pcx
from pcx.backbones import attention
from pcx.backbones.patches import PatchProduct, find_patch_projection
from pcx.backbones.spec import find_spec
from pcx.backbones.straight import Straight, straightened

LEFT = ("eva02", "dinov3", "rope", "beit", "beitv2")  # blocks that ask whether they got a tensor


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_backbone_computes_the_same(family):
    backbone, x = build(family), images(family)
    frozen = pcx.freeze(backbone)
    close(frozen(x), pcx.Linear(backbone, head_init="keep").eval()(x))
    found = [m for m in frozen.modules() if isinstance(m, Straight)]
    assert len(found) == (0 if family in LEFT else len(find_spec(backbone).blocks))
    close(copy.deepcopy(frozen)(x), frozen(x))
    close(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
    assert not any(isinstance(m, Straight | PatchProduct) for m in backbone.modules())


def test_gradients_by_the_images_are_the_same():
    backbone, x = build("vit"), images("vit")
    model = pcx.VPT(backbone, 3).eval()
    slopes = []
    for each in (model, pcx.freeze(model)):
        given = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(each(given).square().sum(), given)[0])
    close(*slopes)


@pytest.fixture
def block():
    backbone = build("vit")
    attention.fuse(backbone)
    spec = find_spec(backbone).blocks[0]
    return backbone.get_submodule(spec.name), spec.calls, spec.dim


def test_a_block_is_left_where_a_capture_would_miss_something(block):
    module, calls, dim = block
    assert isinstance(straightened(module, calls, dim), Straight)
    assert straightened(module, calls + 1, dim) is None
    handle = module.attn.register_forward_hook(lambda m, args, out: None)
    assert straightened(module, calls, dim) is None
    handle.remove()
    module.mlp.forward = lambda x: x
    assert straightened(module, calls, dim) is None
    del module.mlp.forward
    assert straightened(module.train(), calls, dim) is None


class Branches(nn.Module):
    """A block that computes by what its tokens are, which a capture cannot hold."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else self.block(-x)


class Sized(nn.Module):
    """A block in which a capture would hold the number of tokens that it was made with."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x) * (len(list(x.shape)) + (isinstance(x, torch.Tensor)))


@pytest.mark.parametrize("kind", [Branches, Sized])
def test_a_forward_that_asks_for_values_is_not_captured(block, kind):
    module, calls, dim = block
    assert straightened(kind(module), calls, dim) is None


@pytest.mark.parametrize("reduction", ["zero_tprune", "tome"])
def test_token_reduction_stays_on_a_frozen_backbone(reduction):
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=24, num_heads=2, num_classes=3
    )
    backbone, x = backbone.double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    whole = backbone(x)
    if reduction == "zero_tprune":
        handle = pcx.zero_tprune(backbone, layers=(1, 2), keep=0.6, iters=2, similar=2)
    else:
        handle = pcx.token_pruning.tome(backbone, r=3)
    expected = backbone(x)
    frozen = pcx.freeze(backbone)
    handle.remove()
    assert torch.equal(backbone(x), whole)
    close(frozen(x), expected)
    assert not torch.allclose(expected, whole)
    assert sum(isinstance(m, Straight) for m in frozen.modules()) == 3


def test_a_token_reduction_is_set_up_on_a_frozen_backbone():
    backbone, x = build("vit"), images("vit")
    frozen = pcx.freeze(backbone)
    whole = frozen(x)
    handle = pcx.token_pruning.tome(frozen.backbone, r=2)
    found = frozen(x)
    handle.remove()
    close(frozen(x), whole)
    pcx.token_pruning.tome(backbone, r=2)
    close(found, backbone(x))
    meta = pcx.freeze(backbone).to("meta")
    assert meta(x.to("meta")).shape == whole.shape


@pytest.mark.parametrize("size", [(32, 48), (37, 50)])
def test_patches_as_a_product(size):
    convolution = nn.Conv2d(3, 10, (4, 8), (4, 8)).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    close(PatchProduct(convolution)(x), convolution(x))
    x = x.to(memory_format=torch.channels_last)
    close(PatchProduct(convolution)(x), convolution(x))
    with torch.autocast("cpu", torch.bfloat16):
        found = PatchProduct(convolution.float())(x.float())
        expected = convolution(x.float())
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, "0"),
        ({"padding": 1}, None),
        ({"stride": 2}, None),
        ({"groups": 3}, None),
        ({"dilation": 2}, None),
    ],
)
def test_only_a_convolution_that_is_a_product_is_found(change, found):
    settings = {"kernel_size": 4, "stride": 4, **change}
    model = nn.Sequential(nn.Conv2d(3, 12, **settings), nn.Conv2d(12, 4, 1))
    assert find_patch_projection(model, 48) == found
    assert find_patch_projection(model, None) is None
    assert find_patch_projection(nn.Sequential(model, copy.deepcopy(model)), 48) is None
