"""Soft masks by definition, and against tokens that are really dropped."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from families import build, images
from hypothesis import given, settings
from hypothesis import strategies as st

import pcx
from pcx.backbones.attention import MissedCall
from pcx.ops.reference.token_choice import most_important
from pcx.token_pruning import soft_prune, stages
from pcx.token_pruning.soft_masks import importance, log_soft_mask

READING_CLS = ["vit", "vit-qk-norm", "deit", "deit-distilled", "deit3", "dinov2-reg", "clip"]
SETTING = {"layers": (1, 2), "keep": (0.8, 0.6), "iters": (5, 3)}
COLD = 1e-9  # a temperature at which masks are 0 or 1


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_mask_by_its_definition():
    scores = rand(2, 9)
    found = log_soft_mask(scores, 3, 0.2, protected=2).exp()
    for b in range(2):
        ranked = sorted(scores[b, 2:].tolist(), reverse=True)
        theta = (ranked[2] + ranked[3]) / 2
        for i in range(9):
            s = scores[b, i].item()
            expected = 1.0 if i < 2 else 1 / (1 + math.exp(-(s - theta) / 0.2))
            assert found[b, i].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(log_soft_mask(scores, 7, 0.2, protected=2), torch.zeros_like(scores))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 11), st.floats(1e-6, 10), st.floats(-5, 5))
def test_as_many_as_are_to_stay_lie_above_the_threshold(seed, keep, temperature, raised):
    scores = rand(3, 12, seed=seed)
    mask = log_soft_mask(scores, keep, temperature, protected=1).exp()
    assert ((mask[:, 1:] > 0.5).sum(1) == keep).all()
    stays = most_important(scores, keep, protected=1)
    assert (mask.gather(1, stays) > 0.5).all()
    again = log_soft_mask(scores + raised, keep, temperature, protected=1).exp()
    torch.testing.assert_close(again, mask, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("boost", [True, False])
@pytest.mark.parametrize("bias", [None, (1, 3, 12, 12), (12, 12)])
def test_importance_of_whole_and_absent_tokens_is_that_among_the_whole(boost, bias):
    q, k = 3 * rand(2, 3, 12, 8), rand(2, 3, 12, 8, seed=1)
    bias = None if bias is None else rand(*bias, seed=2)
    whole = torch.tensor([0, 1, 4, 5, 8, 9, 10])
    absent = torch.full((2, 12), -1e9, dtype=torch.float64)
    for left, log_mask in (
        (torch.arange(12), torch.zeros(2, 12, dtype=torch.float64)),
        (whole, absent.index_fill(1, whole, 0)),
    ):
        choices = {"iters": 4, "cls_boost": boost, "variances": (0.05, 0.7)}
        among = None if bias is None else bias[..., left, :][..., left]
        expected = stages.importance(q[:, :, left], k[:, :, left], bias=among, **choices)
        found = importance(q, k, log_mask, bias=bias, **choices)
        torch.testing.assert_close(
            found[:, left], expected / expected.mean(1, keepdim=True), rtol=1e-12, atol=1e-12
        )
        assert found.count_nonzero() == 2 * len(left)


def test_scores_of_any_number_of_tokens_have_a_weighted_mean_of_one():
    for n in (5, 50):
        log_mask = F.logsigmoid(rand(2, n, seed=3))
        found = importance(rand(2, 3, n, 8), rand(2, 3, n, 8, seed=1), log_mask, iters=3)
        weights = log_mask.exp()
        mean = (found * weights).sum(1) / weights.sum(1)
        torch.testing.assert_close(mean, torch.ones_like(mean))


def test_gradients_of_masks():
    q, k = (3 * rand(1, 2, 6, 4)).requires_grad_(), rand(1, 2, 6, 4, seed=1).requires_grad_()
    before = F.logsigmoid(2 * rand(1, 6, seed=2)).requires_grad_()

    def mask(q, k, before):
        scores = importance(q, k, before, iters=3, cls_boost=True, variances=(0, math.inf))
        return before + log_soft_mask(scores, 2, 0.3, protected=1)

    assert torch.autograd.gradcheck(mask, (q, k, before))
    gone = torch.tensor([[0, 0, 0, -1e9, 0, -1e9]], dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(mask(q, k, gone).exp().square().sum(), (q, k, gone))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0].any()


def test_a_vit_written_out():
    """Block by block with timm's own parts and attention as a formula."""
    model, x, temperature = build("vit"), images("vit"), 0.3
    tokens = model._pos_embed(model.patch_embed(x))
    mask = torch.ones(2, 17, dtype=torch.float64)
    masks = []
    for i, block in enumerate(model.blocks):
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) / 4).exp() * mask[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True)
        tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
        if i < 2:
            scores = importance(q, k, mask.log(), iters=SETTING["iters"][i], cls_boost=True)
            keep = (13, 8)[i]
            mask = mask * log_soft_mask(scores, keep, temperature, protected=1).exp()
            masks.append(mask)
    soft = soft_prune(model, **SETTING, temperature=temperature)
    torch.testing.assert_close(model(x), model.forward_head(model.norm(tokens)))
    torch.testing.assert_close(soft.masks, masks)
    torch.testing.assert_close(soft.tokens, tokens)
    assert not torch.allclose(masks[0], masks[1])


