"""ATS: what is sampled, that masked slots are as good as removed, and what cannot be sampled."""

import math

import pytest
import torch
import torch.nn.functional as F
from families import build, images, peaked

import pcx
from pcx.token_pruning import ats
from pcx.token_pruning.sampling import first_of_equal, sample, significance

SETTING = {"layers": (1, 2), "tokens": (12, 9)}


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("with_bias", [False, True])
def test_significance_by_hand(with_bias):
    q, k, v = rand(2, 3, 7, 4), rand(2, 3, 7, 4, seed=1), rand(2, 3, 7, 5, seed=2)
    bias = rand(1, 1, 7, 7, seed=3) if with_bias else torch.zeros(1, 1, 7, 7)
    found = significance(q, k, v, protected=2, bias=bias if with_bias else None)
    for b in range(2):
        expected = torch.zeros(5, dtype=torch.float64)
        for h in range(3):
            logits = [q[b, h, 0] @ k[b, h, j] / math.sqrt(4) + bias[0, 0, 0, j] for j in range(7)]
            weights = torch.stack(logits).softmax(0)  # of all tokens, as the block attends
            taken = torch.stack([weights[j] * v[b, h, j].norm() for j in range(2, 7)])
            expected += taken / taken.sum() / 3
        torch.testing.assert_close(found[b], expected)


def test_samples_by_hand():
    scores = rand(20, 11).square()
    scores[:, 4] = 0
    found = sample(scores, 7)
    for b in range(20):
        reached = []
        for n in range(7):
            total, j = 0.0, -1
            while total < (2 * n + 1) / 14:
                j += 1
                total += float(scores[b, j] / scores[b].sum())
            reached.append(j)
        assert found[b].tolist() == reached
        counts = found[b].bincount(minlength=11)
        assert (abs(counts - 7 * scores[b] / scores[b].sum()) < 1).all()
        assert counts[4] == 0
        distinct = first_of_equal(found[[b]])[0]
        assert found[b][distinct].tolist() == sorted(set(reached))


def test_equal_scores_sample_every_patch_once():
    assert sample(torch.ones(1, 9), 9).tolist() == [list(range(9))]
    assert sample(torch.ones(1, 9), 3).tolist() == [[1, 4, 7]]
    for tokens in (0, 10):
        with pytest.raises(ValueError, match=f"tokens: {tokens}, expected 1 to 9"):
            sample(torch.ones(1, 9), tokens)


def removed(model, image, tokens_after):
    """The logits of one image, block by block with timm's own parts, repeated patches removed."""
    tokens = model._pos_embed(model.patch_embed(image))
    prefix, counts = model.num_prefix_tokens, []
    for i, block in enumerate(model.blocks):
        shape = (3, model.blocks[0].attn.num_heads, -1)
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(2, shape).permute(2, 0, 3, 1, 4)
        tokens = block(tokens)
        if i in tokens_after:
            scores = significance(*qkv.unbind(0), protected=prefix)
            sampled = sorted(set(sample(scores, tokens_after[i])[0].tolist()))
            counts.append(len(sampled))
            tokens = tokens[:, [*range(prefix), *(prefix + j for j in sampled)]]
    return model.forward_head(model.norm(tokens)), counts


def test_an_export_samples_the_same():
    class Sample(torch.nn.Module):
        def forward(self, scores):
            return sample(scores, 6)

    scores = rand(5, 11).abs().float()
    scores[1], scores[2, 3:9], scores[3, 1:] = 1.0, 0.0, 0.0
    scores[4, 2] = torch.nan
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Sample(), (scores,), dynamic_shapes=({0: batch},))
    assert not any("searchsorted" in str(node.target) for node in program.graph.nodes)
    for count in (1, 5):
        assert torch.equal(program.module()(scores[:count]), sample(scores[:count], 6))


