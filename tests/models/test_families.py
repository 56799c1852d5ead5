"""Folded equals concatenating, forward and gradients, on every supported family."""

import pytest
import torch
from families import FAMILIES, build, images

import pcx


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def run(model, x, path):
    model.path = path
    model.zero_grad()
    logits = model(x)
    logits.square().mean().backward()
    return logits.detach(), torch.stack([p.grad for p in model.prompts])


def prompted(family, **arguments):
    model = pcx.VPT(build(family), 5, **arguments).double()
    with torch.no_grad():
        for prompts in model.prompts:  # large enough to be seen beside unnormalised tokens
            prompts.mul_(20)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_equals_concat(family):
    model, x = prompted(family), images(family)
    folded, concat = run(model, x, "folded"), run(model, x, "concat")
    assert relative(folded[0], concat[0]) < 1e-9
    assert relative(folded[1], concat[1]) < 1e-9
    assert all(grad.norm() > 1e-6 * concat[1].norm() for grad in concat[1])
    bare = model.keep([torch.arange(0)] * len(model.prompts))
    assert relative(bare(x), concat[0]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_by_keys_equal_scores_by_prompts(family):
    """What lies between a prompt and its keys is differentiated through the block itself."""
    model = prompted(family).keep([torch.arange(4), torch.arange(0), torch.arange(2)])
    x = images(family, batch=3)
    data = torch.utils.data.TensorDataset(x, torch.arange(3))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    found = {}
    for path in ("folded", "concat"):
        model.path = path
        found[path] = pcx.score(model, loader, method=["taylor", "taylor-inner"], progress=False)
    for method, scores in found["folded"].items():
        assert [len(s) for s in scores] == [4, 0, 2]
        for a, b in zip(scores, found["concat"][method], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_prompts_it_is_the_backbone(family):
    backbone, x = build(family), images(family)
    model = pcx.VPT(backbone, 0, head_init="keep")
    for path in ("folded", "concat"):
        model.path = path
        torch.testing.assert_close(model(x), backbone(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_only_the_needed_tokens_is_exact(family):
    x = images(family)
    model = prompted(family)
    whole = pcx.VPT(build(family), 5, read_only=False)
    whole.load_state_dict(model.state_dict())
    (logits, grads), (all_logits, all_grads) = run(model, x, "folded"), run(whole, x, "folded")
    assert relative(logits, all_logits) < 1e-12
    assert relative(grads, all_grads) < 1e-12


@pytest.mark.parametrize(
    ("family", "read"), [("vit", 1), ("vit-avg", None), ("deit-distilled", 2), ("siglip", None)]
)
def test_read_tokens_follow_the_pooling(family, read):
    assert pcx.VPT(build(family), 1).anatomy.read_tokens == read


@pytest.mark.parametrize("family", ["vit", "beit", "eva02", "deit-distilled", "naflexvit"])
def test_shallow_prompts_travel(family):
    """Shallow equals a deep model that is handed the travelling prompts layer by layer: by hand."""
    backbone, x = build(family), images(family)
    model = pcx.VPT(backbone, 4, kind="shallow", head_init="keep")
    assert model.counts == (4, 0, 0)
    logits = model(x)
    logits.sum().backward()
    assert model.prompts[0].grad.norm() > 0
    assert relative(logits, backbone(x)) > 1e-4
    if family == "vit":
        tokens = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))
        prompts = model.prompts[0].expand(len(x), -1, -1)
        tokens = backbone.blocks(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1))
        expected = backbone.head(backbone.norm(tokens)[:, 0])
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["vit", "beit", "eva02", "siglip", "vit-post-norm"])
def test_prefix_kind_equals_the_keys_of_a_deep_model(family):
    """Learned keys and values set to what a deep model's prompts become give the same logits."""
    x, deep = images(family), prompted(family)
    prefix = pcx.VPT(build(family), 5, kind="prefix")
    with torch.no_grad():
        for head, other in zip(prefix.heads, deep.heads, strict=True):
            head.load_state_dict(other.state_dict())
        for layer, target, prompts in zip(deep.layers, prefix.prompts, deep.prompts, strict=True):
            ((key, value),) = layer.prefixes(prompts)  # [H, m, d] each
            target.copy_(torch.stack([t.transpose(0, 1).flatten(1) for t in (key, value)]))
    assert relative(prefix(x), deep(x)) < 1e-12


def test_naflexvit_with_padding():
    """Padded patches carry a mask through both forms."""
    model = prompted("naflexvit")
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(2, 9, 16 * 16 * 3, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    coord = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1)
    x = {
        "patches": patches,
        "patch_valid": valid,
        "patch_coord": coord.reshape(1, 9, 2).expand(2, -1, -1),
    }
    folded, concat = run(model, x, "folded"), run(model, x, "concat")
    assert relative(folded[0], concat[0]) < 1e-9
    assert relative(folded[1], concat[1]) < 1e-9
    changed = {**x, "patches": torch.where(valid[..., None], patches, patches + 1)}
    torch.testing.assert_close(model(changed), concat[0])


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "resnet18", "cait_xxs24_224", "pvt_v2_b0", "davit_tiny"]
)
def test_an_unsupported_family_is_named(name):
    import timm

    with pytest.raises(ValueError, match=r"backbone: \w+ is not supported: .*Supported: timm's"):
        pcx.VPT(timm.create_model(name, num_classes=3), 2)