def dropped_and_cold(model, x):
    whole = model(x)
    pruning = pcx.zero_tprune(model, **SETTING)
    dropped = model(x)
    pruning.remove()
    soft = soft_prune(model, **SETTING, temperature=COLD)
    cold, masks = model(x), soft.masks
    soft.remove()
    outputs = (whole, dropped, cold, model(x))
    whole, dropped, cold, after = (getattr(out, "logits", out) for out in outputs)
    assert torch.equal(after, whole)
    assert not torch.allclose(dropped, whole, atol=1e-3)
    torch.testing.assert_close(cold, dropped, rtol=1e-9, atol=1e-9)
    return masks, pruning.kept


@pytest.mark.parametrize("family", READING_CLS)
def test_without_temperature_masked_tokens_are_dropped_ones(family):
    masks, kept = dropped_and_cold(build(family), images(family))
    for mask, places in zip(masks, kept, strict=True):
        assert torch.equal(mask, torch.zeros_like(mask).scatter(1, places, 1))


@pytest.mark.parametrize("kind", ["deep", "prefix"])
@pytest.mark.parametrize("read_only", [True, False])
def test_prompts_beside_masks(kind, read_only):
    vpt = pcx.VPT(build("vit"), (17, 0, 2), kind=kind, head_init="keep", read_only=read_only)
    dropped_and_cold(vpt.eval(), images("vit"))
    assert vpt.layers[-1].read_tokens == (1 if read_only else None)


def test_hugging_face_s_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=96, image_size=64, num_labels=5, initializer_range=0.2
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval().double()
    dropped_and_cold(model, images("vit"))
    dropped_and_cold(pcx.VPT(model, 2, head_init="keep").eval(), images("vit"))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_prompts_are_those_of_differences(checkpoint):
    """Also along the way through scores and masks."""
    x, step = images("vit"), 1e-5
    model = pcx.VPT(build("vit"), 2, head_init="keep").eval()
    model.set_grad_checkpointing(checkpoint)
    soft = soft_prune(model, **SETTING, temperature=0.2)

    def loss():
        return model(x)[:, 1].sum() + soft.masks[-1].square().sum()

    loss().backward()
    prompts = model.prompts[0]
    direction = rand(*prompts.shape)
    slope = (prompts.grad * direction).sum().item()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            prompts.add_(sign * step * direction)
            ends.append(loss().item())
            prompts.sub_(sign * step * direction)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    model(x)
    (through_scores,) = torch.autograd.grad(soft.masks[-1].square().sum(), prompts)
    assert through_scores.any()


def test_a_step_that_drops_nothing_masks_nothing():
    model, x = build("vit"), images("vit")
    whole = model(x)
    soft_prune(model, layers=(1, 2), keep=1.0, iters=5)
    torch.testing.assert_close(model(x), whole)


def test_a_copy_has_its_own_after_a_step_of_training():
    model, x = build("vit"), images("vit")
    soft = soft_prune(model, **SETTING)
    model(x).sum().backward()
    other = copy.deepcopy(model)
    expected = model(x)
    soft.remove()
    assert torch.equal(other(x), expected)
    assert not torch.equal(model(x), expected)


