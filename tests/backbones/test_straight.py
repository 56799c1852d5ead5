"""Blocks as straight lines of calls, and patch embeddings as products, are what they stand for."""

import copy
import dataclasses
import pickle
import threading

import pytest
import timm
import torch
from families import FAMILIES, build, images
from torch import nn

import pcx
from pcx.backbones import attention
from pcx.backbones.patches import PatchProduct, find_patch_projection
from pcx.backbones.probing import TensorLike
from pcx.backbones.spec import find_spec
from pcx.backbones.straight import Straight, straightened


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_backbone_computes_the_same(family):
    backbone, x = build(family), images(family)
    frozen = pcx.freeze(backbone)
    close(frozen(x), pcx.Linear(backbone, head_init="keep").eval()(x))
    found = [m for m in frozen.modules() if isinstance(m, Straight)]
    assert len(found) == len(find_spec(backbone).blocks)
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
    return backbone.get_submodule(spec.name), spec


def test_a_block_is_left_where_a_capture_would_miss_something(block):
    module, spec = block
    assert isinstance(straightened(module, spec), Straight)
    assert straightened(module, dataclasses.replace(spec, calls=2)) is None
    handle = module.attn.register_forward_hook(lambda m, args, out: None)
    assert straightened(module, spec) is None
    handle.remove()
    module.mlp.forward = lambda x: x
    assert straightened(module, spec) is None
    del module.mlp.forward
    assert straightened(module.train(), spec) is None


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
    module, spec = block
    assert straightened(kind(module), spec) is None


@pytest.mark.parametrize("family", ["eva02", "dinov3", "rope", "beit", "naflexvit"])
def test_a_block_that_is_called_otherwise_runs_as_it_is(family):
    backbone = build(family)
    attention.fuse(backbone)
    spec = find_spec(backbone).blocks[1]
    module = backbone.get_submodule(spec.name)
    straight = straightened(module, spec)
    assert isinstance(straight, Straight)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, spec.stream[1], spec.dim, generator=generator, dtype=torch.float64)
    usual = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if isinstance(value, TensorLike)
        else value
        for name, value in zip(spec.arguments, spec.values, strict=True)
    }
    close(straight(x, **usual), module(x, **usual))
    close(straight(x), module(x))
    bias = "shared_rel_pos_bias" if family == "beit" else "attn_mask"
    other = {**usual, bias: torch.randn(x.shape[1], x.shape[1], dtype=torch.float64)}
    expected = module(x, **other)
    assert (expected - module(x, **usual)).norm() > 1e-6
    close(straight(x, **other), expected)
    seen = []

    def attend(_, call):
        seen.append(call.bias)
        return call.output()

    close(attention.run(straight, 1, attend, x, **other), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("family", ["eva02", "dinov3", "rope"])
def test_rotations_of_other_image_sizes(family):
    backbone = build(family, dynamic_img_size=True)
    model, x = pcx.VPT(backbone, [2, 0, 3]).eval(), images(family)
    model.path = "concat"
    model(x)  # rotations begin behind the prompts now
    frozen, plain = pcx.freeze(model), pcx.freeze(backbone)
    side = backbone.patch_embed.patch_size[0]
    for size in (4 * side, 6 * side, 3 * side):
        y = torch.nn.functional.interpolate(x, size)
        close(plain(y), backbone(y))
        close(frozen(y), model(y))
    assert len([m for m in frozen.modules() if isinstance(m, Straight)]) == 3


class Gated(nn.Module):
    """A block that scales what it gives by something it computes from a buffer, or draws."""

    def __init__(self, block, drawn):
        super().__init__()
        self.inner, self.drawn = block, drawn
        self.register_buffer("gate", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.inner(x) * (1 + 1e-9 * torch.rand(1) if self.drawn else self.gate * 2)


def test_what_is_computed_from_buffers_follows_them(block):
    module, spec = block
    gated = Gated(module, drawn=False).eval()
    straight = straightened(gated, spec)
    assert isinstance(straight, Straight)
    x = torch.randn(2, 9, spec.dim, dtype=torch.float64)
    gated.gate.fill_(3)
    close(straight(x), gated(x))
    assert straight.float()(x.float()).dtype == torch.float32
    assert straight.to("meta")(x.to("meta")).shape == x.shape


def test_a_tensor_that_is_made_anew_is_not_captured(block):
    module, spec = block
    gated = Gated(module, drawn=True).eval()
    before = set(vars(gated))
    assert straightened(gated, spec) is None
    assert set(vars(gated)) == before


def test_other_threads_run_models_while_one_is_captured(block):
    other, x, failures = build("vit"), images("vit"), []
    expected, done = other(x), threading.Event()

    def serve():
        while not done.is_set():
            try:
                if not torch.equal(other(x), expected):
                    failures.append("another result")
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(5):
            assert isinstance(straightened(*block), Straight)
    finally:
        done.set()
        thread.join()
    assert failures == []


def test_a_sum_over_a_broadcast_tensor_is_not_fused(block):
    module, spec = block
    module.place = nn.Parameter(
        torch.ones(1, 1, spec.dim, dtype=torch.float64), requires_grad=False
    )
    added = type("Added", (type(module),), {"forward": _with_place})
    module.__class__ = added
    straight = straightened(module, spec)
    x = torch.randn(2, 9, spec.dim, dtype=torch.float64)
    assert isinstance(straight, Straight)
    close(straight(x), module(x))
    first, second = straight._source.split("add_layer_norm(")[1:]
    assert "place" not in first.split("\n")[0]  # the sum is an operation of its own
    assert second


def _with_place(self, x):
    x = x + self.attn(self.norm1(x + self.place))
    return x + self.mlp(self.norm2(x))


def test_a_watched_patch_embedding_is_left():
    backbone, x = build("vit"), images("vit")
    backbone.patch_embed.proj.register_forward_hook(lambda m, args, out: 2 * out)
    frozen = pcx.freeze(backbone)
    close(frozen(x), backbone(x))
    assert not any(isinstance(m, PatchProduct) for m in frozen.modules())


def test_images_that_do_not_fit_are_named():
    frozen, x = pcx.freeze(build("vit").float(), amp="bf16"), images("vit").float()
    with pytest.raises(ValueError, match=r"images: torch.uint8, expected floating-point"):
        frozen(x.to(torch.uint8))
    with pytest.raises(ValueError, match=r"images: shape \(2, 1, 64, 64\), expected \[B, 3, H, W"):
        frozen(x[:, :1])


def test_a_frozen_model_is_not_frozen_again():
    frozen = pcx.freeze(build("vit"))
    for model in (frozen, frozen.backbone):
        with pytest.raises(ValueError, match="model: it is frozen already"):
            pcx.freeze(model)


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
