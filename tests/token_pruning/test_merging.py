"""ToMe: what is merged, that sizes make up for it, and what cannot be merged."""

import pytest
import torch
import torch.nn.functional as F
from families import build, images

import pcx
from pcx.token_pruning import ats, tome
from pcx.token_pruning.merging import match, merge, size_bias


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_hand(features, r, protected):
    """One sample's tokens left, in their order, each as the list of those that it is made of."""
    group_a = [i for i in range(protected, len(features)) if i % 2 == 0]
    group_b = [i for i in range(protected, len(features)) if i % 2 == 1]
    best = {}
    for i in group_a:
        x = features[i]
        alike = [float(x @ features[j] / x.norm() / features[j].norm()) for j in group_b]
        best[i] = (max(alike), group_b[alike.index(max(alike))])
    going = sorted(group_a, key=lambda i: -best[i][0])[:r]
    into = {j: [j] + [i for i in going if best[i][1] == j] for j in group_b}
    stay = [[i] for i in (*range(protected), *(i for i in group_a if i not in going))]
    return stay + list(into.values())


@pytest.mark.parametrize(("tokens", "protected"), [(12, 1), (13, 1), (12, 2), (17, 5), (9, 0)])
def test_tokens_merged_by_hand(tokens, protected):
    x, features, sizes = rand(3, tokens, 4), rand(3, tokens, 6, seed=1), rand(3, tokens).abs() + 1
    for r in {0, 1, (tokens - protected) // 2}:
        places = match(features, r, protected=protected)
        merged, summed = merge(x, sizes, places, tokens - r)
        assert merged.shape == (3, tokens - r, 4)
        for b in range(3):
            groups = by_hand(features[b], r, protected) if r else [[i] for i in range(tokens)]
            for n, group in enumerate(groups):
                assert {i for i in range(tokens) if places[b, i] == n} == set(group)
                weights = sizes[b, group]
                mean = (weights[:, None] * x[b, group]).sum(0) / weights.sum()
                torch.testing.assert_close(merged[b, n], mean)
                torch.testing.assert_close(summed[b, n], weights.sum())
                if len(group) == 1:
                    assert torch.equal(merged[b, n], x[b, group[0]])


def test_more_than_half_is_an_error():
    for r in (-1, 6):
        with pytest.raises(ValueError, match=f"r: {r}, expected 0 to 5 of 11 tokens"):
            match(rand(1, 12, 3), r, protected=1)


def test_attention_in_proportion_to_size_is_attention_over_the_copies():
    q, k, v = rand(2, 3, 5, 8), rand(2, 3, 4, 8), rand(2, 3, 4, 8, seed=1)
    copies = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    sizes = torch.tensor([[1.0, 3, 1, 2]]).double()
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=size_bias(sizes))
    expected = F.scaled_dot_product_attention(q, k[:, :, copies], v[:, :, copies])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def twins(family, dtype=torch.float64):
    """A model that does not know places, and images whose patches are equal two by two."""
    model, x = build(family, dtype=dtype), images(family, dtype=dtype)
    with torch.no_grad():
        model.pos_embed[:, -16:] = 0.1
    side = x.shape[-1] // 4
    first, second = x[..., :side], x[..., 2 * side : 3 * side]
    return model, torch.cat([first, first, second, second], -1)


@pytest.mark.parametrize("prompts", [None, 3])
@pytest.mark.parametrize("family", ["vit", "vit-avg", "vit-map", "deit-distilled", "dinov2-reg",
                                    "siglip"])  # fmt: skip
def test_merged_copies_change_nothing(family, prompts):
    """Sizes make up for them exactly, also beside prompts and in pooling over all tokens."""
    model, x = twins(family)
    if prompts:
        model = pcx.VPT(model, prompts, head_init="keep").eval()
    expected = model(x)
    merging = tome(model, r=(8, 0, 0))
    found = model(x)
    (merged,) = merging.merged
    assert (merged.sizes[:, -8:] == 2).all()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["vit", "vit-post-norm", "deit-distilled", "dinov2-reg", "clip",
                                    "siglip"])  # fmt: skip
def test_every_family(family):
    model, x = build(family), images(family)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    whole = model(x)
    merging = tome(model, r=3)
    found = model(x)
    assert found.shape == whole.shape
    assert not torch.allclose(found, whole)
    tokens, prefix = 16 + model.num_prefix_tokens, model.num_prefix_tokens
    assert [m.sizes.shape[1] for m in merging.merged] == [tokens - 3, tokens - 6]
    for merged in merging.merged:
        assert (merged.sizes.sum(1) == tokens).all()
        assert (merged.sizes[:, :prefix] == 1).all()
        for b in range(2):  # sizes are what the places say
            assert torch.equal(merged.places[b].bincount().to(merged.sizes), merged.sizes[b])
    assert list(model.state_dict()) == list(weights)
    merging.remove()
    assert torch.equal(model(x), whole)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_a_vit_written_out():
    """Block by block with timm's own parts, attention written out."""
    model, x = build("vit"), images("vit")
    tokens = model._pos_embed(model.patch_embed(x))
    sizes = tokens.new_ones(2, 17)
    for i, block in enumerate(model.blocks):
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) / 4 + sizes.log()[:, None, None]).softmax(-1)
        tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
        if i < 2:
            left = tokens.shape[1] - 5
            tokens, sizes = merge(tokens, sizes, match(k.mean(1), 5, protected=1), left)
    expected = model.forward_head(model.norm(tokens))
    tome(model, r=5)
    torch.testing.assert_close(model(x), expected)