@pytest.mark.parametrize("family", ["vit", "deit-distilled", "dinov2-reg"])
def test_masked_slots_are_as_good_as_removed(family):
    model, x = peaked(family), images(family, batch=4)
    expected = [removed(model, image, {0: 12, 1: 4}) for image in x.split(1)]
    sampling = ats(model, layers=(1, 2), tokens=(12, 4))
    found = model(x)
    torch.testing.assert_close(found, torch.cat([logits for logits, _ in expected]),
                               rtol=1e-10, atol=1e-10)  # fmt: skip
    first, second = sampling.distinct
    assert [[int(a), int(b)] for a, b in zip(first, second, strict=True)] == [
        c for _, c in expected
    ]
    assert (first < 12).any()
    prefix = model.num_prefix_tokens
    for places, distinct in zip(sampling.kept, sampling.distinct, strict=True):
        for b in range(4):
            assert places[b, :prefix].tolist() == list(range(prefix))
            assert len(set(places[b, prefix:].tolist())) == distinct[b]
    assert [k.shape[1] - prefix for k in sampling.kept] == [12, 4]


def test_clip_keeps_its_weights_and_comes_back():
    model, x = build("clip"), images("clip")
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    whole = model(x)
    sampling = ats(model, **SETTING)
    assert not torch.allclose(model(x), whole)
    assert list(model.state_dict()) == list(weights)
    sampling.remove()
    assert torch.equal(model(x), whole)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("kind", ["deep", "prefix"])
def test_prompts_and_sampling_together(kind):
    model = pcx.VPT(peaked("vit"), (3, 0, 2), kind=kind, head_init="keep").eval()
    x = images("vit")
    whole = model(x)
    sampling = ats(model, **SETTING)
    assert not torch.allclose(model(x), whole)
    assert (sampling.distinct[1] < 9).any()
    separate = torch.cat([model(image) for image in x.split(1)])
    torch.testing.assert_close(model(x), separate)
    model.train()
    gradients = []
    for checkpoint in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpoint)
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        gradients.append([p.grad.clone() for p in model.prompts if p.numel()])
    assert all(g.any() and g.isfinite().all() for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    model.eval()
    sampling.remove()
    assert torch.equal(model(x), whole)


def test_hugging_face_s_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=96, image_size=64, num_labels=5)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(2, 3, 64, 64)
    whole = model(x).logits
    sampling = ats(model, **SETTING)
    assert not torch.allclose(model(x).logits, whole)
    assert [k.shape[1] for k in sampling.kept] == [13, 10]
    sampling.remove()
    assert torch.equal(model(x).logits, whole)


def test_layers_between_carry_the_mask_on():
    model, x = peaked("vit"), images("vit")
    (expected, _), (other, _) = (removed(model, image, {0: 6}) for image in x.split(1))
    sampling = ats(model, layers=(1,), tokens=6)
    torch.testing.assert_close(model(x), torch.cat([expected, other]))
    assert (sampling.distinct[0] < 6).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "layers: 3, expected layers from 1 to 2"),
        ({"layers": ()}, r"layers: \(\), expected layers from 1 to 2"),
        ({"layers": (2, 1)}, r"layers: \(2, 1\), expected ascending"),
        ({"layers": (1, 1)}, r"layers: \(1, 1\), expected"),
        ({"layers": (0, 1)}, "layers: 0, expected a whole number, 1 to 2"),
        ({"layers": (1, 3)}, "layers: 3, expected a whole number, 1 to 2"),
        ({"tokens": (4,)}, "tokens: 1 values for 2 layers"),
        ({"tokens": 0}, "tokens: 0, expected a whole number, 1 to 16"),
        ({"tokens": 17}, "tokens: 17, expected a whole number, 1 to 16"),
        ({"tokens": (8, 9)}, "tokens: 9, expected a whole number, 1 to 8"),
        ({"tokens": 0.5}, "tokens: 0.5, expected a whole number"),
        ({"tokens": True}, "tokens: True, expected a whole number"),
    ],
)
def test_bad_settings_are_errors_before_anything_runs(changes, message):
    model, x = build("vit"), images("vit")
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        ats(model, **{**SETTING, **changes})
    assert torch.equal(model(x), expected)


def test_what_cannot_be_sampled_is_an_error():
    for family in ("vit-avg", "vit-map", "siglip"):
        with pytest.raises(ValueError, match=r"model: the head .* reads more than \[CLS\]"):
            ats(build(family), **SETTING)
    with pytest.raises(ValueError, match="turns or biases attention by the tokens' places"):
        ats(build("rope"), **SETTING)
    sampling = ats(build("vit"), **SETTING)
    for name in ("kept", "distinct"):
        with pytest.raises(RuntimeError, match=f"{name}: no batch"):
            getattr(sampling, name)