def test_half_precision():
    model, x = pcx.VPT(build("vit", dtype=torch.float32), 2, head_init="keep"), images("vit")
    soft = soft_prune(model, **SETTING)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x.float())
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.prompts)
    assert soft.masks[-1].dtype == torch.float32


def test_attention_that_is_written_out_is_an_error():
    model, x = build("vit"), images("vit")
    soft_prune(model, **SETTING)
    model.blocks[2].attn.fused_attn = False
    with pytest.raises(MissedCall, match="made no call"):
        model(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0.0, expected a positive number"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"keep": (0.8, 0.0)}, "keep: 0.0, expected 0 < keep <= 1 after layer 2"),
        ({"keep": (0.5,)}, "keep: 1 values for 2 layers"),
        ({"keep": 0.02}, "keep: 0.02 after layer 1 leaves none of 16 patches"),
        ({"iters": 0}, "iters: 0, expected a whole number, 1 or more"),
        ({"layers": (2, 4)}, r"layers: \[2, 4\], expected 1 to 3 of 3"),
    ],
)
def test_bad_settings_are_errors_before_anything_runs(changes, message):
    model, x = build("vit"), images("vit")
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        soft_prune(model, **{**SETTING, **changes})
    assert torch.equal(model(x), expected)


def test_what_cannot_be_masked_is_an_error():
    with pytest.raises(ValueError, match="cls_boost: the model has no"):
        soft_prune(build("siglip"), **SETTING)
    for family, boost in (("siglip", False), ("vit-avg", True), ("vit-map", True)):
        with pytest.raises(ValueError, match="reads image tokens, of which soft pruning drops"):
            soft_prune(build(family), **SETTING, cls_boost=boost)
    with pytest.raises(ValueError, match="turns or biases attention"):
        soft_prune(build("rope"), **SETTING)
    with pytest.raises(ValueError, match="model: its path is 'concat'"):
        soft_prune(pcx.VPT(build("vit"), 2, path="concat"), **SETTING)
    for keep in (0, 9):
        with pytest.raises(ValueError, match=f"keep: {keep} of 8 patches"):
            log_soft_mask(rand(1, 9), keep, 0.1, protected=1)
    with pytest.raises(ValueError, match="temperature: -1"):
        log_soft_mask(rand(1, 9), 3, -1, protected=1)
    with pytest.raises(RuntimeError, match="masks, tokens: no batch"):
        _ = soft_prune(build("vit"), **SETTING).masks


def test_it_takes_the_place_of_another_pruning():
    model, x = build("vit"), images("vit")
    whole = model(x)
    pcx.zero_tprune(model, layers=(3,), keep=0.5, iters=1)
    soft = soft_prune(model, **SETTING)
    fresh = build("vit")
    soft_prune(fresh, **SETTING)
    assert torch.equal(model(x), fresh(x))
    soft.remove()
    assert torch.equal(model(x), whole)


def test_what_a_vpt_computes_comes_back():
    """The last layer of a VPT computes the head's tokens alone, whatever stood in meanwhile."""
    model = pcx.VPT(build("vit"), 2, head_init="keep").eval()
    soft = soft_prune(model, **SETTING)
    with pytest.raises(ValueError, match=r"expected 1 to 2 of 3"):
        pcx.zero_tprune(model, layers=(3,), keep=0.5, iters=1)
    again = soft_prune(model, **SETTING)
    soft.remove()  # which is not what is set up now
    assert model.layers[-1].read_tokens is None
    again.remove()
    assert model.layers[-1].read_tokens == 1


def test_nothing_is_held_on_to_once_removed():
    model, x = build("vit"), images("vit")
    soft = soft_prune(model, **SETTING)
    model(x)
    assert soft.tokens.grad_fn is not None
    soft.remove()
    with pytest.raises(RuntimeError, match="no batch has gone"):
        _ = soft.tokens


def test_blocks_that_are_computed_again_by_timm():
    x, found = images("vit"), []
    for checkpointing in (False, True):
        model = build("vit").train()
        soft = soft_prune(model, **SETTING)
        model.set_grad_checkpointing(checkpointing)
        loss = model(x).square().sum() + soft.masks[-1].square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