def test_r_is_at_most_half_of_what_is_left():
    model, x = build("vit"), images("vit")
    merging = tome(model, r=(50, 50, 50))
    assert merging.r == (50, 50, 0)
    model(x)
    assert [m.sizes.shape[1] - 1 for m in merging.merged] == [8, 4]


@pytest.mark.parametrize("r", [0, (0, 0, 4)])
def test_nothing_merged_is_the_model_itself(r):
    model, x = build("vit"), images("vit")
    whole = model(x)
    merging = tome(model, r=r)
    assert torch.equal(model(x), whole)
    assert merging.merged == []


@pytest.mark.parametrize("kind", ["deep", "prefix"])
def test_prompts_and_merging_together(kind):
    model = pcx.VPT(build("vit"), (3, 0, 2), kind=kind, head_init="keep").eval()
    x = images("vit")
    whole = model(x)
    merging = tome(model, r=4)
    assert not torch.allclose(model(x), whole)
    model.train()
    gradients = []
    for checkpoint in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpoint)
        outputs = [model(x), model(-x)]  # one after the other, then both backward
        F.cross_entropy(torch.cat(outputs), torch.tensor([0, 1, 2, 3])).backward()
        gradients.append([p.grad.clone() for p in model.prompts if p.numel()])
    assert all(g.any() for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    model.eval()
    merging.remove()
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("reduce", [
    lambda model: tome(model, r=4),
    lambda model: ats(model, layers=(1, 2), tokens=(10, 6)),
], ids=["tome", "ats"])  # fmt: skip
def test_prompts_are_scored(reduce):
    """By removal, which replays the layers below, as by models without the prompt."""
    model = pcx.VPT(build("vit"), 2, head_init="keep").eval()
    x, labels = images("vit"), torch.tensor([1, 2])
    reduce(model)
    found = pcx.score(model, [(x, labels)], method="exact", progress=False)
    whole = F.cross_entropy(model(x), labels, reduction="none")
    for layer in range(3):
        for i in range(2):
            kept = [[1 - i] if n == layer else [0, 1] for n in range(3)]
            less = F.cross_entropy(model.keep(kept).eval()(x), labels, reduction="none")
            torch.testing.assert_close(found[layer][i], (less - whole).abs().mean().detach())


def test_hugging_face_s_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=96, image_size=64, num_labels=5)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(2, 3, 64, 64)
    whole = model(x).logits
    merging = tome(model, r=4)
    assert not torch.allclose(model(x).logits, whole)
    assert [m.sizes.shape[1] for m in merging.merged] == [13, 9]
    merging.remove()
    assert torch.equal(model(x).logits, whole)


def test_setting_up_another_method_replaces_it():
    model, x = build("vit"), images("vit")
    whole = model(x)
    before = pcx.zero_tprune(model, layers=(1, 2), keep=0.5, iters=1)
    merging = tome(model, r=2)
    fresh = build("vit")
    tome(fresh, r=2)
    assert torch.equal(model(x), fresh(x))
    before.remove()  # which is not what is set up now
    assert torch.equal(model(x), fresh(x))
    merging.remove()
    assert torch.equal(model(x), whole)


@pytest.mark.filterwarnings("ignore")  # export's own
def test_exports_with_a_dynamic_batch():
    model, x = build("vit-avg", dtype=torch.float32), images("vit").float()
    tome(model, r=4)
    expected = model(x)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), expected)
    assert program.module()(torch.cat([x, x, x])).shape == (6, 7)


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "r: -1, expected a whole number, 0 or more"),
        (2.0, "r: 2.0, expected a whole number"),
        (True, "r: True, expected a whole number"),
        ("8", "r: '8', expected numbers"),
        ((1, 2), "r: 2 values for 3 layers"),
        ((1, None, 2), "r: None, expected a whole number"),
    ],
)
def test_bad_settings_are_errors_before_anything_runs(r, message):
    model, x = build("vit"), images("vit")
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        tome(model, r=r)
    assert torch.equal(model(x), expected)


def test_what_cannot_be_merged_is_an_error():
    with pytest.raises(ValueError, match="turns or biases attention by the tokens' places"):
        tome(build("rope"), r=2)
    with pytest.raises(ValueError, match="model: its path is 'concat'"):
        tome(pcx.VPT(build("vit"), 2, path="concat"), r=2)
    with pytest.raises(RuntimeError, match="merged: no batch"):
        _ = tome(build("vit"), r=2).merged
